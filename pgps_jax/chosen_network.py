"""The network that a run asks for in place of the planned one, and the patch nearest to the planned one that it can take."""

import dataclasses
from collections.abc import Callable

from pgps_jax.architecture import Architecture, Size
from pgps_jax.config import NetworkConfig
from pgps_jax.data.plan import Configuration
from pgps_jax.data.planner import plan_blocks
from pgps_jax.errors import InputError
from pgps_jax.models import limits
from pgps_jax.models.swin_unetr import SwinUnetrOptions
from pgps_jax.models.unetr import UnetrOptions

UNETS = ("plain-unet", "resenc-unet")


def with_network(configuration: Configuration, network: NetworkConfig, say: Callable[[str], None]) -> Configuration:
    """A configuration of the plan with the network that was asked for; `say` is told when the patch had to change.

    U-Nets keep the planned stages, kernels and strides. UNETR and SwinUNETR take their options from `network` and learn positions for
    the largest patch. Every network gets the nearest patch that it can take. Batch size stays as planned.

    Raises InputError for flags that do not go with the network, and for a planar configuration with a network that has none.
    """
    backbone = network.backbone or configuration.architecture.backbone
    _check_options(backbone, network)
    if backbone in UNETS:
        if network.base_features is not None or network.max_features is not None or backbone != configuration.architecture.backbone:
            configuration = dataclasses.replace(configuration, architecture=_unet(configuration.architecture, backbone, network))
        return _fitting(configuration, configuration.architecture, say)
    if network.backbone is None:  # a plan of our own names it, options and all
        return configuration
    if configuration.is_2d:
        raise InputError(f"--network.backbone {backbone}: configuration {configuration.name} is planar and this network is not; use a 3D "
                         "configuration, or plain-unet or resenc-unet")
    options = {name: value for name, value in dataclasses.asdict(_options(network)).items() if value is not None}
    configuration = _fitting(configuration, Architecture(backbone, options=options), say)
    if backbone == "unetr":
        options.setdefault("table_size", configuration.patch_size)
    return dataclasses.replace(configuration, architecture=Architecture(backbone, options=options))


def _fitting(configuration: Configuration, architecture: Architecture, say: Callable[[str], None]) -> Configuration:
    """The configuration with the nearest patch that a network can take."""
    patch = nearest_patch(configuration.patch_size, architecture)
    if patch == configuration.patch_size:
        return configuration
    say(f"patch {_text(configuration.patch_size)} was planned and became {_text(patch)}, the nearest that {architecture.backbone} can take")
    return dataclasses.replace(configuration, patch_size=patch)


def nearest_patch(patch_size: Size, architecture: Architecture) -> Size:
    """Per axis the nearest size that the network can take; the smaller one of two that are equally near."""
    smallest, increment = limits(architecture)
    d, h, w = (low + max(0, (size - low + (step - 1) // 2) // step) * step
               for size, low, step in zip(patch_size, smallest, increment, strict=True))
    return d, h, w


def _unet(planned: Architecture, backbone: str, network: NetworkConfig) -> Architecture:
    if planned.backbone not in UNETS:
        raise InputError(f"--network.backbone {backbone}: the plan is for {planned.backbone} and has no stages for a U-Net; plan again")
    if backbone != planned.backbone:
        stages = len(planned.features_per_stage)
        planned = dataclasses.replace(
            planned, backbone=backbone, blocks_per_stage=plan_blocks(stages, backbone),
            convs_per_stage_decoder=(2 if backbone == "plain-unet" else 1,) * (stages - 1))
    base = planned.features_per_stage[0] if network.base_features is None else network.base_features
    largest = max(planned.features_per_stage) if network.max_features is None else network.max_features
    if base < 1 or largest < base:
        raise InputError(f"--network.base-features {base} and --network.max-features {largest}: want 1 <= base <= max")
    if network.base_features is None and network.max_features is None:
        return planned
    features = tuple(min(base * 2**i, largest) for i in range(len(planned.features_per_stage)))
    return dataclasses.replace(planned, features_per_stage=features)


def _options(network: NetworkConfig) -> UnetrOptions | SwinUnetrOptions:
    return network.unetr if network.backbone == "unetr" else network.swin_unetr


def _check_options(backbone: str, network: NetworkConfig) -> None:
    """Refuse flags of another network than the one that is built."""
    for name, options, default in (("unetr", network.unetr, UnetrOptions()), ("swin-unetr", network.swin_unetr, SwinUnetrOptions())):
        if options != default and network.backbone != name:
            changed = [f.name for f in dataclasses.fields(options) if getattr(options, f.name) != getattr(default, f.name)]
            flags = ", ".join(f"--network.{name}.{field.replace('_', '-')}" for field in changed)
            raise InputError(f"{flags}: goes with --network.backbone {name}; the network is {backbone}")
    if backbone in ("unetr", "swin-unetr") and (network.base_features is not None or network.max_features is not None):
        raise InputError(f"--network.base-features and --network.max-features are for U-Nets; use --network.{backbone}.feature-size")


def _text(patch: Size) -> str:
    return "x".join(map(str, patch))
