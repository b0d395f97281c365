"""From a fingerprint to a plan: spacing, patch size, network and batch size by nnU-Net's rules.

The numbers of nnU-Net's default planner (`ExperimentPlanner`) and of its residual-encoder presets M, L and XL are
reproduced field by field. Memory is estimated as nnU-Net does, by the voxels that all convolutions put out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pgps_jax.architecture import Architecture
from pgps_jax.data.dataset import Dataset
from pgps_jax.data.fingerprint import Fingerprint
from pgps_jax.data.plan import Configuration, Plan
from pgps_jax.data.resample import ANISOTROPY_THRESHOLD, resampled_shape
from pgps_jax.errors import InputError, brief

Spacing = tuple[float, ...]

MIN_EDGE = 4  # voxels that the bottleneck keeps per axis
BASE_FEATURES = 32
LARGEST_FEATURES = {2: 512, 3: 320}  # by number of axes
REFERENCE_BATCH = {2: 12, 3: 2}
MASK_BELOW = 0.75  # relative size after cropping below which z-scores look at the inside of the body only
LOWRES_BELOW = 0.25  # share of the median case in the patch below which a coarser configuration is planned
LOWRES_STEP = 1.03
OVERRIDES_KEY = "pgps_jax_overrides"  # in plans.json: what the user wanted otherwise; nnU-Net skips keys it does not know

_SCHEMES = {
    "ct": "CTNormalization", "nonorm": "NoNormalization", "zscore": "ZScoreNormalization",
    "rescale_to_0_1": "RescaleTo01Normalization", "rgb_to_0_1": "RGBTo01Normalization",
}  # fmt: skip
_READERS = ("SimpleITKIO", "NibabelIO")  # of nnU-Net; both take images as they are stored, and so do we


class Preset(NamedTuple):
    """A planner of nnU-Net."""

    class_name: str
    plans_name: str
    backbone: str
    reference: dict[int, float]  # estimate that fits `reference_gb`, by number of axes
    reference_gb: float
    largest_share: float  # of the dataset's voxels in one batch


PRESETS: dict[str, Preset] = {
    "nnunet": Preset("ExperimentPlanner", "nnUNetPlans", "plain-unet", {2: 85e6, 3: 560e6}, 8, 0.05),
    "resenc-m": Preset("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans", "resenc-unet", {2: 135e6, 3: 680e6}, 8, 1),
    "resenc-l": Preset("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans", "resenc-unet", {2: 380e6, 3: 2.1e9}, 24, 1),
    "resenc-xl": Preset("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans", "resenc-unet", {2: 560e6, 3: 3.6e9}, 40, 1),
}


@dataclass(frozen=True)
class Overrides:
    """What the user wants otherwise than planned; patch and batch size concern 3d_fullres only."""

    target_spacing: tuple[float, float, float] | None = None
    """Spacing of 3d_fullres in mm, in the files' array order (z, y, x)."""
    gpu_memory_target: float | None = None
    """GPU memory in GB to plan for."""
    patch_size: tuple[int, int, int] | None = None
    """Patch size in voxels, in the plan's axis order; rounded up to what the network can halve."""
    batch_size: int | None = None
    """Images per step at the planned patch."""


class Topology(NamedTuple):
    """How often and where a network halves its input. One entry per stage, full resolution first."""

    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]  # rounded up to multiples of `divisor`
    divisor: tuple[int, ...]


