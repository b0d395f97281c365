"""The plan of a dataset: nnU-Net's plans.json as typed values, read in all its generations and written back.

A plan keeps the JSON that it was read from. What was not changed is written back as it stood, unknown keys included.
"""

import copy
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pgps_jax.architecture import Architecture, Size
from pgps_jax.errors import InputError

Spacing = tuple[float, float, float]

_NETWORKS = {"PlainConvUNet": "plain-unet", "ResidualEncoderUNet": "resenc-unet"}  # class name -> backbone
_NETWORK_PATH = "dynamic_network_architectures.architectures.unet."


@dataclass(frozen=True)
class Configuration:
    """One way to train on a dataset: 2d, 3d_lowres, 3d_fullres, ... Axes are the plan's (after transpose_forward).

    Always three axes: in a 2D configuration the first has patch, median shape, kernels and strides 1, and its spacing
    is the dataset's median, to which nothing is resampled.
    """

    name: str
    data_identifier: str  # folder of its preprocessed cases
    batch_size: int
    patch_size: Size
    spacing: Spacing  # mm
    median_shape: tuple[float, float, float]  # voxels at that spacing
    normalization_schemes: tuple[str, ...]  # nnU-Net class names, one per channel
    use_mask_for_norm: tuple[bool, ...]
    batch_dice: bool
    architecture: Architecture
    is_2d: bool = False
    previous_stage: str | None = None  # of a cascade
    entry: dict = field(default_factory=dict, repr=False, compare=False)  # of plans.json as read, inheritance resolved
    own_keys: tuple[str, ...] = field(default=(), repr=False, compare=False)  # of the entry itself, not inherited

    def to_json(self) -> dict:
        """The entry of plans.json as read, except for fields that differ from it; nothing is left to inheritance."""
        now = _fields_to_json(self)
        if not self.entry:
            return {**now, **_preprocessing()}
        was = _fields_to_json(configuration_from_json(self.name, self.entry, self.spacing[0]))
        now = {key: value for key, value in now.items() if value != was.get(key)}
        kept = copy.deepcopy(self.entry)
        if "architecture" in now:
            kept = {key: value for key, value in kept.items() if key not in _LEGACY_NETWORK}
        return {**kept, **now}


@dataclass(frozen=True)
class Plan:
    """Everything decided about a dataset before training."""

    dataset_name: str
    plans_name: str
    transpose_forward: tuple[int, int, int]  # file's array axes -> the network's
    transpose_backward: tuple[int, int, int]
    intensity_properties: dict[str, dict[str, float]]  # of the fingerprint, key = channel number as text
    configurations: dict[str, Configuration]
    original_median_spacing: Spacing | None = None  # mm, after transpose
    original_median_shape: tuple[float, float, float] | None = None  # voxels after cropping, before resampling, after transpose
    experiment_planner: str = "ExperimentPlanner"
    image_reader_writer: str = "SimpleITKIO"
    notes: tuple[str, ...] = field(default=(), compare=False)  # what overrides changed, in words; not written
    source: dict = field(default_factory=dict, repr=False, compare=False)  # plans.json as read, without configurations

    @staticmethod
    def from_json(content: dict) -> "Plan":
        """Read nnU-Net's plans.json: current, 2.0 to 2.3 (legacy networks), with inheritance, edited by hand.

        Raises:
            InputError: a missing or odd key, an unknown parent, inheritance in a circle.
        """
        try:
            entries = content["configurations"]
            forward = tuple(content["transpose_forward"])
            median = content.get("original_median_spacing_after_transp") or [1.0, 1.0, 1.0]
            if sorted(forward) != [0, 1, 2]:
                raise InputError(f"plans: transpose_forward {list(forward)} is not an order of the axes 0, 1, 2")
            return Plan(
                dataset_name=content["dataset_name"],
                plans_name=content["plans_name"],
                transpose_forward=forward,
                transpose_backward=tuple(int(axis) for axis in np.argsort(forward)),
                intensity_properties=content.get("foreground_intensity_properties_per_channel")
                or content.get("foreground_intensity_properties_by_modality") or {},
                configurations={name: _inherited(name, entries, float(median[0])) for name in entries},
                original_median_spacing=tuple(float(s) for s in median),
                original_median_shape=tuple(float(n) for n in content.get("original_median_shape_after_transp") or ()) or None,
                experiment_planner=content.get("experiment_planner_used", ""),
                image_reader_writer=content.get("image_reader_writer", ""),
                source={key: value for key, value in content.items() if key != "configurations"},
            )
        except KeyError as key:
            raise InputError(f"plans: the key {key} is missing") from None
        except (TypeError, AttributeError, IndexError) as error:
            raise InputError(f"plans: a value has an unexpected form ({error})") from None

    def to_json(self) -> dict:
        """Content of nnU-Net's plans.json."""
        known = {
            "dataset_name": self.dataset_name,
            "plans_name": self.plans_name,
            "original_median_spacing_after_transp": _list(self.original_median_spacing),
            "original_median_shape_after_transp": _list(self.original_median_shape),
            "image_reader_writer": self.image_reader_writer,
            "transpose_forward": list(self.transpose_forward),
            "transpose_backward": list(self.transpose_backward),
            "configurations": {},  # filled below
            "experiment_planner_used": self.experiment_planner,
            "label_manager": self.source.get("label_manager", "LabelManager"),
            "foreground_intensity_properties_per_channel": self.intensity_properties,
        }
        if self.source:  # what the file did not have stays absent, and equal numbers as they were written
            known = {k: self.source[k] if self.source.get(k) == v else v for k, v in known.items() if k in self.source}
        known["configurations"] = {}
        whole = {name: configuration.to_json() for name, configuration in self.configurations.items()}
        for name, entry in whole.items():
            parent = entry.get("inherits_from")
            if parent and parent not in whole:
                del entry["inherits_from"]
            elif parent:  # what equals the parent's is left out again
                own = self.configurations[name].own_keys
                entry = {k: v for k, v in entry.items() if k in own or k not in whole[parent] or v != whole[parent][k]}
            known["configurations"][name] = entry
        return {**copy.deepcopy(self.source), **known}


