"""Segmentation metrics, summaries and postprocessing."""
