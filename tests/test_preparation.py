"""Planning and preprocessing a dataset that changes, by processes that start at once."""

import json
import threading

import pytest

from pgps_jax import preparation
from pgps_jax.data.planner import Overrides
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.errors import InputError
from pgps_jax.folder_lock import hold_folder


@pytest.fixture
def raw(tmp_path):
    return write_phantom_dataset(tmp_path / "Dataset900_Tiny", num_cases=5, num_test=0, shape=(8, 8, 8))


def plan(raw, **wishes):
    said = []
    return (*preparation.plan_dataset(raw, raw.parent / "work", "nnunet", said.append, workers=1, **wishes), said)


def preprocess(raw):
    dataset, plans, folder, _ = plan(raw)
    said = []
    store = preparation.preprocess(dataset, plans, plans.configurations["3d_fullres"], folder, workers=1, say=said.append)
    return store, said


@pytest.mark.parametrize("wish", [
    {"overrides": Overrides(patch_size=(8, 8, 8))}, {"overrides": Overrides(gpu_memory_target=4.0)}, {"group_by": "."}], ids=str)
def test_a_wish_for_a_dataset_that_is_planned_is_refused_instead_of_ignored(raw, wish):
    plan(raw)
    with pytest.raises(InputError, match="planned already; add --overwrite"):
        plan(raw, **wish)
    plan(raw, overwrite=True, **wish)


def test_folds_that_part_patients_are_named_with_their_file_when_it_rules(raw):
    splits = plan(raw)[2] / "splits_final.json"
    assert not any("warning" in sentence for sentence in plan(raw, overwrite=True)[3])
    said = plan(raw, overwrite=True, group_by=".")[3]
    assert any("warning: fold 0" in sentence for sentence in said) and any(f"delete {splits} and plan again" in s for s in said)


def test_folds_that_name_a_missing_case_are_refused_before_the_work(raw):
    *_, folder, _ = plan(raw)
    splits = json.loads((folder / "splits_final.json").read_text())
    splits[0]["val"].append("ghost")
    (folder / "splits_final.json").write_text(json.dumps(splits))
    said = []
    with pytest.raises(InputError, match="such as ghost; bring them back, or delete the file"):
        preparation.plan_dataset(raw, raw.parent / "work", "nnunet", said.append, workers=1, overwrite=True)
    assert said == []


def test_the_datasets_own_folds_are_taken(raw):
    ids = sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").iterdir())
    own = [{"train": ids[:3], "val": ids[3:]}]
    (raw / "splits_final.json").write_text(json.dumps(own))
    *_, folder, _ = plan(raw)
    assert json.loads((folder / "splits_final.json").read_text()) == own


def test_a_process_waits_while_another_prepares_the_same_dataset_and_then_finds_it_done(raw):
    folder = raw.parent / "work" / "preprocessed" / raw.name
    folder.mkdir(parents=True)
    waits, results = threading.Event(), []

    def say(sentence):
        if "another process is at work" in sentence:
            waits.set()

    def second():
        results.append(preparation.plan_dataset(raw, raw.parent / "work", "nnunet", say, workers=1))

    thread = threading.Thread(target=second)
    with hold_folder(folder, lambda: 1 / 0):
        thread.start()
        assert waits.wait(60) and not (folder / "nnUNetPlans.json").exists()
    thread.join(60)
    assert results and (folder / "nnUNetPlans.json").exists()


def test_a_faulty_dataset_leaves_nothing_behind(raw):
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(content | {"numTraining": 9}))
    with pytest.raises(InputError, match="numTraining"):
        plan(raw)
    assert not (raw.parent / "work").exists()


def test_cases_that_left_the_dataset_or_were_added_to_it_are_named_after_preprocessing(raw):
    store, said = preprocess(raw)
    assert said == []
    gone, kept = store.ids[0], store.ids[1]
    for path in [*(raw / "imagesTr").glob(f"{gone}*"), *(raw / "labelsTr").glob(f"{gone}*")]:
        path.unlink()
    for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        (raw / part / f"new{ending}").write_bytes((raw / part / f"{kept}{ending}").read_bytes())
    _, said = preprocess(raw)
    assert len(said) == 2
    assert f"1 preprocessed cases are not in the dataset any more ({gone})" in said[0]
    assert "1 preprocessed cases are in no fold" in said[1] and "(new)" in said[1]
