"""The network in a configuration of plans.json: as nnU-Net writes it now, as 2.0 to 2.3 wrote it, and written back."""

import math

from pgps_jax.architecture import Architecture, Size
from pgps_jax.data.plan_values import LONGEST_EDGE, MOST_BLOCKS, MOST_FEATURES, MOST_STAGES, each, text, three, within
from pgps_jax.errors import brief

_NETWORKS = {"PlainConvUNet": "plain-unet", "ResidualEncoderUNet": "resenc-unet"}  # class name -> backbone
_NETWORK_PATH = "dynamic_network_architectures.architectures.unet."
LEGACY_NETWORK = (
    "UNet_class_name", "UNet_base_num_features", "unet_max_num_features", "n_conv_per_stage_encoder",
    "n_conv_per_stage_decoder", "num_pool_per_axis", "pool_op_kernel_sizes", "conv_kernel_sizes",
)  # fmt: skip
_CHECKED_ELSEWHERE = (
    "n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage", "conv_op",
    "n_conv_per_stage_decoder", "norm_op_kwargs", "nonlin_kwargs", "dropout_op_kwargs", "deep_supervision",
)  # fmt: skip


def _fixed_options(is_2d: bool) -> dict:
    """The settings of nnU-Net's networks that its planner never varies, and the only ones that are built here."""
    n = 2 if is_2d else 3
    return {
        "conv_op": f"torch.nn.modules.conv.Conv{n}d",
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{n}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def architecture_to_json(architecture: Architecture, is_2d: bool) -> dict:
    """nnU-Net's `architecture` entry; for networks that nnU-Net does not have, the backbone's name and its options."""
    axes = slice(1, None) if is_2d else slice(None)
    classes = {backbone: name for name, backbone in _NETWORKS.items()}
    if architecture.backbone not in classes:
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in architecture.options.items()}
        return {"network_class_name": architecture.backbone, "arch_kwargs": options, "_kw_requires_import": []}
    blocks = "n_blocks_per_stage" if architecture.backbone == "resenc-unet" else "n_conv_per_stage"
    fixed = _fixed_options(is_2d)
    return {
        "network_class_name": _NETWORK_PATH + classes[architecture.backbone],
        "arch_kwargs": {
            "n_stages": len(architecture.features_per_stage),
            "features_per_stage": list(architecture.features_per_stage),
            "conv_op": fixed.pop("conv_op"),
            "kernel_sizes": [list(kernel[axes]) for kernel in architecture.kernel_sizes],
            "strides": [list(stride[axes]) for stride in architecture.strides],
            blocks: list(architecture.blocks_per_stage),
            "n_conv_per_stage_decoder": list(architecture.convs_per_stage_decoder),
            **fixed,
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def architecture_from_json(entry: dict) -> Architecture:
    """The network of a configuration's entry. Raises KeyError, TypeError, ValueError for what is no such entry."""
    if "architecture" not in entry:
        return _legacy_architecture(entry)
    class_name, kwargs = entry["architecture"]["network_class_name"], entry["architecture"]["arch_kwargs"]
    backbone = _NETWORKS.get(class_name.rsplit(".", 1)[-1])
    if backbone is None:
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in kwargs.items()}
        plain = {key: v for key, v in options.items() if isinstance(v, int | float | str) or _is_ints(v)}
        return Architecture(text(class_name), options=plain)
    odd = _odd_options(kwargs, len(entry["patch_size"]) == 2)
    strides = kwargs["strides"]
    stages = within("n_stages", int(kwargs.get("n_stages", len(strides))), 1, MOST_STAGES)
    blocks = kwargs["n_blocks_per_stage" if backbone == "resenc-unet" else "n_conv_per_stage"]
    return Architecture(
        # a network that is not built here still lets the plan be read; building it says which setting is in the way
        backbone + (f" with {odd}" if odd else ""),
        each("features_per_stage", _per_stage(kwargs["features_per_stage"], stages), 1, MOST_FEATURES),
        _sizes("kernel_sizes", [three(_axes(k, entry), 1, int) for k in kwargs["kernel_sizes"]], stages),
        _sizes("strides", [three(_axes(k, entry), 1, int) for k in strides], stages),
        each("blocks per stage", _per_stage(blocks, stages), 1, MOST_BLOCKS),
        each("n_conv_per_stage_decoder", _per_stage(kwargs["n_conv_per_stage_decoder"], stages - 1), 1, MOST_BLOCKS),
    )


def _legacy_architecture(entry: dict) -> Architecture:
    """The network of plans written by nnU-Net 2.0 to 2.3."""
    class_name = entry["UNet_class_name"]
    strides = [three(_axes(k, entry), 1, int) for k in entry["pool_op_kernel_sizes"]]
    kernels = [three(_axes(k, entry), 1, int) for k in entry["conv_kernel_sizes"]]
    strides = [(1, 1, 1)] * (len(kernels) - len(strides)) + strides
    base, largest = entry["UNet_base_num_features"], entry["unet_max_num_features"]
    stages = within("number of stages", len(strides), 1, MOST_STAGES)
    return Architecture(
        _NETWORKS.get(class_name, class_name),
        each("features", tuple(int(min(base * 2**i, largest)) for i in range(stages)), 1, MOST_FEATURES),
        _sizes("conv_kernel_sizes", kernels, stages),
        _sizes("pool_op_kernel_sizes", strides, stages),
        each("n_conv_per_stage_encoder", _per_stage(entry["n_conv_per_stage_encoder"], stages), 1, MOST_BLOCKS),
        each("n_conv_per_stage_decoder", _per_stage(entry["n_conv_per_stage_decoder"], stages - 1), 1, MOST_BLOCKS),
    )


def _is_ints(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, int) for v in value)


def _axes(value: int | list, entry: dict) -> list:
    return [value] * len(entry["patch_size"]) if isinstance(value, int) else value


def _per_stage(value: int | list, stages: int) -> tuple[int, ...]:
    numbers = (value,) * stages if isinstance(value, int) else tuple(int(v) for v in value)
    if len(numbers) != stages:
        raise ValueError(f"{brief(list(numbers))}: want {stages} numbers, one per stage")
    return numbers


def _sizes(name: str, sizes: list[Size], stages: int) -> tuple[Size, ...]:
    """Kernel sizes or strides of all stages."""
    if len(sizes) != stages:
        raise ValueError(f"{name}: {len(sizes)} of them for {stages} stages")
    return tuple(each(name, size, 1, LONGEST_EDGE) for size in sizes)


def _odd_options(kwargs: dict, is_2d: bool) -> str:
    """Settings of a network that differ from those that are built here, as text; empty if there are none."""
    fixed = _fixed_options(is_2d)
    found = []
    for key, value in kwargs.items():
        if key in _CHECKED_ELSEWHERE:
            continue
        want = fixed.get(key)
        same = value == want or (isinstance(want, str) and str(value).rsplit(".", 1)[-1] == want.rsplit(".", 1)[-1])
        if not same and (key in fixed or value):
            found.append(f"{key} {value}")
    norm, slope = kwargs.get("norm_op_kwargs") or {}, (kwargs.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    if not math.isclose(norm.get("eps", 1e-5), 1e-5) or not norm.get("affine", True):
        found.append(f"norm_op_kwargs {norm}")
    if slope != 0.01:
        found.append(f"negative_slope {slope}")
    return ", ".join(found)
