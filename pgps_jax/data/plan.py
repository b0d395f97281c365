"""The plan of a dataset: nnU-Net's plans.json as typed values, read in all its generations and written back.

A plan keeps the JSON that it was read from. What was not changed is written back as it stood, unknown keys included.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pgps_jax.architecture import Architecture, Size
from pgps_jax.data.plan_network import LEGACY_NETWORK, architecture_from_json, architecture_to_json
from pgps_jax.data.plan_values import LONGEST_EDGE, MOST_BATCH, SHORTEST_SPACING, each, intensities, sequence, text, three, within
from pgps_jax.errors import InputError, brief
from pgps_jax.json_file import read_json, write_json

Spacing = tuple[float, float, float]

MOST_PARENTS = 32  # generations of inherits_from


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
            kept = {key: value for key, value in kept.items() if key not in LEGACY_NETWORK}
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

    def with_configuration(self, configuration: Configuration) -> "Plan":
        """The plan with a configuration in place of the one of its name."""
        return replace(self, configurations=self.configurations | {configuration.name: configuration})

    @staticmethod
    def from_json(content: dict) -> "Plan":
        """Read nnU-Net's plans.json: current, 2.0 to 2.3 (legacy networks), with inheritance, edited by hand.

        Raises:
            InputError: a missing or odd key, an unknown parent, inheritance in a circle.
        """
        try:
            entries = content["configurations"]
            forward = tuple(content["transpose_forward"])
            spacing = content.get("original_median_spacing_after_transp")
            median = each("spacing", three(spacing or [1.0, 1.0, 1.0], 1.0, float), SHORTEST_SPACING, 1 / SHORTEST_SPACING)
            if not all(type(axis) is int for axis in forward) or sorted(forward) != [0, 1, 2]:
                raise InputError(f"plans: transpose_forward {brief(list(forward))} is not an order of the axes 0, 1, 2")
            return Plan(
                dataset_name=text(content["dataset_name"]),
                plans_name=text(content["plans_name"]),
                transpose_forward=forward,
                transpose_backward=tuple(int(axis) for axis in np.argsort(forward)),
                intensity_properties=intensities(content.get("foreground_intensity_properties_per_channel")
                                                  or content.get("foreground_intensity_properties_by_modality") or {}),
                configurations={name: _inherited(name, entries, median[0]) for name in entries},
                original_median_spacing=median,
                original_median_shape=three(shape, 1.0, float) if (shape := content.get("original_median_shape_after_transp")) else None,
                experiment_planner=text(content.get("experiment_planner_used", "")),
                image_reader_writer=text(content.get("image_reader_writer", "")),
                source={key: value for key, value in content.items() if key != "configurations"},
            )
        except KeyError as key:
            raise InputError(f"plans: the key {key} is missing") from None
        except InputError:
            raise
        except (TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
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
    content = read_json(path, cure="plan the dataset first")
    try:
        return Plan.from_json(content)
    except InputError as error:
        raise InputError(f"{path}: cannot be used as a plan ({error})") from None


def write_plan(plan: Plan, path: Path) -> None:
    """Write a plans.json atomically.

    Configurations that only the file there knows, added by hand under names of their own, are kept.
    """
    content = plan.to_json()
    if path.exists():
        try:
            own = {name: entry for name, entry in read_json(path)["configurations"].items() if name not in PLANNED_NAMES}
        except (InputError, KeyError, AttributeError):  # what is no plan is replaced whole
            own = {}
        content["configurations"] = {**own, **content["configurations"]}
    write_json(path, content, indent=4)


_RESAMPLING_DEFAULTS = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": False, "separate_z_anisotropy_threshold": 3}
PLANNED_NAMES = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")


# --------------------------------------------------------------------------------------------- configurations from JSON


def resolve(name: str, entries: dict[str, dict]) -> dict:
    """A configuration's entry with what it inherits filled in: a child's key replaces its parent's, whole.

    Raises:
        InputError: unknown parent, circle, more than `MOST_PARENTS` generations.
    """
    chain = [name]
    while parent := entries[chain[-1]].get("inherits_from"):
        if parent in chain:
            raise InputError(f"plans: configurations inherit in a circle: {' -> '.join((*chain, parent))}")
        if parent not in entries:
            raise InputError(f"plans: configuration {chain[-1]!r} inherits from {brief(parent)}, which does not exist")
        if len(chain) > MOST_PARENTS:
            raise InputError(f"plans: configuration {name!r} inherits over more than {MOST_PARENTS} generations")
        chain.append(parent)
    entry: dict = {}
    for ancestor in reversed(chain):
        entry |= entries[ancestor]
    return entry


def _inherited(name: str, entries: dict[str, dict], slice_spacing: float) -> Configuration:
    entry = resolve(name, entries)
    return replace(configuration_from_json(name, entry, slice_spacing), entry=entry, own_keys=tuple(entries[name]))


def configuration_from_json(name: str, entry: dict, slice_spacing: float = 1.0) -> Configuration:
    """Configuration of an entry of plans.json, inherited keys included; `slice_spacing` (mm) is for 2D's first axis."""
    try:
        patch = entry["patch_size"]
        is_2d = len(patch) == 2
        median = entry.get("median_image_size_in_voxels") or patch
        schemes = tuple(text(scheme) for scheme in sequence(entry["normalization_schemes"]))
        return Configuration(
            name=name,
            data_identifier=_folder_name(entry["data_identifier"]),
            batch_size=within("batch_size", int(entry["batch_size"]), 1, MOST_BATCH),
            patch_size=each("patch_size", three(patch, 1, int), 1, LONGEST_EDGE),
            spacing=each("spacing", three(entry["spacing"], slice_spacing, float), SHORTEST_SPACING, 1 / SHORTEST_SPACING),
            median_shape=each("median_image_size_in_voxels", three(median, 1.0, float), 0, 2**31),
            normalization_schemes=schemes,
            use_mask_for_norm=tuple(bool(m) for m in sequence(entry.get("use_mask_for_norm", [False] * len(schemes)))),
            batch_dice=bool(entry.get("batch_dice", False)),
            architecture=architecture_from_json(entry),
            is_2d=is_2d,
            previous_stage=None if entry.get("previous_stage") is None else text(entry["previous_stage"]),
        )
    except InputError:
        raise
    except KeyError as key:
        raise InputError(f"plans: configuration {name!r} has no {key}") from None
    except (TypeError, ValueError, IndexError, OverflowError, MemoryError) as error:
        raise InputError(f"plans: configuration {name!r} has a value of an unexpected form ({error})") from None


def check_preprocessing(configuration: Configuration) -> None:
    """Raise InputError where a plan asks for other preprocessing than nnU-Net's default, which is the only one done here."""
    done = _preprocessing()
    other = [f"{key} {brief(value)}" for key, value in configuration.entry.items() if key in done and not _same(value, done[key])]
    if other:
        raise InputError(f"plans: configuration {configuration.name!r} asks for {', '.join(other)}; only nnU-Net's default preprocessing "
                         "and resampling are done here. Plan the dataset anew, or use nnU-Net for this plan")


def _same(value: object, done: object) -> bool:
    """Do two settings of resampling mean the same? What arguments do not name has nnU-Net's default."""
    if isinstance(value, dict) and isinstance(done, dict):
        return _RESAMPLING_DEFAULTS | value == _RESAMPLING_DEFAULTS | done
    return value == done


def _folder_name(text: object) -> str:
    """A plain folder name: a plan from a stranger must not lead out of the workspace."""
    if not isinstance(text, str) or text in ("", ".", "..") or any(sign in text for sign in "/\\:\0"):
        raise ValueError(f"data_identifier {text!r} is no plain folder name")
    return text


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
