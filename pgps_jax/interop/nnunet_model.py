"""Folders of trained nnU-Net models: read for prediction here, written so that nnU-Net predicts with them.

A folder holds plans.json, dataset.json and fold_{k}/checkpoint_final.pth. The checkpoints are torch's zip format, which is
read by `pickles` and written here from its dozen opcodes: neither side needs torch, and neither runs code from a file.
"""

import io
import json
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pgps_jax.errors import InputError, brief
from pgps_jax.interop.nnunet_names import params_from_state_dict, state_dict_from_params
from pgps_jax.interop.pickles import read_checkpoint
from pgps_jax.json_file import read_json

Fold = int | str  # 0, 1, ... or "all"


class NnunetModel(NamedTuple):
    """A trained model of one or several folds."""

    plans: dict[str, Any]  # plans.json as nnU-Net writes it
    dataset: dict[str, Any]  # dataset.json
    configuration: str  # key of plans["configurations"]
    params: tuple[dict, ...]  # our parameter tree of each fold, NumPy arrays
    mirror_axes: tuple[int, ...]  # axes (0 d, 1 h, 2 w) after the plan's transpose that test-time mirroring may flip
    trainer: str  # name of nnU-Net's trainer class


def find_folds(results_folder: Path, checkpoint: str = "checkpoint_final.pth") -> tuple[Fold, ...]:
    """Folds of a results folder that have the checkpoint, in order; "all" last."""
    names = [path.parent.name.removeprefix("fold_") for path in Path(results_folder).glob(f"fold_*/{checkpoint}")]
    folds = sorted(int(name) for name in names if name.isdecimal())
    return (*folds, *(["all"] if "all" in names else []))


def read_nnunet_model(
    results_folder: Path, folds: Sequence[Fold] | None = None, checkpoint: str = "checkpoint_final.pth"
) -> NnunetModel:
    """Read a folder that nnU-Net's training has written, e.g. `.../nnUNetTrainer__nnUNetPlans__3d_fullres`.

    Args:
        folds: which folds' weights, in this order; None: all that have the checkpoint.

    Raises:
        InputError: a file is missing or damaged, or the folds are not of one model.
    """
    folder = Path(results_folder)
    cure = "give the folder that nnU-Net's training has written"
    plans, dataset = (read_json(folder / name, cure=cure) for name in ("plans.json", "dataset.json"))
    folds = find_folds(folder, checkpoint) if folds is None else tuple(folds)
    if not folds:
        raise InputError(f"{folder} has no fold_*/{checkpoint}; give the folder that nnU-Net's training has written.")
    params, about = [], []
    for fold in folds:
        path = folder / f"fold_{fold}" / checkpoint
        if not path.is_file():
            raise InputError(f"{path} does not exist; folds with a checkpoint: {find_folds(folder, checkpoint)}.")
        weights, facts = _understood(read_checkpoint(path), path)
        params.append(weights)
        about.append(facts)
    configuration = about[0][0]
    if len(set(about)) > 1:
        raise InputError(f"{folder}: folds {folds} differ in configuration, mirroring axes or trainer: {about}.")
    if not isinstance(plans.get("configurations"), dict) or configuration not in plans["configurations"]:
        raise InputError(f"{folder / 'plans.json'} has no configuration '{configuration}', which the checkpoint is of.")
    return NnunetModel(plans, dataset, configuration, tuple(params), *about[0][1:])


def _understood(contents: dict, path: Path) -> tuple[dict, tuple[str, tuple[int, ...], str]]:
    """Our parameter tree of a checkpoint, and its configuration, mirroring axes and trainer."""
    try:
        weights, configuration = contents["network_weights"], contents["init_args"]["configuration"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a checkpoint of nnU-Net: it has no {error}.") from error
    trainer, axes = contents.get("trainer_name", "nnUNetTrainer"), contents.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(weights, dict) or not all(isinstance(n, str) and isinstance(a, np.ndarray) for n, a in weights.items()):
        raise InputError(f"{path} is not a checkpoint of nnU-Net: its network_weights are not arrays by name.")
    if not isinstance(configuration, str) or not isinstance(trainer, str):
        raise InputError(f"{path} is not a checkpoint of nnU-Net: configuration and trainer_name must be text.")
    planar = any(array.ndim == 4 for array in weights.values())
    if not isinstance(axes, list | tuple) or not all(type(a) is int and 0 <= a < 3 - planar for a in axes):
        raise InputError(f"{path}: the mirroring axes {brief(axes)} are no axes of its images.")
    try:
        tree = params_from_state_dict(weights)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: its network_weights are not those of a network that is known ({error}).") from None
    return tree, (configuration, tuple(a + planar for a in axes), trainer)


def write_nnunet_model(
    results_folder: Path,
    plans: Mapping[str, Any],
    dataset: Mapping[str, Any],
    configuration: str,
    params: Mapping[Fold, Mapping],
    mirror_axes: Sequence[int] = (0, 1, 2),
    *,
    trainer: str = "nnUNetTrainer",
    epochs: int = 1000,
) -> None:
    """Write a folder that nnU-Net's predictor loads strictly; existing files of these names are replaced.

    Args:
        params: our parameter tree per fold (0, 1, ... or "all"); plain or residual-encoder U-Net.
        mirror_axes: as in NnunetModel.
        trainer: the trainer class that nnU-Net builds the network with; its own unless it has been extended.
        epochs: what the checkpoint says it was trained for.
    """
    folder = Path(results_folder)
    planar = len(_patch_size(plans, configuration)) == 2
    if planar and 0 in mirror_axes:
        raise InputError(f"mirror_axes {tuple(mirror_axes)}: a 2D configuration has only the axes 1 (h) and 2 (w).")
    for fold, tree in params.items():
        checkpoint = {
            "network_weights": state_dict_from_params(tree, planar=planar),
            "optimizer_state": {},
            "grad_scaler_state": None,
            "logging": {},
            "_best_ema": None,
            "current_epoch": epochs,
            "init_args": {"configuration": configuration, "fold": fold, "plans": plans, "dataset_json": dataset},
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": tuple(int(a) - planar for a in mirror_axes),
        }
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, checkpoint)
    for name, contents in (("plans.json", plans), ("dataset.json", dataset)):
        text = json.dumps(contents, indent=4).encode()
        _replace(folder / name, lambda file, text=text: file.write(text))


