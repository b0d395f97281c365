"""A run goes on where it was on other devices and threads, outlasts a lost folder, and refuses data that were changed."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pgps_jax.data.store import CaseStore, Preprocessed, write_case
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.main import EXIT_BAD_INPUT, EXIT_STOPPED, main
from pgps_jax.report.run_log import read_records
from pgps_jax.train import loop
from pgps_jax.train.checkpoint import Checkpoints, load_params
from pgps_jax.train.stopping import StopRequest

STEPS = 9

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A raw dataset of tiny phantoms, and a workspace in which it is preprocessed."""
    folder = tmp_path_factory.mktemp("robust")
    raw = write_phantom_dataset(folder / "Dataset900_Tiny", num_cases=6, num_test=0, shape=(8, 8, 8))
    assert main(["preprocess", str(raw), "--workspace", str(folder / "work"), "--workers", "1"]) == 0
    return raw, folder / "work"


def command(tiny, name, *more):
    raw, workspace = tiny
    return ["train", str(raw), "--workspace", str(workspace), "--name", name, "--epochs", "3", "--steps-per-epoch", "3",
            "--validation-steps", "1", "--mode", "constant", "--network.base-features", "4", "--augment.preset", "light", "--no-mirror-tta",
            "--workers", "1", *more]


def run_folder(tiny, name) -> Path:
    return tiny[1] / "runs" / "Dataset900_Tiny" / name / "fold_0"


@pytest.fixture(scope="module")
def finished(tiny):
    assert main(command(tiny, "whole")) == 0
    return run_folder(tiny, "whole")


def after_each_step(monkeypatch, call):
    """Call a function with the number of steps done after each step; the run is asked to stop when it returns True."""
    class Watched(StopRequest):
        done = 0

        @property
        def reason(self):
            self.done += 1
            return "test" if call(self.done) else None

    monkeypatch.setattr(loop, "StopRequest", Watched)


def stopped(tiny, name, step=4, *more):
    with pytest.MonkeyPatch.context() as patch:
        after_each_step(patch, lambda done: done == step)
        assert main(command(tiny, name, *more)) == EXIT_STOPPED
    return run_folder(tiny, name)


def steps_of(folder):
    return [r for r in read_records(folder / "metrics.jsonl") if r["kind"] == "step"]


def assert_same_numbers(a, b):
    jax.tree.map(np.testing.assert_array_equal, load_params(a / "checkpoints"), load_params(b / "checkpoints"))
    assert [(r["step"], r["loss"]) for r in steps_of(a)] == [(r["step"], r["loss"]) for r in steps_of(b)]


def test_a_run_resumed_with_other_threads_and_loader_processes_has_the_same_bits(tiny, finished):
    folder = stopped(tiny, "threads", 4, "--threads", "1")
    assert main(command(tiny, "threads", "--threads", "3", "--cache-gb", "0")) == 0
    assert_same_numbers(finished, folder)


def test_a_run_resumed_on_two_devices_draws_the_same_data_and_has_the_same_numbers_but_for_rounding(tiny, finished):
    folder = stopped(tiny, "devices")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    resume = [sys.executable, "-m", "pgps_jax.main", *command(tiny, "devices")]
    done = subprocess.run(resume, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 2 x cpu" in done.stdout and "1 x cpu" in done.stdout, "the change of devices is to be used, and to be said"
    expected, found = steps_of(finished), steps_of(folder)
    assert [r["step"] for r in found] == list(range(STEPS))
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
                 load_params(finished / "checkpoints"), load_params(folder / "checkpoints"))


def test_a_run_folder_that_goes_away_and_comes_back_costs_nothing_but_a_warning(tiny, finished, monkeypatch):
    folder = run_folder(tiny, "vanishing")
    away = folder.with_name("away")

    def come_and_go(done):
        if done == 2:
            folder.rename(away)
        elif done == 7:
            assert not folder.exists(), "something was written where the lost folder was"
            away.rename(folder)
        return False

    after_each_step(monkeypatch, come_and_go)
    assert main(command(tiny, "vanishing")) == 0
    assert_same_numbers(finished, folder)
    warnings = [e["text"] for e in read_records(folder / "events.jsonl") if e["kind"] == "warning"]
    assert any("checkpoint of step 3 not saved" in text for text in warnings)
    assert json.loads((folder / "health.json").read_text())["warnings"] == len(warnings)


def test_when_the_end_of_a_run_cannot_be_saved_it_is_tried_again_and_then_said(tiny, finished, monkeypatch, capsys):
    waits, save = [], Checkpoints.save
    monkeypatch.setattr(loop.time, "sleep", waits.append)
    monkeypatch.setattr(Checkpoints, "save", lambda self, name, state, step, what: step < STEPS and save(self, name, state, step, what))
    assert main(command(tiny, "no_end")) == EXIT_BAD_INPUT
    assert 600 < sum(waits) < 1200
    assert "its end could not be saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command(tiny, "no_end")) == 0
    assert_same_numbers(finished, run_folder(tiny, "no_end"))


def test_a_best_checkpoint_that_a_kill_prevented_is_made_up_for(tiny, finished):
    folder = stopped(tiny, "best", 3)
    assert (folder / "checkpoints" / "best" / "3").exists()
    shutil.rmtree(folder / "checkpoints" / "best" / "3")
    stopped(tiny, "best", 1)
    assert (folder / "checkpoints" / "best" / "3").exists()


