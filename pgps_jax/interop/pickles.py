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

from pgps_jax.errors import InputError, brief

_LARGEST_PROPERTIES = 2**30  # bytes; locations of some hundred classes take some tens of MB
_LARGEST_STRUCTURE = 2**28  # bytes of a checkpoint's pickle, which holds names and shapes but no numbers of tensors
MOST_OPERATIONS = 10**7  # of a pickle; the log of 8000 epochs with 100 classes takes some millions
MOST_VALUES = 2 * 10**7  # of what a pickle means, counting what it shares every time that it is met
LARGEST_TUPLE, LARGEST_KEY = 10**4, 64  # values in it, those of tuples in it included: each use as a key walks through all
MOST_AXES = 32
_CLASS_OPCODES = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}  # objects of classes; none needed
_SET_OPCODES = {"EMPTY_SET", "ADDITEMS", "FROZENSET"}  # none needed either
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
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_PROPERTIES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); preprocess the case again.") from None
    if len(data) > _LARGEST_PROPERTIES:
        raise InputError(f"{path}: more than {_LARGEST_PROPERTIES} bytes are too many for the properties of one case.")
    properties = _load(data, path, _array_names(), None)
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
    try:
        with zipfile.ZipFile(path) as archive:
            checkpoint = _from_archive(archive, path)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path} is damaged, or not a checkpoint in torch's zip format ({error}); files of torch before 1.6 must be saved again with "
            "a current torch."
        ) from None
    except FileNotFoundError:
        raise InputError(f"{path}: this file is missing.") from None
    except Exception as error:  # zipfile raises many types for damaged archives
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); copy it again from where it came.") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: expected a dictionary, found {type(checkpoint).__name__}.")
    return checkpoint


def _from_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    pickled = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise InputError(f"{path}: a torch checkpoint has exactly one data.pkl, this one has {len(pickled)}.")
    storages = _Storages(archive, members, pickled[0].removesuffix("data.pkl"), path)
    if members[pickled[0]].file_size > _LARGEST_STRUCTURE:
        raise InputError(f"{path}: its data.pkl is larger than any checkpoint needs; refused.")
    return _load(storages.read("data.pkl"), path, _array_names() | _torch_names(), storages.of_key)


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


class _Reader(pickle._Unpickler):
    """Python's own machine for pickles, written in Python, so that what it does can be checked while it does it."""

    def __init__(self, data: bytes, names: dict[tuple[str, str], Callable], storage_of: Callable | None):
        super().__init__(io.BytesIO(data))
        self._names, self._storage_of = names, storage_of
        self._tuples: dict[int, tuple[int, tuple]] = {}  # number of values in each tuple; holding it keeps its id its own

    def find_class(self, module, name):
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a plain value")
        return _Allowed(self._names[module, name])

    def persistent_load(self, key):
        if self._storage_of is None:
            raise pickle.UnpicklingError("it refers to data outside of itself")
        return self._storage_of(key)

    def size(self, value) -> int:
        """Number of values in nested tuples."""
        return self._tuples.get(id(value), (len(value), value))[0] if isinstance(value, tuple) else 1

    def note_tuple(self):
        made = self.stack[-1]
        size = 1 + sum(map(self.size, made))
        if size > LARGEST_TUPLE:
            raise pickle.UnpicklingError("it holds a tuple of too many values")
        self._tuples[id(made)] = size, made

    def check_keys(self, keys):
        if any(self.size(key) > LARGEST_KEY for key in keys):
            raise pickle.UnpicklingError("a dictionary has a key of too many values")

    def set_item(self):
        self.check_keys(self.stack[-2:-1])
        self.load_setitem()

    def set_items(self):
        self.check_keys(self.stack[::2])
        self.load_setitems()

    def build(self):
        made = self.stack[-2]
        if isinstance(made, OrderedDict):  # torch's state dicts carry versions of their modules, which are not needed
            self.stack.pop()
        elif isinstance(made, _Array | _Dtype):
            self.load_build()
        else:
            raise pickle.UnpicklingError("it gives a state to what has none")

    dispatch = pickle._Unpickler.dispatch | {pickle.SETITEM[0]: set_item, pickle.SETITEMS[0]: set_items, pickle.BUILD[0]: build}
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[code[0]] = lambda self, make=dispatch[code[0]]: (make(self), self.note_tuple())


