"""Preprocessed cases on disk: written once, then read patch by patch.

    FOLDER/CASE.b2nd                        image, float32 (c, d, h, w): Blosc2, chunked for patches
    FOLDER/CASE_seg.b2nd                    label map, int16 (1, d, h, w), -1 outside the body
    FOLDER/properties/CASE_locations.npy    int32 (n, 3): some voxels of every class, one class after the other
    FOLDER/properties/CASE.json             geometry, number of locations per class; written last, marks the case done

The arrays are laid out as nnU-Net (2.6 and later) lays out its own, and a folder that nnU-Net made can be read as well.
The folder itself holds no other kind of file because nnU-Net's reader refuses one that does.
"""

import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import numpy as np

from pgps_jax.architecture import Size
from pgps_jax.data.b2nd import open_array
from pgps_jax.data.dataset import check_case_id
from pgps_jax.data.labels import Label
from pgps_jax.errors import InputError, brief
from pgps_jax.interop.pickles import read_properties
from pgps_jax.json_file import read_json

_LARGEST_BLOCK = 128 * 1024  # bytes, uncompressed: the unit of decompression fits a core's cache
_LARGEST_CHUNK = 6 * 1024**2  # bytes, uncompressed: the unit of reading
MOST_LOCATIONS = 10**9  # of one class in one case
_TRIAL = 512 * 1024  # bytes of an array on which filters are tried
_MMAP = None if sys.platform == "win32" else "r"  # Windows cannot replace a mapped file


class Preprocessed(NamedTuple):
    """One case ready for training, axes in the plan's transposed order."""

    image: np.ndarray  # float32 (c, d, h, w), normalised and resampled
    seg: np.ndarray  # int16 (1, d, h, w), -1 outside the body
    properties: dict  # JSON values only; keys as in nnU-Net's properties
    locations: dict[Label, np.ndarray]  # int32 (n, 3) voxels of each class or region, n may be 0; see sample_locations


class StoredCase(NamedTuple):
    """An opened case. `image` and `seg` read from disk only what is sliced: `image[:, 3:9, 0:5, 2:7]`."""

    id: str
    image: Any  # StoredArray, float32 (c, d, h, w)
    seg: Any  # StoredArray, int16 (1, d, h, w)
    properties: dict
    locations: dict[Label, np.ndarray]  # int32 (n, 3), memory-mapped


