"""The whole way on a tiny dataset: from NIfTI to measured Dice, stopped and resumed, and refused when the input is bad."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest

from pgps_jax.config import RunConfig
from pgps_jax.data.labels import Labels
from pgps_jax.data.pipeline import PatchSource
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.main import EXIT_BAD_INPUT, EXIT_STOPPED, main
from pgps_jax.report.run_log import read_records
from pgps_jax.train import loop, sizing
from pgps_jax.train.augment import AugmentConfig
from pgps_jax.train.checkpoint import load_params
from pgps_jax.train.programs import StagePrograms
from pgps_jax.train.stopping import StopRequest
from pgps_jax.workspace import note_on_sides, open_experiment, write_run_folder

STEPS = 12
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A raw dataset of tiny phantoms, and a workspace in which it is preprocessed."""
    folder = tmp_path_factory.mktemp("tiny")
    raw = write_phantom_dataset(folder / "Dataset900_Tiny", num_cases=6, num_test=1, shape=(12, 12, 12))
    assert main(["preprocess", str(raw), "--workspace", str(folder / "work"), "--workers", "1"]) == 0
    return raw, folder / "work"


def command(raw, workspace, name, *more):
    return ["train", str(raw), "--workspace", str(workspace), "--name", name, "--epochs", "4", "--steps-per-epoch", "3",
            "--validation-steps", "1", "--network.base-features", "4", "--augment.preset", "light", "--no-mirror-tta",
            "--workers", "1", *more]


def run_folder(workspace, name) -> Path:
    return workspace / "runs" / "Dataset900_Tiny" / name / "fold_0"


@pytest.fixture(scope="module")
def finished(tiny):
    raw, workspace = tiny
    assert main(command(raw, workspace, "whole")) == 0
    return run_folder(workspace, "whole")


class StopsAfter(StopRequest):
    """Asks to stop after some number of steps."""

    steps = 0

    @property
    def reason(self):
        self.asked = getattr(self, "asked", 0) + 1
        return "test" if self.asked > StopsAfter.steps else None


