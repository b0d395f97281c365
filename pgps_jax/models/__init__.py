"""Networks as flax.nnx modules; they know nothing of training.

A new backbone is one file and one line in BACKBONES.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from pgps_jax.architecture import Architecture, PatchLimits
from pgps_jax.errors import InputError
from pgps_jax.models.resenc import build_resenc_unet
from pgps_jax.models.swin_unetr import build_swin_unetr, swin_unetr_limits
from pgps_jax.models.unet import build_plain_unet, unet_limits, unet_lowest_head
from pgps_jax.models.unetr import build_unetr, unetr_limits


class Backbone(NamedTuple):
    """How to build a network, and what the curriculum and the optimizer must know of it."""

    build: Callable[..., nnx.Module]  # (architecture, in_channels, out_channels, *, dtype, remat, rngs)
    limits: Callable[[Architecture], PatchLimits]
    lowest_head: Callable[[Architecture], tuple[str | int, ...] | None] = lambda architecture: None


BACKBONES: dict[str, Backbone] = {
    "plain-unet": Backbone(build_plain_unet, unet_limits, unet_lowest_head),
    "resenc-unet": Backbone(build_resenc_unet, unet_limits, unet_lowest_head),
    "unetr": Backbone(build_unetr, unetr_limits),
    "swin-unetr": Backbone(build_swin_unetr, swin_unetr_limits),
}


def build(
    architecture: Architecture, in_channels: int, out_channels: int, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
) -> nnx.Module:
    """Freshly initialised network: `net(x, deep_supervision=True)` maps (b, d, h, w, in_channels) to a tuple of logits.

    Parameters are float32 whatever `dtype`, in which convolutions compute. The first logits have the full resolution;
    with `deep_supervision=False` they are the only ones. With `remat` the backward pass keeps the borders of stages or blocks
    and computes what is between them again: less memory, about a third more time, the same numbers.
    """
    return _backbone(architecture).build(architecture, in_channels, out_channels, dtype=dtype, remat=remat, rngs=rngs)


def limits(architecture: Architecture) -> PatchLimits:
    """Smallest patch and increment per axis that the network can take."""
    return _backbone(architecture).limits(architecture)


def lowest_head(architecture: Architecture) -> tuple[str | int, ...] | None:
    """Path of the parameters of the head whose deep-supervision weight is zero, or None: the optimizer freezes it."""
    return _backbone(architecture).lowest_head(architecture)


def _backbone(architecture: Architecture) -> Backbone:
    if architecture.backbone not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise InputError(f"Unknown network backbone '{architecture.backbone}'; choose one of: {known}.")
    return BACKBONES[architecture.backbone]
