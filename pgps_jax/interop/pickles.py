"""Read nnU-Net's pickles (case properties, .pth checkpoints) without running what is inside them, and without torch.

Plain unpickling can call any function of any installed package, so a file from a stranger could run code. Here the only
names a file may use are those of numbers, arrays and containers, and even these are never NumPy's or torch's own
functions: each name leads to a small stand-in below that checks its arguments. Everything else is refused.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pgps_jax.errors import InputError

_LARGEST_PROPERTIES = 2**30  # bytes; locations of some hundred classes take some tens of MB
_LARGEST_STRUCTURE = 2**28  # bytes of a checkpoint's pickle, which holds names and shapes but no numbers of tensors
_FORBIDDEN_OPCODES = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}  # objects of classes; none needed
_MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}  # a huge index would make the reader allocate that many slots
_TORCH_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


def read_properties(path: Path) -> dict[str, Any]:
    """A case's properties as nnU-Net stores them beside its arrays: containers, numbers, text and NumPy arrays.

    Raises:
        InputError: the file is damaged, too large, or asks for anything but plain values.
    """
    path = Path(path)
    if path.stat().st_size > _LARGEST_PROPERTIES:
        raise InputError(f"{path}: {path.stat().st_size} bytes are too many for the properties of one case.")
    properties = _load(path.read_bytes(), path, _array_names(), None)
    if not isinstance(properties, dict):
        raise InputError(f"{path}: expected a dictionary of case properties, found {type(properties).__name__}.")
    return properties


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint in torch's zip format (.pth) with every tensor as a read-only NumPy array (bfloat16 by ml_dtypes).

    Tensors that share storage in the file share memory here.

    Raises:
        InputError: no zip checkpoint, damaged, or it asks for anything but tensors, numbers and containers.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is not a checkpoint in torch's zip format; files of torch before 1.6 must be saved again with a "
            "current torch."
        )
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickled = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise InputError(f"{path}: a torch checkpoint has exactly one data.pkl, this one has {len(pickled)}.")
        prefix = pickled[0].removesuffix("data.pkl")
        storages = _Storages(archive, members, prefix, path)
        if members[pickled[0]].file_size > _LARGEST_STRUCTURE:
            raise InputError(f"{path}: its data.pkl is larger than any checkpoint needs; refused.")
        checkpoint = _load(storages.read("data.pkl"), path, _array_names() | _torch_names(), storages.of_key)
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: expected a dictionary, found {type(checkpoint).__name__}.")
    return checkpoint


# ------------------------------------------------------------------------------------------------------- the reader


class _Allowed:
    """What a name in the file stands for: may be called, and cannot be changed by the file."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable):
        self._make = make

    def __call__(self, *args):
        return self._make(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a function may not be given a state")


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes, names: dict[tuple[str, str], Callable], storage_of: Callable | None):
        super().__init__(io.BytesIO(data))
        self._names, self._storage_of = names, storage_of

    def find_class(self, module, name):
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a plain value")
        return _Allowed(self._names[module, name])

    def persistent_load(self, key):
        if self._storage_of is None:
            raise pickle.UnpicklingError("it refers to data outside of itself")
        return self._storage_of(key)


def _load(data: bytes, path: Path, names: dict, storage_of: Callable | None) -> Any:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _FORBIDDEN_OPCODES:
                raise pickle.UnpicklingError(f"it makes objects of classes ({opcode.name})")
            if opcode.name in _MEMO_OPCODES and argument > len(data):
                raise pickle.UnpicklingError("it numbers more objects than it can hold")
        return _finished(_Reader(data, names, storage_of).load(), {})
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail in any way; none of them is the program's fault
        raise InputError(f"{path} was refused: {error}. Only numbers, arrays and containers are read.") from error


def _finished(value: Any, known: dict[int, Any]) -> Any:
    """The value with every `_Array` replaced by its array; what the file shares stays shared."""
    if isinstance(value, _Array):
        return value.array
    if id(value) in known:
        return known[id(value)][0]
    if isinstance(value, dict):
        done = {}
        known[id(value)] = done, value
        done.update((_finished(k, known), _finished(v, known)) for k, v in value.items())
    elif isinstance(value, list):
        done = []
        known[id(value)] = done, value
        done.extend(_finished(v, known) for v in value)
    elif isinstance(value, tuple):
        done = tuple(_finished(v, known) for v in value)
        known[id(value)] = done, value
    elif isinstance(value, (_Dtype, _Storage, _Allowed)):
        done = str(value)
    else:
        done = value
    return done


