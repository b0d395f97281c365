"""What a run is told about its machine, before it begins."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pgps_jax.curriculum import Stage
from pgps_jax.train import device
from pgps_jax.train.device import open_device, warnings


@pytest.fixture
def machine(monkeypatch):
    """machine("gpu", compute_capability="7.5") -> pretend that JAX has found such a device."""

    def pretend(platform: str, **more) -> None:
        monkeypatch.setattr(jax, "devices", lambda *_: [SimpleNamespace(platform=platform, device_kind="a device", **more)])

    monkeypatch.setattr(device, "_cudnn_version", lambda: 91600)
    return pretend


@pytest.mark.parametrize(("capability", "precision", "number"), [
    ("7.5", "auto", 1), ("7.0", "bfloat16", 1), ("7.5", "float32", 0), ("8.0", "auto", 0), ("9.0", "auto", 0), ("gfx942", "auto", 0)])
def test_bfloat16_on_a_gpu_without_it_is_warned_of(machine, capability, precision, number):
    machine("gpu", compute_capability=capability)
    found = warnings(precision)
    assert len(found) == number
    assert all("float32" in line for line in found)


@pytest.mark.parametrize(("augmentation", "number"), [("default", 1), ("light", 0), ("none", 0)])
def test_rotated_patches_on_tpu_are_warned_of(machine, augmentation, number):
    machine("tpu")
    found = warnings("auto", augmentation)
    assert len(found) == number
    assert all("--augment.preset light" in line for line in found)


def test_an_old_cudnn_is_warned_of_and_one_that_tells_nothing_is_not(machine, monkeypatch):
    machine("gpu", compute_capability="9.0")
    for version, number in ((91000, 1), (91600, 0), (float("inf"), 0)):
        monkeypatch.setattr(device, "_cudnn_version", lambda version=version: version)
        assert len(warnings()) == number


def test_a_cpu_gets_no_warnings():
    assert warnings("bfloat16", "default") == []


def test_what_computes_is_float32_on_cpu_unless_asked_otherwise():
    stages = (Stage(0, (8, 8, 8), 2),)
    assert [open_device(stages, p).dtype for p in ("auto", "float32", "bfloat16")] == [jnp.float32, jnp.float32, jnp.bfloat16]