def make_plan(
    dataset: Dataset, fingerprint: Fingerprint, planner: str = "nnunet", overrides: Overrides = Overrides()
) -> Plan:
    """Plan 2d, 3d_fullres and, where volumes are large, 3d_lowres and its cascade.

    Returns:
        the plan; `notes` say which wishes of `overrides` were changed, and why.

    Raises:
        InputError: unknown planner, wishes that cannot be met.
    """
    if planner not in PRESETS:
        raise InputError(f"--planner {planner}: there are {', '.join(PRESETS)}")
    _check_overrides(overrides)
    preset = PRESETS[planner]
    spacing = np.array(overrides.target_spacing or target_spacing(fingerprint), float)
    coarse = int(np.argmax(spacing))
    forward = [coarse, *(axis for axis in range(3) if axis != coarse)]
    shapes = [resampled_shape(shape, old, tuple(spacing)) for shape, old in
              zip(fingerprint.shapes_after_crop, fingerprint.spacings, strict=True)]
    median = np.median(shapes, axis=0)[forward]
    spacing = spacing[forward]

    planning = _Planning(dataset, fingerprint, preset, overrides, float(np.prod(median)) * dataset.json["numTraining"])
    entries: dict[str, dict] = {"2d": planning.configuration("2d", spacing[1:], median[1:]).to_json()}
    if median[0] > 1:
        fullres = planning.configuration("3d_fullres", spacing, median)
        lowres = planning.lowres(fullres, spacing, median)
        entries["3d_fullres"] = {**fullres.to_json(), "batch_dice": lowres is not None}
        if lowres is not None:
            entries["3d_lowres"] = {**lowres.to_json(), "next_stage": "3d_cascade_fullres"}
            entries["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    elif overrides.patch_size or overrides.batch_size:
        raise InputError("--patch-size and --batch-size change 3d_fullres; these images have one slice, so only 2d is planned")
    original = np.median(fingerprint.shapes_after_crop, axis=0)[forward]
    plan = Plan.from_json({
        "dataset_name": dataset.name,
        "plans_name": preset.plans_name,
        "original_median_spacing_after_transp": np.median(fingerprint.spacings, axis=0)[forward].tolist(),
        "original_median_shape_after_transp": [round(n) for n in original.tolist()],
        "image_reader_writer": _reader(dataset, planning.notes),
        "transpose_forward": forward,
        "transpose_backward": np.argsort(forward).tolist(),
        "configurations": {name: entries[name] for name in sorted(entries)},
        "experiment_planner_used": preset.class_name,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": fingerprint.intensity_properties,
        **({OVERRIDES_KEY: wishes} if (wishes := {k: v for k, v in vars(overrides).items() if v is not None}) else {}),
    })
    return replace(plan, notes=tuple(planning.notes))


def _reader(dataset: Dataset, notes: list[str]) -> str:
    """nnU-Net's reader that gives the same arrays as ours; another one that the dataset asks for is noted."""
    wished = dataset.json.get("overwrite_image_reader_writer")
    if wished in _READERS:
        return wished
    usual = "NibabelIO" if dataset.file_ending == ".nii" else "SimpleITKIO"
    if wished not in (None, "None"):
        notes.append(f"dataset.json asks for the reader {brief(wished)}, which is not used here: images are read as they are stored, like "
                     f"by {usual}, which the plan names")
    return usual


# ------------------------------------------------------------------------------------------------------ target spacing


def target_spacing(fingerprint: Fingerprint) -> Spacing:
    """Median spacing in mm; for strongly anisotropic datasets the 10th percentile of the coarse axis. File's axes."""
    spacings = np.array(fingerprint.spacings)
    target, size = np.percentile(spacings, 50, axis=0), np.median(fingerprint.shapes_after_crop, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    coarse = target[worst] > ANISOTROPY_THRESHOLD * target[others].max()
    if coarse and ANISOTROPY_THRESHOLD * size[worst] < size[others].min():
        finer = np.percentile(spacings[:, worst], 10)
        target[worst] = finer if finer >= target[others].max() else target[others].max() + 1e-5
    return tuple(float(s) for s in target)


# ---------------------------------------------------------------------------------------------------- network topology


def plan_topology(spacing: Sequence[float | int] | np.ndarray, patch_size: Sequence[float | int] | np.ndarray) -> Topology:
    """Halve the finest axes until a bottleneck of `MIN_EDGE` voxels; nnU-Net's rule.

    An axis takes part while its spacing is below twice the finest one's, and is convolved (kernel 3) from then on.
    """
    spacing, size = np.array(spacing, float), np.array(patch_size, float)
    pools, kernel = np.zeros(len(size), int), np.ones(len(size), int)
    strides, kernels = [np.ones(len(size), int)], []
    while True:
        able = np.flatnonzero(size >= 2 * MIN_EDGE)
        if not len(able):
            break
        able = able[spacing[able] / spacing[able].min() < 2]
        if len(able) == 1 and size[able[0]] < 3 * MIN_EDGE:
            break
        kernel[spacing / spacing.min() < 2] = 3
        kernels.append(kernel.copy())
        stride = np.ones(len(size), int)
        stride[able] = 2
        strides.append(stride)
        pools += stride - 1
        spacing, size = spacing * stride, np.ceil(size / stride)
    kernels.append(np.full(len(size), 3))
    divisor = 2**pools
    patch = np.ceil(np.array(patch_size, float) / divisor).astype(int) * divisor
    return Topology(_nested(strides), _nested(kernels), tuple(patch.tolist()), tuple(divisor.tolist()))


def _nested(rows: list[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row.tolist()) for row in rows)


def plan_features(stages: int, axes: int) -> tuple[int, ...]:
    """Channels per stage: 32, 64, ... up to 320 (3D) or 512 (2D)."""
    return tuple(min(BASE_FEATURES * 2**i, LARGEST_FEATURES[axes]) for i in range(stages))


def plan_blocks(stages: int, backbone: str) -> tuple[int, ...]:
    """Convolutions (plain) or residual blocks per encoder stage."""
    return (2,) * stages if backbone == "plain-unet" else ((1, 3, 4) + (6,) * stages)[:stages]


def memory_estimate(topology: Topology, backbone: str, num_labels: int) -> int:
    """Voxels times channels put out by all convolutions for one image at the planned patch; nnU-Net's measure.

    Args:
        num_labels: entries of "labels" in dataset.json, with background, regions and ignore.
    """
    stages, axes = len(topology.strides), len(topology.patch_size)
    features, blocks = plan_features(stages, axes), plan_blocks(stages, backbone)
    size, voxels = np.array(topology.patch_size), []
    for stride in topology.strides:
        size = size // np.array(stride)
        voxels.append(int(np.prod(size)))
    if backbone == "plain-unet":
        encoder = sum(2 * f * v for f, v in zip(features, voxels, strict=True))
        decoder_convs = 2
    else:
        encoder = features[0] * voxels[0]  # the stem
        for i, (f, v) in enumerate(zip(features, voxels, strict=True)):
            projected = i > 0 and (f != features[i - 1] or max(topology.strides[i]) > 1)
            encoder += (2 * blocks[i] + projected) * f * v
        decoder_convs = 1
    decoder = sum((decoder_convs + 1) * f * v for f, v in zip(features[:-1], voxels[:-1], strict=True))
    return encoder + decoder + num_labels * voxels[0]


def initial_patch(spacing: np.ndarray, median: np.ndarray) -> np.ndarray:
    """Patch to shrink from: 256³ (2D: 2048²) voxels of a cube in mm, nowhere larger than the median case."""
    fine = 1 / spacing
    edge = (256**3 if len(spacing) == 3 else 2048**2) / np.prod(fine)
    return np.minimum([round(f) for f in fine * edge ** (1 / len(spacing))], median)


# ------------------------------------------------------------------------------------------------------ configurations


class _Planning:
    """One run of the planner: what all configurations of a dataset have in common, and the notes taken."""

    def __init__(self, dataset: Dataset, fingerprint: Fingerprint, preset: Preset, overrides: Overrides, voxels: float):
        self.preset, self.overrides = preset, overrides
        self.num_labels = len(dataset.json["labels"])
        self.dataset_voxels = voxels  # of all cases at the target spacing
        self.schemes = tuple(_SCHEMES.get(name.lower(), "ZScoreNormalization") for name in dataset.channel_names)
        masked = fingerprint.median_relative_size_after_cropping < MASK_BELOW
        self.use_mask = tuple(masked and scheme == "ZScoreNormalization" for scheme in self.schemes)
        self.gb = overrides.gpu_memory_target or preset.reference_gb
        self.notes: list[str] = []

    def reference(self, axes: int) -> float:
        """Estimate that fits the memory, for the reference batch."""
        return self.preset.reference[axes] * self.gb / self.preset.reference_gb

    def configuration(self, name: str, spacing: np.ndarray, median: np.ndarray) -> Configuration:
        """Patch, network and batch size for images of this spacing (mm) and median shape; 2 or 3 axes."""
        axes, backbone = len(spacing), self.preset.backbone
        wished = self.overrides.patch_size if name == "3d_fullres" else None
        topology = self.shrunk(spacing, median) if wished is None else self.wished(spacing, wished)
        stages = len(topology.strides)
        two_d = axes == 2
        architecture = Architecture(
            backbone,
            plan_features(stages, axes),
            tuple((1,) * two_d + kernel for kernel in topology.kernel_sizes),
            tuple((1,) * two_d + stride for stride in topology.strides),
            plan_blocks(stages, backbone),
            ((2 if backbone == "plain-unet" else 1),) * (stages - 1),
        )
        shared = backbone != "plain-unet" and name != "3d_lowres"  # preprocessed as for the default planner
        return Configuration(
            name=name,
            data_identifier=f"{PRESETS['nnunet'].plans_name if shared else self.preset.plans_name}_{name}",
            batch_size=self.batch_size(name, topology),
            patch_size=(1,) * two_d + topology.patch_size,
            spacing=(1.0,) * two_d + tuple(spacing.tolist()),
            median_shape=(1.0,) * two_d + tuple(median.tolist()),
            normalization_schemes=self.schemes,
            use_mask_for_norm=self.use_mask,
            batch_dice=two_d,
            architecture=architecture,
            is_2d=two_d,
        )

    def shrunk(self, spacing: np.ndarray, median: np.ndarray) -> Topology:
        """The largest patch whose network fits the memory: shrink the axis that covers most of the median case."""
        axes = len(spacing)
        # the residual planners compare the estimate itself; with 2 images of reference in 3D that is the same
        images = REFERENCE_BATCH[axes] if self.preset.backbone == "plain-unet" else 2
        topology = plan_topology(spacing, initial_patch(spacing, median))
        while self.estimate(topology) / images * 2 > self.reference(axes):
            patch = np.array(topology.patch_size)
            axis = np.argsort(patch / median)[-1]
            trial = patch.copy()
            trial[axis] -= topology.divisor[axis]
            patch[axis] -= plan_topology(spacing, trial).divisor[axis]
            topology = plan_topology(spacing, patch)
            if len(topology.strides) == 1:
                raise InputError(f"--gpu-memory-target {self.gb:g}: too little for any patch; ask for more GB")
        return topology

    def wished(self, spacing: np.ndarray, patch: tuple[int, int, int]) -> Topology:
        """The network for a patch that the user asked for, rounded up to what it can halve."""
        topology = plan_topology(spacing, patch)
        if len(topology.strides) == 1:
            raise InputError(f"--patch-size {_sides(patch)}: too small; the network halves axes of {2 * MIN_EDGE} voxels or "
                             "more, and here is none that it may halve")
        if topology.patch_size != tuple(patch):
            self.notes.append(
                f"patch size {_sides(patch)} became {_sides(topology.patch_size)}: the network halves the axes "
                f"{_sides(math.log2(d) for d in topology.divisor)} times, so they must be multiples of "
                f"{_sides(topology.divisor)}"
            )
        if self.estimate(topology) > self.reference(3):
            self.notes.append(f"patch size {_sides(topology.patch_size)} needs {self.estimate(topology) / self.reference(3):.1f} "
                              f"times the memory of {self.gb:g} GB at batch size 2")
        return topology

    def estimate(self, topology: Topology) -> int:
        """Memory estimate of the network on this topology."""
        return memory_estimate(topology, self.preset.backbone, self.num_labels)

    def batch_size(self, name: str, topology: Topology) -> int:
        """As many images as fit the memory, but no more than a share of the dataset, and at least 2."""
        axes = len(topology.patch_size)
        fits = round(self.reference(axes) / self.estimate(topology) * REFERENCE_BATCH[axes])
        share = round(self.dataset_voxels * self.preset.largest_share / math.prod(topology.patch_size))
        planned = max(min(fits, share), 2)
        wished = self.overrides.batch_size if name == "3d_fullres" else None
        if wished is not None and wished > max(fits, 2):
            self.notes.append(f"batch size {wished} is kept as asked, but {max(fits, 2)} is what {self.gb:g} GB are "
                              "planned to hold: training may run out of memory")
        return planned if wished is None else wished

    def lowres(self, fullres: Configuration, spacing: np.ndarray, median: np.ndarray) -> Configuration | None:
        """A configuration whose patch sees a quarter of the median case, or None where the full resolution does so."""
        found, coarse = None, spacing.copy()
        patch, shape = fullres.patch_size, median
        while np.prod(patch) / np.prod(shape) < LOWRES_BELOW:
            fine = coarse.max() / coarse > 2
            coarse[fine if fine.any() else slice(None)] *= LOWRES_STEP
            shape = spacing / coarse * median
            found = self.configuration("3d_lowres", coarse, np.round(shape))
            patch = found.patch_size
        if found is None or np.prod(median) / np.prod(shape) < 2:
            return None
        return found


def _check_overrides(overrides: Overrides) -> None:
    for name, values in vars(overrides).items():
        if values is None:
            continue
        numbers = values if isinstance(values, tuple) else (values,)
        if not all(math.isfinite(v) and v > 0 for v in numbers):
            raise InputError(f"--{name.replace('_', '-')} {_sides(numbers)}: want positive numbers")
        if isinstance(values, tuple) and len(values) != 3:
            raise InputError(f"--{name.replace('_', '-')} {_sides(numbers)}: want 3 numbers, one per axis")


def _sides(numbers) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
