"""What is saved comes back bit for bit; a damaged newest checkpoint falls back to the one before; nothing raises."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax.errors import InputError
from pgps_jax.train import checkpoint as module
from pgps_jax.train.checkpoint import Checkpoints, load_params
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