def _load(data: bytes, path: Path, names: dict, storage_of: Callable | None) -> Any:
    try:
        _check_operations(data)
        return _finished(_Reader(data, names, storage_of).load(), {})[0]
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail in any way; none of them is the program's fault
        raise InputError(f"{path} was refused: {error}. Only numbers, arrays and containers are read.") from error


def _check_operations(data: bytes) -> None:
    """Look through a pickle without doing what it says."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in _CLASS_OPCODES:
            raise pickle.UnpicklingError(f"it makes objects of classes ({opcode.name})")
        if opcode.name in _SET_OPCODES:
            raise pickle.UnpicklingError(f"it makes sets ({opcode.name})")
        if opcode.name in _MEMO_OPCODES and argument > len(data):
            raise pickle.UnpicklingError("it numbers more objects than it can hold")
        if type(argument) is int and abs(argument) >= 2**64:
            raise pickle.UnpicklingError("it holds a number of more than 64 bits")
        if type(argument) is str:
            argument.encode()  # half a character can neither be printed nor be a name
        if count > MOST_OPERATIONS:
            raise pickle.UnpicklingError(f"it takes more than {MOST_OPERATIONS} operations to read")


def _finished(value: Any, known: dict[int, tuple | None]) -> tuple[Any, int]:
    """The value with every `_Array` replaced by its array, and the number of values in it; what the file shares stays shared."""
    if isinstance(value, _Array):
        return value.array, 1
    if isinstance(value, _Dtype | _Storage | _Allowed):
        return str(value), 1
    if not isinstance(value, dict | list | tuple):
        return value, 1
    if id(value) in known:
        if known[id(value)] is None:
            raise pickle.UnpicklingError("a container holds itself")
        return known[id(value)][:2]
    known[id(value)] = None
    inner = [part for item in value.items() for part in item] if isinstance(value, dict) else value
    parts = [_finished(part, known) for part in inner]
    size = 1 + sum(size for _, size in parts)
    if size > MOST_VALUES:
        raise pickle.UnpicklingError(f"what it shares adds up to more than {MOST_VALUES} values")
    plain = [part for part, _ in parts]
    if isinstance(value, dict):
        done = dict(zip(plain[::2], plain[1::2], strict=True))
    else:
        done = tuple(plain) if isinstance(value, tuple) else plain
    known[id(value)] = done, size, value  # holding the value keeps its id its own
    return done, size


# -------------------------------------------------------------------------------------------------- NumPy's stand-ins


class _Dtype:
    """numpy.dtype of a number or bool."""

    def __init__(self, code, align=False, copy=True):
        if not (isinstance(code, str) and re.fullmatch(r"[biufc]\d{1,2}", code)):
            raise pickle.UnpicklingError(f"arrays of type {brief(code)} are not numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if not isinstance(state, tuple) or state[1] not in ("<", ">", "|", "="):
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


def _check_axes(*lengths) -> None:
    for axes in lengths:
        if not isinstance(axes, tuple) or len(axes) > MOST_AXES or not all(isinstance(n, int) and n >= 0 for n in axes):
            raise pickle.UnpicklingError("an array's shape is not understood")


def _array(raw, dtype, shape, order) -> np.ndarray:
    _check_axes(shape)
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
        ("collections", "OrderedDict"): lambda: OrderedDict(),  # filled item by item
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
    _check_axes(size, stride, (offset,))
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor is not understood")
    values = storage.values
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(values) or (math.prod(size) and last >= len(values)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    tensor = _Array()
    strides = [step * values.itemsize for step in stride]
    tensor.array = np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)
    return tensor


def _size(axes=()) -> tuple[int, ...]:
    size = tuple(axes) if isinstance(axes, list) else axes
    _check_axes(size)
    return size


def _torch_names() -> dict[tuple[str, str], Callable]:
    names: dict[tuple[str, str], Callable] = {
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *ignored: tensor,
        ("torch", "Size"): _size,
        ("torch", "device"): lambda *device: ":".join(str(part) for part in device if isinstance(part, str | int)),
    }
    for storage, dtype in _TORCH_STORAGES.items():
        names["torch", storage] = lambda dtype=dtype: dtype
    return names
