"""Reading and writing what nnU-Net and MONAI write, without torch."""
