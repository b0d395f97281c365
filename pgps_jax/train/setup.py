"""From an experiment to what JAX runs: network, first state, optimizer, the program of each stage, and its batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from pgps_jax.curriculum import Stage
from pgps_jax.data.pipeline import PatchBatch, PatchSource, PatchStream
from pgps_jax.models import build, lowest_head
from pgps_jax.models.conv import compiler_options
from pgps_jax.train.augment import crop_size
from pgps_jax.train.device import Device, abstract_batch
from pgps_jax.train.optim import make_optimizer
from pgps_jax.train.programs import StagePrograms
from pgps_jax.train.state import TrainState, abstract, init_state, split
from pgps_jax.train.step import make_train_step
from pgps_jax.workspace import Experiment


def initial_state(run: Experiment, device: Device) -> tuple[nnx.GraphDef, TrainState]:
    """Structure of the network, and the state before the first step (the same for the same seed)."""
    def network() -> nnx.Module:
        return build(run.configuration.architecture, run.channels, run.labels.num_outputs,
                     dtype=device.dtype, remat=run.config.network.remat, rngs=nnx.Rngs(run.config.seed))

    graphdef, _ = split(nnx.eval_shape(network))
    # one program for all draws: compiled one by one, or with LLVM's optimisations, those of a transformer take a minute
    quick = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    params = jax.jit(lambda: split(network())[1]).lower().compile(quick)()
    return graphdef, jax.device_put(init_state(params, optimizer_of(run)), device.whole)


def optimizer_of(run: Experiment) -> optax.GradientTransformation:
    """The optimizer; the head that deep supervision gives no weight stays as it is, as in nnU-Net."""
    return make_optimizer(run.config.optim, lowest_head(run.configuration.architecture))


def stage_programs(run: Experiment, device: Device, graphdef: nnx.GraphDef, state: TrainState) -> StagePrograms:
    """The compiled training step of every stage, made when asked for or ahead of time."""
    return StagePrograms(stage_lowering(run, device, graphdef, state), program_options(run, device))


def program_options(run: Experiment, device: Device) -> dict[str, Any] | None:
    """Options with which XLA compiles the programs of a run."""
    exact = {"xla_gpu_exclude_nondeterministic_ops": True} if run.config.deterministic and device.platform == "gpu" else {}
    return compiler_options(device.platform) | exact or None


def stage_lowering(run: Experiment, device: Device, graphdef: nnx.GraphDef, state: TrainState) -> Callable[[Stage], jax.stages.Lowered]:
    """A function that traces the training step of a stage; the state that goes in is given up for the one that comes out."""
    optimizer, abstract_state = optimizer_of(run), abstract(state, device.whole)

    def lower(stage: Stage) -> jax.stages.Lowered:
        step = make_train_step(graphdef, optimizer, run.labels, run.configuration.batch_dice, run.policy, stage.patch_size,
                               run.config.seed, stage.parts)
        return jax.jit(step, donate_argnums=0).lower(abstract_state, stage_batch(run, device, stage), jax.ShapeDtypeStruct((), jnp.float32))

    return lower


def stage_batch(run: Experiment, device: Device, stage: Stage) -> PatchBatch:
    """Shapes of a stage's batches as the host cuts them."""
    return abstract_batch(device, stage.batch_size, crop_size(run.policy, stage.patch_size), run.channels, run.label_dtype)


def open_stream(run: Experiment, device: Device, first_step: int, say: Callable[[str], None]) -> PatchStream:
    """Batches from `first_step` on, read and cropped by threads or processes."""
    config = run.config
    return PatchStream(training_source(run, device), first_step, threads=config.threads, processes=config.loader_processes, say=say)


def training_source(run: Experiment, device: Device) -> PatchSource:
    """Every training batch of the run by its step."""
    crops = [crop_size(run.policy, stage.patch_size) for stage in run.schedule.stages]
    cache_bytes = int(run.config.cache_gb * 1e9) // max(run.config.loader_processes, 1)  # every process has its own
    return PatchSource(run.store, run.train_ids, run.schedule, run.config.sampling_of_mode, crops, run.configuration.batch_size,
                       seed=run.config.seed, image_dtype=device.transport, label_dtype=run.label_dtype, cache_bytes=cache_bytes)
