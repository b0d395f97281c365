"""A run starts from the weights that are asked for, says what became of each, and refuses what it cannot read before any work."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from pgps_jax import workspace
from pgps_jax.config import NetworkConfig, RunConfig
from pgps_jax.curriculum import CurriculumConfig
from pgps_jax.data.labels import Labels
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.exchange import export_nnunet
from pgps_jax.interop.nnunet_model import write_checkpoint
from pgps_jax.main import EXIT_BAD_INPUT, EXIT_STOPPED, main
from pgps_jax.train import loop
from pgps_jax.train.checkpoint import load_params
from pgps_jax.train.pretrained import output_names, params_of, prepare_start, read_pretrained, state_dict_of, write_start
from pgps_jax.train.setup import initial_state

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a preprocessed dataset."""
    folder = tmp_path_factory.mktemp("pretrained")
    raw = write_phantom_dataset(folder / "Dataset903_Tiny", num_cases=5, num_test=0, shape=(12, 12, 12))
    assert main(["preprocess", str(raw), "--workspace", str(folder / "work"), "--workers", "1"]) == 0
    return RunConfig(raw, folder / "work", name="source", epochs=1, steps_per_epoch=1, network=NetworkConfig(base_features=4),
                     curriculum=CurriculumConfig(mode="constant"), seed=1)


@pytest.fixture(scope="module")
def source(config):
    """A run folder whose weights are those of another seed; nothing is trained in these tests."""
    run = workspace.open_experiment(config)
    workspace.write_run_folder(run, {})
    with loop.Checkpoints(run.folder / "checkpoints") as checkpoints:
        checkpoints.save("last", initial_state(run, loop.open_device(run.schedule.stages, "auto"))[1], 0, {})
    return run.folder


def start(config, name, pretrained, **network):
    changed = dataclasses.replace(config, name=name, pretrained=pretrained, seed=2, network=dataclasses.replace(config.network, **network))
    run = workspace.open_experiment(changed)
    begin = prepare_start(run)
    workspace.write_run_folder(run, {})
    write_start(run, begin)
    return run, begin.report


def test_a_run_of_ours_gives_its_weights_and_the_report_is_kept(config, source):
    run, report = start(config, "from_run", source)
    jax.tree.map(np.testing.assert_array_equal, load_params(run.folder / "checkpoints"), load_params(source / "checkpoints"))
    written = json.loads((run.folder / "pretrained.json").read_text())
    assert written["source"] == str(source)
    assert written["matched"] == list(report.matched)
    assert prepare_start(run) is None, "a run that is under way does not read them again"


def test_a_model_of_nnunet_gives_its_weights_and_its_class_names(config, source, tmp_path):
    export_nnunet(source, tmp_path)
    path = tmp_path / "fold_0" / "checkpoint_final.pth"
    assert read_pretrained(path).classes == ("background", "organ", "lesion")
    run, _ = start(config, "from_nnunet", path)
    jax.tree.map(np.testing.assert_array_equal, load_params(run.folder / "checkpoints"), load_params(source / "checkpoints"))


def test_what_has_another_shape_stays_fresh_and_is_counted(config, source, capsys):
    run, report = start(config, "wider", source, max_features=4)
    assert report.matched and report.skipped
    fresh = initial_state(run, loop.open_device(run.schedule.stages, "auto"))[1].params
    level = load_params(run.folder / "checkpoints")["encoder"]["stages"][1][0]["convs"][0]["conv"]["kernel"]
    np.testing.assert_array_equal(level, fresh["encoder"]["stages"][1][0]["convs"][0]["conv"]["kernel"])


@pytest.mark.parametrize(("what", "words"), [
    ("missing", "no such file"), ("empty folder", "no run folder"), ("text", "zip"), ("no arrays", "no arrays"),
    ("other network", "Nothing of the pretrained weights fits"), ("clash", "known here"),
])
def test_what_cannot_be_used_is_refused_and_no_run_folder_is_made(config, tmp_path, capsys, what, words):
    path = tmp_path / "weights.pth"
    if what == "empty folder":
        path.mkdir()
    elif what == "text":
        path.write_text("weights")
    elif what != "missing":
        write_checkpoint(path, {"no arrays": {"state_dict": {}, "epoch": 3}, "other network": {"vit.norm.weight": np.ones(3, np.float32)},
                                "clash": {"a.b": np.ones(1, np.float32), "a.b.c": np.ones(1, np.float32)}}[what])
    arguments = ["train", str(config.dataset), "--workspace", str(config.workspace), "--name", "refused", "--pretrained", str(path)]
    assert main(arguments) == EXIT_BAD_INPUT
    assert words in capsys.readouterr().err
    assert not workspace.run_folder(dataclasses.replace(config, name="refused")).exists()


def test_run_refuses_missing_weights_before_it_plans(tmp_path, capsys):
    assert main(["run", str(tmp_path), "--workspace", str(tmp_path / "work"), "--pretrained", str(tmp_path / "none.pth")]) == EXIT_BAD_INPUT
    assert "none.pth" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_going_on_with_other_weights_is_refused_and_without_the_file_is_fine(config, source, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "w.pth", {"state_dict": {
        "encoder.stages.0.0.convs.0.norm.weight": np.full(4, 7, np.float32)}})

    def stop(run, spoken):
        raise loop.Stopped("test")

    monkeypatch.setattr("pgps_jax.main.train", stop)
    arguments = ["train", str(config.dataset), "--workspace", str(config.workspace), "--name", "tuned", "--network.base-features", "4"]
    assert main([*arguments, "--pretrained", str(tmp_path / "w.pth")]) == EXIT_STOPPED
    assert "1 parameters copied" in capsys.readouterr().out
    (tmp_path / "w.pth").unlink()
    assert main([*arguments, "--pretrained", str(tmp_path / "w.pth")]) == EXIT_STOPPED
    assert main([*arguments, "--pretrained", str(source)]) == EXIT_BAD_INPUT
    assert "pretrained" in capsys.readouterr().err


def test_fresh_does_not_delete_the_weights_that_it_should_start_from(config, source, capsys):
    arguments = ["train", str(config.dataset), "--workspace", str(config.workspace), "--name", "source", "--fresh"]
    assert main([*arguments, "--pretrained", str(source)]) == EXIT_BAD_INPUT
    assert "--fresh" in capsys.readouterr().err
    assert source.exists()


def test_the_kind_of_network_is_told_by_the_names_of_its_parameters():
    one = np.ones((2, 2), np.float32)
    swin = {"module.layers1.0.blocks.0.mlp.fc1.weight": one, "module.rotation_head.weight": one}
    assert set(params_of(swin)) == {"swinViT", "module.rotation_head.weight"}
    whole, encoder = (params_of({f"{prefix}layers1.0.blocks.0.mlp.fc1.weight": one}) for prefix in ("swinViT.", ""))
    jax.tree.map(np.testing.assert_array_equal, whole, encoder)
    assert list(params_of({"encoder.stages.0.0.convs.0.norm.weight": one[0]})) == ["encoder"]
    assert state_dict_of({"state_dict": {"a": one}, "epoch": 3}).keys() == state_dict_of({"a": one, "epoch": 3}).keys() == {"a"}


def test_outputs_are_named_by_value_with_background_or_by_region():
    assert output_names(Labels.from_json({"labels": {"tumour": 2, "background": 0, "liver": 1}})) == ("background", "liver", "tumour")
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    assert output_names(Labels.from_json(regions)) == ("whole", "core")
