"""Folds equal nnU-Net's, keep patients together where asked, and refuse split files that would leak."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.data.folds import beyond_folds, cases_of_fold, leaks, make_folds, read_or_make_folds
from pgps_jax.errors import InputError

IDS = [f"case_{i:02d}" for i in range(20)]


def test_twenty_cases_are_split_as_scikit_learn_splits_them():
    held_out = [[IDS.index(case) for case in fold["val"]] for fold in make_folds(IDS[::-1])]
    assert held_out == [[3, 8, 13, 16], [0, 10, 12, 15], [6, 7, 11, 17], [9, 14, 18, 19], [1, 2, 4, 5]]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(2, 7), st.booleans())
def test_every_case_is_held_out_once_and_trained_on_otherwise(cases, num_folds, grouped):
    ids = [f"p{i // 3:02d}_{i % 3}" for i in range(cases)]
    if grouped and cases < 4:
        return
    folds = make_folds(ids, num_folds, r"^p\d+" if grouped else None)
    assert sorted(case for fold in folds for case in fold["val"]) == ids
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == ids and fold["train"] == sorted(fold["train"]) and fold["val"]


def test_few_cases_are_left_out_one_by_one():
    folds = make_folds(["b", "a", "c"])
    assert len(folds) == 3 and sorted(fold["val"][0] for fold in folds) == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"1 case.*--fold all"):
        make_folds(["a"])


def test_scans_of_a_patient_stay_together_and_folds_stay_even():
    ids = [f"{patient}_{scan}" for patient in range(30) for scan in range(1 + patient % 4)]
    folds = make_folds(ids, group_by=r"^(\d+)_")
    assert leaks(folds, r"^(\d+)_") == []
    sizes = [len(fold["val"]) for fold in folds]
    assert max(sizes) - min(sizes) <= 2 and sum(sizes) == len(ids)
    assert make_folds(ids[::-1], group_by=r"^(\d+)_") == folds


def test_leaks_are_counted_and_named():
    sentences = leaks(make_folds([f"{i // 2:02d}_{i % 2}" for i in range(40)]), r"^\d+")
    assert len(sentences) == 5 and sentences[0].startswith("fold 0: ") and "held-out patients are also trained on" in sentences[0]


@pytest.mark.parametrize(("pattern", "words"), [("(", "regular expression"), (r"\d{9}", "case_00 and 19 others")])
def test_a_useless_expression_is_refused(pattern, words):
    with pytest.raises(InputError, match=words):
        make_folds(IDS, group_by=pattern)


def test_a_split_file_is_written_once_and_then_obeyed(tmp_path):
    path = tmp_path / "splits_final.json"
    made = read_or_make_folds(path, IDS)
    assert json.loads(path.read_text()) == made == make_folds(IDS)
    path.write_text(json.dumps([{"train": IDS[:3], "val": IDS[3:4]}]))
    before = path.read_bytes()
    assert read_or_make_folds(path, IDS) == [{"train": IDS[:3], "val": IDS[3:4]}]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "JSON"),
        ({"train": []}, "JSON list"),
        ([], "list of folds"),
        ([["a"]], "fold 0 must be"),
        ([{"train": [1], "val": ["case_01"]}], "fold 0 must be"),
        ([{"train": ["case_00"], "val": []}], "no cases to hold out"),
        ([{"train": ["case_00"], "val": ["case_77"]}], "case_77"),
        ([{"train": ["case_00", "case_01"], "val": ["case_01"]}], "holds out, such as case_01"),
    ],
)
def test_split_files_that_cannot_be_meant_are_refused(tmp_path, content, words):
    path = tmp_path / "splits_final.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=words):
        read_or_make_folds(path, IDS)


def test_a_fold_is_chosen_by_number_or_all():
    folds = make_folds(IDS)
    assert cases_of_fold(folds, IDS, 3) == cases_of_fold(folds, IDS, "3") == (folds[3]["train"], folds[3]["val"])
    assert cases_of_fold(folds, IDS[::-1], "all") == (IDS, IDS)
    for wrong in (-1, "five", 2**40):
        with pytest.raises(InputError, match=r"--fold .*0 to 4"):
            cases_of_fold(folds, IDS, wrong)


def test_a_number_beyond_the_folds_is_nnunets_random_split_and_said_to_be_one():
    folds = make_folds(IDS)
    held_out = {7: [3, 5, 10, 14], 12: [10, 17, 18, 19]}  # by nnU-Net 2.8.1 for these names
    for fold, numbers in held_out.items():
        train, val = cases_of_fold(folds, IDS[::-1], fold)
        assert val == [IDS[i] for i in numbers] and sorted(train + val) == IDS
        assert f"--fold {fold} is a random split" in beyond_folds(folds, fold)
    assert beyond_folds(folds, 4) is beyond_folds(folds, "all") is None
    with pytest.raises(InputError, match="two or more cases"):
        cases_of_fold([], IDS[:1], 7)


@pytest.mark.parametrize("name", ["Dataset004_Hippocampus", "Dataset101_SarcomaPETCT", "Dataset102_Sunnybrook"])
def test_real_splits_equal_nnunets(real_parity, name):
    folder = real_parity / "plans" / name
    want = json.loads((folder / "splits_final.json").read_text())
    ids = np.random.default_rng(0).permutation([case for fold in want for case in fold["val"]]).tolist()
    assert make_folds(ids) == want
    given = read_or_make_folds(folder / "splits_given.json", ids)
    assert len(given) == 5


def test_sunnybrooks_patients_are_kept_apart_by_their_names(real_parity):
    folds = json.loads((real_parity / "plans/Dataset102_Sunnybrook/splits_final.json").read_text())
    ids = [case for fold in folds for case in fold["val"]]
    assert len(leaks(folds, r"(.*)_ph\d+")) == 5
    assert leaks(make_folds(ids, group_by=r"(.*)_ph\d+"), r"(.*)_ph\d+") == []
