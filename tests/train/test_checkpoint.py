"""What is saved comes back bit for bit; a damaged newest checkpoint falls back to the one before; nothing raises."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.errors import InputError
from pgps_jax.train import checkpoint as module
from pgps_jax.train.checkpoint import Checkpoints, load_params
from pgps_jax.train.checksum import check, sealed
from pgps_jax.train.state import TrainState, abstract


def state_at(step: int) -> TrainState:
    params = {"stages": {0: {"kernel": jax.random.normal(jax.random.key(step), (3, 4))}, 1: {"bias": jnp.arange(5.0) + step}}}
    return TrainState(jnp.int32(step), params, jax.tree.map(lambda p: p * 2, params))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state_at(0))) is None
        checkpoints.save("last", state_at(3), 3, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(abstract(state_at(0))), state_at(3))


def test_parameters_can_be_read_without_knowing_the_network(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", state_at(3), 3, {})
    assert_equal(load_params(tmp_path), state_at(3).params)
    with pytest.raises(InputError, match="no finished checkpoint"):
        load_params(tmp_path, "best")


def test_last_keeps_the_two_newest_and_best_only_one(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save("last", state_at(step), step, {})
            checkpoints.save("best", state_at(step), step, {})
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == ["2", "3"]
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["3"]


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(tmp_path, damage):
    said = []
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", state_at(1), 1, {})
        checkpoints.save("last", state_at(2), 2, {})
    for file in [p for p in (tmp_path / "last" / "2" / "state").rglob("*") if p.is_file()]:
        if damage == "truncate":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif file.exists():
            file.unlink()
    with Checkpoints(tmp_path, said.append) as checkpoints:
        assert_equal(checkpoints.restore(abstract(state_at(0))), state_at(1))
    assert any("step 2 cannot be read" in line for line in said)


def test_a_nearly_full_disk_is_said_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
    said = []
    with Checkpoints(tmp_path, said.append) as checkpoints:
        checkpoints.save("last", state_at(1), 1, {})
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=10))
        assert not checkpoints.save("last", state_at(2), 2, {})
    assert any("not saved" in line for line in said)
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(abstract(state_at(0))), state_at(1))


def test_when_no_checkpoint_can_be_read_nothing_starts_over_silently(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", state_at(1), 1, {})
    shutil.rmtree(tmp_path / "last" / "1" / "state")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="no checkpoint can be read"):
        checkpoints.restore(abstract(state_at(0)))


def steps_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_when_writing_fails_halfway_nothing_is_lost_and_the_next_save_is_not_spoilt(tmp_path, monkeypatch):
    said = []
    with Checkpoints(tmp_path, said.append) as checkpoints:
        for step in (1, 2):
            assert checkpoints.save("last", state_at(step), step, {})
        assert checkpoints.finish()
        checkpoints.save("last", state_at(3), 3, {})
        real = module.ocp.CheckpointManager.wait_until_finished

        def disk_full(self):
            real(self)
            (tmp_path / "last" / "3").rename(tmp_path / "last" / "3.orbax-checkpoint-tmp")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(module.ocp.CheckpointManager, "wait_until_finished", disk_full)
            assert not checkpoints.finish()
        assert steps_in(tmp_path / "last") == ["2"]
        assert checkpoints.save("last", state_at(4), 4, {})
    assert len(said) == 1 and "step 3 not saved" in said[0] and "older checkpoints are kept" in said[0]
    assert steps_in(tmp_path / "last") == ["2", "4"]


def test_a_folder_that_goes_away_and_comes_back_costs_only_the_saves_in_between(tmp_path):
    said, folder = [], tmp_path / "checkpoints"
    with Checkpoints(folder, said.append) as checkpoints:
        checkpoints.save("last", state_at(1), 1, {})
        checkpoints.finish()
        folder.rename(tmp_path / "away")
        assert not checkpoints.save("last", state_at(2), 2, {})
        assert not folder.exists(), "a folder in place of a vanished mount would fill the wrong disk"
        (tmp_path / "away").rename(folder)
        assert checkpoints.save("last", state_at(3), 3, {})
    assert steps_in(folder / "last") == ["1", "3"]
    assert any("step 2 not saved" in line for line in said)


def test_after_a_save_that_failed_the_next_is_due_within_a_minute(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Checkpoints(tmp_path, lambda _: None) as checkpoints:
        now[0] += 300
        assert not checkpoints.due(10.0)
        now[0] += 301
        assert checkpoints.due(10.0)
        checkpoints.not_saved(5, OSError("full"))
        assert not checkpoints.due(10.0)
        now[0] += module.RETRY_SECONDS + 1
        assert checkpoints.due(10.0)
        checkpoints.save("last", state_at(6), 6, {})
        checkpoints.finish()
        now[0] += module.RETRY_SECONDS + 1
        assert not checkpoints.due(10.0)


def test_going_back_waits_for_the_save_under_way_instead_of_taking_it_for_damaged(tmp_path):
    said = []
    with Checkpoints(tmp_path, said.append) as checkpoints:
        checkpoints.save("last", state_at(1), 1, {})
        assert_equal(checkpoints.restore(abstract(state_at(0))), state_at(1))
    assert not said


def test_as_many_checkpoints_are_kept_as_asked(tmp_path):
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save("last", state_at(step), step, {})
    assert steps_in(tmp_path / "last") == ["4", "5", "6", "7"]


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_in_any_file_of_the_newest_checkpoint_is_said_or_changes_nothing(tmp_path):
    rng = np.random.default_rng(0)

    def large(step):  # beyond some hundred bytes, arrays lie in a file of their own without any checksum of the format's
        return TrainState(jnp.int32(step), {"kernel": jax.random.normal(jax.random.key(step), (60, 80))}, {})

    with Checkpoints(tmp_path / "good") as checkpoints:
        for step in (1, 2):
            checkpoints.save("last", large(step), step, {"step": step, "pseudo_dice_ema": 0.5})
    paths = [path for path in (tmp_path / "good/last/2").rglob("*") if path.is_file() and path.stat().st_size]
    files = [path.relative_to(tmp_path / "good") for path in paths]
    largest = max(files, key=lambda file: (tmp_path / "good" / file).stat().st_size)
    used = []
    for file in [*files, *[largest] * 8]:
        folder, said = tmp_path / "run", []
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(flipped(content, int(rng.integers(len(content) * 8))))
        with Checkpoints(folder, said.append) as checkpoints:
            state = checkpoints.restore(abstract(large(0)))
        assert_equal(state, large(int(state.step)))
        assert any("step 2 cannot be read" in line for line in said) == (int(state.step) == 1)
        used.append((file, int(state.step)))
    assert all(step == 1 for file, step in used if file == largest)


def test_damaged_parameters_are_not_predicted_with(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", TrainState(jnp.int32(3), {"kernel": jnp.ones((60, 80)) * jnp.pi}, {}), 3, {})
    largest = max((path for path in tmp_path.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(flipped(largest.read_bytes(), 4 * largest.stat().st_size))
    with pytest.raises(InputError, match=r"last/3: this checkpoint cannot be read.*the one before"):
        load_params(tmp_path)


def test_a_description_that_was_changed_is_not_believed(tmp_path):
    description = sealed({"step": 3, "pseudo_dice_ema": float("nan")}, state_at(3))
    check(json.loads(json.dumps(description)), state_at(3))
    check({"step": 3}, state_at(3))  # of a version without checksums
    for changed in (description | {"step": 4}, {k: v for k, v in description.items() if k != "seal"}, None, []):
        with pytest.raises(ValueError, match="description"):
            check(changed, state_at(3))
    with pytest.raises(ValueError, match="params/stages/0/kernel is not what was saved"):
        check(description, state_at(3)._replace(params=state_at(4).params))


def test_notices_of_preemption_are_asked_for_only_where_there_is_a_distributed_runtime(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(module.ocp.CheckpointManager, "reached_preemption", lambda self, step: step >= 7)
        assert not checkpoints.preempted(8)
        monkeypatch.setattr(module.jax.distributed, "is_initialized", lambda: True)
        assert not checkpoints.preempted(6) and checkpoints.preempted(7)
