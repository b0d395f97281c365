"""Networks as flax.nnx modules; they know nothing of training."""
