"""Read and write volumes with their geometry. The only file that imports nibabel (and, for .nrrd and .mha, SimpleITK).

Arrays have axes (d, h, w), which are the file's (z, y, x): the order of nnU-Net. Spacings follow the array's order,
affines the file's. Nothing is reoriented on reading; `reorient` does it where asked.
"""

import gzip
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from jaxtyping import Float, Shaped
from nibabel.orientations import aff2axcodes, apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from pgps_jax.architecture import Size
from pgps_jax.errors import InputError, brief

Spacing = tuple[float, float, float]
NIFTI_ENDINGS = (".nii.gz", ".nii")
SITK_ENDINGS = (".nrrd", ".mha", ".gipl")
MOST_COMPRESSION = 1032  # of deflate: a file of zeros
MOST_VOXELS = 2**32  # 1625 voxels along each axis, 16 GiB once read; a small compressed file may claim any number
FLATTEST = 1e-6  # volume of a voxel as a share of its edges' product; 1 where they are at right angles
MOST_EXTENSION = 2**24  # bytes between a header and its voxels, which are read before the first voxel is


class Volume(NamedTuple):
    """One channel or label map."""

    array: np.ndarray  # float32 (d, h, w); labels too
    spacing: Spacing  # mm, array order
    affine: np.ndarray  # float64 (4, 4): voxel (x, y, z) to world mm, RAS+


class Header(NamedTuple):
    """Geometry without voxels."""

    shape: Size  # d, h, w
    spacing: Spacing
    affine: np.ndarray


def read_volume(path: Path) -> Volume:
    """Read a 3D volume as float32, scaled as its header says.

    A fourth axis of length 1 is dropped.

    Raises:
        InputError: missing, unreadable or truncated file, not 3D, zero or negative spacing.
    """
    if _is_sitk(path):
        image, header = _open_sitk(path, with_voxels=True)
        return Volume(image, header.spacing, header.affine)
    image, header = _open_nifti(path)
    array = _voxels(path, image, lambda image: image.get_fdata(dtype=np.float32, caching="unchanged"))
    return Volume(np.ascontiguousarray(array.reshape(array.shape[:3]).T), header.spacing, header.affine)


def read_header(path: Path) -> Header:
    """Read only the geometry; see `read_volume`."""
    return (_open_sitk(path, with_voxels=False) if _is_sitk(path) else _open_nifti(path))[1]


