"""What is written is read back, patch by patch; what is incomplete or damaged is never taken for a case."""

import json
import math
import pickle

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgps_jax.data import store
from pgps_jax.data.store import CaseStore, Preprocessed, chunks_and_blocks, remove_leftovers, stored_from, write_case
from pgps_jax.errors import InputError

PROPERTIES = {
    "spacing": [1.0, 0.5, 0.5],
    "shape_before_cropping": [13, 40, 32],
    "bbox_used_for_cropping": [[1, 12], [0, 38], [2, 31]],
    "shape_after_cropping_and_before_resampling": [11, 38, 29],
    "nibabel_stuff": {"original_affine": np.eye(4).tolist()},
}
PATCH = (8, 24, 16)


def make_case(seed: int = 0) -> Preprocessed:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, 11, 38, 29)).astype(np.float32)
    seg = rng.integers(-1, 3, (1, 11, 38, 29)).astype(np.int16)
    voxels = {label: np.argwhere(np.isin(seg[0], label)).astype(np.int32) for label in (1, (1, 2), 7, 2)}
    return Preprocessed(image, seg, PROPERTIES, voxels)


def test_a_case_comes_back_as_it_was_written(tmp_path):
    case = make_case()
    write_case(tmp_path, "case_1", case, PATCH, made_from="abc")
    stored = CaseStore(tmp_path).open("case_1")
    assert CaseStore(tmp_path).ids == ("case_1",) and stored.id == "case_1"
    np.testing.assert_array_equal(stored.image[:], case.image)
    np.testing.assert_array_equal(stored.seg[:], case.seg)
    assert stored.image.shape == (2, 11, 38, 29) and stored.image.dtype == np.float32 and stored.seg.dtype == np.int16
    np.testing.assert_array_equal(stored.image[:, 2:9, 30:38, 5:6], case.image[:, 2:9, 30:38, 5:6])
    assert {key: stored.properties[key] for key in PROPERTIES} == PROPERTIES
    assert list(stored.locations) == [1, (1, 2), 7, 2]
    for label, voxels in case.locations.items():
        np.testing.assert_array_equal(stored.locations[label], voxels)
        assert stored.locations[label].dtype == np.int32 and stored.locations[label].shape == (len(voxels), 3)
    assert stored_from(tmp_path, "case_1") == "abc" and stored_from(tmp_path, "case_2") is None


def test_a_case_without_foreground_can_be_opened(tmp_path):
    case = make_case()._replace(locations={1: np.zeros((0, 3), np.int32)})
    write_case(tmp_path, "empty", case, PATCH)
    assert CaseStore(tmp_path).open("empty").locations[1].shape == (0, 3)


def test_arrays_are_compressed_and_chunked_as_nnunets(tmp_path):
    write_case(tmp_path, "a", make_case(), PATCH)
    array = blosc2.open(str(tmp_path / "a.b2nd"))
    assert array.schunk.cparams.codec is blosc2.Codec.LZ4HC and array.schunk.cparams.clevel == 5
    assert (array.chunks, array.blocks) == chunks_and_blocks((2, 11, 38, 29), PATCH, 4)


@given(
    shape=st.tuples(*[st.integers(1, 600)] * 3),
    patch=st.tuples(*[st.integers(1, 300)] * 3),
    size=st.sampled_from([2, 4]),
)
def test_chunks_stay_within_their_bounds(shape, patch, size):
    chunks, blocks = chunks_and_blocks((3, *shape), patch, size)
    assert chunks[0] == blocks[0] == 1
    assert math.prod(blocks) * size <= 128 * 1024 and math.prod(chunks) * size <= 6 * 1024**2
    for n, p, chunk, block in zip(shape, patch, chunks[1:], blocks[1:], strict=True):
        assert 1 <= block <= chunk <= max(1, min(n, int(1.5 * p)))


def test_a_typical_patch_is_chunked_as_by_nnunet():
    assert chunks_and_blocks((1, 200, 256, 256), (128, 128, 128), 4)[1] == (1, 32, 32, 32)
    assert chunks_and_blocks((1, 100, 512, 512), (28, 256, 256), 4) == ((1, 24, 256, 256), (1, 8, 64, 64))


@pytest.mark.parametrize("fails_at", ["a.b2nd", "a_seg.b2nd", "a_locations.npy", "a.json"])
def test_a_case_interrupted_at_any_file_is_not_there(tmp_path, monkeypatch, fails_at):
    replace = store.os.replace

    def interrupted(source, target):
        if target.name == fails_at:
            raise KeyboardInterrupt
        replace(source, target)

    write_case(tmp_path, "a", make_case(), PATCH, made_from="old")  # an older version must not shine through
    monkeypatch.setattr(store.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_case(tmp_path, "a", make_case(1), PATCH, made_from="new")
    assert CaseStore(tmp_path).ids == () and stored_from(tmp_path, "a") is None
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(InputError, match="preprocess it first"):
        CaseStore(tmp_path).open("a")
    monkeypatch.undo()
    write_case(tmp_path, "a", make_case(1), PATCH, made_from="new")
    np.testing.assert_array_equal(CaseStore(tmp_path).open("a").image[:], make_case(1).image)


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    write_case(tmp_path, "a", make_case(), PATCH)
    for name in (".b.b2nd.123.tmp", "properties/.b.json.123.tmp"):
        (tmp_path / name).write_text("half")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.rglob(".*")) and CaseStore(tmp_path).ids == ("a",)


