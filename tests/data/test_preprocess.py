"""Whole preprocessing against nnU-Net's results, and what happens to a dataset when something goes wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pgps_jax.data import preprocess
from pgps_jax.data.dataset import Labels, RawCase, open_dataset, read_case
from pgps_jax.data.nifti import write_volume
from pgps_jax.data.plan import Plan
from pgps_jax.data.preprocess import preprocess_case, preprocess_dataset, sample_locations
from pgps_jax.data.store import CaseStore, Preprocessed
from pgps_jax.errors import InputError


def make_plan(spacing, schemes, use_mask, intensities, transpose=(0, 1, 2), patch=(16, 16, 16)) -> Plan:
    """A plan of which only what preprocessing needs is meaningful."""
    kwargs = {"order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": [20.0] * len(patch),
        "spacing": list(spacing),
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": list(use_mask),
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, **kwargs},
        "resampling_fn_seg_kwargs": {"is_seg": True, **kwargs, "order": 1},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, **kwargs, "order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": 2,
                "features_per_stage": [4, 8],
                "conv_op": f"torch.nn.modules.conv.Conv{len(patch)}d",
                "kernel_sizes": [[3] * len(patch)] * 2,
                "strides": [[1] * len(patch), [2] * len(patch)],
                "n_conv_per_stage": [2, 2],
                "n_conv_per_stage_decoder": [2],
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{len(patch)}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    content = {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": np.argsort(transpose).tolist(),
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": intensities,
    }
    return Plan.from_json(content)


def labels_of(*names, **more) -> Labels:
    return Labels.from_json({"labels": {"background": 0, **{name: i + 1 for i, name in enumerate(names)}, **more}})


def check_against_peer(case: Preprocessed, arrays: dict, sidecar: dict) -> None:
    stored = sidecar["stored_region"]
    region = (slice(None),) * 4 if stored == "full arrays" else (slice(None), *(slice(a, b) for a, b in stored))
    assert list(case.image.shape) == sidecar["full_data"]["shape"] and case.image.dtype == np.float32
    np.testing.assert_allclose(case.image[region], arrays["data"], rtol=1e-7, atol=2e-5)
    assert case.image.sum(dtype=np.float64) == pytest.approx(sidecar["full_data"]["sum"], rel=1e-4, abs=0.5)
    assert case.seg.dtype == np.int16
    np.testing.assert_array_equal(case.seg[region], arrays["seg"])
    values, counts = np.unique(case.seg, return_counts=True)
    assert dict(zip(map(str, values), counts, strict=True)) == sidecar["full_seg"]["label_counts"]
    peers = sidecar["properties"]
    for key in ("shape_before_cropping", "bbox_used_for_cropping", "shape_after_cropping_and_before_resampling"):
        assert case.properties[key] == peers[key]
    assert case.properties["spacing"] == pytest.approx(peers["spacing"])
    assert {str(k): len(v) for k, v in case.locations.items()} == peers["class_locations_counts"]
    for label, voxels in case.locations.items():  # even the same voxels in the same order
        np.testing.assert_array_equal(voxels[:3], np.array(peers["class_locations_first_rows"][str(label)])[:, 1:])
    json.dumps(case.properties)


@pytest.mark.parametrize("name", ["anisotropic_masked", "isotropic_transposed"])
def test_a_synthetic_case_comes_out_as_from_nnunet(golden, name):
    arrays, sidecar = golden(f"preprocess/case_{name}")
    raw, about = golden(f"preprocess/case_{name}_input")
    plan = make_plan(
        sidecar["target_spacing"], sidecar["normalization_schemes"], sidecar["use_mask_for_norm"],
        sidecar["intensity_properties"], sidecar["transpose_forward"],
    )  # fmt: skip
    image = np.stack([raw["image_0"].T, raw["image_1"].T]).astype(np.float32)
    spacing = tuple(float(np.float32(zoom)) for zoom in about["zooms_xyz"][::-1])
    case = RawCase(image, raw["label"].T[None].astype(np.int16), spacing, np.eye(4))
    labels = labels_of(*"abc"[: len(sidecar["properties"]["class_locations_counts"])])
    check_against_peer(preprocess_case(case, plan, plan.configurations["3d_fullres"], labels), arrays, sidecar)


REAL = {
    "Hippocampus": ("Dataset004_Hippocampus", ["hippocampus_160", "hippocampus_225", "hippocampus_243"]),
    "SarcomaPETCT": ("Dataset101_SarcomaPETCT", ["STS_019", "STS_025", "STS_042", "other_spacing_isotropic"]),
    "SunnybrookCMR": (
        "Dataset102_Sunnybrook", ["SC-HF-NI-14_ph03", "SC-HYP-01_ph08", "SC-HYP-11_ph07", "other_spacing_separate_z"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case_id"), [(name, case) for name in REAL for case in REAL[name][1]])
def test_a_real_case_comes_out_as_from_nnunet(real_data, real_parity, name, case_id):
    folder = real_parity / "preprocess" / REAL[name][0]
    sidecar = json.loads((folder / f"{case_id}.json").read_text())
    content = json.loads((real_parity / "plans" / REAL[name][0] / "nnUNetPlans.json").read_text())
    content["configurations"]["3d_fullres"]["spacing"] = sidecar["target_spacing"]
    plan = Plan.from_json(content)
    dataset = open_dataset(real_data / name)
    (case,) = [case for case in dataset.cases if case.id == sidecar.get("source_case", case_id)]
    made = preprocess_case(
        read_case(case, dataset.labels), plan, plan.configurations["3d_fullres"], dataset.labels
    )
    check_against_peer(made, dict(np.load(folder / f"{case_id}.npz")), sidecar)


def test_a_2d_configuration_keeps_the_slices():
    plan = make_plan((2.0, 0.5), ["NoNormalization"], [False], {}, patch=(16, 16))
    image = np.ones((1, 5, 20, 20), np.float32)
    raw = RawCase(image, np.zeros((1, 5, 20, 20), np.int16), (1.0, 1.0, 1.0), np.eye(4))
    (configuration,) = plan.configurations.values()
    assert preprocess_case(raw, plan, configuration, labels_of("a")).image.shape == (1, 5, 10, 40)


def test_a_case_without_labels_is_marked_outside_only():
    plan = make_plan((1.0, 1.0, 1.0), ["NoNormalization"], [False], {})
    image = np.zeros((1, 6, 7, 8), np.float32)
    image[0, 1:5, 2:5, 3] = image[0, 1, 2, 4] = 1
    raw = RawCase(image, None, (1.0, 1.0, 1.0), np.eye(4))
    made = preprocess_case(raw, plan, plan.configurations["3d_fullres"], labels_of("a"))
    np.testing.assert_array_equal(made.seg[0], np.where(image[0, 1:5, 2:5, 3:5] > 0, 0, -1))
    assert made.locations[1].shape == (0, 3)


def test_locations_are_bounded_true_and_the_same_every_time():
    seg = np.random.default_rng(0).integers(-1, 4, (1, 60, 130, 300)).astype(np.int16)
    labels = Labels.from_json(
        {"labels": {"background": 0, "both": [1, 2], "two": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    )
    locations = sample_locations(seg, labels)
    assert list(locations) == [(1, 2), 2, (-1, 0, 1, 2)]
    for label, voxels in locations.items():
        total = np.isin(seg, label).sum()
        assert len(voxels) == max(min(10_000, total), int(np.ceil(0.01 * total)))
        assert len(np.unique(voxels, axis=0)) == len(voxels) and voxels.dtype == np.int32
        assert np.isin(seg[0][tuple(voxels.T)], label).all()
    again = sample_locations(seg, labels)
    assert all(np.array_equal(again[label], voxels) for label, voxels in locations.items())
    assert len(locations[(-1, 0, 1, 2)]) > 10_000  # one in a hundred of a large class


@pytest.mark.parametrize("kind", ["labels", "regions"])
def test_voxels_of_classes_regions_and_what_is_annotated_are_nnunets(golden, kind):
    arrays, sidecar = golden("preprocess/locations")
    case = sidecar["cases"][kind]
    made = sample_locations(arrays["seg"].astype(np.int16), Labels.from_json(case["dataset_json"]))
    assert list(made) == [tuple(key) if isinstance(key, list) else key for key in case["keys"]]
    assert [len(voxels) for voxels in made.values()] == case["counts"]
    for number, voxels in enumerate(made.values()):
        np.testing.assert_array_equal(voxels[:200], arrays[f"{kind}_{number}"])


# ----------------------------------------------------------------------------------------------------------- datasets


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "Dataset001_Test"
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(4):
        write_volume(folder / "imagesTr" / f"case_{i}_0000.nii.gz", rng.normal(5, 1, (8, 9, 10 + i)), np.eye(4))
        write_volume(folder / "labelsTr" / f"case_{i}.nii.gz", rng.integers(0, 3, (8, 9, 10 + i)), np.eye(4))
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return open_dataset(folder)


PLAN = make_plan((1.0, 1.0, 1.0), ["ZScoreNormalization"], [False], {}, patch=(8, 8, 8))
CONFIGURATION = PLAN.configurations["3d_fullres"]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_processes_store_what_one_process_stores_and_a_restart_does_nothing_twice(dataset, tmp_path, monkeypatch):
    seen, alone = [], []
    preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "two", 2, lambda *counts: seen.append(counts))
    assert seen == [(i, 4) for i in range(5)]
    assert "OMP_NUM_THREADS" not in os.environ
    preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "one", 1)
    two, one = CaseStore(tmp_path / "two"), CaseStore(tmp_path / "one")
    assert two.ids == one.ids == tuple(f"case_{i}" for i in range(4))
    for case in two.ids:
        np.testing.assert_array_equal(two.open(case).image[:], one.open(case).image[:])
        np.testing.assert_array_equal(two.open(case).seg[:], one.open(case).seg[:])
        np.testing.assert_array_equal(two.open(case).locations[2], one.open(case).locations[2])

    before = times(tmp_path / "one")
    (tmp_path / "one" / "properties" / "case_2.json").unlink()
    preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "one", 1, lambda *counts: alone.append(counts))
    assert alone == [(3, 4), (4, 4)]
    changed = {name for name, time in times(tmp_path / "one").items() if before.get(name) != time}
    assert changed == {"case_2.b2nd", "case_2_seg.b2nd", "case_2_locations.npy", "case_2.json"}


def test_a_changed_plan_or_file_redoes_what_depends_on_it(dataset, tmp_path):
    store = tmp_path / "store"
    preprocess_dataset(dataset, PLAN, CONFIGURATION, store, 1)
    before = times(store)
    write_volume(dataset.cases[0].images[0], np.full((8, 9, 10), 3.0), np.eye(4))
    preprocess_dataset(dataset, PLAN, CONFIGURATION, store, 1)
    changed = {name for name, time in times(store).items() if before[name] != time}
    assert changed == {"case_0.b2nd", "case_0_seg.b2nd", "case_0_locations.npy", "case_0.json"}
    other = make_plan((2.0, 2.0, 2.0), ["ZScoreNormalization"], [False], {}, patch=(8, 8, 8))
    preprocess_dataset(dataset, other, other.configurations["3d_fullres"], store, 1)
    assert CaseStore(store).open("case_1").image.shape == (1, 4, 4, 6)


def test_cases_that_nnunet_stored_are_left_alone(dataset, tmp_path):
    for name in ("case_1.pkl", "case_1.b2nd", "case_1_seg.b2nd", "case_2.pkl", "case_2.npz"):  # the second by an old version
        (tmp_path / name).write_bytes(b"nnU-Net's")
    preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path, 1)
    assert all((tmp_path / name).read_bytes() == b"nnU-Net's" for name in ("case_1.pkl", "case_1.b2nd", "case_2.pkl"))
    assert CaseStore(tmp_path).ids == ("case_0", "case_1", "case_3")


@pytest.mark.parametrize("name", ["case_1.b2nd", "case_1_seg.b2nd", "properties/case_1.json", "properties/case_1_locations.npy"])
def test_any_file_of_a_case_that_is_deleted_is_made_again(dataset, tmp_path, name):
    preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path, 1)
    (tmp_path / name).unlink()
    preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path, 1)
    assert CaseStore(tmp_path).open("case_1").image.shape == (1, 8, 9, 11)


def test_values_that_are_not_finite_are_refused_with_case_and_channel(dataset, tmp_path):
    image = np.ones((8, 9, 11))
    image[1, 2, 3] = np.nan
    write_volume(dataset.cases[1].images[0], image, np.eye(4))
    with pytest.raises(InputError, match=r"case case_1: .*case_1_0000\.nii\.gz holds 1 values that are not finite"):
        preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "store", 1)


def test_ct_normalisation_without_statistics_is_refused_before_the_work(dataset, tmp_path):
    plan = make_plan((1.0, 1.0, 1.0), ["CTNormalization"], [False], {"0": {"mean": 1.0}}, patch=(8, 8, 8))
    with pytest.raises(InputError, match="channel 0 by CTNormalization but has no percentile_00_5, percentile_99_5, std"):
        preprocess_dataset(dataset, plan, plan.configurations["3d_fullres"], tmp_path / "store", 1)
    assert not list((tmp_path / "store").iterdir())


def test_a_reference_is_copied_again_when_its_label_was_corrected(dataset, tmp_path):
    label = dataset.cases[1].label
    preprocess.keep_references(dataset, tmp_path / "references")
    before = times(tmp_path / "references")
    preprocess.keep_references(dataset, tmp_path / "references")
    assert times(tmp_path / "references") == before and len(before) == 4
    write_volume(label, np.zeros((8, 9, 11), np.uint8), np.eye(4))
    preprocess.keep_references(dataset, tmp_path / "references")
    assert (tmp_path / "references" / label.name).read_bytes() == label.read_bytes()
    assert {name for name, time in times(tmp_path / "references").items() if before[name] != time} == {label.name}


def test_no_more_processes_are_started_than_fit_into_the_memory(dataset, tmp_path, monkeypatch):
    used = []
    run = preprocess._run
    monkeypatch.setattr(preprocess, "_run", lambda tasks, workers: used.append(workers) or run(tasks, 1))
    monkeypatch.setattr("pgps_jax.data.dataset.default_workers", lambda: 16)
    for left, workers in ((10**12, 4), (150_000, 2), (1, 1)):
        monkeypatch.setattr("pgps_jax.data.dataset.host_bytes_left", lambda left=left: left)
        preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / str(left), None)
        assert used.pop() == workers


@pytest.mark.parametrize("workers", [1, 2])
def test_a_faulty_case_is_named_and_the_others_are_stored(dataset, tmp_path, workers):
    damaged = dataset.cases[2].label
    write_volume(damaged, np.full((8, 9, 12), 7), np.eye(4))
    with pytest.raises(InputError, match=r"1 of 4 cases .*case_2\.nii\.gz"):
        preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "store", workers)
    assert CaseStore(tmp_path / "store").ids == ("case_0", "case_1", "case_3")
    assert not list((tmp_path / "store").rglob("*.tmp"))


def test_too_little_space_is_said_before_any_work(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(preprocess.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="free some space"):
        preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "store", 1)
    assert not list((tmp_path / "store").iterdir())


def test_a_full_disk_is_an_input_error_and_a_bug_is_not(dataset, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(preprocess.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preprocess, "write_case", full)
    with pytest.raises(InputError, match=r"Case case_0 .*is full"):
        preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "store", 1)
    monkeypatch.setattr(preprocess, "write_case", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        preprocess_dataset(dataset, PLAN, CONFIGURATION, tmp_path / "store", 1)
    assert "case_0" in error.value.__notes__[0]


def test_worker_processes_import_neither_jax_nor_the_program_that_starts_them(dataset, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN.to_json()))
    script = tmp_path / "script.py"
    script.write_text(f"""