# -------------------------------------------------------------------------------------------------- NumPy's stand-ins


class _Dtype:
    """numpy.dtype of a number or bool."""

    def __init__(self, code, align=False, copy=True):
        if not (isinstance(code, str) and re.fullmatch(r"[biufc]\d{1,2}", code)):
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("an array's byte order is not understood")
        self.dtype = self.dtype.newbyteorder(state[1])

    def __str__(self):
        return self.dtype.name


class _Array:
    """numpy.ndarray: made empty, then given (version, shape, dtype, Fortran order, bytes)."""

    array = np.zeros(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw, dtype, shape, order) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array is not made of plain bytes")
    if len(raw) != math.prod(shape) * dtype.dtype.itemsize:
        raise pickle.UnpicklingError("an array's shape and its bytes disagree")
    return np.ndarray(shape, dtype.dtype, raw, order=order)


def _scalar(dtype, raw):
    return _array(raw, dtype, (), "C")[()]


def _latin1(text, encoding):
    if encoding != "latin1":
        raise pickle.UnpicklingError("bytes are encoded in an unknown way")
    return text.encode("latin1")


def _array_names() -> dict[tuple[str, str], Callable]:
    def never(*args):
        raise pickle.UnpicklingError("it makes an array in an unknown way")

    names: dict[tuple[str, str], Callable] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): never,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _latin1,
        ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes no bytes at all
    }
    for core in ("numpy._core", "numpy.core"):  # NumPy 2, NumPy 1
        names[f"{core}.multiarray", "_reconstruct"] = lambda *ignored: _Array()
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _array
    return names


# -------------------------------------------------------------------------------------------------- torch's stand-ins


class _Storage:
    """The numbers behind one or more tensors, flat."""

    def __init__(self, values: np.ndarray):
        self.values = values


class _Storages:
    """Members of the checkpoint's zip file, each read once."""

    def __init__(self, archive: zipfile.ZipFile, members: dict, prefix: str, path: Path):
        self._archive, self._members, self._prefix, self._path = archive, members, prefix, path
        self._known: dict[tuple[str, str], _Storage] = {}
        self._left = path.stat().st_size  # a stored member cannot hold more than the file: stops zip bombs
        if f"{prefix}byteorder" in members and self.read("byteorder") != b"little":
            raise InputError(f"{path}: written on a big-endian machine, which is not supported.")

    def read(self, name: str) -> bytes:
        info = self._members.get(self._prefix + name)
        if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size > self._left:
            raise InputError(f"{self._path}: member {name!r} is missing, compressed or larger than the file; refused.")
        self._left -= info.file_size
        return self._archive.read(info)

    def of_key(self, reference) -> _Storage:
        kind, dtype, key, _device, numel = reference
        if kind != "storage" or not isinstance(dtype, _Allowed) or not isinstance(key, str):
            raise pickle.UnpicklingError("a tensor's storage is not understood")
        dtype = dtype()
        if (key, dtype) not in self._known:
            values = np.frombuffer(self.read(f"data/{key}") if numel else b"", _numpy_dtype(dtype))
            if len(values) != numel:
                raise pickle.UnpicklingError(f"storage {key} does not have the length it claims")
            self._known[key, dtype] = _Storage(values)
        return self._known[key, dtype]


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # comes with jax; only such checkpoints need it

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _tensor(storage, offset, size, stride, *ignored) -> _Array:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor is not understood")
    values = storage.values
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(values) or (math.prod(size) and last >= len(values)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    tensor = _Array()
    strides = [step * values.itemsize for step in stride]
    tensor.array = np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)
    return tensor


def _torch_names() -> dict[tuple[str, str], Callable]:
    names: dict[tuple[str, str], Callable] = {
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *ignored: tensor,
        ("torch", "Size"): lambda *size: tuple(*size),
        ("torch", "device"): lambda *device: ":".join(map(str, device)),
    }
    for storage, dtype in _TORCH_STORAGES.items():
        names["torch", storage] = lambda dtype=dtype: dtype
    return names
