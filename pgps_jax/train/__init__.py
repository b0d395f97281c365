"""Loss, augmentation, optimiser and the training loop."""