def write_checkpoint(path: Path, contents: Mapping[str, Any]) -> None:
    """Write containers, text, numbers and NumPy arrays so that `torch.load` returns them, arrays as CPU tensors.

    Arrays that are the same object share their storage, as a network's aliases do.
    """
    writer = _TorchPickle()
    pickled = writer.pickle(contents)

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", "little")
            for key, array in enumerate(writer.storages):
                with archive.open(zipfile.ZipInfo(f"archive/data/{key}"), "w", force_zip64=True) as member:
                    member.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
            archive.writestr("archive/version", "3\n")

    _replace(Path(path), write)


class _TorchPickle:
    """Pickle protocol 2 as torch.save writes it: arrays become tensors whose numbers lie in `storages`."""

    _STORAGES = {  # noqa: RUF012
        "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage",
        "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage",
        "bool": "BoolStorage",
    }  # fmt: skip

    def __init__(self):
        self.storages: list[np.ndarray] = []
        self._keys: dict[int, int] = {}

    def pickle(self, value: Any) -> bytes:
        self._out = io.BytesIO()
        self._out.write(b"\x80\x02")
        self._save(value)
        self._out.write(b".")
        return self._out.getvalue()

    def _save(self, value: Any) -> None:
        write = self._out.write
        if value is None:
            write(b"N")
        elif isinstance(value, (bool, np.bool_)):
            write(b"\x88" if value else b"\x89")
        elif isinstance(value, (int, np.integer)):
            self._save_int(int(value))
        elif isinstance(value, (float, np.floating)):
            write(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            write(b"X" + struct.pack("<I", len(text)) + text)
        elif isinstance(value, np.ndarray):
            self._save_tensor(value)
        elif isinstance(value, Mapping):
            write(b"}(")
            for item in value.items():
                self._save(item[0])
                self._save(item[1])
            write(b"u")
        elif isinstance(value, tuple):
            write(b"(")
            for item in value:
                self._save(item)
            write(b"t")
        elif isinstance(value, list):
            write(b"](")
            for item in value:
                self._save(item)
            write(b"e")
        else:
            raise TypeError(f"a checkpoint holds containers, text, numbers and arrays, not {type(value).__name__}")

    def _save_int(self, value: int) -> None:
        if -(2**31) <= value < 2**31:
            self._out.write(b"J" + struct.pack("<i", value))
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._out.write(b"\x8a" + bytes([len(raw)]) + raw)

    def _save_tensor(self, array: np.ndarray) -> None:
        if array.dtype.name not in self._STORAGES:
            raise TypeError(f"torch has no tensors of type {array.dtype}")
        if id(array) not in self._keys:
            self._keys[id(array)] = len(self.storages)
            self.storages.append(array)
        strides = np.cumprod((1, *array.shape[:0:-1]))[::-1] if array.ndim else ()
        write = self._out.write
        # _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks); storage by persistent id
        write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self._save("storage")
        write(f"ctorch\n{self._STORAGES[array.dtype.name]}\n".encode())
        for part in (str(self._keys[id(array)]), "cpu", array.size):
            self._save(part)
        write(b"tQ")
        for part in (0, array.shape, tuple(strides), False):
            self._save(part)
        write(b"ccollections\nOrderedDict\n)RtR")


def _patch_size(plans: Mapping[str, Any], configuration: str) -> Sequence[int]:
    """Patch size of a configuration, which may be inherited."""
    configurations, seen = plans.get("configurations", {}), []
    while configuration in configurations and configuration not in seen:
        if "patch_size" in configurations[configuration]:
            return configurations[configuration]["patch_size"]
        seen.append(configuration)
        configuration = configurations[configuration].get("inherits_from")
    raise InputError(f"The plans have no patch_size for configuration '{seen[0] if seen else configuration}'.")


def _replace(path: Path, write) -> None:
    """Write a file under a temporary name, then move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
