"""The predicted class balance is that of the patches, and it falls as patches grow."""

import numpy as np
import pytest

from pgps_jax.architecture import PatchLimits
from pgps_jax.curriculum import CurriculumConfig, Schedule, Stage, make_schedule
from pgps_jax.data.class_balance import class_balance
from pgps_jax.data.labels import Labels
from pgps_jax.data.pipeline import PatchSource
from pgps_jax.data.sampling import SamplingConfig
from pgps_jax.data.store import CaseStore, Preprocessed, write_case
from pgps_jax.data.synthetic import phantom

LABELS = Labels(("background", "organ", "lesion"), (0, 1, 2))
PATCH = (32, 40, 32)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory) -> CaseStore:
    folder = tmp_path_factory.mktemp("phantoms")
    for number in range(4):
        image, label = phantom(np.random.default_rng(number), (40, 48, 40))
        locations = {k: np.argwhere(label == k).astype(np.int32) for k in (1, 2)}
        write_case(folder, f"case_{number}", Preprocessed(image[None], label[None].astype(np.int16), {}, locations), PATCH)
    return CaseStore(folder)


def test_class_balance_falls_as_patches_grow(phantoms):
    schedule = make_schedule(CurriculumConfig("efficiency"), PATCH, 2, PatchLimits((8, 8, 8), (8, 8, 8)), 1400, 100)
    found = class_balance(phantoms, phantoms.ids, schedule, SamplingConfig(), 2, LABELS, patches=200)
    assert [balance.stage for balance in found] == list(schedule.stages)
    volume = [balance.stage.voxels for balance in found]
    for share in ([b.foreground for b in found], [b.classes["lesion"] for b in found]):
        assert np.corrcoef(np.log(volume), np.log(share))[0, 1] < -0.8
        assert share[0] > 1.8 * share[-1]


def test_shares_are_those_of_the_voxels_that_training_sees(phantoms):
    stages = (Stage(0, (8, 8, 8), 3), Stage(1, (16, 16, 16), 2))
    schedule = Schedule(stages, np.array([0, 1, 0, 1, 1], np.int32), np.full(5, 4, np.int32))
    source = PatchSource(phantoms, phantoms.ids, schedule, SamplingConfig(), [s.patch_size for s in stages], 2, seed=3)
    found = class_balance(phantoms, phantoms.ids, schedule, SamplingConfig(), 2, LABELS, seed=3, patches=1000)
    for balance, steps in zip(found, ([0, 2], [1, 3, 4]), strict=True):
        label = np.concatenate([source.batch_of_step(step).label.ravel() for step in steps])
        assert balance.patches == len(steps) * balance.stage.batch_size
        assert balance.foreground == pytest.approx((label > 0).mean())
        assert balance.classes == pytest.approx({"organ": (label == 1).mean(), "lesion": (label == 2).mean()})


def test_regions_may_overlap_and_ignored_voxels_do_not_count(phantoms):
    schedule = Schedule((Stage(0, (40, 48, 40), 2),), np.zeros(2, np.int32), np.full(2, 4, np.int32))

    def balance(labels):
        return class_balance(phantoms, phantoms.ids, schedule, SamplingConfig(), 2, labels)[0]

    plain, regions = balance(LABELS), balance(Labels(("background", "all", "lesion"), (0, (1, 2), 2), None, (1, 2)))
    assert regions.classes == pytest.approx({"all": plain.foreground, "lesion": plain.classes["lesion"]})
    ignoring = balance(Labels(("background", "organ"), (0, 1), 2))
    assert ignoring.classes == pytest.approx({"organ": plain.classes["organ"] / (1 - plain.classes["lesion"])})


def test_only_stages_that_are_used_and_label_maps_alone_are_read(phantoms, monkeypatch):
    schedule = Schedule((Stage(0, (8, 8, 8), 1), Stage(1, (16, 16, 16), 1)), np.ones(3, np.int32), np.full(3, 4, np.int32))
    before, opened = CaseStore.open, []

    def without_images(self, case_id):
        opened.append(case_id)
        return before(self, case_id)._replace(image=None)

    monkeypatch.setattr(CaseStore, "open", without_images)
    found = class_balance(phantoms, phantoms.ids, schedule, SamplingConfig(), 1, LABELS)
    assert [balance.stage.index for balance in found] == [1] and opened