def write_volume(path: Path, array: Shaped[np.ndarray, "d h w"], affine: Float[np.ndarray, "4 4"]) -> None:
    """Write a volume atomically, in the format that the file name says.

    Integers and truth values become uint8 if they are below 255, else uint16 (int16 or int32 when that cannot hold
    them); floats become float32.
    """
    array = array.astype(_stored_type(array), copy=False)
    temporary = path.with_name(f".writing.{os.getpid()}.{path.name}")
    try:
        if _is_sitk(path):
            _write_sitk(temporary, array, affine)
        else:
            image = nibabel.Nifti1Image(array.T, affine)
            image.header.set_xyzt_units("mm")
            nibabel.save(image, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_shape(path: Path) -> tuple[int, ...]:
    """Lengths of all axes of a NIfTI file, x first; 3 for a volume, 4 for several channels."""
    return tuple(int(n) for n in _load_nifti(path).shape)


def read_channels(path: Path) -> tuple[Shaped[np.ndarray, "c d h w"], np.ndarray]:
    """A 3D or 4D NIfTI as channels (the file's last axis) in the file's own number type, and its affine.

    Voxels are not scaled unless the header asks for it. Raises InputError as `read_volume` does.
    """
    image = _load_nifti(path)
    if len(image.shape) not in (3, 4):
        raise InputError(f"{path}: has {len(image.shape)} axes {image.shape}; want a volume (3) or channels of one (4)")
    array = _voxels(path, image, lambda image: np.asanyarray(image.dataobj))
    return (array.T if array.ndim == 4 else array.T[None]), _affine(image)


def axis_codes(affine: Float[np.ndarray, "4 4"]) -> str:
    """To which side of the body the file's axes x, y, z grow, e.g. "RAS" or "LPS"; array axis a is letter 2 - a."""
    return "".join(code or "?" for code in aff2axcodes(affine))


def reorient(
    array: Shaped[np.ndarray, "d h w"], affine: Float[np.ndarray, "4 4"], codes: str
) -> tuple[Shaped[np.ndarray, "d2 h2 w2"], np.ndarray]:
    """Flip and permute axes so that `axis_codes` of the new affine is `codes`; no interpolation, exactly invertible.

    Raises:
        InputError: `codes` does not name each body axis once.
    """
    transform = _transform(affine, codes)
    new_affine = affine @ nibabel.orientations.inv_ornt_aff(transform, array.T.shape)
    return np.ascontiguousarray(apply_orientation(array.T, transform).T), new_affine


def reordered(spacing: Spacing, affine: Float[np.ndarray, "4 4"], codes: str) -> Spacing:
    """Spacing of the array that `reorient` makes of one with this spacing and affine."""
    x_to_z = spacing[::-1]
    return tuple(x_to_z[int(axis)] for axis in np.argsort(_transform(affine, codes)[:, 0]))[::-1]


def _transform(affine: np.ndarray, codes: str) -> np.ndarray:
    check_orientation(codes)
    return ornt_transform(io_orientation(affine), axcodes2ornt(codes))


def check_orientation(codes: str) -> None:
    """Raise InputError unless each body axis is named once, as in "RAS"."""
    axes = {"R": "RL", "L": "RL", "A": "AP", "P": "AP", "S": "SI", "I": "SI"}
    if sorted(axes.get(code, "?") for code in codes) != ["AP", "RL", "SI"]:
        raise InputError(f"orientation {brief(codes)}: want one letter of each of R/L, A/P, S/I, such as RAS or LPS")


def geometry_difference(first: Header, second: Header) -> float:
    """Largest distance in mm between where the two headers place the same voxel, over the corners of the first."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in first.shape[::-1]], [1], indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((first.affine - second.affine) @ corners)[:3], axis=0).max())


def same_spacing(first: Header, second: Header) -> bool:
    """Do two headers give the same spacing, but for rounding? A header may contradict its own affine."""
    return np.allclose(first.spacing, second.spacing, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ reading


def _load_nifti(path: Path) -> Any:
    """Open a NIfTI-1 or -2 file and check what its header claims; its voxels are not read."""
    if not path.name.endswith(NIFTI_ENDINGS):
        raise InputError(f"{path}: this kind of file is not read; known are {', '.join(NIFTI_ENDINGS + SITK_ENDINGS)}")
    if not path.is_file():
        raise InputError(f"{path}: this file is missing")
    try:
        image = _nifti_kind(path).from_filename(path)
        stored = image.header.get_data_dtype()
        if stored.kind not in "iuf":
            raise InputError(f"{path}: holds {'colours' if stored.fields else 'complex numbers' if stored.kind == 'c' else stored.name} "
                             f"({stored}); want one real number per voxel. Store each part as a channel of its own")
        _check_claim(path, tuple(image.shape), stored.itemsize)
        return image
    except InputError:
        raise
    except Exception as error:  # nibabel raises many types for damaged files
        raise _unreadable(path, error) from None


def _nifti_kind(path: Path) -> type:
    """The class that reads this file. Not left to nibabel, which would also read CIFTI and whatever else ends in .nii."""
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        head = file.read(176)
    for order in "<>":
        if len(head) == 176 and struct.unpack(f"{order}i", head[:4])[0] in (348, 540):
            first = struct.unpack(f"{order}i", head[:4])[0] == 348
            voxels_at = struct.unpack(f"{order}f", head[108:112])[0] if first else struct.unpack(f"{order}q", head[168:176])[0]
            if not 0 <= voxels_at <= MOST_EXTENSION:
                raise InputError(f"{path}: its header says that the voxels begin at byte {voxels_at:g}; want 0 to {MOST_EXTENSION}")
            return nibabel.Nifti1Image if first else nibabel.Nifti2Image
    raise InputError(f"{path}: cannot be read as a volume (it does not begin with a NIfTI header); is the file complete?")


def _voxels(path: Path, image: Any, numbers: Callable[[Any], np.ndarray]) -> np.ndarray:
    """The voxels of an opened file. Compressed ones are read to the end of the file, where gzip's checksum tells flipped bits."""
    try:
        if not path.name.endswith(".gz"):
            return numbers(image)
        with gzip.open(path) as file:
            array = numbers(type(image).from_stream(file))
            file.read(MOST_EXTENSION)
        return array
    except Exception as error:  # nibabel raises many types for damaged files
        raise _unreadable(path, error) from None


def _check_claim(path: Path, shape: tuple, itemsize: int) -> None:
    """Refuse a header that claims more voxels than its file can hold or than are ever read, before memory is asked for."""
    if min(shape, default=0) < 1:
        raise InputError(f"{path}: the volume is empty, shape {shape}")
    voxels = math.prod(int(n) for n in shape)
    held = path.stat().st_size * (1 if path.name.endswith(".nii") else MOST_COMPRESSION)
    if voxels * itemsize > held:
        raise InputError(f"{path}: its header claims {voxels * itemsize} bytes of voxels, more than the file can hold; it is damaged or "
                         "cut short")
    if voxels > MOST_VOXELS:
        raise InputError(f"{path}: its header claims {voxels} voxels, more than the {MOST_VOXELS} that are read; crop or resample it")


def _open_nifti(path: Path) -> tuple[Any, Header]:
    image = _load_nifti(path)
    shape = tuple(image.shape)
    if len(shape) != 3 and (len(shape) < 3 or set(shape[3:]) != {1}):
        raise InputError(
            f"{path}: has {len(shape)} axes {shape} where a 3D volume is expected; store each channel in its own file "
            "(CASE_0000, CASE_0001, ...), and a single slice as a volume of one slice"
        )
    spacing = tuple(float(zoom) * _mm_per_unit(image) for zoom in image.header.get_zooms()[2::-1])
    return image, _checked_header(path, shape[2::-1], spacing, _affine(image))


def _affine(image: Any) -> np.ndarray:
    """Voxel (x, y, z) to world in mm, RAS+."""
    return np.diag([*[_mm_per_unit(image)] * 3, 1.0]) @ np.asarray(image.affine, np.float64)


def _mm_per_unit(image: Any) -> float:
    """Files may count in metres or micrometres; ITK, and nnU-Net with it, converts both, and takes an unknown unit for mm."""
    return {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)


def _checked_header(path: Path, shape: tuple, spacing: tuple, affine: np.ndarray) -> Header:
    if not all(np.isfinite(s) and s > 0 for s in spacing) or not np.isfinite(affine).all():
        raise InputError(f"{path}: its header gives the voxel spacing {spacing} mm; want positive numbers")
    if abs(np.linalg.det(affine[:3, :3])) <= FLATTEST * np.prod(np.linalg.norm(affine[:3, :3], axis=0)):
        raise InputError(f"{path}: its header lays the axes of the volume into one plane (affine {affine[:3, :3].tolist()}); correct its "
                         "sform or qform")
    return Header(tuple(int(n) for n in shape), tuple(float(s) for s in spacing), affine)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: cannot be read as a volume ({type(error).__name__}: {error}); is the file complete?")


def _stored_type(array: np.ndarray) -> Callable:
    if array.dtype.kind == "f":
        return np.float32
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0:
        return np.int16 if low >= -(2**15) and high < 2**15 else np.int32
    return np.uint8 if high < 255 else np.uint16 if high < 2**16 else np.int32


# ---------------------------------------------------------------------------------------------------------- SimpleITK


def _is_sitk(path: Path) -> bool:
    return path.name.endswith(SITK_ENDINGS)


def _sitk(path: Path) -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise InputError(f"{path}: {path.suffix} files need SimpleITK: pip install SimpleITK") from None
    return SimpleITK


_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # SimpleITK's world axes against NIfTI's


def _open_sitk(path: Path, with_voxels: bool) -> tuple[np.ndarray | None, Header]:
    sitk = _sitk(path)
    if not path.is_file():
        raise InputError(f"{path}: this file is missing")
    _check_self_contained(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_claim(path, reader.GetSize(), 1)
        image = reader.Execute() if with_voxels else reader
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    if reader.GetDimension() != 3 or reader.GetNumberOfComponents() != 1:
        raise InputError(f"{path}: want a 3D volume of one number per voxel, found {reader.GetDimension()} axes and "
                         f"{reader.GetNumberOfComponents()} numbers per voxel")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    header = _checked_header(path, image.GetSize()[::-1], image.GetSpacing()[::-1], _LPS @ affine)
    return (sitk.GetArrayFromImage(image).astype(np.float32) if with_voxels else None), header


def _check_self_contained(path: Path) -> None:
    """Refuse headers that name other files as the place of the voxels: any file of this machine could be meant."""
    with path.open("rb") as file:
        head = file.read(2**16).lower()
    nrrd = head.split(b"\n\n")[0].split(b"\r\n\r\n")[0]
    elsewhere = re.search(rb"^data ?file:", nrrd, re.MULTILINE) if path.name.endswith(".nrrd") else \
        re.search(rb"^elementdatafile\s*=\s*+(?!local\s)", head, re.MULTILINE) if path.name.endswith(".mha") else None
    if elsewhere:
        raise InputError(f"{path}: its voxels are said to lie in another file; store them in the file itself")


def _write_sitk(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    sitk = _sitk(path)
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).reshape(-1).tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)