print("running the script")
import json, sys
import pgps_jax.data.preprocess as p
from pgps_jax.data.dataset import open_dataset
from pgps_jax.data.plan import Plan
print("jax imported:", "jax" in sys.modules)
plan = Plan.from_json(json.load(open({str(plan)!r})))
(configuration,) = plan.configurations.values()
p.preprocess_dataset(open_dataset({str(dataset.folder)!r}), plan, configuration, {str(tmp_path / "store")!r}, 2)
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env=with_this_package())
    assert done.stdout.splitlines() == ["running the script", "jax imported: False"]
    assert len(CaseStore(tmp_path / "store").ids) == 4


def with_this_package() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(preprocess.__file__).parents[2])}


class Deadly:
    """A case that kills the process that it comes to, as the system does when memory runs out."""

    def __init__(self, name):
        self.id = name

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_process_is_told_with_the_cases_in_work_and_the_free_memory():
    with pytest.raises(InputError, match=r"one of the cases a, b; .*(GiB|MiB) are free now.*fewer --workers \(now 2\)"):
        list(preprocess._run([(Deadly(name),) for name in "abc"], 2))


def test_processes_that_are_killed_while_cases_are_still_handed_out_are_told_too(monkeypatch):
    class Broken:
        def __init__(self, *_, **__):
            pass

        def submit(self, *_):
            raise preprocess.BrokenProcessPool

        def shutdown(self, **_):
            pass

    monkeypatch.setattr(preprocess, "ProcessPoolExecutor", Broken)
    with pytest.raises(InputError, match="one of the cases a, b; "):
        list(preprocess._run([(Deadly(name),) for name in "abc"], 2))


def test_running_out_of_memory_is_told_with_case_shape_and_free_memory(dataset, tmp_path, monkeypatch):
    def too_much(*_):
        raise MemoryError

    monkeypatch.setattr(preprocess, "preprocess_case", too_much)
    told = preprocess._preprocess_and_store(dataset.cases[0], PLAN, CONFIGURATION, dataset.labels, tmp_path, "")
    assert dataset.cases[0].id in told and "channels of" in told and "are free; use fewer --workers" in told
