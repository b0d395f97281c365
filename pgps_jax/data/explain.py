"""Why each number of a plan is what it is, in plain words."""

import math
from collections.abc import Iterable

import numpy as np

from pgps_jax.data.dataset import Dataset
from pgps_jax.data.fingerprint import Fingerprint
from pgps_jax.data.plan import Configuration, Plan
from pgps_jax.data.planner import (
    LOWRES_BELOW,
    MASK_BELOW,
    OVERRIDES_KEY,
    PRESETS,
    REFERENCE_BATCH,
    Preset,
    Topology,
    initial_patch,
    memory_estimate,
    target_spacing,
)

_SCHEME_WORDS = {
    "CTNormalization": "clipped to the 0.5 and 99.5 percentiles inside the labels of the whole dataset ({low:.4g} to {high:.4g}), "
    "minus their mean {mean:.4g}, divided by their standard deviation {std:.4g}, as CT numbers mean the same in every scan",
    "ZScoreNormalization": "brought to mean 0 and standard deviation 1 in each image, as its numbers have no fixed scale",
    "NoNormalization": "left as it is",
    "RescaleTo01Normalization": "stretched to 0..1 in each image",
    "RGBTo01Normalization": "divided by 255",
}


def explain(plan: Plan, fingerprint: Fingerprint, dataset: Dataset) -> list[str]:
    """Sentences on every decision of a plan, in the order in which they were taken.

    Plans that were edited by hand or made by other planners are told as they are, without reasons that are not known.
    """
    wishes = plan.source.get(OVERRIDES_KEY, {})
    preset = next((p for p in PRESETS.values() if p.class_name == plan.experiment_planner), None)
    sentences = [*_normalisation(plan, fingerprint, dataset), *_spacing(plan, fingerprint, wishes)]
    for name, configuration in plan.configurations.items():
        if configuration.previous_stage:
            sentences.append(f"{name} takes the prediction of {configuration.previous_stage} as a further input.")
            continue
        sentences += [f"{name}: {text}" for text in _configuration(configuration, dataset, preset, wishes)]
    return [*sentences, *_lowres(plan), *(f"Asked for and changed: {note}." for note in plan.notes)]


def _normalisation(plan: Plan, fingerprint: Fingerprint, dataset: Dataset) -> list[str]:
    configuration = next(iter(plan.configurations.values()))
    sentences = []
    for channel, scheme in enumerate(configuration.normalization_schemes):
        known = plan.intensity_properties.get(str(channel), {})
        values = {"low": known.get("percentile_00_5", math.nan), "high": known.get("percentile_99_5", math.nan),
                  "mean": known.get("mean", math.nan), "std": known.get("std", math.nan)}
        words = _SCHEME_WORDS.get(scheme, scheme).format(**values)
        name = dataset.channel_names[channel] if channel < len(dataset.channel_names) else "?"
        sentences.append(f"Channel {channel} is named {name!r} and therefore {words}.")
    share = fingerprint.median_relative_size_after_cropping
    if any(configuration.use_mask_for_norm):
        sentences.append(f"Mean and deviation are taken inside the body only: cutting away zeros leaves {share:.0%} of the median "
                         f"image, less than {MASK_BELOW:.0%}.")
    elif share < 1:
        sentences.append(f"Cutting away zeros leaves {share:.0%} of the median image; normalisation looks at all of that.")
    return sentences


def _spacing(plan: Plan, fingerprint: Fingerprint, wishes: dict) -> list[str]:
    spacings = np.array(fingerprint.spacings)
    shapes = np.median(fingerprint.shapes_after_crop, axis=0)
    median, chosen = np.median(spacings, axis=0), target_spacing(fingerprint)
    axes = "zyx"
    varied = [f"{axes[a]} {low:.4g} to {high:.4g} mm" for a, (low, high) in enumerate(zip(spacings.min(0), spacings.max(0), strict=True))
              if high > low * 1.001]
    span = f" (they vary: {', '.join(varied)})" if varied else " (all alike)"
    if "target_spacing" in wishes:
        asked = _times(wishes["target_spacing"])
        first = f"All cases are resampled to {asked} mm (z, y, x) as you asked; the median is {_times(median)} mm."
    else:
        first = f"All cases are resampled to {_times(chosen)} mm (z, y, x), the median of {len(spacings)} cases{span}"
        thick = [a for a in range(3) if not math.isclose(chosen[a], median[a])]
        first += "".join(f"; along {axes[a]} the slices are thick and few, so the finest tenth of the cases decides instead of the "
                         f"median {median[a]:.4g} mm" for a in thick) + "."
    sentences = [first, f"The median image has {_times(shapes)} voxels (z, y, x) before resampling."]
    if plan.transpose_forward != (0, 1, 2):
        order = ", ".join(axes[axis] for axis in plan.transpose_forward)
        sentences.append(f"The axes are put in the order {order}: the coarsest comes first.")
    return sentences