def read_plan(path: Path) -> Plan:
    """Read a plans.json; InputError naming the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise InputError(f"expected a JSON object, found a {type(content).__name__}")
        return Plan.from_json(content)
    except FileNotFoundError:
        raise InputError(f"{path}: this file is missing; plan the dataset first") from None
    except (OSError, ValueError, RecursionError) as error:  # InputError is a ValueError
        raise InputError(f"{path}: cannot be used as a plan ({error})") from None


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plans.json atomically.

    Configurations that only the file there knows, added by hand under names of their own, are kept.
    """
    content = plan.to_json()
    if path.exists():
        try:
            present = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        except (OSError, ValueError, KeyError, TypeError):
            present = {}
        own = {name: entry for name, entry in present.items() if name not in PLANNED_NAMES}
        content["configurations"] = {**own, **content["configurations"]}
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=4, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


PLANNED_NAMES = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")


# --------------------------------------------------------------------------------------------- configurations from JSON


def resolve(name: str, entries: dict[str, dict], below: tuple[str, ...] = ()) -> dict:
    """A configuration's entry with what it inherits filled in: a child's key replaces its parent's, whole.

    Raises:
        InputError: unknown parent, circle.
    """
    if name in below:
        raise InputError(f"plans: configurations inherit in a circle: {' -> '.join((*below, name))}")
    if name not in entries:
        raise InputError(f"plans: configuration {below[-1]!r} inherits from {name!r}, which does not exist")
    entry = entries[name]
    parent = entry.get("inherits_from")
    return {**resolve(parent, entries, (*below, name)), **entry} if parent else dict(entry)


def _inherited(name: str, entries: dict[str, dict], slice_spacing: float) -> Configuration:
    entry = resolve(name, entries)
    return replace(configuration_from_json(name, entry, slice_spacing), entry=entry, own_keys=tuple(entries[name]))


