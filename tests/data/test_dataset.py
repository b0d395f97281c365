"""A raw dataset is understood as nnU-Net understands it, and each fault is named in one sentence."""

import json
import os
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest

from pgps_jax.data import dataset as dataset_module
from pgps_jax.data.dataset import Labels, check_dataset, fitting_workers, open_dataset, read_case, reading_bytes
from pgps_jax.data.nifti import write_volume
from pgps_jax.errors import InputError

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}


def write_dataset(folder: Path, cases=("a", "b"), channels=("T1", "T2"), **changes) -> Path:
    """Two channels, labels 0 and 1, 4 x 5 x 6 voxels."""
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in cases:
        for channel in range(len(channels)):
            write_volume(folder / f"imagesTr/{case}_{channel:04d}.nii.gz", rng.normal(size=(4, 5, 6)), np.eye(4))
        write_volume(folder / f"labelsTr/{case}.nii.gz", rng.integers(0, 2, (4, 5, 6)), np.eye(4))
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {"background": 0, "organ": 1},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    } | changes
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def test_cases_are_found_with_their_channels_in_order(tmp_path):
    folder = write_dataset(tmp_path / "Dataset001_X", cases=("b_2", "a", "b_10"))
    (folder / "imagesTr/._a_0000.nii.gz").write_text("left behind by macOS")
    dataset = open_dataset(folder)
    assert dataset.name == "Dataset001_X" and dataset.channel_names == ("T1", "T2")
    assert [case.id for case in dataset.cases] == ["a", "b_10", "b_2"]
    assert [path.name for path in dataset.cases[1].images] == ["b_10_0000.nii.gz", "b_10_0001.nii.gz"]
    check_dataset(dataset)
    raw = read_case(dataset.cases[0], dataset.labels)
    assert raw.image.shape == (2, 4, 5, 6) and raw.label.shape == (1, 4, 5, 6) and raw.label.dtype == np.int16
    assert read_case(dataset.cases[0]).label is None


def test_modality_is_the_older_word_for_channel_names(tmp_path):
    folder = write_dataset(tmp_path / "X", channel_names=None, modality={"0": "CT", "1": "PET"})
    assert open_dataset(folder).channel_names == ("CT", "PET")


def test_explicit_paths_may_lie_anywhere_in_the_folder_and_behind_its_links(tmp_path, monkeypatch):
    elsewhere, folder = write_dataset(tmp_path / "elsewhere", cases=("p",)), tmp_path / "X"
    monkeypatch.setenv("MY_SCANS", str(folder / "scans"))
    entry = {"images": ["$MY_SCANS/imagesTr/p_0000.nii.gz", "imagesTr/../scans/imagesTr/p_0001.nii.gz"],
             "label": str(folder / "scans/labelsTr/p.nii.gz")}
    write_dataset(folder, cases=(), dataset={"case 1": entry}, numTraining=1)
    (folder / "scans").symlink_to(elsewhere)
    dataset = open_dataset(folder)
    assert dataset.cases[0].id == "case 1"
    assert dataset.cases[0].images == tuple(folder / f"scans/imagesTr/p_000{i}.nii.gz" for i in range(2))
    check_dataset(dataset)


@pytest.mark.parametrize(
    "path", ["../elsewhere/imagesTr/p_0000.nii.gz", "{tmp}/elsewhere/imagesTr/p_0000.nii.gz", "$MY_SCANS/p_0000.nii.gz"])
def test_an_explicit_path_that_leads_out_of_the_folder_is_refused_with_the_cure(tmp_path, monkeypatch, path):
    elsewhere = write_dataset(tmp_path / "elsewhere", cases=("p",), channels=("CT",))
    monkeypatch.setenv("MY_SCANS", str(elsewhere / "imagesTr"))
    entry = {"images": [path.format(tmp=tmp_path)], "label": "labelsTr/p.nii.gz"}
    folder = write_dataset(tmp_path / "X", cases=(), channels=("CT",), dataset={"p": entry}, numTraining=1)
    with pytest.raises(InputError, match=r"case p in dataset.json.*leads out of.*ln -s"):
        open_dataset(folder)


# ------------------------------------------------------------------------------------------------------------- faults