@dataclass(frozen=True)
class CaseStore:
    """The cases of a preprocessed folder. Opening is lazy and cheap; nothing is cached.

    Raises:
        InputError: there is no such folder, it was made by an nnU-Net older than 2.6, or a case's name is no file name.
    """

    folder: Path

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Ids of all complete cases, sorted; listed once."""
        if not self.folder.is_dir():
            raise InputError(f"There is no preprocessed folder {self.folder}; run the preprocessing first.")
        names = {path.name for path in self.folder.iterdir()}
        done = {path.name.removesuffix(".json") for path in _properties_folder(self.folder).glob("*.json")}
        done |= {name.removesuffix(".pkl") for name in names if name.endswith(".pkl")}
        found = sorted(case for case in done if {f"{case}.b2nd", f"{case}_seg.b2nd"} <= names)
        for case in found:
            check_case_id(case, self.folder)
        if not found and any(name.endswith(".npz") for name in names):
            raise InputError(
                f"{self.folder} holds .npz files of an nnU-Net older than 2.6, which are not read; preprocess again."
            )
        return tuple(found)

    def open(self, case_id: str) -> StoredCase:
        """Open one case.

        Raises:
            InputError: the case is missing, incomplete or damaged.
        """
        ours = _properties_folder(self.folder) / f"{case_id}.json"
        peers = self.folder / f"{case_id}.pkl"
        if not ours.exists() and not peers.exists():
            raise InputError(f"Case {case_id} is not in {self.folder}; preprocess it first.")
        properties, locations = _read_ours(ours) if ours.exists() else _read_peers(peers)
        try:
            image, seg = (open_array(self.folder / f"{case_id}{name}.b2nd") for name in ("", "_seg"))
        except InputError as error:
            raise InputError(f"Case {case_id}: {error}") from error
        if image.shape[1:] != seg.shape[1:] or seg.shape[0] != 1:
            raise InputError(
                f"Case {case_id} in {self.folder}: the image has shape {image.shape} and the label map {seg.shape}; "
                "delete its files and preprocess it again."
            )
        return StoredCase(case_id, image, seg, properties, locations)


# -------------------------------------------------------------------------------------------------------------- writing


def write_case(folder: Path, case_id: str, case: Preprocessed, patch_size: Size, made_from: str = "") -> None:
    """Write one case; every file appears complete or not at all, and the JSON that marks it done appears last.

    Args:
        patch_size: of training; decides the chunks.
        made_from: what the case depends on (`stored_from` gives it back), so that a changed plan redoes the work.

    Raises:
        OSError: no space, no permission, or a file that does not read back as it was written.
    """
    properties_folder = _properties_folder(folder)
    properties_folder.mkdir(parents=True, exist_ok=True)
    done = properties_folder / f"{case_id}.json"
    done.unlink(missing_ok=True)
    (folder / f"{case_id}.pkl").unlink(missing_ok=True)  # nnU-Net's view of an earlier version

    _write_array(folder / f"{case_id}.b2nd", case.image.astype(np.float32, copy=False), patch_size)
    _write_array(folder / f"{case_id}_seg.b2nd", case.seg.astype(np.int16, copy=False), patch_size)
    rows = [np.asarray(voxels, np.int32).reshape(-1, 3) for voxels in case.locations.values()]
    table = np.concatenate(rows) if rows else np.zeros((0, 3), np.int32)
    _replace(_locations_file(done), lambda temporary: _save_array(temporary, table))
    counts = {str(label): len(voxels) for label, voxels in case.locations.items()}
    text = json.dumps({**case.properties, "class_location_counts": counts, "made_from": made_from}, indent=1)
    _replace(done, lambda temporary: temporary.write_text(text))


def stored_from(folder: Path, case_id: str) -> str | None:
    """`made_from` of a case written by `write_case`; None if any of its files is missing."""
    properties = _properties_folder(folder) / f"{case_id}.json"
    if not _has_arrays(folder, case_id) or not _locations_file(properties).exists():
        return None
    try:
        return read_json(properties).get("made_from")
    except InputError:
        return None


def stored_by_nnunet(folder: Path, case_id: str) -> bool:
    """Whether nnU-Net stored a case here, of any version: also where it cannot be read, it is not ours to replace."""
    return (folder / f"{case_id}.pkl").exists() and (_has_arrays(folder, case_id) or (folder / f"{case_id}.npz").exists())


def _has_arrays(folder: Path, case_id: str) -> bool:
    return (folder / f"{case_id}.b2nd").exists() and (folder / f"{case_id}_seg.b2nd").exists()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writers that were killed. Call it while nobody else writes (`folder_lock`)."""
    for place in (folder, _properties_folder(folder)):
        for path in place.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def _properties_folder(folder: Path) -> Path:
    return folder / "properties"


def _locations_file(properties: Path) -> Path:
    return properties.with_name(f"{properties.name.removesuffix('.json')}_locations.npy")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _write_array(path: Path, array: np.ndarray, patch_size: Size) -> None:
    array = np.ascontiguousarray(array)
    chunks, blocks = chunks_and_blocks(array.shape, patch_size, array.itemsize)
    settings = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1}

    def write(temporary: Path) -> None:
        filters = [_best_filter(array, chunks, settings)]
        blosc2.asarray(
            array, chunks=chunks, blocks=blocks, urlpath=str(temporary), mode="w",
            cparams={**settings, "filters": filters, "filters_meta": [0]},
        )  # fmt: skip
        if not np.array_equal(blosc2.open(str(temporary), mode="r")[:], array):
            raise OSError(f"{path} does not read back as it was written; the disk may be full or failing.")

    _replace(path, write)


