"""The doctor on datasets with one fault of each kind, its report, and the repairs that follow from it."""

import gzip
import json
import re
import struct

import nibabel
import numpy as np
import pytest

from pgps_jax.data.dataset import check_dataset, open_dataset
from pgps_jax.data.doctor import examine, fits_better_mirrored, flipped_axes, header_of
from pgps_jax.data.findings import RULES
from pgps_jax.data.nifti import read_volume, reorient, write_volume
from pgps_jax.data.repair import repair
from pgps_jax.errors import InputError
from pgps_jax.report.doctor_page import write_doctor_report

SHAPE = (12, 14, 16)
AFFINE = np.array([[-1.0, 0, 0, 20], [0, -1.2, 0, 30], [0, 0, 2.0, -10], [0, 0, 0, 1]])
FLIP_D = np.diag([1.0, 1, -1, 1])  # of the file's z, the array's first axis


def blob(seed):
    """Image with a bright body off the centre and a brighter core in it, and its label map."""
    rng = np.random.default_rng(seed)
    d, h, w = np.ogrid[tuple(slice(n) for n in SHAPE)]
    distance = np.sqrt(((d - 3) / 0.7) ** 2 + (h - 4) ** 2 + (w - 5) ** 2)
    label = (distance < 4.5).astype(np.uint8) + (distance < 2.5)
    return (10 * label + rng.normal(0, 1, SHAPE)).astype(np.float32), label


@pytest.fixture
def healthy(tmp_path):
    """A dataset of 6 cases with nothing wrong; two channels."""
    folder = tmp_path / "Dataset001_Healthy"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    write_json(folder, {
        "channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "body": 1, "core": 2},
        "numTraining": 6, "file_ending": ".nii.gz"})
    for k, case in enumerate("abcdef"):
        image, label = blob(k)
        write_volume(image_path(folder, case), image, AFFINE)
        write_volume(image_path(folder, case, 1), 100 - image, AFFINE)
        write_volume(label_path(folder, case), label, AFFINE)
    return folder


def write_json(folder, content):
    (folder / "dataset.json").write_text(json.dumps(content))


def change_json(folder, **changes):
    write_json(folder, json.loads((folder / "dataset.json").read_text()) | changes)


def image_path(folder, case="b", channel=0):
    return folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz"


def label_path(folder, case="b"):
    return folder / "labelsTr" / f"{case}.nii.gz"


def rewrite(path, change=lambda array: array, affine=None):
    volume = read_volume(path)
    write_volume(path, change(volume.array), volume.affine if affine is None else affine)


def rewrite_label(path, change=lambda array: array, affine=None):
    rewrite(path, lambda array: change(array.astype(np.int32)), affine)


def set_voxel(value, at=(0, 0, 0)):
    def change(array):
        array = array.copy()
        array[at] = value
        return array

    return change


def write_4d(folder):
    channels = np.stack([read_volume(image_path(folder, "b", c)).array.T for c in (0, 1)], -1)
    nibabel.save(nibabel.Nifti1Image(channels, AFFINE), image_path(folder))
    image_path(folder, "b", 1).unlink()


def copy_images(folder, source, target):
    for c in (0, 1):
        image_path(folder, target, c).write_bytes(image_path(folder, source, c).read_bytes())


def turn_all(folder, case, codes):
    """Store a case in another orientation, consistently."""
    for path in (image_path(folder, case, 0), image_path(folder, case, 1), label_path(folder, case)):
        volume = read_volume(path)
        array, affine = reorient(volume.array, volume.affine, codes)
        write_volume(path, array.astype(np.int32) if path == label_path(folder, case) else array, affine)


def crop_all(folder, case):
    for path in (image_path(folder, case, 0), image_path(folder, case, 1)):
        rewrite(path, lambda array: array[:3])
    rewrite_label(label_path(folder, case), lambda array: array[:3])


