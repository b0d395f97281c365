"""Files from strangers: whatever is in them, they are read or refused with a sentence; they cannot lead out of their folder."""

import gzip
import json
import struct

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgps_jax.curriculum import schedule_from_json
from pgps_jax.data.dataset import open_dataset
from pgps_jax.data.folds import read_folds
from pgps_jax.data.nifti import read_header, read_volume
from pgps_jax.data.plan import read_plan
from pgps_jax.errors import InputError

PLAN = {
    "dataset_name": "D", "plans_name": "p", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
    "foreground_intensity_properties_per_channel": {},
    "configurations": {"3d_fullres": {
        "data_identifier": "p_3d", "batch_size": 2, "patch_size": [8, 8, 8], "spacing": [1, 1, 1], "normalization_schemes": ["ZScore"],
        "architecture": {"network_class_name": "x.PlainConvUNet", "arch_kwargs": {
            "n_stages": 2, "features_per_stage": [4, 8], "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [2, 2], "n_conv_per_stage_decoder": [2]}}}},
}


def read_changed_plan(tmp_path, **changes):
    plan = json.loads(json.dumps(PLAN))
    plan["configurations"]["3d_fullres"] |= changes
    (tmp_path / "plans.json").write_text(json.dumps(plan))
    return read_plan(tmp_path / "plans.json")


def test_the_plan_of_these_tests_is_a_good_one(tmp_path):
    assert read_changed_plan(tmp_path).configurations["3d_fullres"].data_identifier == "p_3d"


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/b", "..", "", 5, None, "a\\b", "c:x"])
def test_a_plan_cannot_lead_out_of_its_folder(tmp_path, name):
    with pytest.raises(InputError, match="data_identifier"):
        read_changed_plan(tmp_path, data_identifier=name)


@pytest.mark.parametrize("changes", [{"batch_size": float("inf")}, {"batch_size": "x"}, {"patch_size": 3}, {"architecture": []}])
def test_a_plan_with_values_of_another_form_is_refused(tmp_path, changes):
    with pytest.raises(InputError):
        read_changed_plan(tmp_path, **changes)


@pytest.mark.parametrize("read", [read_plan, lambda path: open_dataset(path.parent), lambda path: read_folds(path, ["a"])])
def test_json_that_is_nested_beyond_measure_is_refused(tmp_path, read):
    for name in ("dataset.json", "x.json"):
        (tmp_path / name).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("steps", ["0x99999999999999", "0x999999999", "99999999999", "x", "0x-3", "1x3", "0x3 0x"])
def test_a_schedule_that_cannot_be_is_refused_before_memory_is_asked_for(steps):
    with pytest.raises(InputError):
        schedule_from_json({"stages": [{"patch_size": [8, 8, 8], "batch_size": 2}], "stage_of_step": steps, "case_pool_of_step": "1x3"})


@pytest.mark.parametrize("stage", [{"patch_size": [0, -1, 8], "batch_size": 2}, {"patch_size": [8, 8, 8], "batch_size": -1}])
def test_a_schedule_of_sizes_below_one_is_refused(stage):
    with pytest.raises(InputError):
        schedule_from_json({"stages": [stage], "stage_of_step": "0x3", "case_pool_of_step": "1x3"})


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    path = tmp_path_factory.mktemp("nifti") / "good.nii"
    nibabel.save(nibabel.Nifti1Image(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6), np.diag([1, 2, 3, 1.0])), path)
    return path.read_bytes()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_claims_more_than_the_file_holds_is_refused(tmp_path, volume, ending):
    huge = bytearray(volume)
    huge[42:48] = struct.pack("<3h", 30000, 30000, 30000)
    path = tmp_path / f"huge{ending}"
    path.write_bytes(gzip.compress(bytes(huge)) if ending == ".nii.gz" else bytes(huge))
    for read in (read_header, read_volume):
        with pytest.raises(InputError, match="huge"):
            read(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6), st.one_of(st.none(), st.integers(0, 592)))
def test_a_volume_with_any_bytes_changed_or_cut_off_is_read_or_refused(tmp_path, volume, changes, length):
    damaged = bytearray(volume)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    path = tmp_path / "damaged.nii"
    path.write_bytes(bytes(damaged[:length]))
    try:
        assert read_volume(path).array.ndim == 3
    except InputError as error:
        assert "damaged.nii" in str(error)