def test_a_run_tells_how_it_went_and_keeps_the_environment_it_was_started_in(tiny, finished, capsys):
    folder = stopped(tiny, "told")
    stored = json.loads((folder / "environment.json").read_text())
    stored["packages"]["scipy"] = "0.1"
    (folder / "environment.json").write_text(json.dumps(stored))
    capsys.readouterr()
    assert main(command(tiny, "told")) == 0
    said = capsys.readouterr().out
    assert "not as at the run's start: scipy 0.1 then" in said and "health: 9 steps" in said and "once resumed" in said
    assert "health: 9 steps" in (folder / "train.log").read_text()
    health = json.loads((folder / "health.json").read_text())
    assert (health["steps"], health["epochs"], health["resumes"], health["stops"]) == (STEPS, 3, 1, 1)
    assert health["peak_host_bytes"] > 2**20
    assert json.loads((folder / "environment.json").read_text()) == stored
    assert main(["reproduce", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("pgps-jax run ") and "--name told" in printed.out and "--mode constant" in printed.out
    assert "not as then: scipy 0.1 then" in printed.err and "data.json" not in printed.err
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(data | {"hash": "of other data", "train": dict.fromkeys(data["train"], "another")}))
    assert main(["reproduce", str(folder)]) == 0
    assert "data.json: the data are not those that this run was started with (changed: phantom_" in capsys.readouterr().err


def test_changed_data_and_a_changed_plan_are_refused_on_resume(tiny, finished, tmp_path, capsys):
    stopped(tiny, "changed")
    work = tmp_path / "work"
    shutil.copytree(tiny[1], work)
    elsewhere = (tiny[0], work)
    cases = work / "preprocessed" / "Dataset900_Tiny" / "nnUNetPlans_3d_fullres"
    plans = cases.parent / "nnUNetPlans.json"
    content = plans.read_text()
    plans.write_text(content.replace('"batch_dice": true', '"batch_dice": false').replace('"batch_size": 2', '"batch_size": 4'))
    assert plans.read_text() != content
    assert main(command(elsewhere, "changed")) == EXIT_BAD_INPUT
    assert "planned otherwise" in capsys.readouterr().err
    plans.write_text(content)
    case = CaseStore(cases).open("phantom_000")
    write_case(cases, case.id, Preprocessed(case.image[:] + 1, case.seg[:], case.properties, dict(case.locations)), (8, 8, 8))
    assert main(command(elsewhere, "changed")) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert "changed: phantom_000" in error and "data.json" in error
    (run_folder(elsewhere, "changed") / "data.json").unlink()
    assert stopped(elsewhere, "changed", 1), "the way out that the message names"


def test_a_run_folder_that_cannot_be_written_is_refused_in_one_sentence(tiny, tmp_path, capsys):
    work = tmp_path / "work"
    shutil.copytree(tiny[1] / "preprocessed", work / "preprocessed")
    (work / "runs").write_text("a file where a folder should be")
    assert main(command((tiny[0], work), "x")) == EXIT_BAD_INPUT
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("interruptions, code", [(1, EXIT_STOPPED), (2, 130)])
def test_ctrl_c_once_saves_and_twice_leaves_at_once(tiny, finished, interruptions, code):
    name = f"interrupted{interruptions}"
    more = ["--epochs", "100000"]
    process = subprocess.Popen([sys.executable, "-m", "pgps_jax.main", *command(tiny, name, *more)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    log = run_folder(tiny, name) / "train.log"
    while process.poll() is None and not (log.exists() and "epoch 2" in log.read_text()):
        time.sleep(0.05)
    for _ in range(interruptions):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)  # Python makes one of two signals that come before it looks
    assert process.wait(60) == code, process.stderr.read()
    assert "Traceback" not in process.stderr.read()
    if interruptions == 1:
        (step,) = [r["step"] for r in read_records(log.with_name("events.jsonl")) if r["kind"] == "stopped"]
        assert (log.parent / "checkpoints" / "last" / str(step)).exists()


def test_a_run_whose_terminal_closes_saves_and_stops(tiny, finished, hanging_up_counts):
    log = run_folder(tiny, "hung_up") / "train.log"
    ours, theirs = os.openpty()
    in_terminal = ["sh", "-c", f"exec <>{os.ttyname(theirs)} >&0 2>&0; exec \"$@\"", "sh"]  # a new session takes it for its terminal
    process = subprocess.Popen([*in_terminal, sys.executable, "-m", "pgps_jax.main", *command(tiny, "hung_up", "--epochs", "100000")],
                               start_new_session=True)
    while process.poll() is None and not (log.exists() and "epoch 2" in log.read_text()):
        while select.select([ours], [], [], 0.05)[0]:  # as a terminal does, or the program would wait for it
            os.read(ours, 10**6)
    os.close(ours)
    os.close(theirs)
    try:
        assert process.wait(60) == EXIT_STOPPED
    finally:
        process.kill()  # or a test that fails would leave a training for ever
    (stop,) = [r for r in read_records(log.with_name("events.jsonl")) if r["kind"] == "stopped"]
    assert stop["reason"] == "SIGHUP" and (log.parent / "checkpoints" / "last" / str(stop["step"])).exists()
    assert "stopped by SIGHUP" in log.read_text()
