"""Host side: from NIfTI files to batches of patches. NumPy only, except pipeline.py."""
