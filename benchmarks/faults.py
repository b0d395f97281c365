"""Inject every kind of fault into good files and write down what the user sees: docs/faults.md.

    python benchmarks/faults.py              # writes docs/faults.md
    python benchmarks/faults.py --show       # prints it instead

Each entry of `FAULTS` names a fault and makes it in an empty folder; what the package says is taken as it is, with the
folder's name shortened. tests/test_faults.py goes through the same list.
"""

import argparse
import gzip
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import blosc2
import fuzz_targets as good
import numpy as np

from pgps_jax.errors import InputError
from pgps_jax.json_file import read_json, write_json
from pgps_jax.train.checkpoint import Checkpoints, load_params
from pgps_jax.train.state import abstract

DOCUMENT = Path(__file__).parents[1] / "docs" / "faults.md"
HEAD = (
    "# Faults in files, and what the user sees", "",
    "Made by `python benchmarks/faults.py`: each fault is injected into good files. The message is what the command line prints before it",
    "leaves with code 2, or what the log says where training goes on.", "",
)
LIMITS = """\
## What a stranger's file can do

It can be refused. Limits, whatever a file says of itself:

| file | limits |
|---|---|
| any JSON | 256 MiB, 64 levels, numbers of 64 bits, valid Unicode |
| dataset.json | paths lead into the dataset's folder or through links in it; case names are printable and have at most 200 bytes |
| | 32766 labels, 10000 channels |
| plans.json | 24 stages, 65536 features, patches of 32768 voxels per axis, batches of 2^20, 32 generations of inheritance |
| | folder names are plain names |
| schedule.json | 10^8 steps, patch edges and batches of 2^20 |
| NIfTI | no more voxels than the file can hold (1032 bytes per byte under gzip) and at most 2^32; 16 MiB before the first voxel |
| | CIFTI is not read |
| .nrrd, .mha | voxels in the file itself |
| .b2nd | one array of plain numbers: no expressions, functions, references, archives or plugins; 64 GiB, chunks of 1 GiB |
| .pkl, .pth | numbers, text, arrays and containers; 10^7 operations, 2 x 10^7 values with sharing unfolded |
| | members that are not compressed, with the right sums |
| checkpoints | every array and the description must have the CRC-32 that was saved with them |
| archives of fetch-msd | plain files under the task's folder, not larger together than the archive |

Nothing is unpickled by Python's own rules, no name of a class or function in a file is looked up, and no file starts a program, opens a
connection or writes outside of the workspace. `python benchmarks/fuzz.py` tries to make it otherwise; its last results are in
`benchmarks/results/fuzz.json`.
"""


class Fault(NamedTuple):
    """What is wrong, and a function that makes it so in an empty folder and then does what the package does."""

    what: str
    inject: Callable[[Path], None]


def changed_json(make: Callable, read: Callable, **changes: object) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        path = make(folder)[0]
        write_json(path, read_json(path) | changes)
        read(path)

    return inject


def changed_bytes(make: Callable, read: Callable, change: Callable[[bytes], bytes], number: int = 0) -> Callable[[Path], None]:
    def inject(folder: Path) -> None:
        path = make(folder)[number]
        path.write_bytes(change(path.read_bytes()))
        read(path)

    return inject


