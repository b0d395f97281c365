"""Volumes come back as they were written, and unreadable ones are named."""

import gzip
import struct
import sys

import nibabel
import numpy as np
import pytest

from pgps_jax.data import nifti
from pgps_jax.data.nifti import axis_codes, file_shape, geometry_difference, read_channels, read_header, read_volume, reorient, write_volume
from pgps_jax.errors import InputError

OBLIQUE = np.array([[-0.9, 0.1, 0.0, 12.0], [0.1, 1.1, 0.3, -40.0], [0.0, -0.2, 2.5, 7.0], [0, 0, 0, 1]])


def world(affine: np.ndarray, d: int, h: int, w: int) -> np.ndarray:
    return (affine @ [w, h, d, 1])[:3]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_written_volume_is_read_back_with_its_geometry(tmp_path, ending):
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    write_volume(tmp_path / f"x{ending}", array, OBLIQUE)
    volume, header = read_volume(tmp_path / f"x{ending}"), read_header(tmp_path / f"x{ending}")
    np.testing.assert_array_equal(volume.array, array)
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-6)
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(OBLIQUE[:3, :3], axis=0)[::-1], rtol=1e-6)
    assert header.shape == (3, 4, 5) and header.spacing == volume.spacing
    assert [path.name for path in tmp_path.iterdir()] == [f"x{ending}"]


def test_array_axes_are_the_files_z_y_x_and_so_is_the_spacing(tmp_path):
    xyz = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    nibabel.save(nibabel.Nifti1Image(xyz, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "x.nii.gz")
    volume = read_volume(tmp_path / "x.nii.gz")
    assert volume.array.shape == (4, 3, 2) and volume.spacing == (3.0, 2.0, 1.0)
    assert volume.array[3, 1, 0] == xyz[0, 1, 3]


def test_values_are_scaled_as_the_header_says(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4))
    image.set_data_dtype(np.int16)
    data = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 2, 2)
    image = nibabel.Nifti1Image(data, np.eye(4), image.header)
    nibabel.save(image, tmp_path / "x.nii.gz")
    np.testing.assert_allclose(read_volume(tmp_path / "x.nii.gz").array, data.T, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "stored"),
    [([0, 254], np.uint8), ([0, 255], np.uint16), ([0, 70000], np.int32), ([-1, 5], np.int16), ([False, True], np.uint8),
     ([0.5, 1.0], np.float32)],
)
def test_the_smallest_fitting_type_is_stored(tmp_path, values, stored):
    array = np.array(values).reshape(1, 1, 2)
    write_volume(tmp_path / "x.nii", array, np.eye(4))
    assert nibabel.load(tmp_path / "x.nii").get_data_dtype() == stored
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii").array, array)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.nii.gz"
    write_volume(path, np.ones((2, 2, 2), np.uint8), np.eye(4))

    def full_disk(image, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nifti.nibabel, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_volume(path, np.zeros((2, 2, 2), np.uint8), np.eye(4))
    assert list(tmp_path.iterdir()) == [path] and read_volume(path).array.all()


def test_four_axes_are_refused_unless_the_fourth_is_of_length_one(tmp_path):
    for last in (1, 2):
        nibabel.save(nibabel.Nifti1Image(np.zeros((2, 3, 4, last), np.uint8), np.eye(4)), tmp_path / f"{last}.nii.gz")
    assert read_volume(tmp_path / "1.nii.gz").array.shape == read_header(tmp_path / "1.nii.gz").shape == (4, 3, 2)
    with pytest.raises(InputError, match=r"2\.nii\.gz: has 4 axes .* 3D"):
        read_volume(tmp_path / "2.nii.gz")
    channels, affine = read_channels(tmp_path / "2.nii.gz")
    assert channels.shape == (2, 4, 3, 2) and channels.dtype == np.uint8 and affine.shape == (4, 4)


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1.0), ("meter", 1000.0), ("micron", 0.001), ("unknown", 1.0)])
def test_spacing_and_place_are_in_millimetres_whatever_unit_the_file_counts_in(tmp_path, unit, mm):
    affine = np.array([[0, -3.0, 0, 10], [2.0, 0, 0, 20], [0, 0, 4.0, 30], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), affine)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "x.nii.gz")
    header = read_header(tmp_path / "x.nii.gz")
    np.testing.assert_allclose(header.spacing, np.array([4.0, 3.0, 2.0]) * mm)
    np.testing.assert_allclose(header.affine[:3], affine[:3] * mm)
    np.testing.assert_array_equal(read_channels(tmp_path / "x.nii.gz")[1], header.affine)


def test_axes_in_one_plane_are_refused(tmp_path):
    flat = np.array([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))
    image.set_sform(flat, 1)
    nibabel.save(image, tmp_path / "x.nii.gz")
    with pytest.raises(InputError, match=r"x\.nii\.gz: its header lays the axes of the volume into one plane"):
        read_header(tmp_path / "x.nii.gz")


@pytest.mark.parametrize(("dtype", "word"), [
    (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"), (np.complex64, "complex numbers")], ids=["colours", "complex"])
def test_voxels_that_are_no_real_numbers_are_refused(tmp_path, dtype, word):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), dtype), np.eye(4)), tmp_path / "x.nii.gz")
    for read in (read_volume, read_header, read_channels):
        with pytest.raises(InputError, match=rf"x\.nii\.gz: holds {word} .*want one real number per voxel"):
            read(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("fault", ["truncated", "text", "missing", "unknown kind", "spacing"])
def test_what_cannot_be_read_is_named(tmp_path, fault):
    path = tmp_path / ("x.jpg" if fault == "unknown kind" else "x.nii.gz")
    if fault == "truncated":
        write_volume(path, np.random.default_rng(0).normal(size=(20, 20, 20)), np.eye(4))
        path.write_bytes(path.read_bytes()[:9000])
    elif fault in ("text", "unknown kind"):
        path.write_text("no volume")
    elif fault == "spacing":
        image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4))
        image.header["pixdim"][3] = np.nan
        nibabel.save(image, path)
    with pytest.raises(InputError, match=path.name):
        read_volume(path)


