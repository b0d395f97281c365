"""The optimiser: SGD with Nesterov momentum as PyTorch computes it, and the learning rate of every step as an array."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, PyTree

from pgps_jax.errors import InputError


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning rate; the defaults are nnU-Net's."""

    learning_rate: float = 0.01
    """Learning rate of the first epoch."""
    poly_exponent: float = 0.9
    """Decay over the run: learning_rate * (1 - epoch / epochs) ** poly_exponent, constant within an epoch; with steps in place of
    epochs in runs that max_hours limits."""
    momentum: float = 0.99
    """Nesterov momentum."""
    weight_decay: float = 3e-5
    """L2 penalty on all weights, biases and norm parameters."""
    clip_norm: float = 12.0
    """Largest global norm of the gradient; a longer one is scaled down to it."""
    batch_rule: Literal["none", "sqrt", "linear"] = "none"
    """How the learning rate follows the batch size of a stage relative to the planned one. none: not at all (papers). sqrt, linear:
    times the root of the ratio, times the ratio."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly when a stage is entered for the first time; fewer than a stage has."""

    def check(self) -> None:
        """Raise InputError if a value is out of its range."""
        for name in ("learning_rate", "poly_exponent", "momentum", "weight_decay", "clip_norm", "warmup_steps"):
            value, above = getattr(self, name), name in ("learning_rate", "clip_norm")
            if not (math.isfinite(value) and (value > 0 or (value == 0 and not above))):
                raise InputError(f"--optim.{name.replace('_', '-')} {value}: must be {'above' if above else 'at least'} 0, and finite")
        if self.momentum >= 1:
            raise InputError(f"--optim.momentum {self.momentum}: must be below 1; nnU-Net's is 0.99")


def clip_by_torch_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)): PyTorch's rule (optax's own has no 1e-6)."""

    def clip(gradients: PyTree, _params: PyTree) -> PyTree:
        scale = jnp.minimum(1.0, max_norm / (optax.global_norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: g * scale, gradients)

    return optax.stateless(clip)


def outside(head: Sequence[str | int]) -> Callable[[PyTree], PyTree]:
    """Function from parameters to a tree of bools: True for every parameter whose path does not begin with `head`."""
    head = tuple(map(str, head))

    def select(params: PyTree) -> PyTree:
        def keys(path: tuple) -> tuple[str, ...]:
            return tuple(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path[: len(head)])

        return jax.tree_util.tree_map_with_path(lambda path, _: keys(path) != head, params)

    return select


def make_optimizer(config: OptimConfig, frozen: Sequence[str | int] | None = None) -> optax.GradientTransformation:
    """Clip, weight decay, Nesterov momentum; the step multiplies the result by the learning rate and subtracts it.

    g <- g * min(1, clip / (|g| + 1e-6));  g <- g + decay * w;  b <- momentum * b + g (b starts as g);
    direction = g + momentum * b. The learning rate stays outside, so that one compiled program serves a whole stage.

    Args:
        frozen: path of the deep-supervision head whose loss has weight zero (`models.lowest_head`), or None. PyTorch
            never touches a parameter without gradient; here the gradient is 0, and without decay it stays as it is.
    """
    return optax.chain(
        clip_by_torch_norm(config.clip_norm),
        optax.add_decayed_weights(config.weight_decay, mask=None if frozen is None else outside(frozen)),
        optax.trace(config.momentum, nesterov=True),
    )


def learning_rate_of_step(
    config: OptimConfig,
    num_steps: int,
    steps_per_epoch: int,
    batch_size_of_step: Int[np.ndarray, " steps"] | None = None,
    planned_batch_size: int | None = None,
    stage_of_step: Int[np.ndarray, " steps"] | None = None,
) -> Float[np.ndarray, " steps"]:
    """Learning rate of every step, float32: poly decay per epoch, times the rules for large batches and new stages.

    Args:
        steps_per_epoch: steps with the same rate; with 1 it falls at every step, to almost nothing at the last.
        batch_size_of_step, planned_batch_size: needed by `batch_rule` sqrt and linear.
        stage_of_step: needed by `warmup_steps`.
    """
    step = np.arange(num_steps)
    num_epochs = -(-num_steps // steps_per_epoch)
    rate = config.learning_rate * (1 - (step // steps_per_epoch) / num_epochs) ** config.poly_exponent
    if config.batch_rule != "none":
        if batch_size_of_step is None or planned_batch_size is None:
            raise ValueError(f"batch_rule {config.batch_rule!r} needs batch_size_of_step and planned_batch_size")
        ratio = np.asarray(batch_size_of_step) / planned_batch_size
        rate = rate * (np.sqrt(ratio) if config.batch_rule == "sqrt" else ratio)
    if config.warmup_steps > 0:
        if stage_of_step is None:
            raise ValueError("warmup_steps needs stage_of_step")
        _, first, inverse = np.unique(stage_of_step, return_index=True, return_inverse=True)
        rate = rate * np.minimum(1.0, (step - first[inverse] + 1) / config.warmup_steps)
    return rate.astype(np.float32)
