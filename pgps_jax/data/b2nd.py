"""Open the arrays of a preprocessed case, which may come from anyone.

A .b2nd file need not hold numbers: it may be an expression over other files, a function in source code, or a stand-in for
an address on the network, which Blosc2 would set up on opening and compute on reading. So the file's head, a small msgpack
document, is read here first, and only an array of plain numbers within bounds is handed to Blosc2 at all.
"""

import math
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import blosc2
import msgpack  # comes with blosc2
import numpy as np

from pgps_jax.errors import InputError, brief

_MMAP = None if sys.platform == "win32" else "r"  # Windows cannot replace a mapped file
LARGEST_HEAD = 2**16  # bytes
LARGEST_ARRAY = 2**36  # bytes once read: 64 GiB, twenty times a whole-body PET/CT
LARGEST_CHUNK = 2**30  # bytes once read; one is read whole
MOST_CHUNKS = 2**22  # whose places are all read on opening
DTYPES = ("<f4", "<f2", "|i1", "<i2", "<i4", "|u1", "<u2", "<f8", "<i8")
CODECS = range(6)  # blosclz, lz4, lz4hc, snappy, zlib, zstd
FILTERS = range(5)  # none, shuffle, bitshuffle, delta, truncation; larger numbers are plugins


class StoredArray:
    """An array on disk: `array[:, 3:9, 0:5, 2:7]` reads and decompresses only the blocks that it needs."""

    def __init__(self, array: blosc2.NDArray, path: Path):
        self._array, self._path = array, path
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype
        self.nbytes: int = math.prod(self.shape) * self.dtype.itemsize
        self.cbytes: int = array.schunk.cbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: Any) -> np.ndarray:
        """Read a part. Raises InputError naming the file if it cannot be decompressed."""
        try:
            return self._array[where]
        except (RuntimeError, ValueError, MemoryError, OSError) as error:
            raise InputError(f"{self._path} is damaged ({error}); delete it and preprocess its case again") from error


def open_array(path: Path) -> StoredArray:
    """Open a .b2nd file of plain numbers. Nothing but its head is read.

    Raises:
        InputError: it is missing, damaged or cut short, holds anything but an array of numbers, or claims to be larger
            than any case.
    """
    try:
        head = _read_head(path)
        _check_head(head, path)
        array = blosc2.open(str(path), mode="r", dparams={"nthreads": 1}, mmap_mode=_MMAP)
        if type(array) is not blosc2.NDArray or tuple(array.shape) != head.shape or array.dtype != np.dtype(head.dtype):
            raise ValueError("it is not the array that its head describes")
    except InputError:
        raise
    except Exception as error:  # blosc2 raises RuntimeError, OSError, ValueError, ...; msgpack has a dozen of its own
        raise InputError(f"{path} is missing or damaged ({error}); delete it and preprocess its case again") from error
    return StoredArray(array, path)


class _Head(NamedTuple):
    """What the file says of itself."""

    frame_bytes: int
    raw_bytes: int
    chunk_bytes: int
    codec: int
    filters: tuple[int, ...]
    layers: set[str]  # what kind of thing it is
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str


def _read_head(path: Path) -> _Head:
    """See c-blosc2's README_CFRAME_FORMAT and README_B2ND_METALAYER."""
    with path.open("rb") as file:
        start = file.read(LARGEST_HEAD)
    if start[2:10] != b"b2frame\0":
        raise ValueError("it does not begin as one")
    fields = _unpacked(start)
    _, _, frame_bytes, flags, raw_bytes, _, _, _, chunk_bytes, _, _, _, filters, (_, names, values) = fields
    layers = dict(zip((name.decode() for name in names), values, strict=True))
    if "b2nd" not in layers:
        raise ValueError("it holds bytes, not an array")
    shape, chunks, _, _, dtype = _unpacked(layers["b2nd"])[2:7]
    codec, codes = max(flags[2] & 15, filters.data[6]), tuple(filters.data[:6])
    return _Head(frame_bytes, raw_bytes, chunk_bytes, codec, codes, set(layers), tuple(shape), tuple(chunks), dtype.decode())


def _unpacked(data: bytes) -> Any:
    unpacker = msgpack.Unpacker(raw=True, strict_map_key=False, max_buffer_size=LARGEST_HEAD)
    unpacker.feed(data)
    return unpacker.unpack()


def _check_head(head: _Head, path: Path) -> None:
    others = head.layers - {"b2nd"}
    if others or _is_archive(path):
        raise InputError(f"{path}: holds more than an array of numbers ({brief(sorted(others) or 'an archive')}), which could run code "
                         "or read other files; it is not opened. Preprocess its case again from the images")
    if head.codec not in CODECS or not set(head.filters) <= set(FILTERS):
        raise InputError(f"{path}: is compressed with a plugin (codec {head.codec}, filters {head.filters}); only Blosc2's own are used")
    if head.dtype not in DTYPES:
        raise InputError(f"{path}: holds values of type {brief(head.dtype)}; want numbers, {', '.join(DTYPES)}")
    if head.frame_bytes != path.stat().st_size:
        raise ValueError(f"it has {path.stat().st_size} bytes, {head.frame_bytes} were written")
    if len(head.shape) != 4 or len(head.chunks) != 4 or min(head.shape + head.chunks) < 1:
        raise ValueError(f"its shape is {brief(head.shape)} in chunks of {brief(head.chunks)}; want (channels, d, h, w)")
    chunk = math.prod(head.chunks) * np.dtype(head.dtype).itemsize
    count = math.prod(-(-n // c) for n, c in zip(head.shape, head.chunks, strict=True))
    if count * chunk > LARGEST_ARRAY or chunk > LARGEST_CHUNK or count > MOST_CHUNKS:
        raise InputError(f"{path}: claims to be of shape {brief(head.shape)} in chunks of {brief(head.chunks)}, beyond any case "
                         f"({LARGEST_ARRAY // 2**30} GiB); delete it and preprocess its case again")
    if head.chunk_bytes < chunk or head.chunk_bytes > 2 * LARGEST_CHUNK or head.raw_bytes != count * head.chunk_bytes:
        raise ValueError(f"{head.raw_bytes} bytes in chunks of {head.chunk_bytes} are not its shape {brief(head.shape)}")


def _is_archive(path: Path) -> bool:
    """Whether the file is a zip archive too, which Blosc2 would look into for other things to open."""
    try:
        with zipfile.ZipFile(path):
            return True
    except Exception:  # whatever it raises, it could not be opened as one
        return False