@pytest.mark.smoke
def test_a_run_leaves_everything_that_the_readme_names(finished):
    for name in ("config.json", "plan.json", "schedule.json", "environment.json", "dataset.json", "inference.json", "metrics.jsonl",
                 "train.log", "progress.png", "validation/summary.json", "checkpoints/last", "checkpoints/best"):
        assert (finished / name).exists(), name
    records = read_records(finished / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(STEPS))
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [0, 1, 2, 3]
    stages = {r["stage"] for r in records if r["kind"] == "stage"}
    assert len(stages) > 1, "the curriculum of this test must cross a stage border"
    summary = json.loads((finished / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(list((finished / "validation").glob("*.nii.gz"))) == 2


@pytest.mark.parametrize("stops", [1, 4, 9])
def test_a_stopped_and_resumed_run_has_the_same_bits_as_an_uninterrupted_one(tiny, finished, monkeypatch, stops):
    raw, workspace = tiny
    name = f"stopped{stops}"
    StopsAfter.steps = stops
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", StopsAfter)
        assert main(command(raw, workspace, name)) == EXIT_STOPPED
    assert main(command(raw, workspace, name)) == 0
    whole, pieces = (load_params(folder / "checkpoints") for folder in (finished, run_folder(workspace, name)))
    jax.tree.map(np.testing.assert_array_equal, whole, pieces)
    kept = ("kind", "step", "loss", "gradient_norm", "pseudo_dice", "pseudo_dice_ema")

    def numbers(folder):
        return [{k: r.get(k) for k in kept} for r in read_records(folder / "metrics.jsonl") if r["kind"] in ("step", "epoch")]

    assert numbers(run_folder(workspace, name)) == numbers(finished)


def test_a_run_killed_without_warning_goes_on_with_the_same_bits(tiny, finished):
    raw, workspace = tiny
    folder = run_folder(workspace, "killed")
    process = subprocess.Popen([sys.executable, "-m", "pgps_jax.main", *command(raw, workspace, "killed")],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((folder / "checkpoints" / "last").glob("[0-9]*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert main(command(raw, workspace, "killed")) == 0
    jax.tree.map(np.testing.assert_array_equal, load_params(finished / "checkpoints"), load_params(folder / "checkpoints"))
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"] == list(range(STEPS))


def test_processes_that_read_patches_do_not_change_a_bit(tiny, finished):
    raw, workspace = tiny
    assert main(command(raw, workspace, "processes", "--loader-processes", "2", "--threads", "3", "--cache-gb", "0")) == 0
    whole, same = (load_params(folder / "checkpoints") for folder in (finished, run_folder(workspace, "processes")))
    jax.tree.map(np.testing.assert_array_equal, whole, same)


def test_training_again_after_the_end_changes_nothing(tiny, finished):
    raw, workspace = tiny
    before = (finished / "metrics.jsonl").read_text()
    assert main(command(raw, workspace, "whole")) == 0
    assert (finished / "metrics.jsonl").read_text() == before


def test_new_images_are_segmented_in_their_own_frame(tiny, finished, tmp_path):
    raw, _ = tiny
    assert main(["predict", str(finished), "-i", str(raw / "imagesTs"), "-o", str(tmp_path), "--no-mirror-tta"]) == 0
    (image,) = (raw / "imagesTs").iterdir()
    (segmentation,) = tmp_path.glob("*.nii.gz")
    assert segmentation.name == image.name.replace("_0000", "")
    a, b = nibabel.load(image), nibabel.load(segmentation)
    assert a.shape == b.shape
    np.testing.assert_allclose(a.affine, b.affine)


def test_evaluate_writes_a_summary(tiny, finished, capsys):
    raw, _ = tiny
    (finished / "validation" / "summary.json").unlink()
    assert main(["evaluate", str(finished / "validation"), str(raw / "labelsTr"), "--workers", "1"]) == 0
    assert "organ" in capsys.readouterr().out
    assert (finished / "validation" / "summary.json").exists()


def test_the_schedule_can_be_printed_as_json_without_training(tiny, capsys):
    raw, workspace = tiny
    capsys.readouterr()
    assert main(["schedule", str(raw), "--workspace", str(workspace), "--mode", "performance", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 250_000
    assert printed["stages"][-1]["patch_size"] == printed["planned"]["patch_size"]


def test_the_schedule_of_a_preprocessed_folder_is_that_of_its_dataset_and_shows_the_cases_in_use(tiny, capsys):
    raw, workspace = tiny
    printed = []
    for dataset in (raw, workspace / "preprocessed" / raw.name):
        assert main(["schedule", str(dataset), "--workspace", str(workspace), "--epochs", "40", "--case-curriculum", "pdl", "--json"]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert printed[0]["stages"][-1]["cases"] == [4, 4] and printed[0]["stages"][0]["cases"][0] == 1  # of six, two are held out


def test_what_a_schedule_cannot_show_is_noted_and_a_picture_without_a_place_is_refused_at_once(tiny, tmp_path, capsys):
    raw, workspace = tiny
    common = ["schedule", str(raw), "--workspace", str(workspace)]
    assert main([*common, "--json", "--max-hours", "2", "--batch-policy", "device-memory"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "--max-hours" in err and "--batch-policy device-memory" in err
    assert main([*common, "--plot", str(tmp_path / "none" / "x.png"), "--workspace", str(tmp_path / "new")]) == EXIT_BAD_INPUT
    assert "--plot" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_picture_of_a_schedule_shows_class_balance_once_cases_are_preprocessed(tiny, tmp_path, capsys):
    raw, workspace = tiny
    for where, words in ((workspace, "picture.png\n"), (tmp_path / "only_planned", "without class balance")):
        assert main(["schedule", str(raw), "--workspace", str(where), "--epochs", "20", "--plot", str(tmp_path / "picture.png")]) == 0
        assert words in capsys.readouterr().out
        (tmp_path / "picture.png").unlink()


@pytest.mark.parametrize("change, words", [
    (["--epochs", "5"], "epochs"),
    (["--mode", "constant"], "mode"),
    (["--network.base-features", "8"], "base_features"),
])
def test_a_run_folder_of_another_config_is_refused_naming_the_key(tiny, finished, capsys, change, words):
    raw, workspace = tiny
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert main(command(raw, workspace, "whole", *change)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert words in error and "--fresh" in error and str(finished) in error
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--accumulate", "0"], ["--pretrained", "nothing.pth"]])
def test_starting_over_deletes_nothing_while_something_can_be_refused(tiny, finished, capsys, wrong):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert main(command(*tiny, "whole", "--fresh", *wrong)) == EXIT_BAD_INPUT
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.parametrize("arguments, words", [
    (["--fold", "-1"], "fold"),
    (["--configuration", "3d_lowres"], "3d_lowres"),
    (["--epochs", "0"], "epochs"),
    (["--network.base-features", "0"], "base-features"),
    (["--device", "tpu"], "tpu"),
    (["--threads", "0"], "threads"),
    (["--loader-processes", "-1"], "loader-processes"),
    (["--cache-gb", "nan"], "cache-gb"),
    (["--accumulate", "0"], "accumulate"),
    (["--accumulate", "2", "--batch-policy", "device-memory"], "accumulate"),
    (["--dataset-share", "0"], "dataset-share"),
    (["--max-hours", "nan"], "max-hours"),
    (["--schedule-seed", "-1", "--mode", "rpss"], "schedule-seed"),
    (["--case-curriculum", "pdl"], "use --epochs 31 or more"),
])
def test_bad_arguments_are_refused_before_anything_is_written(tiny, capsys, arguments, words):
    raw, workspace = tiny
    assert main([*command(raw, workspace, "refused"), *arguments]) == EXIT_BAD_INPUT
    assert words in capsys.readouterr().err
    assert not run_folder(workspace, "refused").exists()


def test_a_mistyped_flag_suggests_the_right_one(tiny, capsys):
    raw, _ = tiny
    with pytest.raises(SystemExit) as exit_:
        main(["run", str(raw), "--epoch", "3"])
    assert exit_.value.code == 2
    assert "--epochs" in "".join(capsys.readouterr())


def spoil(raw: Path, how: str) -> None:
    image, label = raw / "imagesTr" / "phantom_002_0000.nii.gz", raw / "labelsTr" / "phantom_002.nii.gz"
    if how == "no dataset.json":
        (raw / "dataset.json").unlink()
    elif how == "no image":
        image.unlink()
    elif how == "unreadable image":
        image.write_bytes(image.read_bytes()[:500])
    elif how == "not finite":
        loaded = nibabel.load(image)
        voxels = loaded.get_fdata(dtype=np.float32)
        voxels[3, 3, 3] = np.nan
        nibabel.save(nibabel.Nifti1Image(voxels, loaded.affine), image)
    else:
        loaded = nibabel.load(label)
        voxels, affine = np.asarray(loaded.dataobj), loaded.affine.copy()
        if how == "label shape":
            voxels = voxels[:-1]
        elif how == "label affine":
            affine[0, 3] += 40
        elif how == "unknown label":
            voxels = voxels.copy()
            voxels[0, 0, 0] = 7
        nibabel.save(nibabel.Nifti1Image(voxels, affine), label)


@pytest.mark.parametrize("how, words", [
    ("no dataset.json", "dataset.json"),
    ("no image", "phantom_002"),
    ("unreadable image", "phantom_002_0000.nii.gz"),
    ("not finite", "phantom_002"),
    ("label shape", "phantom_002"),
    ("label affine", "phantom_002"),
    ("unknown label", "7"),
])
def test_a_faulty_dataset_is_refused_with_one_sentence_and_nothing_half_written(tiny, tmp_path, capsys, how, words):
    raw = tmp_path / "Dataset901_Faulty"
    shutil.copytree(tiny[0], raw)
    spoil(raw, how)
    assert main(["run", str(raw), "--workspace", str(tmp_path / "work"), "--workers", "1"]) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("accumulate", ["1", "auto"])
def test_when_the_device_runs_out_of_memory_the_batch_is_halved_or_computed_in_parts_and_training_goes_on(
    tiny, monkeypatch, capsys, accumulate
):
    raw, workspace = tiny
    name = f"short_of_memory_{accumulate}"
    get, failures = StagePrograms.get, []

    def sometimes(self, stage):
        if stage.index == 1 and not failures:
            failures.append(stage.batch_size)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 123 bytes")
        return get(self, stage)

    monkeypatch.setattr(StagePrograms, "get", sometimes)
    arguments = ["--mode", "performance", "--epochs", "3", "--accumulate", accumulate]
    assert main(command(raw, workspace, name, *arguments)) == 0
    assert "out of memory in stage 1" in capsys.readouterr().out
    folder = run_folder(workspace, name)
    stage = json.loads((folder / "schedule.json").read_text())["stages"][1]
    if accumulate == "auto":
        assert stage["batch_size"] == failures[0] and stage["parts"] >= 2
    else:
        assert stage["batch_size"] == failures[0] // 2 and stage["parts"] == 1
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"] == list(range(9))


def test_random_patch_sizes_and_a_growing_pool_of_cases_run_and_end(tiny):
    raw, workspace = tiny
    more = ["--mode", "rpss", "--case-curriculum", "pdl", "--case-epochs", "1"]
    assert main(command(raw, workspace, "random", *more)) == 0
    assert len(read_records(run_folder(workspace, "random") / "metrics.jsonl")) > 6
    assert (workspace / "preprocessed" / "Dataset900_Tiny" / "similarity_nnUNetPlans_3d_fullres_fold_0.json").exists()


def test_a_time_budget_shortens_the_run_and_it_still_ends_at_the_planned_patch(tiny):
    raw, workspace = tiny
    assert main(command(raw, workspace, "hurried", "--epochs", "100000", "--max-hours", "0.0006")) == 0
    folder = run_folder(workspace, "hurried")
    steps = [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"]
    plan = json.loads((folder / "plan.json").read_text())["configurations"]["3d_fullres"]
    stages = json.loads((folder / "schedule.json").read_text())["stages"]
    assert 0 < len(steps) < 3000
    assert stages[steps[-1]["stage"]]["patch_size"] == plan["patch_size"]
    *_, (epoch, of) = re.findall(r"epoch (\d+) of (\d+):", (folder / "train.log").read_text())
    assert epoch == of, "epochs are counted to the end that the budget allows"


def test_batch_sizes_fill_the_memory_that_is_said_to_be_there(tiny, monkeypatch, capsys):
    raw, workspace = tiny
    monkeypatch.setattr(sizing, "device_budget", lambda fraction: int(fraction * 40e6))
    arguments = ["--batch-policy", "device-memory", "--mode", "constant", "--epochs", "1", "--cache-gb", "0"]
    assert main(command(raw, workspace, "filled", *arguments)) == 0
    (stage,) = json.loads((run_folder(workspace, "filled") / "schedule.json").read_text())["stages"]
    assert stage["batch_size"] > 2
    assert f"batch {stage['batch_size']} needs" in capsys.readouterr().out


def test_a_batch_that_fills_the_memory_may_be_limited_to_a_share_of_the_dataset(tiny, monkeypatch):
    raw, workspace = tiny
    monkeypatch.setattr(sizing, "device_budget", lambda fraction: int(1e9))
    arguments = ["--batch-policy", "device-memory", "--dataset-share", "0.7", "--mode", "constant", "--epochs", "1"]
    assert main(command(raw, workspace, "limited", *arguments)) == 0
    (stage,) = json.loads((run_folder(workspace, "limited") / "schedule.json").read_text())["stages"]
    plan = json.loads((run_folder(workspace, "limited") / "plan.json").read_text())["configurations"]["3d_fullres"]
    voxels = 6 * np.prod(plan["median_image_size_in_voxels"])
    assert stage["batch_size"] == max(2, round(0.7 * voxels / np.prod(plan["patch_size"])))


def test_a_run_that_swaps_labels_keeps_axis_and_pairs_for_prediction_and_one_that_should_is_told(tiny):
    raw, workspace = tiny
    mirror = AugmentConfig(mirror="label-swap", label_pairs=((1, 2),))
    run = open_experiment(RunConfig(raw, workspace, name="sides", augment=mirror))
    write_run_folder(run, {})
    stored = json.loads((run_folder(workspace, "sides") / "inference.json").read_text())
    assert (stored["mirror_axes"], stored["swap_axis"], stored["swap_pairs"]) == ([0, 1, 2], run.plan.transpose_forward.index(2), [[1, 2]])
    sided = dataclasses.replace(run, labels=Labels(("background", "kidney left", "kidney right"), (0, 1, 2)))
    assert note_on_sides(sided) is None
    plainly = dataclasses.replace(sided, config=dataclasses.replace(run.config, augment=AugmentConfig()))
    assert "kidney left and kidney right look like left and right" in note_on_sides(plainly)


def test_bench_measures_without_writing_into_the_workspace(tiny, tmp_path, capsys):
    raw, workspace = tiny
    before = sorted(workspace.rglob("*"))
    arguments = ["bench", *command(raw, workspace, "whole", "--mode", "performance", "--seconds", "0.3", "--stages", "1")[1:]]
    assert main([*arguments, "--json", str(tmp_path / "bench.json")]) == 0
    assert sorted(workspace.rglob("*")) == before
    found = json.loads((tmp_path / "bench.json").read_text())
    (stage,) = found["stages"]
    assert stage["stage"] == 1 and min(stage["input"], stage["step"], stage["both"]) > 0 and 0 <= stage["input_wait"] <= 1
    printed = capsys.readouterr().out
    assert found["limit"] in printed and found["advice"].split(";")[0] in printed.replace("\n", " ")


def test_bench_refuses_what_it_cannot_measure(tiny, tmp_path, capsys):
    raw, workspace = tiny
    for arguments, words in ((["--stages", "99"], "--stages 99"), (["--seconds", "0"], "--seconds 0"),
                             (["--json", str(tmp_path / "none" / "x.json")], "no folder")):
        assert main(["bench", *command(raw, workspace, "whole", *arguments)[1:]]) == EXIT_BAD_INPUT
        assert words in capsys.readouterr().err


def test_batches_too_large_for_the_device_are_computed_in_parts(tiny, monkeypatch, capsys):
    raw, workspace = tiny
    monkeypatch.setattr(sizing, "device_budget", lambda fraction: 0)
    assert main(command(raw, workspace, "parts", "--accumulate", "auto", "--mode", "constant", "--epochs", "1")) == 0
    (stage,) = json.loads((run_folder(workspace, "parts") / "schedule.json").read_text())["stages"]
    assert (stage["batch_size"], stage["parts"]) == (2, 2)
    assert "batch 2 in 2 parts" in capsys.readouterr().out


def test_a_model_goes_to_nnunets_files_and_back_and_predicts_the_same(tiny, finished, tmp_path):
    raw, _ = tiny
    assert main(["export-nnunet", str(finished), "-o", str(tmp_path / "peer")]) == 0
    assert main(["import-nnunet", str(tmp_path / "peer"), "-o", str(tmp_path / "back")]) == 0
    whole, back = (load_params(folder / "checkpoints") for folder in (finished, tmp_path / "back" / "fold_0"))
    jax.tree.map(np.testing.assert_array_equal, whole, back)
    assert main(["predict", str(tmp_path / "back"), "-i", str(raw / "imagesTs"), "-o", str(tmp_path / "out"), "--no-mirror-tta"]) == 0


def test_a_batch_without_finite_loss_is_kept_and_skipped_and_a_resumed_run_skips_it_too(tiny, monkeypatch, capsys):
    raw, workspace = tiny
    batch_of_step = PatchSource.batch_of_step

    def poisoned(self, step):
        batch = batch_of_step(self, step)
        if step == 4 and len(self) == STEPS and len(self.schedule.stages) > 1:
            batch.image[0] = np.nan
        return batch

    monkeypatch.setattr(PatchSource, "batch_of_step", poisoned)
    assert main(command(raw, workspace, "poisoned")) == 0
    folder = run_folder(workspace, "poisoned")
    assert "step 4 is not finite" in capsys.readouterr().out
    assert json.loads((folder / "skipped.json").read_text()) == [4]
    assert np.isnan(np.load(folder / "not_finite" / "step_4.npz")["image"]).any()
    assert [r["step"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"] == [s for s in range(STEPS) if s != 4]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(folder / "checkpoints")))


def test_a_decision_on_postprocessing_is_found_and_applied(tiny, finished, tmp_path):
    raw, _ = tiny
    predictions = finished / "validation"
    assert main(["find-postprocessing", str(predictions), str(raw / "labelsTr"), "--output", str(tmp_path / "p.json")]) == 0
    assert main(["postprocess", str(predictions), str(tmp_path / "p.json"), "-o", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").glob("*.nii.gz")} == {p.name for p in predictions.glob("*.nii.gz")}
