"""From a trained network to segmentations of whole volumes."""
