"""Progressive Growing of Patch Size (PGPS) for 3D medical image segmentation, in JAX."""

__version__ = "0.1.0"
