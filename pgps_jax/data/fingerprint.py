"""Measure a dataset: shapes, spacings and intensities inside the labelled structures, as nnU-Net's fingerprint.

nnU-Net draws the same number of foreground voxels from every case, with replacement (10^8 in all, which fills
gigabytes), and takes the statistics of what it drew. So every case counts the same, however large its structures. Here
nothing is drawn: mean, standard deviation and extremes use all voxels with those weights, and percentiles all voxels of
small cases and evenly spaced ranks of large ones. That is what nnU-Net's numbers tend to; they agree to 1e-3.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pgps_jax.data.dataset import Case, Dataset, Labels, Progress, check_finite, map_cases, read_case
from pgps_jax.data.plan_values import intensities, sequence, three
from pgps_jax.data.resample import crop_to_nonzero
from pgps_jax.errors import InputError

KEPT_VALUES = 10_000_000  # per channel over all cases: 40 MB
FEWEST_PER_CASE = 1000


@dataclass(frozen=True)
class Fingerprint:
    """What the planner knows of a dataset. Axes in the files' array order."""

    spacings: tuple[tuple[float, float, float], ...]  # mm, one per case
    shapes_after_crop: tuple[tuple[int, int, int], ...]
    intensity_properties: dict[str, dict[str, float]]  # channel number as text -> mean, median, ...
    median_relative_size_after_cropping: float  # voxels left by the crop to non-zero / all voxels

    def to_json(self) -> dict:
        """Content of nnU-Net's dataset_fingerprint.json."""
        return {
            "foreground_intensity_properties_per_channel": self.intensity_properties,
            "median_relative_size_after_cropping": self.median_relative_size_after_cropping,
            "shapes_after_crop": [list(shape) for shape in self.shapes_after_crop],
            "spacings": [list(spacing) for spacing in self.spacings],
        }

    @staticmethod
    def from_json(content: dict) -> "Fingerprint":
        """Read nnU-Net's dataset_fingerprint.json; InputError naming what is missing or of another form."""
        try:
            spacings, shapes = content["spacings"], content["shapes_after_crop"]
            found = Fingerprint(
                tuple(three(spacing, 1.0, float) for spacing in sequence(spacings)),
                tuple(three(shape, 1, int) for shape in sequence(shapes)),
                intensities(content["foreground_intensity_properties_per_channel"]),
                float(content["median_relative_size_after_cropping"]),
            )
        except KeyError as key:
            raise InputError(f"dataset_fingerprint.json: the key {key} is missing; plan again without it") from None
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(f"dataset_fingerprint.json: a value has another form ({error}); plan again without it") from None
        return found


class Intensities(NamedTuple):
    """Foreground values of one channel of one case, condensed."""

    count: int
    mean: float
    std: float
    low: float
    high: float
    ranked: np.ndarray  # float32, sorted: all values, or as many evenly spaced ranks as are kept


class Measured(NamedTuple):
    """One case's share of the fingerprint."""

    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    relative_size: float
    channels: list[Intensities]


def extract_fingerprint(dataset: Dataset, workers: int | None = None, progress: Progress | None = None) -> Fingerprint:
    """Measure all cases, in threads (decompression and NumPy leave Python's lock): one case per worker in memory.

    Raises:
        InputError: values that are not finite, no labelled voxel in the whole dataset, unreadable files.
    """
    keep = max(FEWEST_PER_CASE, KEPT_VALUES // len(dataset.cases))
    measured = map_cases(lambda case: measure_case(case, dataset.labels, keep), dataset.cases, progress, workers)
    return Fingerprint(
        spacings=tuple(case.spacing for case in measured),
        shapes_after_crop=tuple(case.shape for case in measured),
        intensity_properties={
            str(channel): pooled_statistics([case.channels[channel] for case in measured], name)
            for channel, name in enumerate(dataset.channel_names)
        },
        median_relative_size_after_cropping=float(np.median([case.relative_size for case in measured])),
    )


def measure_case(case: Case, labels: Labels, keep: int) -> Measured:
    """Geometry after the crop to non-zero and intensities where the label is above 0 (the ignore label included)."""
    raw = read_case(case, labels)
    for path, channel in zip(case.images, raw.image, strict=True):
        check_finite(case, path, channel)
    image, seg, _ = crop_to_nonzero(raw.image, raw.label)
    foreground = seg[0] > 0
    return Measured(
        raw.spacing, tuple(image.shape[1:]), image[0].size / raw.image[0].size,
        [condense(channel[foreground], keep) for channel in image],
    )  # fmt: skip


def condense(values: Float[np.ndarray, " n"], keep: int) -> Intensities:
    """Moments of all values; the values themselves sorted, thinned to `keep` evenly spaced ranks."""
    if not len(values):
        return Intensities(0, 0.0, 0.0, 0.0, 0.0, np.empty(0, np.float32))
    ranked = np.sort(values.astype(np.float32, copy=False))
    mean, std = ranked.mean(dtype=np.float64), ranked.std(dtype=np.float64)
    low, high = ranked[0], ranked[-1]
    if len(ranked) > keep:
        ranked = ranked[((np.arange(keep) + 0.5) * (len(ranked) / keep)).astype(np.int64)]
    return Intensities(len(values), float(mean), float(std), float(low), float(high), ranked)


def pooled_statistics(cases: list[Intensities], channel_name: str) -> dict[str, float]:
    """Statistics over cases that all weigh the same; cases without foreground do not take part."""
    cases = [case for case in cases if case.count]
    if not cases:
        raise InputError(f"channel {channel_name}: no case has a labelled voxel; at least one must have some")
    means = np.array([case.mean for case in cases])
    mean = means.mean()
    variance = np.mean([case.std**2 for case in cases]) + np.mean((means - mean) ** 2)
    values = np.concatenate([case.ranked for case in cases])
    weights = np.concatenate([np.full(len(case.ranked), 1 / (len(cases) * len(case.ranked))) for case in cases])
    order = np.argsort(values)
    share = np.cumsum(weights[order])
    # no interpolation between values: among 10^8 draws each would come up so often that percentiles are values themselves
    low, median, high = values[order][np.minimum(np.searchsorted(share, (0.005, 0.5, 0.995)), len(values) - 1)]
    return {
        "max": max(case.high for case in cases),
        "mean": float(mean),
        "median": float(median),
        "min": min(case.low for case in cases),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
        "std": float(np.sqrt(variance)),
    }
