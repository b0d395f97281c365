"""Which cases are trained on and which are held out: nnU-Net's folds, and folds that keep patients together."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pgps_jax.errors import InputError
from pgps_jax.json_file import read_json, write_json

Fold = dict[str, list[str]]  # {"train": case ids, "val": case ids}

NUM_FOLDS = 5
_SEED = 12345
_TRAINED_SHARE = 0.8  # of a random split


def make_folds(case_ids: Sequence[str], num_folds: int = NUM_FOLDS, group_by: str | None = None) -> list[Fold]:
    """Split the cases into folds; each case is held out exactly once. Equal to nnU-Net's without `group_by`.

    Sorted cases are shuffled (Mersenne Twister, seed 12345) and cut into consecutive blocks, as scikit-learn's KFold does.
    With fewer cases than folds, each case is a fold of its own (leave-one-out).

    Args:
        group_by: regular expression; cases for which it finds the same text (its first group, if it has one) belong to
            one patient and stay together. Patients are dealt to the folds in shuffled order, largest first, always to
            the smallest fold.

    Raises:
        InputError: fewer than two cases or patients, an expression that does not match a case.
    """
    ids = np.sort(np.unique(np.asarray(case_ids, dtype=str)))
    groups = patients(ids.tolist(), group_by)
    units = sorted(set(groups.values()))
    if len(units) < 2:
        what = "case" if group_by is None else f"patient by {group_by!r}"
        raise InputError(f"{len(units)} {what}: folds need at least two, one to train on and one to hold out; use --fold all")
    num_folds = min(num_folds, len(units))
    order = np.arange(len(units))
    np.random.RandomState(_SEED).shuffle(order)
    if group_by is None:
        blocks = [{units[i] for i in block} for block in np.array_split(order, num_folds)]
    else:
        size = {unit: sum(group == unit for group in groups.values()) for unit in units}
        blocks, filled = [set() for _ in range(num_folds)], [0] * num_folds
        for unit in sorted((units[i] for i in order), key=lambda unit: -size[unit]):
            smallest = filled.index(min(filled))
            blocks[smallest].add(unit)
            filled[smallest] += size[unit]
    return [{"train": [i for i in ids.tolist() if groups[i] not in block],
             "val": [i for i in ids.tolist() if groups[i] in block]} for block in blocks]  # fmt: skip


def patients(case_ids: Sequence[str], group_by: str | None) -> dict[str, str]:
    """Patient of each case: what the expression finds in its id; without an expression every case is its own."""
    if group_by is None:
        return {case_id: case_id for case_id in case_ids}
    try:
        expression = re.compile(group_by)
    except re.error as error:
        raise InputError(f"--group-by {group_by!r} is not a regular expression: {error}") from None
    found = {case_id: expression.search(case_id) for case_id in case_ids}
    missed = [case_id for case_id, match in found.items() if not match]
    if missed:
        raise InputError(f"--group-by {group_by!r} finds nothing in the case {missed[0]} and {len(missed) - 1} others")
    return {case_id: match[1] if expression.groups else match[0] for case_id, match in found.items()}


def leaks(folds: Sequence[Fold], group_by: str) -> list[str]:
    """One sentence per fold in which a patient is trained on and held out at once; empty if none."""
    sentences = []
    for number, fold in enumerate(folds):
        groups = patients([*fold["train"], *fold["val"]], group_by)
        both = sorted({groups[i] for i in fold["train"]} & {groups[i] for i in fold["val"]})
        if both:
            sentences.append(f"fold {number}: {len(both)} of {len({groups[i] for i in fold['val']})} held-out patients are also "
                             f"trained on, such as {both[0]}: its Dice will be too good")
    return sentences


def read_or_make_folds(
    path: Path, case_ids: Sequence[str], num_folds: int = NUM_FOLDS, group_by: str | None = None
) -> list[Fold]:
    """The folds of a splits_final.json, which is never changed; if there is none, make folds and write it.

    Raises:
        InputError: the file is unreadable, names cases that do not exist, or holds a case out that it trains on.
    """
    if path.exists():
        return read_folds(path, case_ids)
    folds = make_folds(case_ids, num_folds, group_by)
    write_json(path, folds, indent=4)
    return folds


def read_folds(path: Path, case_ids: Sequence[str]) -> list[Fold]:
    """Read and check a splits_final.json; see `read_or_make_folds`. Cases that no fold names are allowed."""
    folds = read_json(path, list)
    if not folds:
        raise InputError(f'{path}: want a list of folds [{{"train": [...], "val": [...]}}, ...]')
    for number, fold in enumerate(folds):
        where = f"{path}: fold {number}"
        if not isinstance(fold, dict) or not all(
            isinstance(fold.get(part), list) and all(isinstance(i, str) for i in fold[part]) for part in ("train", "val")
        ):
            raise InputError(f'{where} must be {{"train": [case names], "val": [case names]}}')
        if not fold["train"] or not fold["val"]:
            raise InputError(f"{where} has no cases to {'train on' if not fold['train'] else 'hold out'}")
        unknown = sorted({*fold["train"], *fold["val"]} - set(case_ids))
        if unknown:
            raise InputError(f"{where} names {len(unknown)} cases that the dataset does not have, such as {unknown[0]}; bring them back, "
                             "or delete the file, and folds are made again")
        both = sorted(set(fold["train"]) & set(fold["val"]))
        if both:
            raise InputError(f"{where} trains on {len(both)} cases that it holds out, such as {both[0]}")
    return [{"train": list(fold["train"]), "val": list(fold["val"])} for fold in folds]


def cases_in_no_fold(folds: Sequence[Fold], case_ids: Sequence[str]) -> list[str]:
    """Cases that no fold trains on or holds out, in the order given."""
    named = {case_id for fold in folds for case_id in (*fold["train"], *fold["val"])}
    return [case_id for case_id in case_ids if case_id not in named]


def cases_of_fold(folds: Sequence[Fold], case_ids: Sequence[str], fold: int | str) -> tuple[list[str], list[str]]:
    """(cases to train on, cases held out) of a fold; of "all" both are all cases, as in nnU-Net.

    A number beyond the folds is a random split of its own, 80 to 20, equal to nnU-Net's (see `beyond_folds`).

    Raises:
        InputError: the fold is no number from 0 and not "all", or there are too few cases to split.
    """
    if str(fold) == "all":
        return sorted(case_ids), sorted(case_ids)
    if isinstance(fold, str) and fold.isdigit():
        fold = int(fold)
    if not isinstance(fold, int) or not 0 <= fold < 2**31 or (fold >= len(folds) and len(case_ids) < 2):
        raise InputError(f"--fold {fold}: there are the folds 0 to {len(folds) - 1}, and `all`; higher numbers split two or more cases")
    if fold < len(folds):
        return list(folds[fold]["train"]), list(folds[fold]["val"])
    ids = np.sort(np.asarray(case_ids, dtype=str))
    chosen = np.zeros(len(ids), bool)
    chosen[np.random.RandomState(_SEED + fold).choice(len(ids), int(_TRAINED_SHARE * len(ids)), replace=False)] = True
    return ids[chosen].tolist(), ids[~chosen].tolist()


def beyond_folds(folds: Sequence[Fold], fold: int | str) -> str | None:
    """A sentence on a fold that is a random split of its own, since its number may be a mistake."""
    if str(fold) == "all" or int(fold) < len(folds):
        return None
    return (f"warning: there are the folds 0 to {len(folds) - 1}; --fold {fold} is a random split, 80 % of the cases to train on, which "
            "overlaps with the folds and does not keep patients together")
