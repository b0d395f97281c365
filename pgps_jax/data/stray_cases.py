"""Preprocessed cases that a training would use, or leave out, without a word: datasets change after they were preprocessed."""

from collections.abc import Sequence

from pgps_jax.data.folds import cases_in_no_fold, read_folds
from pgps_jax.data.store import CaseStore

MOST_NAMED = 5


def stray_cases(store: CaseStore, dataset_ids: Sequence[str] | None = None) -> list[str]:
    """A sentence each on cases that are not in the dataset any more, and on cases that are in no fold, with what to do.

    Args:
        store: folder of a configuration's cases; splits_final.json lies beside it.
        dataset_ids: cases of the raw dataset, where it is at hand.

    Raises:
        InputError: the folder or splits_final.json cannot be read, or a fold names cases that are not in the store.
    """
    splits, sentences = store.folder.parent / "splits_final.json", []
    gone = [] if dataset_ids is None else sorted(set(store.ids) - set(dataset_ids))
    if gone:
        sentences.append(f"warning: {len(gone)} preprocessed cases are not in the dataset any more ({_some(gone)}), but are still trained "
                         f"and validated on; to leave them out, delete their files (CASE.b2nd, CASE_seg.b2nd, properties/CASE*) from "
                         f"{store.folder}, and {splits}, so that folds are made again")
    left_out = cases_in_no_fold(read_folds(splits, store.ids), store.ids) if splits.exists() else []
    if left_out:
        sentences.append(f"warning: {len(left_out)} preprocessed cases are in no fold of {splits} ({_some(left_out)}): only --fold all "
                         "trains or validates on them; delete the file to have folds made again (by `plan --overwrite --group-by ...` "
                         "where patients must stay together)")
    return sentences


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:MOST_NAMED]) + (", ..." if len(ids) > MOST_NAMED else "")
