"""What benchmarks/ promises: no wrong half precision passes the gate before timings, and a part that takes too long leaves nothing."""

import os
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import all as programme  # noqa: E402
from benchmarks import precision  # noqa: E402

sys.path.remove(str(ROOT))
NAN = float("nan")


def rows(*errors: float) -> list[dict]:
    return [{"output": 0.001, "by_input": 0.001, "by_kernel": error} for error in errors]


@pytest.mark.parametrize("errors", [(0.001, NAN), (NAN, 0.001), (NAN, NAN), (0.001, 0.5), (float("inf"),)])
def test_a_large_error_or_one_that_is_no_number_fails_wherever_it_stands(errors):
    assert not precision.is_right(precision.largest(rows(*errors)))


def test_small_errors_pass():
    assert precision.is_right(precision.largest(rows(0.001, 0.004)))


@pytest.mark.parametrize(("wrong", "passes"), [(NAN, False), (1.5, False), (1.0, True)])
def test_the_program_ends_with_an_error_code_when_a_convolution_is_wrong(monkeypatch, wrong, passes):
    product = lambda x, k: jnp.tensordot(x, k[0, 0, 0], axes=1)  # noqa: E731
    monkeypatch.setattr(precision, "CONVOLUTIONS", [(1, (2, 2, 2), 8, 8, (1, 1, 1), (1, 1, 1))])
    monkeypatch.setattr(precision, "conv3d", lambda x, k, stride: product(x, k) * (1 if x.dtype.itemsize == 4 else wrong))
    monkeypatch.setattr(precision, "conv_transpose3d", product)
    monkeypatch.setattr(sys, "argv", ["precision"])
    assert precision.main() == int(not passes)


def test_a_part_that_takes_too_long_ends_with_the_processes_that_it_started(tmp_path):
    note = tmp_path / "pid"
    grandchild = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    assert programme.finish([sys.executable, "-c", child], minutes=4 / 60) == "took too long"
    assert not is_running(int(note.read_text()))


def is_running(pid: int) -> bool:
    for _ in range(50):  # whoever inherits the process may take a moment to bury it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_an_exit_code_is_handed_on():
    assert programme.finish([sys.executable, "-c", "raise SystemExit(3)"], minutes=1) == 3


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_part_names_a_program_and_flags_that_exist(device):
    for part in programme.parts(device, Path("dataset")).values():
        module, *arguments = part.arguments
        text = (ROOT / "benchmarks" / f"{module}.py").read_text()
        assert all(f'"{flag}"' in text for flag in arguments if flag.startswith("--"))
