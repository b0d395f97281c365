"""Gradients of a batch that does not fit the device at once, computed chunk by chunk with the numbers of the whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def accumulated_value_and_grad(
    forward: Callable[[PyTree, Float[Array, "b d h w c"]], PyTree],
    loss: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    images: Float[Array, "b d h w c"],
    chunks: int,
) -> tuple[Float[Array, ""], PyTree]:
    """`jax.value_and_grad(lambda p: loss(forward(p, images)))(params)` with the activations of one chunk at a time.

    Averaging the gradients of chunks would be wrong for losses that do not split over the batch (Dice over the whole
    batch, means over the voxels without ignored ones). So the chunks' logits are computed first, keeping nothing else;
    the loss of all of them gives each chunk's share of the gradient, which a second pass takes back to the parameters.
    That is right for every loss, and costs one forward pass more. The chunks are unrolled: XLA's fast convolutions on
    CPU are not found inside loops. On CPU XLA ignores the barriers below, so there it saves little memory. A chunk takes
    every `chunks`-th patch, so that devices which share a batch share each chunk as well.

    Args:
        forward: network; leaves of its result have the batch first.
        loss: function of the results for the whole batch.
        chunks: must divide the batch.

    Raises ValueError if it does not.
    """
    if len(images) % chunks:
        raise ValueError(f"a batch of {len(images)} cannot be cut into {chunks} equal chunks")
    if chunks == 1:
        return jax.value_and_grad(lambda p: loss(forward(p, images)))(params)
    value, cotangents = jax.value_and_grad(loss)(forward_in_chunks(forward, params, images, chunks))

    total = jax.tree.map(jnp.zeros_like, params)
    for i, part in enumerate(_interleaved(images, chunks)):
        # without the barrier XLA would notice that it has been here before, and keep the activations after all
        part, cotangents, total = jax.lax.optimization_barrier((part, cotangents, total))
        mine = jax.tree.map(lambda leaf, i=i: _interleaved(leaf, chunks)[i], cotangents)
        _, pull_back = jax.vjp(lambda p, part=part: forward(p, part), params)
        total = jax.tree.map(jnp.add, total, pull_back(mine)[0])
    return value, total


def forward_in_chunks(
    forward: Callable[[PyTree, Float[Array, "b d h w c"]], PyTree], params: PyTree, images: Float[Array, "b d h w c"], chunks: int
) -> PyTree:
    """`forward(params, images)` with the activations of one chunk at a time; arguments as above."""
    results: list[PyTree] = []
    for part in _interleaved(images, chunks):
        if results:  # one chunk after the other: the barrier makes this one depend on the last one's result
            part, results[-1] = jax.lax.optimization_barrier((part, results[-1]))
        results.append(forward(params, part))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(len(images), *leaves[0].shape[1:]), *results)


def _interleaved(leaf: Array, chunks: int) -> list[Array]:
    """Chunk i holds the patches i, i + chunks, i + 2 chunks, ... of a batch."""
    rows = leaf.reshape(len(leaf) // chunks, chunks, *leaf.shape[1:])
    return [rows[:, i] for i in range(chunks)]
