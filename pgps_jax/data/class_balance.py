"""How much foreground the patches of each stage hold: small patches around foreground are better balanced than large ones.

The patches are those that training would draw: same sampler, same cases, of steps spread over each stage. Only label maps are read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pgps_jax.curriculum import Schedule, Stage
from pgps_jax.data.labels import Labels
from pgps_jax.data.pipeline import PatchSource
from pgps_jax.data.sampling import SamplingConfig
from pgps_jax.data.store import CaseStore, StoredCase

_PATCHES = 400  # per stage: the share of foreground is then known to a few per cent
_VOXELS = 2e8  # per stage at most, whatever the patch


class StageBalance(NamedTuple):
    """Shares of the voxels in the patches of a stage: of any foreground, and of each foreground class or region by name.

    Voxels with the ignore label do not count; voxels outside the case count as background, as the loss sees them.
    """

    stage: Stage
    patches: int  # that were looked at
    foreground: float
    classes: dict[str, float]


def class_balance(
    store: CaseStore,
    case_ids: Sequence[str],
    schedule: Schedule,
    sampling: SamplingConfig,
    planned_batch_size: int,
    labels: Labels,
    *,
    seed: int = 0,
    patches: int = _PATCHES,
) -> list[StageBalance]:
    """The balance of every stage that the schedule uses, smallest index first.

    Args:
        store, case_ids, schedule, sampling, planned_batch_size, seed: as for training, see `PatchSource`.
        patches: to draw per stage, if the stage has that many and they are no more than two hundred million voxels.

    Raises:
        InputError: a case cannot be read.
    """
    source = PatchSource(_LabelsOnly(store.folder), case_ids, schedule, sampling, [s.patch_size for s in schedule.stages],
                         planned_batch_size, seed=seed)  # fmt: skip
    return [_balance_of(source, stage, labels, patches) for stage in schedule.stages if stage.index in schedule.stage_of_step]


def _balance_of(source: PatchSource, stage: Stage, labels: Labels, patches: int) -> StageBalance:
    steps = np.flatnonzero(source.schedule.stage_of_step == stage.index)
    wanted = min(patches / stage.batch_size, _VOXELS / stage.voxels, len(steps))
    chosen = steps[np.linspace(0, len(steps) - 1, max(1, math.ceil(wanted))).astype(int)]
    counts = np.zeros(max(labels.all_labels) + 3, np.int64)  # of -1, 0, 1, ... and of the ignore label
    for step in chosen.tolist():
        counts += np.bincount(source.batch_of_step(step).label.ravel() + 1, minlength=len(counts))
    of_label = {label: int(counts[label + 1]) for label in labels.all_labels}
    total = counts[0] + sum(of_label.values())

    def share(members: Sequence[int]) -> float:
        return sum(of_label[label] for label in members) / total if total else math.nan

    classes = {name: share(value if isinstance(value, tuple) else (value,))
               for name, value in zip(labels.names, labels.values, strict=True) if value != 0}
    return StageBalance(stage, len(chosen) * stage.batch_size, share([label for label in of_label if label != 0]), classes)


@dataclass(frozen=True)
class _LabelsOnly(CaseStore):
    """The same cases with images of no channels, so that no intensities are read."""

    def open(self, case_id: str) -> StoredCase:
        case = super().open(case_id)
        return case._replace(image=np.empty((0, *case.seg.shape[1:]), np.float32))