def configuration_from_json(name: str, entry: dict, slice_spacing: float = 1.0) -> Configuration:
    """Configuration of an entry of plans.json, inherited keys included; `slice_spacing` (mm) is for 2D's first axis."""
    try:
        patch = entry["patch_size"]
        is_2d = len(patch) == 2
        median = entry.get("median_image_size_in_voxels") or patch
        schemes = tuple(entry["normalization_schemes"])
        return Configuration(
            name=name,
            data_identifier=_folder_name(entry["data_identifier"]),
            batch_size=int(entry["batch_size"]),
            patch_size=_three(patch, 1, int),
            spacing=_three(entry["spacing"], slice_spacing, float),
            median_shape=_three(median, 1.0, float),
            normalization_schemes=schemes,
            use_mask_for_norm=tuple(bool(m) for m in entry.get("use_mask_for_norm", [False] * len(schemes))),
            batch_dice=bool(entry.get("batch_dice", False)),
            architecture=_architecture(name, entry),
            is_2d=is_2d,
            previous_stage=entry.get("previous_stage"),
        )
    except KeyError as key:
        raise InputError(f"plans: configuration {name!r} has no {key}") from None
    except (TypeError, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise InputError(f"plans: configuration {name!r} has a value of an unexpected form ({error})") from None


def _folder_name(text: object) -> str:
    """A plain folder name: a plan from a stranger must not lead out of the workspace."""
    if not isinstance(text, str) or text in ("", ".", "..") or any(sign in text for sign in "/\\:\0"):
        raise ValueError(f"data_identifier {text!r} is no plain folder name")
    return text


def _three(values: list, lead: float | int, kind: type) -> tuple:
    numbers = tuple(kind(v) for v in values)
    if len(numbers) not in (2, 3):
        raise ValueError(f"{values}: want 2 or 3 numbers")
    return numbers if len(numbers) == 3 else (kind(lead), *numbers)


def _list(values: tuple | None) -> list | None:
    return None if values is None else list(values)


def _fields_to_json(c: Configuration) -> dict:
    """A configuration's fields in the current schema of plans.json."""
    axes = slice(1, None) if c.is_2d else slice(None)
    stage = {} if c.previous_stage is None else {"previous_stage": c.previous_stage}
    return {
        "data_identifier": c.data_identifier,
        "batch_size": c.batch_size,
        "patch_size": list(c.patch_size[axes]),
        "median_image_size_in_voxels": list(c.median_shape[axes]),
        "spacing": list(c.spacing[axes]),
        "normalization_schemes": list(c.normalization_schemes),
        "use_mask_for_norm": list(c.use_mask_for_norm),
        "architecture": architecture_to_json(c.architecture, c.is_2d),
        "batch_dice": c.batch_dice,
        **stage,
    }


def _preprocessing() -> dict:
    """The names by which nnU-Net knows how images, labels and probabilities are resampled."""
    entry = {"preprocessor_name": "DefaultPreprocessor"}
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        entry[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        kwargs = {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        entry[f"resampling_fn_{what}_kwargs"] = kwargs
    return entry


# --------------------------------------------------------------------------------------------------- the network's part

_LEGACY_NETWORK = (
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


def _architecture(name: str, entry: dict) -> Architecture:
    if "architecture" not in entry:
        return _legacy_architecture(entry)
    class_name, kwargs = entry["architecture"]["network_class_name"], entry["architecture"]["arch_kwargs"]
    backbone = _NETWORKS.get(class_name.rsplit(".", 1)[-1])
    if backbone is None:
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in kwargs.items()}
        return Architecture(class_name, options=options)
    odd = _odd_options(kwargs, len(entry["patch_size"]) == 2)
    strides = kwargs["strides"]
    stages = int(kwargs.get("n_stages", len(strides)))
    blocks = kwargs["n_blocks_per_stage" if backbone == "resenc-unet" else "n_conv_per_stage"]
    return Architecture(
        # a network that is not built here still lets the plan be read; building it says which setting is in the way
        backbone + (f" with {odd}" if odd else ""),
        _per_stage(kwargs["features_per_stage"], stages),
        tuple(_three(_axes(k, entry), 1, int) for k in kwargs["kernel_sizes"]),
        tuple(_three(_axes(k, entry), 1, int) for k in strides),
        _per_stage(blocks, stages),
        _per_stage(kwargs["n_conv_per_stage_decoder"], stages - 1),
    )


def _legacy_architecture(entry: dict) -> Architecture:
    """The network of plans written by nnU-Net 2.0 to 2.3."""
    class_name = entry["UNet_class_name"]
    strides = [_three(_axes(k, entry), 1, int) for k in entry["pool_op_kernel_sizes"]]
    kernels = [_three(_axes(k, entry), 1, int) for k in entry["conv_kernel_sizes"]]
    strides = [(1, 1, 1)] * (len(kernels) - len(strides)) + strides
    base, largest = entry["UNet_base_num_features"], entry["unet_max_num_features"]
    stages = len(strides)
    return Architecture(
        _NETWORKS.get(class_name, class_name),
        tuple(min(base * 2**i, largest) for i in range(stages)),
        tuple(kernels),
        tuple(strides),
        _per_stage(entry["n_conv_per_stage_encoder"], stages),
        _per_stage(entry["n_conv_per_stage_decoder"], stages - 1),
    )


def _axes(value: int | list, entry: dict) -> list:
    return [value] * len(entry["patch_size"]) if isinstance(value, int) else value


def _per_stage(value: int | list, stages: int) -> tuple[int, ...]:
    numbers = (value,) * stages if isinstance(value, int) else tuple(int(v) for v in value)
    if len(numbers) != stages:
        raise ValueError(f"{list(numbers)}: want {stages} numbers, one per stage")
    return numbers


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
