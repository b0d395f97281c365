"""Keep only the largest component of a structure where cross-validation shows that this helps; nnU-Net's rule."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np
from jaxtyping import Integer
from scipy import ndimage

from pgps_jax.data.dataset import default_workers
from pgps_jax.data.labels import Label, Labels
from pgps_jax.data.nifti import write_volume
from pgps_jax.errors import InputError, brief
from pgps_jax.evaluate.metrics import Metrics, overlap_metrics
from pgps_jax.evaluate.summary import label_maps, match_files, mean_over, read_label_map, read_label_pair
from pgps_jax.json_file import read_json, write_json

Progress = Callable[[int, int], None]


def keep_largest_component(seg: Integer[np.ndarray, "d h w"], label: Label) -> Integer[np.ndarray, "d h w"]:
    """Set all voxels of a label or region to 0 that are not in its largest component.

    Voxels that touch by a corner are connected; components of equal size are all kept. Returns the input itself where
    nothing is removed.
    """
    components, count = ndimage.label(np.isin(seg, label), structure=np.ones((3, 3, 3)))
    if count < 2:
        return seg
    sizes = np.bincount(components.reshape(-1))
    sizes[0] = 0
    removed = sizes < sizes.max()
    removed[0] = False
    return np.where(removed[components], 0, seg).astype(seg.dtype) if removed.any() else seg


@dataclass(frozen=True)
class Postprocessing:
    """Labels or regions of which only the largest component is kept, in this order; none: predictions stay as are."""

    keep_largest_of: tuple[Label, ...] = ()

    def __call__(self, seg: Integer[np.ndarray, "d h w"]) -> Integer[np.ndarray, "d h w"]:
        for label in self.keep_largest_of:
            seg = keep_largest_component(seg, label)
        return seg


class Decision(NamedTuple):
    """What was decided, and each label's mean Dice over the cases before and after."""

    postprocessing: Postprocessing
    before: dict[Label, float]
    after: dict[Label, float]


class _Case(NamedTuple):
    prediction: Any  # label maps, compressed in memory: all cases stay there while many steps are tried
    reference: Any
    metrics: dict[Label, Metrics]


def decide_postprocessing(
    predictions: Path,
    references: Path | Mapping[str, Path],
    labels: Labels,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Decision:
    """Try on (merged cross-validation) predictions which steps raise the Dice, and keep those.

    First the largest component of all foreground together: kept if the mean Dice over labels rises and none falls.
    Then, given more than one label or region, of each in the order declared: kept if its mean Dice rises. As in
    nnU-Net, except that classes without any case do not make the mean over labels NaN.

    Args:
        progress: called with (steps tried, steps in all).

    Raises:
        InputError: as `evaluate_folder`.
    """
    labels = labels.in_files
    steps = [tuple(label for label in labels.all_labels if label != 0)]
    steps += labels.foreground if len(labels.foreground) > 1 else []
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        pairs = match_files(Path(predictions), references)
        cases = list(pool.map(lambda pair: _load(*pair, labels), pairs))
        before = current = _mean_dice(cases, labels.foreground)
        accepted = []
        for tried, step in enumerate(steps):
            changed = list(pool.map(lambda case, step=step: _with_step(case, step, labels), cases))
            dice = _mean_dice(changed, labels.foreground)
            if tried == 0:
                rises = np.nanmean(list(dice.values())) > np.nanmean(list(current.values()))
                better = rises and not any(dice[label] < current[label] for label in dice)
            else:
                better = dice[step] > current[step]
            if better:
                cases, current = changed, dice
                accepted.append(step)
            if progress:
                progress(tried + 1, len(steps))
    return Decision(Postprocessing(tuple(accepted)), before, current)


def _load(case: str, prediction: Path, reference: Path, labels: Labels) -> _Case:
    predicted, true, _ = read_label_pair(case, prediction, reference)
    metrics = overlap_metrics(predicted, true, labels.foreground, labels.ignore)
    return _Case(blosc2.asarray(predicted), blosc2.asarray(true), metrics)


def _with_step(case: _Case, step: Label, labels: Labels) -> _Case:
    before = case.prediction[:]
    after = keep_largest_component(before, step)
    if after is before:
        return case
    metrics = overlap_metrics(after, case.reference[:], labels.foreground, labels.ignore)
    return _Case(blosc2.asarray(after), case.reference, metrics)


def _mean_dice(cases: Sequence[_Case], labels: Sequence[Label]) -> dict[Label, float]:
    return {label: mean_over([case.metrics[label] for case in cases])["Dice"] for label in labels}


# ------------------------------------------------------------------------------------------------------------ to disk


def write_postprocessing(decision: Decision, path: Path) -> None:
    """Write the decision as JSON, atomically."""
    content = {
        "keep_largest_component_of": decision.postprocessing.keep_largest_of,
        "mean_dice_before": {str(label): dice for label, dice in decision.before.items()},
        "mean_dice_after": {str(label): dice for label, dice in decision.after.items()},
    }
    write_json(path, content, indent=1)


def read_postprocessing(path: Path) -> Postprocessing:
    """Read what `write_postprocessing` wrote.

    Raises:
        InputError: the file is missing or no such JSON.
    """
    steps = read_json(path).get("keep_largest_component_of")
    regions = [step if isinstance(step, list) else [step] for step in steps] if isinstance(steps, list) else [[None]]
    if not all(type(label) is int for region in regions for label in region):
        raise InputError(f'{path}: "keep_largest_component_of" must list labels and lists of labels; found {brief(steps)}')
    return Postprocessing(tuple(tuple(step) if isinstance(step, list) else step for step in steps))


def apply_postprocessing(
    postprocessing: Postprocessing, folder: Path, output: Path, progress: Progress | None = None
) -> None:
    """Write every label map of `folder` postprocessed to `output` under the same name; both may be the same folder.

    Raises InputError: no folder, no label maps, a file that is none, or `output` cannot be written.
    """
    files = label_maps(folder)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for done, (case, path) in enumerate(files.items(), start=1):
            volume = read_label_map(case, path)
            write_volume(output / path.name, postprocessing(volume.array), volume.affine)
            if progress:
                progress(done, len(files))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error}); name another output folder") from None
