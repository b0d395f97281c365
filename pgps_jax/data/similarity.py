"""Ranking of training cases by how similar they are to the others, for the curriculum over cases.

Progressive Deep Learning (Choi et al. 2020, 2023) ranks cases by mean squared error, peak signal-to-noise ratio,
structural similarity and the universal quality index, but does not tell how these are combined or on which grid. Ours:

1. every preprocessed image is averaged down to 16 x 16 x 16 cells, whatever its size, and all images are brought to
   [0, 1] by one common range per channel (0.5 % to 99.5 % of all cells);
2. each measure is taken between all pairs of cases, and averaged over the partners of a case;
3. cases are ranked by each of the four averages, and ordered by the mean of the four ranks, most similar first.

The measures are those of scikit-image where it has them (window of 7 cells, data range 1), vectorised over partners.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import rankdata

from pgps_jax.data.identity import hashes_of_cases
from pgps_jax.data.store import CaseStore
from pgps_jax.errors import InputError
from pgps_jax.json_file import read_json, write_json

CELLS = 16  # per axis
WINDOW = 7  # cells per axis over which SSIM and UQI compare
RULE = "mean of the ranks by mean MSE, PSNR, SSIM and UQI to all other cases, 16^3 cells, window 7; version 1"
MOST_PSNR = 100.0  # dB, for identical images
_TINY = 1e-12  # variances and squared means below are rounding errors of zero


class Similarities(NamedTuple):
    """Four measures between all pairs of cases, (n, n) each and symmetric. MSE is small for similar cases."""

    mse: Float[np.ndarray, "n n"]
    psnr: Float[np.ndarray, "n n"]
    ssim: Float[np.ndarray, "n n"]
    uqi: Float[np.ndarray, "n n"]


def ranked_cases(
    path: Path, store: CaseStore, case_ids: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> tuple[str, ...]:
    """`case_ids` in order of similarity, most similar to the others first.

    The ranking is kept as JSON in `path`, with the hashes of the cases, and read from there when the same are asked for again.
    """
    kept, hashes = _read(path), hashes_of_cases(store, sorted(case_ids))
    if kept.get("rule") != RULE or kept.get("hashes") != hashes or sorted(c["id"] for c in kept["cases"]) != list(hashes):
        cells = []
        for done, case in enumerate(case_ids, start=1):
            cells.append(shrink(store.open(case).image))
            if progress:
                progress(done, len(case_ids))
        kept = {"rule": RULE, "hashes": hashes, "cases": rank(case_ids, compare(to_unit_range(np.stack(cells))))}
        write_json(path, kept, indent=1)
    return tuple(case["id"] for case in kept["cases"])


def shrink(image: Any, cells: int = CELLS) -> Float[np.ndarray, "c {cells} {cells} {cells}"]:
    """Means of an image (c, d, h, w) over `cells` per axis; cells are as equal as whole voxels allow.

    An axis with fewer voxels repeats them. `image` may be lazy: it is read slab by slab.
    """
    edges = [np.linspace(0, size, cells + 1).astype(int) for size in image.shape[1:]]
    slabs = []
    for first, last in zip(edges[0][:-1], edges[0][1:], strict=True):
        plane = np.asarray(image[:, first : max(last, first + 1)], np.float64).mean(axis=1)
        for axis, edge in ((1, edges[1]), (2, edges[2])):
            widths = np.maximum(np.diff(edge), 1).reshape([-1 if a == axis else 1 for a in range(3)])
            plane = np.add.reduceat(plane, edge[:-1], axis=axis) / widths
        slabs.append(plane)
    return np.stack(slabs, axis=1)


def to_unit_range(images: Float[np.ndarray, "n c d h w"]) -> Float[np.ndarray, "n c d h w"]:
    """All images in [0, 1]: the same line for all of them, channel by channel, outliers clipped."""
    low, high = np.percentile(images, (0.5, 99.5), axis=(0, 2, 3, 4), keepdims=True)
    return np.clip((images - low) / np.maximum(high - low, _TINY), 0, 1)


def compare(images: Float[np.ndarray, "n c d h w"]) -> Similarities:
    """MSE, PSNR, SSIM and UQI between all pairs of images with data range 1, averaged over channels.

    With means m, sample variances v and covariance k of two images in each window of 7^3 cells:
    SSIM = mean of (2 m1 m2 + C1)(2 k + C2) / ((m1^2 + m2^2 + C1)(v1 + v2 + C2)), C1 = 0.01^2, C2 = 0.03^2 (Wang et al.
    2004); UQI is the same with C1 = C2 = 0, and 1 where nothing is left to compare (Wang and Bovik 2002).
    """
    n = len(images)
    mean, square = _window_mean(images), _window_mean(images**2)
    sample = WINDOW**3 / (WINDOW**3 - 1)
    variance = sample * (square - mean**2)
    mse, ssim, uqi = (np.zeros((n, n)) for _ in range(3))
    for i in range(n):
        one, others = images[i], images[i:]
        mse[i, i:] = ((others - one) ** 2).mean(axis=(1, 2, 3, 4))
        products = mean[i] * mean[i:]
        covariance = sample * (_window_mean(one * others) - products)
        of_means, of_variances = mean[i] ** 2 + mean[i:] ** 2, variance[i] + variance[i:]
        similarity = (2 * products + 1e-4) * (2 * covariance + 9e-4) / ((of_means + 1e-4) * (of_variances + 9e-4))
        ssim[i, i:] = similarity.mean(axis=(1, 2, 3, 4))
        quality = _ratio(2 * products, of_means) * _ratio(2 * covariance, of_variances)
        uqi[i, i:] = quality.mean(axis=(1, 2, 3, 4))
    mse, ssim, uqi = (np.triu(m) + np.triu(m, 1).T for m in (mse, ssim, uqi))
    psnr = np.minimum(-10 * np.log10(np.maximum(mse, _TINY)), MOST_PSNR)
    return Similarities(mse, psnr, ssim, uqi)


def rank(case_ids: Sequence[str], similarities: Similarities) -> list[dict[str, Any]]:
    """Cases with their mean measures and mean rank (1 is best), most similar to the others first, ties by id."""
    n = len(case_ids)
    averages = {name: (m.sum(axis=1) - np.diag(m)) / max(n - 1, 1) for name, m in similarities._asdict().items()}
    # rounded, so that the order does not hang on the last bits of a sum
    ranks = np.stack([rankdata(np.round(a if name == "mse" else -a, 9)) for name, a in averages.items()]).mean(axis=0)
    order = sorted(range(n), key=lambda i: (ranks[i], case_ids[i]))
    return [
        {"id": case_ids[i], "mean_rank": float(ranks[i])} | {name: float(a[i]) for name, a in averages.items()}
        for i in order
    ]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > _TINY, above / np.maximum(below, _TINY), 1.0)


def _window_mean(images: np.ndarray) -> np.ndarray:
    """Means over all whole windows, of the last three axes."""
    for axis in (-3, -2, -1):
        images = sliding_window_view(images, WINDOW, axis=axis).mean(axis=-1)
    return images


def _read(path: Path) -> dict:
    """A ranking kept earlier; an empty one if there is none or it cannot be read, for it is made again easily."""
    try:
        kept = read_json(path)
        [case["id"] for case in kept["cases"]]
    except (InputError, KeyError, TypeError):
        return {"rule": None, "cases": []}
    return kept
