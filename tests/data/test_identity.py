"""A run's data are recognised again, and what has changed in them is named."""

import shutil

import numpy as np
import pytest

from pgps_jax.data.identity import identity, refuse_changed
from pgps_jax.data.store import CaseStore, Preprocessed, write_case
from pgps_jax.errors import InputError

DATASET = {"labels": {"background": 0, "organ": 1}}


def write(folder, name, value, size=12):
    image = np.random.default_rng(value).normal(size=(1, size, size, size)).astype(np.float32)
    seg = (image > 1).astype(np.int16)
    write_case(folder, name, Preprocessed(image, seg, {}, {1: np.argwhere(seg[0] == 1).astype(np.int32)}), (8, 8, 8))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cases"
    for value, name in enumerate("abc"):
        write(folder, name, value)
    return folder


def of(folder, train=("a", "b"), validation=("c",), dataset=DATASET):
    return identity(CaseStore(folder), train, validation, dataset)


def test_a_copy_elsewhere_and_a_case_written_again_alike_are_the_same_data(folder, tmp_path):
    then = of(folder)
    shutil.copytree(folder, tmp_path / "copy")
    write(tmp_path / "copy", "a", 0)
    refuse_changed(then, of(tmp_path / "copy"), tmp_path / "data.json")


@pytest.mark.parametrize("change, words", [
    (lambda f: write(f, "b", 99), "changed: b"),
    (lambda f: write(f, "c", 2, size=13), "changed: c"),
])
def test_a_case_of_other_content_is_refused_by_name(folder, tmp_path, change, words):
    then = of(folder)
    change(folder)
    with pytest.raises(InputError, match=words) as error:
        refuse_changed(then, of(folder), tmp_path / "data.json")
    assert "--fresh" in str(error.value) and "data.json" in str(error.value)


@pytest.mark.parametrize("changed, words", [
    (dict(train=("b", "a")), "another order"),
    (dict(train=("a",)), "no more to train on: b"),
    (dict(train=("a", "b", "c"), validation=()), "new to train on: c; no more to validate on: c"),
    (dict(dataset={"labels": {"background": 0, "lesion": 1}}), "dataset.json is another"),
])
def test_other_cases_another_order_and_other_labels_are_refused(folder, tmp_path, changed, words):
    with pytest.raises(InputError, match=words):
        refuse_changed(of(folder), of(folder, **changed), tmp_path / "data.json")
