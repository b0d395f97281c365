"""Files from strangers: whatever is in them, they are read or refused with a sentence; they cannot lead out of their folder."""

import gzip
import json
import struct

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgps_jax.config import RunConfig, from_json
from pgps_jax.curriculum import schedule_from_json
from pgps_jax.data.dataset import open_dataset
from pgps_jax.data.folds import read_folds
from pgps_jax.data.nifti import read_header, read_volume
from pgps_jax.data.plan import read_plan
from pgps_jax.errors import InputError
from pgps_jax.inference import read_inference
from pgps_jax.json_file import read_json

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


@pytest.mark.parametrize(
    "steps", ["0x99999999999999", "0x999999999", "99999999999", "x", "0x-3", "1x3", "0x3 0x", "0x999999999999 0x-999999999996"])
def test_a_schedule_that_cannot_be_is_refused_before_memory_is_asked_for(steps):
    with pytest.raises(InputError):
        schedule_from_json({"stages": [{"patch_size": [8, 8, 8], "batch_size": 2}], "stage_of_step": steps, "case_pool_of_step": "1x3"})


@pytest.mark.parametrize("stage", [{"patch_size": [0, -1, 8], "batch_size": 2}, {"patch_size": [8, 8, 8], "batch_size": -1},
                                   {"patch_size": [8, 8, 10**12], "batch_size": 2}])
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


def network(**changes):
    return {"architecture": {"network_class_name": "x.PlainConvUNet", "arch_kwargs":
                             PLAN["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] | changes}}


@pytest.mark.parametrize("changes", [
    {"patch_size": [10**12] * 3}, {"batch_size": 10**12}, {"spacing": [0, 1, 1]}, {"spacing": [float("nan"), 1, 1]}, {"patch_size": "888"},
    {"normalization_schemes": [["ZScore"]]}, {"previous_stage": 3}, network(n_stages=10**12, features_per_stage=4),
    network(features_per_stage=[4, 10**9]), network(n_conv_per_stage=[2, 10**9]), network(strides=[[1, 1, 1], [0, 2, 2]]),
    network(kernel_sizes=[[3, 3, 3]]),
    {"architecture": None} | {"UNet_class_name": "PlainConvUNet", "pool_op_kernel_sizes": [[1, 1, 1]] * 99},
])
def test_a_plan_of_absurd_numbers_is_refused_before_anything_is_built_of_it(tmp_path, changes):
    with pytest.raises(InputError, match="3d_fullres"):
        read_changed_plan(tmp_path, **changes)


@pytest.mark.parametrize("parents", [
    {"c1": "c2", "c2": "c1"}, {f"c{i}": f"c{i + 1}" for i in range(1, 5000)}, {"c1": ["c2"]}, {"c1": "none"}])
def test_inheritance_in_a_circle_or_without_end_is_refused(tmp_path, parents):
    entry = PLAN["configurations"]["3d_fullres"]
    plan = PLAN | {"configurations": {f"c{i}": entry for i in range(1, 5001)} | {n: {"inherits_from": p} for n, p in parents.items()}}
    (tmp_path / "plans.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"inherit|unexpected form"):
        read_plan(tmp_path / "plans.json")


@pytest.mark.parametrize("text, words", [
    ("1" * 401, "64 bits"), ("[" * 70 + "]" * 70, "levels"), ('"\\ud800"', "surrogates"),
    ("[" * 10**6, "nested|recursion"), ("\xff", "JSON"),
    ("1" * 5000, "digits"), ("NaN", "NaN"), ("[1]", "expected a JSON object, found a list"),
])
def test_json_beyond_reason_is_refused(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=rf"x\.json.*({words})"):
        read_json(path, finite=True)


@pytest.mark.parametrize("values", [
    {"epochs": 10**30}, {"checkpoint_minutes": 10**400}, {"checkpoint_minutes": float("nan")}, {"checkpoint_minutes": float("inf")},
    {"dataset": "x" * 10**5}, {"dataset": "a\0b"}, {"fold": [[]]}, {"curriculum": {"mode": ["constant"]}}, {"optim": {"momentum": "0.9"}},
])
def test_a_config_of_absurd_values_is_refused_naming_the_key(values):
    with pytest.raises(InputError, match=f"config.json: {next(iter(values))}"):
        from_json(RunConfig, {"dataset": "x"} | values, "config.json")


INFERENCE = {"configuration": "3d_fullres", "mirror_axes": [0, 1, 2], "orientation": "RAS"}


@pytest.mark.parametrize("changes, words", [
    ({}, None), ({"orientation": None}, None), ({"swap_axis": 2, "swap_pairs": [[1, 2]]}, None),
    ({"configuration": "2d"}, "not in the plan"), ({"configuration": ["3d_fullres"]}, "configuration"), ({"mirror_axes": [0, 3]}, "axes"),
    ({"mirror_axes": [0, 0]}, "axes"), ({"mirror_axes": 10**18}, "mirror_axes"), ({"orientation": "RRS"}, "orientation"),
    ({"orientation": "?"}, "orientation"), ({"swap_axis": -1}, "axes"), ({"swap_pairs": [[1]]}, "swap_pairs"), ({"x": 1}, "unknown keys x"),
])
def test_inference_json_is_read_when_it_fits_the_plan(tmp_path, changes, words):
    plan = read_changed_plan(tmp_path)
    (tmp_path / "inference.json").write_text(json.dumps(INFERENCE | changes))
    if words is None:
        assert read_inference(tmp_path, plan).configuration == "3d_fullres"
    else:
        with pytest.raises(InputError, match=rf"inference\.json.*{words}"):
            read_inference(tmp_path, plan)