def scale_all(folder, case):
    for path in (image_path(folder, case, 0), image_path(folder, case, 1), label_path(folder, case)):
        change = rewrite_label if path == label_path(folder, case) else rewrite
        change(path, affine=AFFINE @ np.diag([0.1, 0.1, 0.1, 1]))


def rare_class(folder):
    for case in "acdef":
        rewrite_label(label_path(folder, case), lambda array: np.minimum(array, 1))


TURNED = AFFINE @ FLIP_D
# kind -> (what to do to the healthy dataset, the case that must be named, what must be said of it)
FAULTS = {
    "dataset-json": (lambda f: change_json(f, labels={"body": 1, "core": 2}), "", "background"),
    "case-count": (lambda f: change_json(f, numTraining=9), "", "numTraining is 9, found 6"),
    "unreadable": (lambda f: image_path(f).write_bytes(b"no image"), "b", "b_0000.nii.gz"),
    "four-dimensional": (write_4d, "b", "b_0000.nii.gz: 2 volumes"),
    "missing-channel": (lambda f: image_path(f, "b", 1).unlink(), "b", "channel 1"),
    "surplus-channel": (lambda f: rewrite_to(image_path(f), image_path(f, "b", 2)), "b", "b_0002.nii.gz"),
    "missing-label": (lambda f: label_path(f).unlink(), "b", "labelsTr/b"),
    "label-without-image": (lambda f: rewrite_to(label_path(f), label_path(f, "z")), "z", "z.nii.gz"),
    "shape-mismatch": (lambda f: rewrite_label(label_path(f), lambda a: a[:-1]), "b", "11 x 14 x 16 voxels, the image has 12 x 14"),
    "geometry-mismatch": (lambda f: rewrite_label(label_path(f), affine=shifted(5)), "b", "up to 5 mm apart"),
    "flipped-axis": (lambda f: rewrite_label(label_path(f), affine=TURNED), "b", "array axis 0"),
    "label-looks-flipped": (lambda f: rewrite_label(label_path(f), lambda a: a[:, ::-1]), "b", "array axis 1"),
    "not-finite": (lambda f: rewrite(image_path(f), set_voxel(np.nan)), "b", "b_0000.nii.gz: 1 of 2688 voxels"),
    "constant-image": (lambda f: rewrite(image_path(f), lambda a: a * 0 + 7), "b", "7 everywhere"),
    "tiny-image": (lambda f: crop_all(f, "b"), "b", "3 x 14 x 16"),
    "odd-spacing": (lambda f: scale_all(f, "b"), "b", r"0.2 x 0.12 x 0.1 mm, the median is 2 x 1.2 x 1 mm"),
    "fractional-label": (lambda f: rewrite(label_path(f), set_voxel(1.5)), "b", "1.5"),
    "unexpected-label": (lambda f: rewrite_label(label_path(f), set_voxel(9)), "b", r"9 \(1 voxels\)"),
    "empty-label": (lambda f: rewrite_label(label_path(f), lambda a: a * 0), "b", "b.nii.gz"),
    "class-without-voxels": (
        lambda f: change_json(f, labels={"background": 0, "body": 1, "core": 2, "shell": 3}), "", r"shell \(label 3\)"),
    "rare-class": (rare_class, "", r"core \(label 2\): 1 of 6 cases"),
    "duplicate-images": (lambda f: copy_images(f, "a", "b"), "b", "same voxels as a"),
    "left-right-labels": (
        lambda f: change_json(f, labels={"background": 0, "lung_left": 1, "lung_right": 2}), "",
        "lung_left and lung_right: array axis 2"),
    "orientation-mixture": (lambda f: turn_all(f, "b", "RAS"), "b", "RAS, while 5 cases are LPS"),
    "huge-case": (None, "b", "12 x 14 x 16 voxels need about"),
}  # fmt: skip


def rewrite_to(source, target):
    target.write_bytes(source.read_bytes())


