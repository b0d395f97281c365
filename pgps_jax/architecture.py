"""What a plan says about a network, and what a network says about the patches that it can take."""

from dataclasses import dataclass, field
from typing import NamedTuple

Size = tuple[int, int, int]


class PatchLimits(NamedTuple):
    """Smallest patch that a network can take and the step by which each axis may grow, in voxels (d, h, w)."""

    smallest: Size
    increment: Size


@dataclass(frozen=True)
class Architecture:
    """A convolutional encoder-decoder as planned by nnU-Net (its plans.json, `architecture`); always 3D.

    A 2D configuration is a 3D one whose first axis has patch, kernel and stride 1. All per-stage fields run from full
    resolution to the bottleneck; `strides[0]` is (1, 1, 1).
    """

    backbone: str  # key of models.BACKBONES: "plain-unet", "resenc-unet", "unetr", "swin-unetr"
    features_per_stage: tuple[int, ...] = ()
    kernel_sizes: tuple[Size, ...] = ()
    strides: tuple[Size, ...] = ()
    blocks_per_stage: tuple[int, ...] = ()  # convolutions per encoder stage (plain) or residual blocks (resenc)
    convs_per_stage_decoder: tuple[int, ...] = ()
    options: dict[str, int | float | str | bool | tuple[int, ...]] = field(default_factory=dict)  # transformers

    @property
    def first_features(self) -> int:
        """Channels at full resolution."""
        return self.features_per_stage[0] if self.features_per_stage else int(self.options.get("feature_size", 24))  # SwinUNETR's default

    def __hash__(self):
        return hash((self.backbone, self.features_per_stage, self.kernel_sizes, self.strides, self.blocks_per_stage,
                     self.convs_per_stage_decoder, tuple(sorted(self.options.items()))))