def with_header(path, **fields):
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    for name, value in fields.items():
        image.header[name] = value
    content = image.header.binaryblock + bytes(4 + 4**3)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


@pytest.mark.parametrize(("fields", "words"), [
    ({"dim": [3, 4000, 4000, 4000, 1, 1, 1, 1]}, "more than the file can hold"), ({"vox_offset": 1e12}, "voxels begin"),
    ({"vox_offset": np.nan}, "voxels begin"), ({"vox_offset": -4}, "voxels begin"), ({"datatype": 7}, "cannot be read"),
    ({"dim": [-3, 4, 4, 4, 1, 1, 1, 1]}, "x.nii"), ({"dim": [3, -4, 4, 4, 1, 1, 1, 1]}, "x.nii"),
])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_claims_the_impossible_is_refused(tmp_path, fields, words, ending):
    path = tmp_path / f"x{ending}"
    with_header(path, **fields)
    for read in (read_volume, read_header, read_channels, file_shape):
        with pytest.raises(InputError, match=words):
            read(path)


def test_a_flipped_bit_in_compressed_voxels_is_found(tmp_path):
    path, rng = tmp_path / "x.nii.gz", np.random.default_rng(0)
    write_volume(path, rng.integers(0, 200, (20, 20, 20)), np.eye(4))
    good = path.read_bytes()
    for position in rng.integers(500, len(good) - 8, 40).tolist():
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        for read in (read_volume, read_channels):
            with pytest.raises(InputError, match=r"x\.nii\.gz: cannot be read"):
                read(path)


def test_a_compressed_file_of_zeros_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(nifti, "MOST_VOXELS", 10**6)
    path = tmp_path / "bomb.nii.gz"
    with_header(path, dim=[3, 200, 200, 200, 1, 1, 1, 1])
    with gzip.open(path, "ab") as file:
        file.write(bytes(200**3))
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match="8000000 voxels, more than"):
        read_volume(path)


def test_an_extension_without_end_is_not_read(tmp_path):
    path = tmp_path / "x.nii.gz"
    with_header(path, vox_offset=2**24)
    content = bytearray(gzip.decompress(path.read_bytes())[:348]) + b"\1\0\0\0" + struct.pack("<2i", 2**31 - 16, 4) + bytes(2**24)
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(InputError, match=r"x\.nii"):
        read_volume(path)


def test_reorienting_moves_no_voxel_in_the_world_and_can_be_undone():
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    assert axis_codes(OBLIQUE) == "LAS"
    for codes in ("RAS", "LPS", "PIR", "SAL"):
        turned, affine = reorient(array, OBLIQUE, codes)
        assert axis_codes(affine) == codes
        at = np.unravel_index(np.argmax(turned), turned.shape)
        before = np.unravel_index(np.argmax(array), array.shape)
        np.testing.assert_allclose(world(affine, *at), world(OBLIQUE, *before), atol=1e-9)
        back, restored = reorient(turned, affine, "LAS")
        np.testing.assert_array_equal(back, array)
        np.testing.assert_allclose(restored, OBLIQUE, atol=1e-9)
    with pytest.raises(InputError, match="orientation 'RLS'"):
        reorient(array, OBLIQUE, "RLS")


def test_geometry_difference_is_the_farthest_corners_in_mm():
    first = nifti.Header((11, 11, 11), (1.0, 1.0, 1.0), np.eye(4))
    assert geometry_difference(first, first) == 0
    moved = np.eye(4)
    moved[0, 3] = 2.0
    assert geometry_difference(first, first._replace(affine=moved)) == pytest.approx(2.0)
    flipped = np.diag([-1.0, 1.0, 1.0, 1.0])
    assert geometry_difference(first, first._replace(affine=flipped)) == pytest.approx(20.0)


def test_files_of_simpleitk_have_the_same_array_and_affine(tmp_path):
    pytest.importorskip("SimpleITK", reason="SimpleITK is not installed, so .nrrd and .mha were not tried")
    array = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    affine = np.array([[0, -2.0, 0, 3], [1.5, 0, 0, 4], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    for ending in (".nrrd", ".mha"):
        write_volume(tmp_path / f"x{ending}", array, affine)
        volume = read_volume(tmp_path / f"x{ending}")
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-9)
        assert volume.spacing == read_header(tmp_path / f"x{ending}").spacing == (3.0, 2.0, 1.5)


@pytest.mark.parametrize(("name", "header"), [
    ("x.nrrd", "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: /etc/passwd\n\n"),
    ("x.nrrd", "NRRD0004\r\ntype: uchar\r\ndimension: 3\r\nsizes: 2 2 2\r\nencoding: raw\r\ndatafile: ../y.raw\r\n\r\n"),
    ("x.mha", "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = /etc/passwd\n"),
    ("x.mha", "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = LIST\na\nb\n"),
])
def test_voxels_in_another_file_are_not_fetched(tmp_path, monkeypatch, name, header):
    monkeypatch.setattr(nifti, "_sitk", lambda path: None)  # nothing of it may be asked before the header is checked
    (tmp_path / name).write_bytes(header.encode())
    with pytest.raises(InputError, match="another file"):
        read_volume(tmp_path / name)


def test_without_simpleitk_its_files_are_refused_with_the_cure(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    (tmp_path / "x.nrrd").write_bytes(b"")
    with pytest.raises(InputError, match="pip install SimpleITK"):
        read_volume(tmp_path / "x.nrrd")
