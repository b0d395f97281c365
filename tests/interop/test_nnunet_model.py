"""Folders of nnU-Net models are read, and written so that nnU-Net reads them."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from pgps_jax.errors import InputError
from pgps_jax.interop.nnunet_model import find_folds, read_nnunet_model, write_checkpoint, write_nnunet_model
from pgps_jax.interop.nnunet_names import params_from_state_dict, state_dict_from_params
from pgps_jax.interop.pickles import read_checkpoint

DATASET = {
    "channel_names": {"0": "CT", "1": "CT"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


def plans(about: dict) -> dict:
    """Plans in nnU-Net's schema around a golden network."""
    kwargs = {k: v for k, v in about["arch_kwargs"].items() if k not in ("input_channels", "num_classes")}
    kwargs |= {
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "nonlin": "torch.nn.LeakyReLU",
    }
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet." + about["network"],
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return {
        "dataset_name": "Dataset001_Golden",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "configurations": {
            "base": {"patch_size": [16, 16, 16], "architecture": network},
            "3d_fullres": {"inherits_from": "base"},
            "2d": {"patch_size": [16, 16]},
        },
    }


@pytest.fixture
def written(golden, tmp_path):
    arrays, about = golden("nets/resenc")
    state_dict = {k.removeprefix("param:"): v for k, v in arrays.items() if k.startswith("param:")}
    params = params_from_state_dict(state_dict)
    folds = {0: params, 1: params, "all": params}
    write_nnunet_model(tmp_path, plans(about), DATASET, "3d_fullres", folds, (0, 2))
    return tmp_path, state_dict, about


def test_a_written_model_reads_back_the_same(written):
    folder, state_dict, about = written
    assert find_folds(folder) == (0, 1, "all")
    model = read_nnunet_model(folder, [1, 0])
    assert model.plans == plans(about)
    assert model.dataset == DATASET
    assert (model.configuration, model.mirror_axes, len(model.params)) == ("3d_fullres", (0, 2), 2)
    weights = state_dict_from_params(model.params[0])
    assert set(weights) == set(about["all_state_dict_names_in_order"])
    assert all((weights[name] == array).all() for name, array in state_dict.items())


def test_aliases_share_their_numbers_in_the_file(written):
    folder, state_dict, _ = written
    size = (folder / "fold_0" / "checkpoint_final.pth").stat().st_size
    assert size < 1.2 * sum(array.nbytes for array in state_dict.values())


def test_a_planar_model_counts_its_axes_without_depth(golden, tmp_path):
    _, about = golden("nets/resenc")
    params = {"encoder": {"conv": {"kernel": np.zeros((1, 3, 3, 2, 4), np.float32)}}}
    write_nnunet_model(tmp_path, plans(about), DATASET, "2d", {0: params}, (1, 2))
    raw = read_checkpoint(tmp_path / "fold_0" / "checkpoint_final.pth")
    assert raw["inference_allowed_mirroring_axes"] == (0, 1)
    assert raw["network_weights"]["encoder.conv.weight"].shape == (4, 2, 3, 3)
    assert read_nnunet_model(tmp_path).mirror_axes == (1, 2)
    with pytest.raises(InputError, match="only the axes 1"):
        write_nnunet_model(tmp_path, plans(about), DATASET, "2d", {0: params}, (0, 1, 2))


def test_the_pickle_is_one_that_python_reads(tmp_path):
    contents = {"none": None, "flags": (True, False), "small": -3, "large": [2**40, -(2**31) - 1, -(2**63)], "π": 1.5, "": {}}
    write_checkpoint(tmp_path / "file.pth", contents)
    with zipfile.ZipFile(tmp_path / "file.pth") as archive:
        assert pickle.loads(archive.read("archive/data.pkl")) == contents


def test_what_is_missing_is_said(written, tmp_path):
    folder, _, _ = written
    with pytest.raises(InputError, match="fold_7"):
        read_nnunet_model(folder, [7])
    with pytest.raises(InputError, match=r"plans\.json: this file is missing"):
        read_nnunet_model(folder / "fold_0")
    with pytest.raises(InputError, match="no fold_"):
        read_nnunet_model(folder, checkpoint="checkpoint_best.pth")
    write_checkpoint(folder / "fold_0" / "checkpoint_final.pth", {"network_weights": {}})
    with pytest.raises(InputError, match="not a checkpoint of nnU-Net"):
        read_nnunet_model(folder)


def test_a_model_that_nnunet_has_trained_is_read(real_parity):
    folder = real_parity / "inference" / "Dataset004_Hippocampus" / "model"
    model = read_nnunet_model(folder)
    assert (model.configuration, model.mirror_axes) == ("3d_fullres", (0, 1, 2))
    (params,) = model.params
    raw = read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")["network_weights"]
    again = state_dict_from_params(params)
    assert set(again) == set(raw)
    assert all((again[name] == array).all() for name, array in raw.items())
    assert model.dataset["labels"] == json.loads((folder / "dataset.json").read_text())["labels"]


def test_torch_and_nnunets_predictor_load_what_was_written(written):
    torch = pytest.importorskip("torch")
    predict = pytest.importorskip("nnunetv2.inference.predict_from_raw_data")
    folder, state_dict, about = written
    loaded = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert list(loaded["network_weights"]) != []
    predictor = predict.nnUNetPredictor(device=torch.device("cpu"), verbose=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=(0, 1))  # strict
    assert predictor.allowed_mirroring_axes == (0, 2)
    weights = predictor.network.state_dict()
    assert set(weights) == set(about["all_state_dict_names_in_order"])
    assert all((weights[name].numpy() == array).all() for name, array in state_dict.items())


@pytest.mark.parametrize("changes, words", [
    ({"network_weights": [1]}, "arrays by name"), ({"network_weights": {"a": 1}}, "arrays by name"), ({"network_weights": None}, "arrays"),
    ({"init_args": {}}, "has no 'configuration'"), ({"init_args": {"configuration": ("3d",)}}, "must be text"),
    ({"inference_allowed_mirroring_axes": (0, 7)}, "mirroring axes"), ({"inference_allowed_mirroring_axes": 1}, "mirroring axes"),
    ({"network_weights": {"a": np.zeros(1, np.float32), "a.weight": np.zeros(1, np.float32)}}, "network that is known"),
    ({"network_weights": {"a.weight": np.zeros((1,) * 7, np.float32)}}, "network that is known"),
    ({"network_weights": {"a." * 99 + "weight": np.zeros(1, np.float32)}}, "network that is known"),
])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, changes, words):
    (tmp_path / "fold_0").mkdir()
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_text('{"configurations": {"3d": {}}}')
    good = {"network_weights": {}, "init_args": {"configuration": "3d"}}
    write_checkpoint(tmp_path / "fold_0/checkpoint_final.pth", good)
    assert read_nnunet_model(tmp_path).configuration == "3d"
    write_checkpoint(tmp_path / "fold_0/checkpoint_final.pth", good | changes)
    with pytest.raises(InputError, match=words):
        read_nnunet_model(tmp_path)
