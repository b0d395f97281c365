"""Where tests find the peers' numbers and real data. What is absent is skipped with a message, never silently."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def golden():
    """Reader of tests/golden: golden("loss/dc_ce_batchdice_true") -> (arrays, sidecar)."""

    def read(name: str) -> tuple[dict[str, np.ndarray], dict]:
        sidecar = json.loads((GOLDEN / f"{name}.json").read_text())
        arrays = GOLDEN / f"{name}.npz"
        return (dict(np.load(arrays)) if arrays.exists() else {}), sidecar

    return read


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name}: real data or peers' results are not beside this checkout, so this check did not run")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the datasets Hippocampus, SarcomaPETCT and SunnybrookCMR in nnU-Net raw layout."""
    return _folder("data")


@pytest.fixture(scope="session")
def real_parity() -> Path:
    """Folder with nnU-Net's own results on the real datasets."""
    return _folder("parity/real")


os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session")
def fresh():
    """fresh(make) -> the network that make() builds, its first weights drawn by one program: drawn one by one, every shape of
    weights is compiled on its own, for seconds."""
    import jax
    from flax import nnx

    def drawn(make):
        graphdef, _ = nnx.split(nnx.eval_shape(make), nnx.Param)
        draw = jax.jit(lambda: nnx.state(make(), nnx.Param)).lower().compile({"xla_backend_optimization_level": 0})
        return nnx.merge(graphdef, draw())

    return drawn


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """Compiled programs of the tests stay with the tests; a stopped and resumed run finds those of its first half."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs of runs and predictions are compiled without LLVM's optimisations, which take most of the time of a run of a few steps."""
    from pgps_jax.infer import predict
    from pgps_jax.train import setup

    with pytest.MonkeyPatch.context() as patch:
        for module in (setup, predict):
            patch.setattr(module, "compiler_options", lambda platform: {"xla_backend_optimization_level": "0"})
        yield


@pytest.fixture
def hanging_up_counts():
    """SIGHUP as a terminal has it: tests that are started with nohup ignore it, and so would what they start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