def _configuration(c: Configuration, dataset: Dataset, preset: Preset | None, wishes: dict) -> list[str]:
    axes = slice(1, None) if c.is_2d else slice(None)
    patch, median = np.array(c.patch_size[axes]), np.array(c.median_shape[axes])
    strides = np.array(c.architecture.strides)[:, axes]
    divisor = strides.prod(axis=0)
    seen = np.minimum(patch, median).prod() / median.prod()
    text = f"patch {_times(patch)} of a median image of {_times(median)} voxels at {_times(c.spacing[axes])} mm"
    asked = c.name == "3d_fullres"
    if asked and "patch_size" in wishes:
        text += f", as you asked ({_times(wishes['patch_size'])})"
    elif np.all(patch >= median):
        text += f": the whole image, rounded up to multiples of {_times(divisor)}"
    elif preset and np.all(patch >= initial_patch(np.array(c.spacing[axes]), median)):
        text += f": {seen:.0%} of the image, the largest patch that is ever planned at this spacing"
    elif preset:
        text += f": {seen:.0%} of the image, the most that fits {_memory(preset, wishes)}; cut first where it covers most of the image"
    sentences = [text + "."]
    bottleneck = patch // divisor
    sentences.append(
        f"the network halves the axes {_times(np.log2(divisor))} times, down to {_times(bottleneck)} voxels (at least 4 are kept), in "
        f"{len(strides)} stages of {', '.join(str(f) for f in c.architecture.features_per_stage)} features."
    )
    flat = [(stage, axis) for stage, kernel in enumerate(np.array(c.architecture.kernel_sizes)[:, axes]) for axis in
            range(len(patch)) if kernel[axis] == 1]
    if flat:
        sentences.append(f"the first {1 + max(stage for stage, _ in flat)} stages do not look along axis "
                         f"{', '.join(str(a) for a in sorted({axis for _, axis in flat}))}: its spacing is at least twice that of the "
                         "finest axis until that has been halved often enough.")
    sentences.append(_batch(c, dataset, preset, wishes, axes))
    sentences.append(f"batch Dice {'on' if c.batch_dice else 'off'}: " + (
        "the Dice of the loss pools the voxels of a batch, as one patch may hold little of a structure." if c.batch_dice else
        "the Dice of the loss is taken patch by patch, as a patch sees much of an image."))
    return sentences


def _batch(c: Configuration, dataset: Dataset, preset: Preset | None, wishes: dict, axes: slice) -> str:
    if c.name == "3d_fullres" and "batch_size" in wishes:
        return f"batch size {c.batch_size}, as you asked."
    if preset is None:
        return f"batch size {c.batch_size}."
    strides = tuple(tuple(s[axes]) for s in c.architecture.strides)
    topology = Topology(strides, (), c.patch_size[axes], ())
    dimensions = len(topology.patch_size)
    gb = wishes.get("gpu_memory_target") or preset.reference_gb
    estimate = memory_estimate(topology, preset.backbone, len(dataset.json["labels"]))
    fits = round(preset.reference[dimensions] * gb / preset.reference_gb / estimate * REFERENCE_BATCH[dimensions])
    memory, share = _memory(preset, wishes), f"{preset.largest_share:.0%} of the dataset's voxels"
    if c.batch_size >= fits:
        why = f"what fits {memory}" if fits >= 2 else f"the least; {memory} are full with it"
    elif c.batch_size > 2:
        why = f"{fits} would fit {memory}, but a batch shall hold at most {share}"
    else:
        why = f"the least; {fits} would fit {memory}, but a batch shall not hold more than {share}"
    return f"batch size {c.batch_size}: {why}."


def _lowres(plan: Plan) -> Iterable[str]:
    fullres = plan.configurations.get("3d_fullres")
    if fullres is None:
        return ["There is no 3D configuration: the images have one slice."] if "2d" in plan.configurations else []
    seen = math.prod(fullres.patch_size) / math.prod(fullres.median_shape)
    if "3d_lowres" in plan.configurations:
        return [f"3d_lowres exists because a patch at full resolution has {seen:.0%} of the voxels of the median image, less than "
                f"{LOWRES_BELOW:.0%}: it may miss the context that the coarser configuration sees."]
    if seen >= LOWRES_BELOW:
        return [f"There is no 3d_lowres: a patch at full resolution has {min(seen, 1):.0%} of the voxels of the median image "
                f"({LOWRES_BELOW:.0%} are enough)."]
    return ["There is no 3d_lowres: it would have more than half the voxels of the full resolution."]


def _memory(preset: Preset, wishes: dict) -> str:
    return f"{wishes.get('gpu_memory_target') or preset.reference_gb:g} GB"


def _times(numbers: Iterable) -> str:
    return " x ".join(f"{float(n):.4g}" for n in numbers)