def test_a_file_that_does_not_read_back_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(store.np, "array_equal", lambda *_: False)
    with pytest.raises(OSError, match="does not read back"):
        write_case(tmp_path, "a", make_case(), PATCH)
    assert not list(tmp_path.glob("*.b2nd"))


def write_as_nnunet(folder, case_id, case, **geometry):
    blosc2.asarray(case.image, urlpath=str(folder / f"{case_id}.b2nd"), mode="w")
    blosc2.asarray(case.seg, urlpath=str(folder / f"{case_id}_seg.b2nd"), mode="w")
    locations = {label: np.pad(v, ((0, 0), (1, 0))).astype(np.int64) for label, v in case.locations.items()}
    locations[99] = []
    properties = {key: value for key, value in PROPERTIES.items() if key != "nibabel_stuff"} | geometry
    (folder / f"{case_id}.pkl").write_bytes(pickle.dumps({**properties, "class_locations": locations}))


def test_a_folder_made_by_nnunet_is_opened(tmp_path):
    case = make_case()
    write_as_nnunet(tmp_path, "x", case, nibabel_stuff={"original_affine": np.eye(4)})
    stored = CaseStore(tmp_path).open("x")
    assert CaseStore(tmp_path).ids == ("x",)
    np.testing.assert_array_equal(stored.image[:, 1:5], case.image[:, 1:5])
    for label, voxels in case.locations.items():
        np.testing.assert_array_equal(stored.locations[label], voxels)
    assert stored.locations[99].shape == (0, 3) and "class_locations" not in stored.properties
    np.testing.assert_array_equal(stored.properties["nibabel_stuff"]["original_affine"], np.eye(4))


def test_geometry_read_by_simpleitk_becomes_a_nifti_affine(tmp_path):
    direction = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    geometry = {"spacing": (0.5, 0.7, 3.0), "origin": (-10.0, 20.0, 5.0), "direction": direction}
    write_as_nnunet(tmp_path, "x", make_case(), sitk_stuff=geometry)
    affine = np.array(CaseStore(tmp_path).open("x").properties["nibabel_stuff"]["original_affine"])
    x, y, z = affine[:3] @ [2, 3, 4, 1]  # ITK: origin + direction @ (spacing * index), then left and posterior negated
    np.testing.assert_allclose((x, y, z), (-(-10 - 0.7 * 3), -(20 + 0.5 * 2), 5 + 3.0 * 4))


def test_a_case_that_nnunet_made_of_a_picture_without_geometry_is_refused(tmp_path):
    write_as_nnunet(tmp_path, "x", make_case())
    with pytest.raises(InputError, match=r"x\.pkl: does not say where the image lies in space .* Convert the images"):
        CaseStore(tmp_path).open("x")


def test_missing_damaged_and_old_folders_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(InputError, match="no preprocessed folder"):
        _ = CaseStore(tmp_path / "nowhere").ids
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.npz").touch()
    with pytest.raises(InputError, match=r"older than 2\.6"):
        _ = CaseStore(tmp_path / "old").ids
    write_case(tmp_path, "a", make_case(), PATCH)
    (tmp_path / "a_seg.b2nd").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"Case a.*damaged"):
        CaseStore(tmp_path).open("a")
    properties = tmp_path / "properties" / "a.json"
    counts = json.loads(properties.read_text())
    counts["class_location_counts"]["1"] += 1
    properties.write_text(json.dumps(counts))
    with pytest.raises(InputError, match=r"a\.json"):
        CaseStore(tmp_path).open("a")


def test_a_case_of_an_impossible_name_is_not_taken(tmp_path):
    write_case(tmp_path, "a", make_case(), PATCH)
    for file in (tmp_path / "a.b2nd", tmp_path / "a_seg.b2nd", tmp_path / "properties/a.json"):
        file.rename(file.with_name(file.name.replace("a", "a\nb", 1)))
    with pytest.raises(InputError, match="cannot be a file name"):
        _ = CaseStore(tmp_path).ids


def test_a_label_in_the_properties_is_a_number_or_a_region(tmp_path):
    write_case(tmp_path, "a", make_case(), PATCH)
    path = tmp_path / "properties" / "a.json"
    good = json.loads(path.read_text())
    assert store._label("-1") == -1 and store._label("(1,)") == (1,) and store._label(str((-1, 0, 12))) == (-1, 0, 12)
    for label in ("(" + "1" * 40, "(" + "1, " * 10**5 + "x)", "(1 2)", "__import__('os')",
                  "(" * 5000 + "1" + ")" * 5000, "1e3", "9" * 30, "(1, (2,))", ""):
        path.write_text(json.dumps(good | {"class_location_counts": {label: 0}}))
        with pytest.raises(InputError, match=r"a\.json"):
            CaseStore(tmp_path).open("a")


def test_a_damaged_block_is_said_with_its_file_when_it_is_read(tmp_path):
    write_case(tmp_path, "a", make_case(), PATCH)
    path = tmp_path / "a.b2nd"
    content = bytearray(path.read_bytes())
    content[300:20000] = bytes(19700)
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"a\.b2nd"):
        CaseStore(tmp_path).open("a").image[:]
