"""Memory that a run will need, before its first step: said per stage, and refused where the machine does not have it.

A generous estimate comes first and costs nothing. Only where that is more than there is, the program of the largest stage
is compiled before training begins, which it needs anyway, and its own figure decides.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pgps_jax.curriculum import Stage
from pgps_jax.errors import InputError
from pgps_jax.host_memory import gib, host_bytes_left
from pgps_jax.train.device import Device
from pgps_jax.train.health import memory_errors_of
from pgps_jax.train.memory import device_budget
from pgps_jax.train.programs import StagePrograms
from pgps_jax.train.sizing import host_bytes, waiting_bytes
from pgps_jax.train.state import TrainState, state_bytes
from pgps_jax.workspace import Experiment

TENSORS = 96  # of the first features at full resolution: twice what the programs of U-Nets were seen to need
STATES = 4  # parameters, momentum, gradients, a copy for the checkpoint: each half a state, generously counted whole


class Forecast(NamedTuple):
    """Bytes that a stage needs on each device, and in the memory of the host."""

    stage: Stage
    device_bytes: int
    host_bytes: int


def forecast(run: Experiment, device: Device, state: TrainState, programs: StagePrograms, say: Callable[[str], None],
             free_device: int | None = None, free_host: int | None = None) -> list[Forecast]:
    """Forecast of every stage, the largest one said.

    Args:
        free_device, free_host: bytes to be had; what the machine has when not given. CPU devices take theirs from the host.

    Raises InputError when the machine has too little memory, saying what to change; StageTooLarge when already the compiler
    runs out of it.
    """
    held = state_bytes(state)  # in use already, and counted with a program's arguments
    free_device = device_budget(1.0) + held if free_device is None else free_device
    free_host = host_bytes_left() + (held if device.platform == "cpu" else 0) if free_host is None else free_host
    fixed, generous = STATES * held, _generous(run, device)
    largest = max(run.schedule.stages, key=lambda stage: stage.voxels / stage.parts)
    needed, source = fixed + generous(largest), "at most "
    if needed > (free_host - host_bytes(run, device, held, largest) if device.platform == "cpu" else free_device):
        with memory_errors_of(largest):
            needed, source = programs.timing(largest).program_bytes + waiting_bytes(run, device, largest), ""
    share = max(needed - fixed, 0) / max(generous(largest), 1)
    stages = []
    for stage in run.schedule.stages:
        on_device = int(needed if stage == largest else min(fixed, needed) + share * generous(stage))
        stages.append(Forecast(stage, on_device, host_bytes(run, device, held, stage) + (on_device if device.platform == "cpu" else 0)))
    host = max(one.host_bytes for one in stages)
    say(f"memory: stage {largest.index} ({largest}) needs {source}{gib(needed)} of {gib(free_device)} free on each {device.platform} "
        f"device; the host {gib(host)} of {gib(free_host)}")
    if needed > free_device and device.platform != "cpu":
        raise InputError(f"stage {largest.index} ({largest}) needs {gib(needed)} on each device, and {gib(free_device)} are free; use "
                         "more devices, or start over with less: --fresh --accumulate auto computes batches in parts, and --fresh goes "
                         "with --network.remat, fewer --network.base-features or a smaller --batch-size as well")
    if host > free_host:
        raise InputError(f"training needs {gib(host)} of memory in stage {max(stages, key=lambda s: s.host_bytes).stage.index}, and "
                         f"{gib(free_host)} are free; keep fewer cases in memory (--cache-gb 0), use fewer --loader-processes or "
                         "--threads, end other programs, or start over with --fresh and a smaller --batch-size or --network.base-features")
    return stages


def _generous(run: Experiment, device: Device) -> Callable[[Stage], float]:
    """Bytes of activations and batches per device, with a wide margin."""
    features = run.configuration.architecture.first_features
    item = np.dtype(device.dtype).itemsize
    return lambda stage: TENSORS * features * item * stage.voxels / stage.parts / device.count + waiting_bytes(run, device, stage)