def change(**changes):
    def fault(folder: Path):
        path = folder / "dataset.json"
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return fault


def replace_volume(name: str, array: np.ndarray, affine=None):
    def fault(folder: Path):
        write_volume(folder / name, array, np.eye(4) if affine is None else affine)

    return fault


def four_axes(folder: Path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5, 4, 2), np.uint8), np.eye(4)), folder / "imagesTr/b_0000.nii.gz")


IMAGE, LABEL = np.ones((4, 5, 6), np.float32), np.ones((4, 5, 6), np.uint8)
NOT_FINITE = np.where(np.arange(120).reshape(4, 5, 6) == 7, np.nan, 1).astype(np.float32)
SHIFTED = np.array([[1, 0, 0, 3.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
OPENING = {  # fault -> words that the message must hold
    "no dataset.json": (lambda f: (f / "dataset.json").unlink(), ["dataset.json", "missing"]),
    "no JSON": (lambda f: (f / "dataset.json").write_text("{labels"), ["dataset.json", "JSON"]),
    "a list": (lambda f: (f / "dataset.json").write_text("[]"), ["dataset.json", "list"]),
    "no labels": (change(labels=None), ['"labels"', "missing"]),
    "no file_ending": (change(file_ending=None), ['"file_ending"', "missing"]),
    "no channels": (change(channel_names=None), ['"channel_names"']),
    "channels from 1": (change(channel_names={"1": "T1", "2": "T2"}), ['"channel_names"', "from 0"]),
    "file ending": (change(file_ending=".png"), [".png"]),
    "no imagesTr": (lambda f: (f / "imagesTr").rename(f / "images"), ["imagesTr", "missing"]),
    "channel missing": (lambda f: (f / "imagesTr/b_0001.nii.gz").unlink(), ["case b", "channel 1 (T2)", "b_0001.nii.gz"]),
    "channel too many": (change(channel_names={"0": "T1"}), ["case a", "a_0001.nii.gz", "too many"]),
    "no channel number": (replace_volume("imagesTr/c.nii.gz", IMAGE), ["c.nii.gz", "CASE_0000.nii.gz"]),
    "label missing": (lambda f: (f / "labelsTr/b.nii.gz").unlink(), ["case b", "label", "b.nii.gz"]),
    "no cases": (lambda f: [p.unlink() for p in (f / "imagesTr").iterdir()], ["no training cases"]),
    "decathlon": (change(file_ending=None, training=[]), ["Decathlon", "convert-msd"]),
    "odd case name": (change(dataset={"../b": {"images": [], "label": ""}}), ["'../b'", "file name"]),
    "explicit path": (change(dataset={"b": {"images": ["x.nii.gz", "y.nii.gz"], "label": "z.nii.gz"}}), ["case b", "x.nii.gz", "missing"]),
    "endless path": (change(dataset={"b": {"images": ["x" * 5000 + ".nii.gz"] * 2, "label": "z.nii.gz"}}), ["case b", "xxx", "missing"]),
    "no Unicode": (change(dataset={"b\ud800": {"images": [], "label": ""}}), ["dataset.json", "surrogates"]),
    "no line": (change(dataset={"b\nc": {"images": [], "label": ""}}), ["'b\\nc'", "file name"]),
    "endless name": (change(dataset={"b" * 400: {"images": [], "label": ""}}), ["bbb", "200 bytes"]),
    "order of lists": (change(labels=REGIONS, regions_class_order=[[1], [2], [3]]), ["regions_class_order", "[[1], [2], [3]]"]),
    "too many labels": (change(labels={"background": 0} | {f"l{i}": i for i in range(1, 40000)}), ["40000", "32766"]),
    "channel of a list": (change(channel_names={"0": "T1", "1": ["T2"]}), ["channel_names", "text"]),
    "explicit channels": (change(dataset={"b": {"images": ["x.nii.gz"], "label": "z.nii.gz"}}), ["case b", "1 images", "T1, T2"]),
}
CHECKING = {
    "numTraining": (change(numTraining=3), ["numTraining", "3", "2"]),
    "channel shape": (replace_volume("imagesTr/b_0001.nii.gz", np.ones((4, 5, 7))), ["case b", "b_0001", "4 x 5 x 7", "4 x 5 x 6"]),
    "label shape": (replace_volume("labelsTr/b.nii.gz", np.ones((3, 5, 6), int)), ["case b", "labelsTr", "3 x 5 x 6"]),
    "label spacing": (replace_volume("labelsTr/b.nii.gz", LABEL, np.diag([1, 1, 2, 1.0])), ["case b", "spacing", "(2.0, 1.0, 1.0)"]),
    "label origin": (replace_volume("labelsTr/b.nii.gz", LABEL, SHIFTED), ["case b", "affine", "3 mm"]),
    "label flipped": (replace_volume("labelsTr/b.nii.gz", LABEL, np.diag([-1, 1, 1, 1.0])), ["case b", "affine", "10 mm"]),
    "unknown label": (replace_volume("labelsTr/b.nii.gz", LABEL * 7), ["case b", "labelsTr", "7", "dataset.json"]),
    "not finite": (replace_volume("imagesTr/b_0001.nii.gz", NOT_FINITE), ["case b", "b_0001", "1 values", "not finite"]),
    "unreadable": (lambda f: (f / "imagesTr/b_0000.nii.gz").write_text("?"), ["b_0000.nii.gz", "cannot be read"]),
    "four axes": (four_axes, ["b_0000.nii.gz", "4 axes"]),
}  # fmt: skip


def test_a_file_whose_name_is_no_unicode_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "X")
    try:
        os.rename(folder / "imagesTr/a_0000.nii.gz", os.fsencode(folder) + b"/imagesTr/\xff_0000.nii.gz")
    except OSError:
        pytest.skip("this file system refuses such names, so there is nothing to guard against")
    with pytest.raises(InputError, match="cannot be a file name") as error:
        open_dataset(folder)
    str(error.value).encode()


def test_a_case_named_as_the_preprocessed_labels_of_another_is_refused(tmp_path):
    with pytest.raises(InputError, match="the case name a_seg is what the preprocessed labels of a are called; rename"):
        open_dataset(write_dataset(tmp_path / "data", cases=("a", "a_seg")))


def test_cases_are_read_side_by_side_only_as_far_as_they_fit_into_the_memory(tmp_path, monkeypatch):
    cases = open_dataset(write_dataset(tmp_path / "data")).cases
    monkeypatch.setattr(dataset_module, "default_workers", lambda: 8)
    sizes = [reading_bytes(case.images) for case in cases]
    for left, workers in ((10**12, 8), (3 * max(sizes), 3), (0, 1)):
        monkeypatch.setattr(dataset_module, "host_bytes_left", lambda left=left: left)
        assert fitting_workers(sizes) == workers
    cases[0].images[0].write_bytes(b"")
    assert reading_bytes(cases[0].images) == 0, "what cannot be read is told where it is read"


@pytest.mark.parametrize("fault", OPENING)
def test_a_fault_in_names_or_dataset_json_is_found_on_opening(tmp_path, fault):
    make, words = OPENING[fault]
    make(write_dataset(tmp_path / "X"))
    with pytest.raises(InputError) as error:
        open_dataset(tmp_path / "X")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("fault", CHECKING)
def test_a_fault_in_the_volumes_is_found_by_the_check(tmp_path, fault):
    make, words = CHECKING[fault]
    make(write_dataset(tmp_path / "X"))
    dataset = open_dataset(tmp_path / "X")
    with pytest.raises(InputError) as error:
        check_dataset(dataset)
    assert all(word in str(error.value) for word in words), error.value


def test_the_check_counts_cases_and_says_how_many_are_faulty(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "X", cases=("a", "b", "c")))
    seen = []
    check_dataset(dataset, progress=lambda done, total: seen.append((done, total)), workers=2)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for case in "bc":
        replace_volume(f"labelsTr/{case}.nii.gz", LABEL * 7)(dataset.folder)
    with pytest.raises(InputError, match=r"case b.* 1 more case"):
        check_dataset(dataset)


# ------------------------------------------------------------------------------------------------------------- labels


def test_exclusive_labels_have_one_output_each_and_background():
    labels = Labels.from_json({"labels": {"background": 0, "liver": 2, "tumour": 1, "ignore": 3}})
    assert labels.foreground == (2, 1) and labels.all_labels == (0, 1, 2)
    assert labels.num_outputs == 3 and labels.ignore == 3 and not labels.has_regions and labels.raw_values == ()


def test_regions_have_one_output_each_and_none_for_background():
    labels = Labels.from_json({"labels": REGIONS | {"ignore": 4}, "regions_class_order": [1, 2, 3]})
    assert labels.foreground == ((1, 2, 3), (2, 3), 3) and labels.num_outputs == 3
    assert labels.all_labels == (0, 1, 2, 3) and labels.ignore == 4 and labels.regions_class_order == (1, 2, 3)


def test_a_list_of_one_label_is_no_region():
    assert not Labels.from_json({"labels": {"background": 0, "liver": [1]}}).has_regions


def test_labels_of_any_integers_are_numbered_without_gaps_and_can_be_restored():
    labels = Labels.from_json({"labels": {"background": 0, "b": 500, "a": -20, "ignore": 7}})
    assert labels.values == (0, 2, 1) and labels.ignore == 3 and labels.raw_values == (0, -20, 500, 7)
    raw = np.array([[0, 500, 7], [-20, 0, 500]], np.float32)
    inside = labels.encode(raw)
    np.testing.assert_array_equal(inside, [[0, 2, 3], [1, 0, 2]])
    np.testing.assert_array_equal(labels.decode(inside), raw)
    assert labels.in_files == Labels(("background", "b", "a"), (0, 500, -20), 7)


def test_regions_of_any_integers_keep_their_members():
    labels = Labels.from_json({"labels": {"background": 0, "all": [10, 30], "core": 30}, "regions_class_order": [10, 30]})
    assert labels.values == (0, (1, 2), 2) and labels.regions_class_order == (1, 2)
    assert labels.in_files.values == (0, (10, 30), 30) and labels.in_files.regions_class_order == (10, 30)


def test_values_that_are_no_labels_are_listed():
    labels = Labels(("background", "organ"), (0, 1))
    with pytest.raises(ValueError, match=r"-3, 0\.5, 2, nan"):
        labels.encode(np.array([0, 1, 2, -3, 0.5, np.nan, 2], np.float32))
    np.testing.assert_array_equal(labels.encode(np.array([0.99999994, 1e-7], np.float32)), [1, 0])


def test_a_large_label_map_is_translated_in_pieces_that_take_little_memory():
    labels = Labels(("background", "a", "b"), (0, 1, 2), raw_values=(0, 500, -3))
    raw = np.random.default_rng(0).choice(np.array([0, 500, -3], np.float32), (2, 2**11, 2**11))
    tracemalloc.start()
    encoded = labels.encode(raw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert encoded.dtype == np.int16 and peak < 4 * raw.size, "the int16 result takes half of it"
    np.testing.assert_array_equal(labels.decode(encoded), raw)
    raw[0, 0, 0], raw[-1, -1, -1] = 7, -7
    with pytest.raises(ValueError, match=r"-7, 7$"):
        labels.encode(raw)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"labels": {"organ": 1}}, "background"),
        ({"labels": {"background": 1, "organ": 2}}, "background"),
        ({"labels": {"0": "background", "1": "organ"}}, "Decathlon"),
        ({"labels": {"background": 0, "organ": "1"}}, "organ"),
        ({"labels": {"background": 0, "organ": 1.5}}, "organ"),
        ({"labels": {"background": 0, "organ": True}}, "organ"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "same value"),
        ({"labels": {"background": 0, "a": 1, "ignore": [2, 3]}}, "ignore"),
        ({"labels": {"background": 0, "a": 1, "ignore": 1}}, "ignore"),
        ({"labels": REGIONS}, "regions_class_order"),
        ({"labels": REGIONS, "regions_class_order": [1, 2]}, "3 foreground regions"),
        ({"labels": REGIONS, "regions_class_order": [1, 2, 9]}, "regions_class_order"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(content, words):
    with pytest.raises(InputError, match=words):
        Labels.from_json(content)


def test_a_real_dataset_has_no_fault(real_data):
    dataset = open_dataset(real_data / "SarcomaPETCT")
    assert len(dataset.cases) == 51
    check_dataset(dataset)
