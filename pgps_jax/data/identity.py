"""data.json: which cases a run is trained on, recognisably, so that a run never goes on with data that were changed meanwhile.

The hash of a case is that of the sizes and of the first and last 4 KiB of its stored arrays and class locations: compressed
arrays of other content have another size, almost surely, and two blocks read as fast from a slow disk as from a fast one.
Preprocessing in its turn does cases again whose raw files have another size or time (`data.preprocess`).
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pgps_jax.data.store import CaseStore
from pgps_jax.errors import InputError

END = 4096  # bytes read at the beginning and at the end of a file
THREADS = 8  # files looked at side by side: network drives answer slowly, but many at once
MOST_NAMED = 5


def identity(store: CaseStore, train_ids: Sequence[str], validation_ids: Sequence[str], dataset_json: dict) -> dict:
    """JSON-able identity of the data of a run: hashes of dataset.json and of every case, the order of the cases, and one of all."""
    hashes = hashes_of_cases(store, store.ids)
    content = {
        "dataset.json": _digest(json.dumps(dataset_json, sort_keys=True).encode()),
        "train": {case_id: hashes[case_id] for case_id in train_ids},
        "validation": {case_id: hashes[case_id] for case_id in validation_ids},
    }
    return {"hash": _digest(json.dumps(content).encode()), **content}


def hashes_of_cases(store: CaseStore, ids: Sequence[str]) -> dict[str, str]:
    """Hash of each case, which is another one when it was preprocessed otherwise."""
    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(ids, threads.map(lambda case_id: _hash_of_case(store.folder, case_id), ids), strict=True))


def refuse_changed(then: dict, now: dict, where: Path) -> None:
    """Raise InputError, naming cases, when the data are not those that a run was started with; `where` is its data.json."""
    if then.get("hash") == now["hash"]:
        return
    changes = ["dataset.json is another"] if then.get("dataset.json") != now["dataset.json"] else []
    for part, what in (("train", "to train on"), ("validation", "to validate on")):
        old, new = then.get(part, {}), now[part]
        changes += _named("changed", [case_id for case_id in new if case_id in old and old[case_id] != new[case_id]])
        changes += _named(f"new {what}", [case_id for case_id in new if case_id not in old])
        changes += _named(f"no more {what}", [case_id for case_id in old if case_id not in new])
        if set(old) == set(new) and list(old) != list(new):
            changes.append(f"the cases {what} have another order")
    raise InputError(f"{where}: the data are not those that this run was started with ({'; '.join(changes)}). Restore them, use another "
                     "--name for a new run or --fresh to start over; delete this file to go on all the same")


def _named(what: str, ids: list[str]) -> list[str]:
    more = f" and {len(ids) - MOST_NAMED} others" if len(ids) > MOST_NAMED else ""
    return [f"{what}: {', '.join(ids[:MOST_NAMED])}{more}"] if ids else []


def _hash_of_case(folder: Path, case_id: str) -> str:
    """Of the files from which a case is trained, in both layouts (ours and nnU-Net's); a missing one counts as none.

    Class locations are read from nnU-Net's pickle only where our own file is missing: one exported beside it changes nothing.
    """
    locations = folder / "properties" / f"{case_id}_locations.npy"
    files = [folder / f"{case_id}.b2nd", folder / f"{case_id}_seg.b2nd", locations if locations.exists() else folder / f"{case_id}.pkl"]
    return _digest(b"".join(_ends(path) for path in files))


def _ends(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(END)
            file.seek(max(size - END, 0))
            return f"{path.suffix} {size} ".encode() + first + file.read(END)
    except FileNotFoundError:
        return b""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
