"""The training step and the validation step: pure functions, compiled once per patch and batch size.

augment -> network -> loss -> gradient -> optimizer is one program, so nothing but patches crosses to the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from pgps_jax.architecture import Size
from pgps_jax.data.labels import Labels
from pgps_jax.data.pipeline import PatchBatch
from pgps_jax.train.accumulate import accumulated_value_and_grad, forward_in_chunks
from pgps_jax.train.augment import AugmentPolicy, augment
from pgps_jax.train.losses import hard_counts, segmentation_loss
from pgps_jax.train.state import TrainState


class StepMetrics(NamedTuple):
    """What a training step tells: loss and global gradient norm before clipping, both float32 scalars."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


class ValidationCounts(NamedTuple):
    """Hard true positives, false positives and false negatives per foreground class over a batch, and its loss."""

    tp: Float[Array, " k"]
    fp: Float[Array, " k"]
    fn: Float[Array, " k"]
    loss: Float[Array, ""]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    labels: Labels,
    batch_dice: bool,
    policy: AugmentPolicy,
    patch_size: Size,
    seed: int,
    parts: int = 1,
) -> Callable[[TrainState, PatchBatch, Float[Array, ""]], tuple[TrainState, StepMetrics]]:
    """Training step for one patch size.

    The random key is `fold_in(key(seed), step)`: a step gives the same numbers whenever and wherever it is run.
    The learning rate is an argument, not part of the program, so that one program serves the whole stage. With `parts`
    the batch goes through the network part by part, for less memory and with the same numbers but for rounding.
    """

    def forward(params: PyTree, image: Float[Array, "b d h w c"]) -> tuple[Float[Array, "b ..."], ...]:
        return nnx.merge(graphdef, params)(image)

    def train_step(state: TrainState, batch: PatchBatch, learning_rate: Float[Array, ""]) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        image, label = augment(key, batch.image, batch.label, policy, patch_size)

        def objective(logits: tuple[Float[Array, "b ..."], ...]) -> Float[Array, ""]:
            return segmentation_loss(logits, label, labels, batch_dice)

        loss, gradients = accumulated_value_and_grad(forward, objective, state.params, image, parts)
        directions, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - learning_rate * d, state.params, directions)
        return TrainState(state.step + 1, params, opt_state), StepMetrics(loss, optax.global_norm(gradients))

    return train_step


def make_validation_step(
    graphdef: nnx.GraphDef, labels: Labels, batch_dice: bool, parts: int = 1
) -> Callable[[PyTree, PatchBatch], ValidationCounts]:
    """Loss and hard counts of one batch of unaugmented patches, for the pseudo-Dice (nnU-Net's online evaluation).

    `parts` as for `make_train_step`.
    """

    def validation_step(params: PyTree, batch: PatchBatch) -> ValidationCounts:
        image = batch.image.astype(jnp.float32)
        label: Int[Array, "b d h w"] = jnp.maximum(batch.label.astype(jnp.int32), 0)
        logits = forward_in_chunks(lambda p, x: nnx.merge(graphdef, p)(x), params, image, parts)
        tp, fp, fn = hard_counts(logits[0], label, labels)
        return ValidationCounts(tp, fp, fn, segmentation_loss(logits, label, labels, batch_dice))

    return validation_step
