"""Every decision of a plan is told with its reason."""

import dataclasses
import json

from pgps_jax.data.dataset import Dataset, Labels
from pgps_jax.data.explain import explain
from pgps_jax.data.fingerprint import Fingerprint
from pgps_jax.data.plan import Plan
from pgps_jax.data.planner import Overrides, make_plan

STATISTICS = {"max": 900.0, "mean": 40.0, "median": 42.0, "min": -900.0, "percentile_00_5": -100.0, "percentile_99_5": 250.0, "std": 60.0}


def told(tmp_path, spacing, shape, channels=("CT", "T1"), cases=500, planner="nnunet", relative_size=0.6, **wishes) -> str:
    content = {"labels": {"background": 0, "organ": 1}, "numTraining": cases, "file_ending": ".nii.gz"}
    dataset = Dataset(tmp_path, "Dataset999_Test", channels, Labels.from_json(content), ".nii.gz", (), content)
    fingerprint = Fingerprint((spacing,) * 3, (shape,) * 3, {str(i): STATISTICS for i in range(len(channels))}, relative_size)
    plan = make_plan(dataset, fingerprint, planner, Overrides(**wishes))
    read_back = dataclasses.replace(Plan.from_json(json.loads(json.dumps(plan.to_json()))), notes=plan.notes)
    assert explain(read_back, fingerprint, dataset) == explain(plan, fingerprint, dataset)
    return "\n".join(explain(plan, fingerprint, dataset))


def test_a_large_ct_plan_is_explained(tmp_path):
    text = told(tmp_path, (1.245, 0.785, 0.785), (252, 512, 512))
    for words in (
        "Channel 0 is named 'CT' and therefore clipped", "(-100 to 250)", "minus their mean 40",
        "Channel 1 is named 'T1' and therefore brought to mean 0", "inside the body only: cutting away zeros leaves 60%",
        "resampled to 1.245 x 0.785 x 0.785 mm (z, y, x), the median of 3 cases (all alike)",
        "3d_fullres: patch 80 x 192 x 160", "the most that fits 8 GB", "halves the axes 4 x 5 x 5 times, down to 5 x 6 x 5 voxels",
        "3d_fullres: batch size 2: what fits 8 GB", "3d_fullres: batch Dice on", "3d_cascade_fullres takes the prediction of 3d_lowres",
        "3d_lowres exists because a patch at full resolution has 4% of the voxels of the median image, less than 25%",
    ):  # fmt: skip
        assert words in text, words


def test_a_small_anisotropic_plan_is_explained(tmp_path):
    text = told(tmp_path, (1.0, 1.0, 5.0), (100, 90, 12), cases=20, relative_size=1.0)
    for words in (
        "put in the order x, z, y: the coarsest comes first", "the whole image, rounded up to multiples of", "a batch shall",
        "5% of the dataset's voxels", "do not look along axis 0", "There is no 3d_lowres: a patch at full resolution has 100%",
    ):  # fmt: skip
        assert words in text, words
    assert "inside the body" not in text


def test_wishes_are_told_as_wishes(tmp_path):
    text = told(tmp_path, (1.0, 1.0, 1.0), (136, 153, 171), patch_size=(60, 60, 60), batch_size=3, target_spacing=(1.0, 1.0, 2.0))
    for words in ("as you asked; the median is 1 x 1 x 1 mm", "as you asked (60 x 60 x 60)", "batch size 3, as you asked",
                  "Asked for and changed: patch size 60 x 60 x 60 became"):
        assert words in text, words
    assert "fits 24 GB" in told(tmp_path, (1.0, 1.0, 1.0), (300, 300, 300), planner="resenc-l")
    assert "fits 12 GB" in told(tmp_path, (1.0, 1.0, 1.0), (300, 300, 300), gpu_memory_target=12.0)


def test_plans_of_other_origin_are_told_without_made_up_reasons(tmp_path):
    content = {"labels": {"background": 0, "organ": 1}, "numTraining": 20, "file_ending": ".nii.gz"}
    dataset = Dataset(tmp_path, "X", ("CT",), Labels.from_json(content), ".nii.gz", (), content)
    fingerprint = Fingerprint(((1.0, 1.0, 1.0),), ((300, 300, 300),), {"0": STATISTICS}, 1.0)
    plan = dataclasses.replace(make_plan(dataset, fingerprint), experiment_planner="SomeOtherPlanner")
    text = "\n".join(explain(plan, fingerprint, dataset))
    assert "GB" not in text and "resampled to 1 x 1 x 1 mm" in text
