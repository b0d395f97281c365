"""Memory is forecast before the first step; a run that the machine cannot hold is refused with what to change."""

import jax
import pytest

from pgps_jax.config import NetworkConfig, RunConfig
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.errors import InputError
from pgps_jax.main import main
from pgps_jax.train.device import open_device
from pgps_jax.train.forecast import forecast
from pgps_jax.train.health import StageTooLarge
from pgps_jax.train.programs import ProgramError, ProgramTiming, StagePrograms
from pgps_jax.train.setup import initial_state
from pgps_jax.workspace import open_experiment

GIB = 2**30


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    raw = write_phantom_dataset(folder / "Dataset900_Tiny", num_cases=6, num_test=0, shape=(12, 12, 12))
    assert main(["preprocess", str(raw), "--workspace", str(folder / "work"), "--workers", "1"]) == 0
    return open_experiment(RunConfig(raw, folder / "work", epochs=4, steps_per_epoch=2, network=NetworkConfig(base_features=4)))


class Measured(StagePrograms):
    """Programs of a known size that are not made."""

    def __init__(self, size):
        self.size, self.made = size, []

    def timing(self, stage):
        self.made.append(stage)
        return ProgramTiming(stage, 0.0, 0.0, False, 0.0, self.size)


def told(run, programs, platform, free_device, free_host):
    device = open_device(run.schedule.stages, "float32")._replace(platform=platform)
    said = []
    _, state = initial_state(run, device)
    return forecast(run, device, state, programs, said.append, free_device, free_host), said[0]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_where_there_is_plenty_nothing_is_compiled_and_every_stage_has_its_figure(run, platform):
    programs = Measured(0)
    stages, said = told(run, programs, platform, 100 * GIB, 100 * GIB)
    assert not programs.made and "needs at most" in said
    assert [s.stage for s in stages] == list(run.schedule.stages)
    needed = [s.device_bytes for s in stages]
    assert needed == sorted(needed) and 0 < needed[0] < needed[-1] < GIB


def test_where_it_may_be_too_little_the_largest_stage_is_compiled_and_its_own_figure_decides(run):
    programs = Measured(3_000_000)
    stages, said = told(run, programs, "gpu", 3_500_000, 100 * GIB)
    assert programs.made == [run.schedule.stages[-1]] and "at most" not in said
    assert 3_000_000 <= stages[-1].device_bytes <= 3_500_000


def test_a_device_that_is_too_small_is_refused_before_training(run):
    with pytest.raises(InputError, match=r"needs 5\.00 GiB on each device, and 1\.0 MiB are free.*--fresh --accumulate auto"):
        told(run, Measured(5 * GIB), "gpu", 2**20, 100 * GIB)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_too_little_memory_of_the_host_is_refused_before_training(run, platform):
    with pytest.raises(InputError, match="--cache-gb 0"):
        told(run, Measured(10**6), platform, 100 * GIB, 10**8)


def test_when_already_the_compiler_runs_out_of_memory_the_largest_stage_is_too_large(run):
    class Refused(Measured):
        def timing(self, stage):
            raise ProgramError("its program could not be made") from jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(StageTooLarge) as caught:
        told(run, Refused(0), "gpu", 2**20, 100 * GIB)
    assert caught.value.stage == run.schedule.stages[-1]
