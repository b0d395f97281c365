"""What a model brings along, or must be told, when it changes between nnU-Net and us."""

import json

import pytest

from pgps_jax.errors import InputError
from pgps_jax.exchange import export_nnunet, import_nnunet
from pgps_jax.interop.pickles import read_checkpoint
from pgps_jax.validate import load_predictor


@pytest.fixture
def peer(run, tmp_path):
    """The run as nnU-Net would have trained it."""
    assert export_nnunet(run, tmp_path / "peer") is None
    (checkpoint,) = (tmp_path / "peer").glob("fold_*/checkpoint_final.pth")
    checkpoint.parent.rename(tmp_path / "peer" / "fold_0")
    return tmp_path / "peer"


def change_plans(folder, configuration=None, **values):
    content = json.loads((folder / "plans.json").read_text()) | values
    content["configurations"]["3d_fullres"] |= configuration or {}
    (folder / "plans.json").write_text(json.dumps(content))


@pytest.mark.parametrize("reader, orientation", [("SimpleITKIO", None), ("NibabelIOWithReorient", "RAS")])
def test_an_imported_model_turns_images_as_nnunets_reader_did(peer, tmp_path, reader, orientation):
    change_plans(peer, image_reader_writer=reader)
    (folder,) = import_nnunet(peer, tmp_path / "imported")
    assert load_predictor(folder).orientation == orientation


def test_the_second_network_of_a_cascade_is_not_imported(peer, tmp_path):
    change_plans(peer, {"previous_stage": "3d_lowres"})
    with pytest.raises(InputError, match="segmentation of 3d_lowres"):
        import_nnunet(peer, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


def test_a_model_of_other_preprocessing_is_imported_but_does_not_predict(peer, tmp_path):
    change_plans(peer, {"resampling_fn_probabilities": "resample_torch_fornnunet"})
    (folder,) = import_nnunet(peer, tmp_path / "imported")
    with pytest.raises(InputError, match="resampling_fn_probabilities 'resample_torch_fornnunet'"):
        load_predictor(folder)


@pytest.mark.parametrize("entries, order, exported", [
    ({"background": 0, "b": 3, "a": 1}, None, {"background": 0, "b": 2, "a": 1}),
    ({"background": 0, "all": [3, 1], "a": [1], "b": 3, "ignore": 9}, [3, 1, 3],
     {"background": 0, "all": [2, 1], "a": [1], "b": 2, "ignore": 3}),
])  # fmt: skip
def test_labels_with_gaps_are_exported_as_nnunet_will_write_them(run, tmp_path, entries, order, exported):
    dataset = {"labels": entries, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "regions_class_order": order}
    (run / "dataset.json").write_text(json.dumps(dataset))
    assert "3 as 2" in export_nnunet(run, tmp_path / "peer")
    found = json.loads((tmp_path / "peer" / "dataset.json").read_text())
    assert found["labels"] == exported and list(found["labels"]) == list(exported)
    assert found["regions_class_order"] == ([2, 1, 2] if order else None)
    (checkpoint,) = (tmp_path / "peer").glob("fold_*/checkpoint_final.pth")
    assert read_checkpoint(checkpoint)["init_args"]["dataset_json"]["labels"] == exported