def shifted(mm):
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def test_a_healthy_dataset_has_no_findings(healthy):
    examination = examine(healthy)
    assert examination.findings == ()
    assert [case.id for case in examination.cases] == list("abcdef")


def test_there_is_a_fault_for_every_kind_of_finding():
    assert set(FAULTS) == set(RULES)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_found_in_its_case(healthy, kind):
    fault, case, said = FAULTS[kind]
    memory = None
    if fault is None:
        memory = 1000
    else:
        fault(healthy)
    findings = {finding.kind: finding for finding in examine(healthy, memory=memory).findings}
    assert kind in findings, f"found {sorted(findings)} only"
    finding = findings[kind]
    assert case in finding.cases and (kind == "huge-case" or finding.cases == (case,))
    assert re.search(said, finding.details[finding.cases.index(case)])
    assert finding.severity in ("error", "warning", "note") and finding.cure and finding.reason
    others = set(findings) - {kind} - ALONG.get(kind, set())
    assert not others, f"{kind} was taken for {others} as well"


# What a fault brings with it.
ALONG = {
    "four-dimensional": {"missing-channel"},
    "unreadable": {"geometry-mismatch"},
}


def test_only_a_dataset_without_readable_json_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        examine(tmp_path / "nowhere")
    with pytest.raises(InputError, match="missing"):
        examine(tmp_path)


def test_a_decathlon_folder_is_sent_to_its_conversion(healthy):
    write_json(healthy, {"modality": {"0": "CT"}, "labels": {"0": "background"}, "training": []})
    with pytest.raises(InputError, match="`convert-msd"):
        examine(healthy)