def flipped(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


def plan_with(**changes: object) -> Callable[[Path], None]:
    plans = json.loads(json.dumps(good.PLANS))
    plans["configurations"]["3d_fullres"] |= changes
    return changed_json(good.make_json("plans.json", plans), good.read_plans)


def bomb(folder: Path) -> None:
    path = good.make_nifti(".nii.gz")(folder)[0]
    header = bytearray(gzip.decompress(path.read_bytes())[:352])
    header[42:48] = np.array([4000, 4000, 4000], "<i2").tobytes()
    with gzip.open(path, "wb", 1) as file:
        file.write(bytes(header))
        for _ in range(16):
            file.write(bytes(2**24))
    good.read_nifti(path)


class _Command:
    def __reduce__(self):
        return os.system, ("touch ran",)


def command_in_a_pickle(folder: Path) -> None:
    path = good.make_pickled(folder)[0]
    path.write_bytes(pickle.dumps({"spacing": _Command()}))
    good.read_pickled(path)


def endless_pickle(folder: Path) -> None:
    path, value = good.make_pickled(folder)[0], (1,)
    for _ in range(50):
        value = (value, value)
    path.write_bytes(pickle.dumps({"spacing": value}))
    good.read_pickled(path)


def expression_in_a_store(folder: Path) -> None:
    path = good.make_stored("a.b2nd")(folder)[0]
    array = blosc2.asarray(np.zeros((2, 9, 12, 10), np.float32), urlpath=str(folder / "operand.b2nd"), mode="w")
    path.unlink()
    (array + 1).save(urlpath=str(path))
    good.read_stored(path)


def checkpoint_with(number_of_damaged: int, use: Callable[[Path], object]) -> Callable[[Path], None]:
    """Damage the largest file of the newest checkpoints."""

    def inject(folder: Path) -> None:
        good.make_checkpoints(folder)
        for step in (2, 1)[:number_of_damaged]:
            files = [path for path in (folder / f"good/last/{step}").rglob("*") if path.is_file()]
            largest = max(files, key=lambda path: path.stat().st_size)
            content = bytearray(largest.read_bytes())
            for place in (1, 3):  # in the parameters and in the optimizer's state, whichever comes first
                content[len(content) * place // 4] ^= 1
            largest.write_bytes(bytes(content))
        use(folder / "good")

    return inject


def restore(folder: Path) -> None:
    said: list[str] = []
    with Checkpoints(folder, said.append) as checkpoints:
        checkpoints.restore(abstract(good.run_state(0)))
    raise InputError("; ".join(said))  # what is said here is not an error: training goes on


def overlapping_folds(folder: Path) -> None:
    write_json(folder / "splits_final.json", [{"train": ["a", "b"], "val": ["b"]}])
    good.read_folds(folder / "splits_final.json", ["a", "b"])


def case_without_locations(folder: Path) -> None:
    path = good.make_stored("a.b2nd")(folder)[0]
    (folder / "properties/a_locations.npy").unlink()
    good.read_stored(path)


DATASET = good.make_dataset, good.read_dataset
CASE = {"images": ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz"], "label": "labelsTr/a.nii.gz"}
SCHEDULE = good.make_json("schedule.json", good.SCHEDULE), good.read_schedule
CONFIG = good.make_json("config.json", {"dataset": "x"}), good.read_config
INFERENCE = next((target.make, target.read) for target in good.TARGETS if target.name == "inference.json")
FAULTS = (
    Fault("a volume cut short", changed_bytes(good.make_nifti(".nii.gz"), good.read_nifti, lambda b: b[:60])),
    Fault("a volume whose header claims 64 billion voxels", bomb),
    Fault("an image that is none", changed_bytes(good.make_nifti(".nii.gz"), good.read_nifti, lambda b: b"<html>not found</html>")),
    Fault("dataset.json is no JSON", changed_bytes(*DATASET, lambda b: b[:-20])),
    Fault("dataset.json nested without end", changed_bytes(*DATASET, lambda b: b"[" * 10**6)),
    Fault("an image path that leads out of the dataset", changed_json(*DATASET, dataset={"a": CASE | {"label": "../private/b.nii.gz"}})),
    Fault("a case name that is a path", changed_json(*DATASET, dataset={"../a": CASE})),
    Fault("regions in an order of lists", changed_json(*DATASET, regions_class_order=[[1], [2]])),
    Fault("two labels of one value", changed_json(*DATASET, labels={"background": 0, "a": 1, "b": 1})),
    Fault("plans.json leads out of its folder", plan_with(data_identifier="../../x")),
    Fault("plans.json of 10^12 stages", plan_with(architecture={"network_class_name": "PlainConvUNet", "arch_kwargs": good.NETWORK | {
        "n_stages": 10**12, "features_per_stage": 4}})),
    Fault("plans.json inherits in a circle", plan_with(inherits_from="child")),
    Fault("a split that trains on what it holds out", overlapping_folds),
    Fault("schedule.json of 10^14 steps", changed_json(*SCHEDULE, stage_of_step="0x99999999999999")),
    Fault("config.json with a number beyond all bounds", changed_bytes(*CONFIG, lambda b: b'{"epochs": 1' + b"0" * 400 + b"}")),
    Fault("config.json with NaN", changed_json(*CONFIG, checkpoint_minutes=float("nan"))),
    Fault("config.json of another run", changed_json(*CONFIG, seed=7)),
    Fault("inference.json of another plan", changed_json(*INFERENCE, configuration="2d")),
    Fault("a preprocessed array cut short", changed_bytes(good.make_stored("a.b2nd"), good.read_stored, lambda b: b[:-100])),
    Fault("an expression in place of a preprocessed array", expression_in_a_store),
    Fault("a preprocessed case without its locations", case_without_locations),
    Fault("a pickle that runs a command", command_in_a_pickle),
    Fault("a pickle of tuples without end", endless_pickle),
    Fault("a flipped bit in nnU-Net's weights", changed_bytes(good.make_model, good.read_model, flipped)),
    Fault("weights that are no torch file", changed_bytes(good.make_model, good.read_model, lambda b: b"version https://git-lfs...")),
    Fault("flipped bits in the newest checkpoint, training goes on", checkpoint_with(1, restore)),
    Fault("flipped bits in every checkpoint", checkpoint_with(2, restore)),
    Fault("flipped bits in the checkpoint to predict with", checkpoint_with(1, load_params)),
)


def seen(fault: Fault, folder: Path) -> str:
    """What the package says; AssertionError if it says nothing."""
    try:
        fault.inject(folder)
    except InputError as error:
        return str(error).replace(str(folder.resolve()), "FOLDER").replace(str(folder), "FOLDER").replace("\n", " ")
    raise AssertionError(f"nothing was said of {fault.what}")


def document() -> str:
    """docs/faults.md."""
    lines = [*HEAD, LIMITS, "## Faults", "", "| fault | what the user sees |", "|---|---|"]
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(f"| {fault.what} | {seen(fault, Path(folder)).replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", action="store_true", help="print instead of writing")
    if parser.parse_args().show:
        print(document())
    else:
        DOCUMENT.write_text(document())