def _best_filter(array: np.ndarray, chunks: tuple[int, ...], settings: dict) -> blosc2.Filter:
    """Shuffling bytes helps noise and harms label maps: tried on slices in the middle, which are typical."""
    middle = tuple(slice((n - c) // 2, (n - c) // 2 + c) for n, c in zip(array.shape, chunks, strict=True))
    chunk = array[middle]
    start = chunk.shape[1] // 2
    piece = np.ascontiguousarray(chunk[:, start : start + max(1, _TRIAL * chunk.shape[1] // chunk.nbytes)])
    sizes = {
        kind: len(blosc2.compress2(piece, typesize=array.itemsize, filters=[kind], filters_meta=[0], **settings))
        for kind in (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE)
    }
    return min(sizes, key=sizes.get)


def chunks_and_blocks(
    shape: tuple[int, ...], patch_size: Size, itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and block shape (c, d, h, w) for reading patches; nnU-Net's rule.

    A block starts as the patch rounded up to powers of two and is halved along the axis that is longest for the image
    until it has at most 128 KiB; a chunk grows from it, block by block, to at most 6 MiB. Neither is longer than 1.5
    patches or than the image. Channels are kept apart.
    """
    limit = [max(1, min(n, math.floor(1.5 * p))) for n, p in zip(shape[1:], patch_size, strict=True)]
    block = [2 ** math.ceil(math.log2(p)) for p in patch_size]
    while math.prod(block) * itemsize > _LARGEST_BLOCK:
        longest = max((a for a in range(3) if block[a] > 1), key=lambda a: block[a] / limit[a])
        block[longest] //= 2
    block = [min(b, n) for b, n in zip(block, limit, strict=True)]
    chunk = list(block)
    growing = [0, 1, 2]
    while growing:
        axis = min(growing, key=lambda a: chunk[a] / limit[a])
        grown = [min(c + block[a], limit[a]) if a == axis else c for a, c in enumerate(chunk)]
        if grown[axis] == chunk[axis] or math.prod(grown) * itemsize > _LARGEST_CHUNK:
            growing.remove(axis)
        else:
            chunk = grown
    return (1, *chunk), (1, *block)


# -------------------------------------------------------------------------------------------------------------- reading


def _read_ours(path: Path) -> tuple[dict, dict[Label, np.ndarray]]:
    file = _locations_file(path)
    properties = read_json(path)
    try:
        counts = {_label(text): n for text, n in properties["class_location_counts"].items()}
        if not all(type(n) is int and 0 <= n <= MOST_LOCATIONS for n in counts.values()):
            raise ValueError("its class_location_counts are no counts")
        total = sum(counts.values())
        table = np.load(file, mmap_mode=_MMAP) if total else np.zeros((0, 3), np.int32)  # nothing cannot be mapped
        if table.shape != (total, 3) or table.dtype != np.int32:
            raise ValueError(f"{table.dtype} locations of shape {table.shape} instead of int32 of {(total, 3)}")
    except Exception as error:  # NumPy raises many types for damaged headers
        raise InputError(f"{path} or {file.name} is damaged ({error}); delete it and preprocess again.") from error
    ends = np.cumsum(list(counts.values()), dtype=int)
    return properties, {
        label: table[end - n : end] for (label, n), end in zip(counts.items(), ends.tolist(), strict=True)
    }


def _label(text: str) -> Label:
    """The label or region that `str` made a key of."""
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        return int(text)
    if not re.fullmatch(r"\(-?[0-9]{1,9}(, -?[0-9]{1,9})*,?\)", text):
        raise ValueError(f"{brief(text)} is neither a label nor a region")
    return tuple(int(number) for number in re.findall(r"-?[0-9]+", text))


def _read_peers(path: Path) -> tuple[dict, dict[Label, np.ndarray]]:
    properties = read_properties(path)
    stored = properties.pop("class_locations", None)
    if not isinstance(stored, dict):
        raise InputError(f"{path} has no class_locations: this is not the training data of an nnU-Net >= 2.6.")
    geometry = properties.get("sitk_stuff")
    try:
        locations = {
            label: np.asarray(voxels, np.int32).reshape(-1, 4)[:, 1:]  # nnU-Net's first column is the channel, always 0
            for label, voxels in stored.items()
        }
        if geometry and "nibabel_stuff" not in properties:
            properties["nibabel_stuff"] = {"original_affine": _affine_of_sitk(**geometry)}
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: its class_locations or sitk_stuff are not nnU-Net's ({error}); preprocess again.") from None
    if not isinstance(properties.get("nibabel_stuff"), dict):
        raise InputError(f"{path}: does not say where the image lies in space (nibabel_stuff or sitk_stuff), as of .png and .tif files; "
                         "cases made from NIfTI, .nrrd, .mha or .gipl files are read. Convert the images and preprocess again")
    if not all(isinstance(part, int) for label in locations for part in (label if isinstance(label, tuple) else (label,))):
        raise InputError(f"{path}: its class_locations are of {brief(list(locations))}; want labels or tuples of them.")
    return properties, locations


def _affine_of_sitk(spacing, origin, direction) -> list[list[float]]:
    """NIfTI affine (x, y, z; right, anterior, superior) of SimpleITK's geometry (left, posterior, superior)."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing)
    affine[:3, 3] = origin
    return (np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine).tolist()