def contradict_affine(path):
    """Spacing 1 in the header beside the right sform, as some tools write it."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:92] = struct.pack("<3f", 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(content)))


def test_a_spacing_that_contradicts_the_image_is_found_and_repaired_since_training_refuses_it(healthy, tmp_path):
    contradict_affine(label_path(healthy))
    with pytest.raises(InputError, match=r"spacing \(1\.0, 1\.0, 1\.0\)"):
        check_dataset(open_dataset(healthy))
    (finding,) = examine(healthy).findings
    assert finding.kind == "geometry-mismatch" and finding.details == ("b.nii.gz: spacing 1 x 1 x 1 mm, the image has 2 x 1.2 x 1 mm",)
    repair(examine(healthy), tmp_path / "repaired")
    assert examine(tmp_path / "repaired").findings == ()


@pytest.mark.parametrize(("entry", "said"), [
    (["x"], "want"), ({"images": 3, "label": "x"}, "want"), ({"images": [3, None], "label": {}}, "3 is no path"),
    ({"images": ["../elsewhere.nii.gz"], "label": "y.nii.gz"}, "leads out"), ({"images": ["imagesTr/none.nii.gz"]}, "missing")], ids=str)
def test_entries_of_the_dataset_key_that_name_no_files_are_findings(healthy, entry, said):
    good = {"images": [f"imagesTr/a_000{i}.nii.gz" for i in range(2)], "label": "labelsTr/a.nii.gz"}
    change_json(healthy, dataset={"a": good, "odd": entry}, numTraining=1)
    (finding,) = (finding for finding in examine(healthy).findings if finding.kind == "dataset-json")
    assert set(finding.cases) == {"odd"} and said in finding.details[0]


@pytest.mark.parametrize("changes", [{"dataset": ["a"]}, {"file_ending": 3}, {"channel_names": ["CT"]}], ids=str)
def test_keys_of_another_form_are_findings(healthy, changes):
    change_json(healthy, **changes)
    assert "dataset-json" in {finding.kind for finding in examine(healthy).findings}


def test_a_header_without_volume_is_a_finding(healthy, tmp_path):
    image = nibabel.load(label_path(healthy))
    image.set_sform(np.diag([1.0, 1, 0, 1]), 1)
    nibabel.save(image, label_path(healthy))
    (finding,) = examine(healthy).findings
    assert finding.kind == "unreadable" and "one plane" in finding.details[0]
    repair(examine(healthy), tmp_path / "repaired")


def test_tolerance_is_in_millimetres(healthy):
    rewrite_label(label_path(healthy), affine=shifted(0.4))
    assert [f.kind for f in examine(healthy, tolerance_mm=0.1).findings] == ["geometry-mismatch"]
    assert examine(healthy, tolerance_mm=0.5).findings == ()


def test_findings_come_with_errors_first(healthy):
    for kind in ("empty-label", "case-count", "missing-channel"):
        FAULTS[kind][0](healthy)
    assert [f.severity for f in examine(healthy).findings] == ["error", "warning", "note"]


def test_a_mirrored_label_is_told_from_a_true_one():
    image, label = blob(0)
    assert fits_better_mirrored(image, label > 0) is None
    for axis in range(3):
        assert fits_better_mirrored(image, np.flip(label > 0, axis)) == axis
    assert fits_better_mirrored(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), label > 0) is None


def test_flipped_axes_are_named_in_array_order(tmp_path):
    write_volume(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    first = header_of(read_volume(tmp_path / "a.nii.gz"))
    assert flipped_axes(first, first._replace(affine=AFFINE @ np.diag([-1.0, 1, 1, 1]))) == (2,)
    assert flipped_axes(first, first._replace(affine=shifted(50))) == ()


# --------------------------------------------------------------------------------------------------------------- report


def test_the_report_is_one_page_with_a_picture_of_each_class_and_a_json_of_everything(healthy, tmp_path):
    change_json(healthy, labels={"background": 0, "<body>": 1, "core": 2})
    FAULTS["unexpected-label"][0](healthy)
    page, data = write_doctor_report(examine(healthy), tmp_path / "report")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "&lt;body&gt;" in text and "<body>" not in text, "names from files must be escaped"
    assert set(re.findall(r'(?:src|href)="?([a-z]*:?)', text)) == {"data:"}, "nothing may be loaded from elsewhere"
    assert "unexpected-label" in text and "9 (1 voxels)" in text
    content = json.loads(data.read_text())
    assert content["counts"] == {"error": 1, "warning": 0, "note": 0}
    assert content["findings"][0]["cases"] == ["b"]
    assert [c["cases"] for c in content["classes"]] == [6, 6] and len(content["cases"]) == 6


def test_a_report_can_be_written_of_a_dataset_with_every_fault(healthy, tmp_path):
    for kind in ("unreadable", "missing-label", "class-without-voxels"):
        FAULTS[kind][0](healthy)
    for case, kind in (("c", "constant-image"), ("d", "shape-mismatch"), ("e", "not-finite")):
        image_path(healthy).rename(image_path(healthy).with_suffix(".aside")) if image_path(healthy).exists() else None
        for path in (image_path(healthy, case), image_path(healthy, case, 1)):
            path.rename(path.with_name(path.name.replace(case, "b", 1)))
        label_path(healthy, case).rename(label_path(healthy))
        FAULTS[kind][0](healthy)
        for path in (image_path(healthy), image_path(healthy, "b", 1)):
            path.rename(path.with_name(path.name.replace("b", case, 1)))
        label_path(healthy).rename(label_path(healthy, case))
    page, _ = write_doctor_report(examine(healthy), tmp_path / "report")
    assert page.read_text().count("data:image/png") == 2


# --------------------------------------------------------------------------------------------------------------- repair


def repaired(folder, out):
    done = repair(examine(folder), out)
    assert json.loads((out / "repairs.json").read_text()) == [r._asdict() for r in done]
    return done


REPAIRABLE = {
    "case-count": ("", "numTraining set from 9 to 6"),
    "four-dimensional": ("b", "split into 2 channels"),
    "flipped-axis": ("b", "header of the image copied"),
}


@pytest.mark.parametrize("kind", REPAIRABLE)
def test_what_can_be_repaired_is_sound_afterwards(healthy, tmp_path, kind):
    FAULTS[kind][0](healthy)
    done = repaired(healthy, tmp_path / "out")
    case, action = REPAIRABLE[kind]
    assert [(r.case, action in r.action) for r in done] == [(case, True)]
    assert examine(tmp_path / "out").findings == ()
    check_dataset(open_dataset(tmp_path / "out"))  # training takes it


def test_rounded_headers_take_the_images(healthy, tmp_path):
    rewrite_label(label_path(healthy), affine=shifted(0.3))
    rewrite(image_path(healthy, "c", 1), affine=shifted(0.3))
    assert len(repaired(healthy, tmp_path / "out")) == 2
    assert examine(tmp_path / "out").findings == ()


def test_a_label_stored_against_the_image_is_turned_when_that_fits(healthy, tmp_path):
    truth = read_volume(label_path(healthy)).array
    rewrite_label(label_path(healthy), lambda array: array[::-1], AFFINE @ FLIP_D)
    (done,) = repaired(healthy, tmp_path / "out")
    assert "turned along array axis 0" in done.action
    np.testing.assert_array_equal(read_volume(label_path(tmp_path / "out")).array, truth)


def test_a_label_on_another_grid_is_resampled_if_no_foreground_is_lost(healthy, tmp_path):
    truth = read_volume(label_path(healthy)).array
    crop = AFFINE.copy()
    crop[:3, 3] = (AFFINE @ [1, 0, 0, 1])[:3]
    rewrite_label(label_path(healthy), lambda array: array[:10, :13, 1:], crop)
    (done,) = repaired(healthy, tmp_path / "out")
    assert "resampled to the image's grid, 12 x 14 x 16" in done.action
    np.testing.assert_array_equal(read_volume(label_path(tmp_path / "out")).array, truth)


def test_a_label_that_reaches_beyond_the_image_is_left_alone(healthy, tmp_path):
    far = AFFINE.copy()
    far[0, 3] += 12
    rewrite_label(label_path(healthy), lambda array: array[:10], far)
    assert repaired(healthy, tmp_path / "out") == []
    assert [f.kind for f in examine(tmp_path / "out").findings] == ["shape-mismatch"]


def test_rounding_errors_in_labels_are_rounded_and_fractions_are_not(healthy, tmp_path):
    rewrite(label_path(healthy, "a"), lambda array: array * np.float32(1.00001))
    rewrite(label_path(healthy, "b"), set_voxel(1.5))
    assert [r.case for r in repaired(healthy, tmp_path / "out")] == ["a"]
    assert [(f.kind, f.cases) for f in examine(tmp_path / "out").findings] == [("fractional-label", ("b",))]


def test_what_needs_a_decision_is_copied_byte_by_byte_and_the_original_is_never_touched(healthy, tmp_path):
    for kind in ("unexpected-label", "not-finite", "label-looks-flipped", "case-count"):
        FAULTS[kind][0](healthy)
    before = {p.relative_to(healthy): p.read_bytes() for p in healthy.rglob("*") if p.is_file()}
    repaired(healthy, tmp_path / "out")
    assert {p.relative_to(healthy): p.read_bytes() for p in healthy.rglob("*") if p.is_file()} == before
    for name, content in before.items():
        assert name.name == "dataset.json" or (tmp_path / "out" / name).read_bytes() == content


def test_a_repaired_copy_goes_to_a_new_folder_outside(healthy, tmp_path):
    with pytest.raises(InputError, match="lies in the dataset"):
        repair(examine(healthy), healthy / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="is not empty"):
        repair(examine(healthy), tmp_path / "full")


def test_real_datasets_have_no_errors(real_data):
    examination = examine(real_data / "SarcomaPETCT")
    assert [f.kind for f in examination.findings if f.severity == "error"] == []
