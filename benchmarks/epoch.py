"""Training steps per second from files to updated weights: pgps_jax against nnU-Net's loader, augmentation, network and step.

    python -m benchmarks.epoch                       # smallest, middle and planned patch of the Hippocampus plan, batch 2
    python -m benchmarks.epoch --stages 0 14 --batch 9

Both sides read the same folder, written by nnU-Net, crop with foreground oversampling, use the whole default augmentation
and train the same network, in turns and with all cores of this machine. On CPU workers and network share the cores, as
they do for a user without an accelerator. Needs the extra `bench`.
"""

import argparse
import collections
import multiprocessing
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks import loader, step
from pgps_jax.json_file import write_json


@contextmanager
def ours(folder: Path, stage, backbone: str, device: str):
    """A function that makes a batch, trains on it and returns, as the training loop does, when the step before is done."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from pgps_jax.data.labels import Labels
    from pgps_jax.data.pipeline import PatchStream
    from pgps_jax.models import build, lowest_head
    from pgps_jax.models.conv import compiler_options
    from pgps_jax.train.augment import AugmentConfig, crop_size, make_policy
    from pgps_jax.train.device import abstract_batch, open_device, put
    from pgps_jax.train.optim import OptimConfig, make_optimizer
    from pgps_jax.train.state import abstract, init_state, split
    from pgps_jax.train.step import make_train_step

    plan, cases = step.PLANS["hippocampus"].with_backbone(backbone), loader.PLANS["hippocampus"]
    policy = make_policy(AugmentConfig(), plan.patch)
    network = plan.architecture
    optimizer = make_optimizer(OptimConfig(), lowest_head(network))
    where = open_device((stage,), "auto")
    graphdef, params = split(build(network, 1, plan.classes, dtype=where.dtype, rngs=nnx.Rngs(0)))
    state = jax.device_put(init_state(params, optimizer), where.whole)
    labels = Labels.from_json({"labels": {"background": 0, "one": 1, "two": 2}})
    train_step = make_train_step(graphdef, optimizer, labels, False, policy, stage.patch_size, 0)
    shapes = abstract_batch(where, stage.batch_size, crop_size(policy, stage.patch_size), 1, np.dtype(np.int8))
    lowered = jax.jit(train_step, donate_argnums=0).lower(abstract(state, where.whole), shapes, jax.ShapeDtypeStruct((), jnp.float32))
    program = lowered.compile(compiler_options=compiler_options(where.platform))
    source = loader.our_source(folder, stage, cases._replace(batch=stage.batch_size), np.dtype(where.transport).name)
    with PatchStream(source, threads=os.cpu_count() or 1) as batches:
        waits = collections.deque([jnp.zeros(())])  # the loss of the step that still computes

        def run() -> float:
            nonlocal state
            state, metrics = program(state, put(next(batches), where), np.float32(0.01))
            waits.append(metrics.loss)
            return float(waits.popleft())

        yield run


@contextmanager
def theirs(folder: Path, stage, backbone: str, device: str):
    """The same with nnU-Net's loader and augmentation, and PyTorch."""
    plan, cases = step.PLANS["hippocampus"].with_backbone(backbone), loader.PLANS["hippocampus"]
    train_on = step.torch_trainer(plan.architecture, plan.classes, device)
    batches = loader.nnunet_workers(
        loader.nnunet_loader(folder, stage, cases._replace(batch=stage.batch_size)), os.cpu_count() or 1)

    def run() -> float:
        found = next(batches)
        image, target = found["data"], found["target"]
        label = (target[0] if isinstance(target, list) else target)[:, 0].long().clamp(min=0)
        return train_on(*((image.cuda(), label.cuda()) if device == "gpu" else (image, label)))

    try:
        yield run
    finally:
        batches._finish()


def seconds_per_step(side, seconds: float, *arguments) -> float:
    """Of one side, alone in its process: workers of the other would take its cores."""
    with side(*arguments) as run:
        for _ in range(3):
            run()
        began, count = time.perf_counter(), 0
        while count < 2 or time.perf_counter() - began < seconds:
            run()
            count += 1
        return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="plain-unet", choices=["plain-unet", "resenc-unet"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 7, 14], help="stages of efficiency mode")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each side's turn")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    from pgps_jax.curriculum import Stage

    stages = step.PLANS["hippocampus"].stages()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loader.write_cases(Path(folder), loader.PLANS["hippocampus"])
        for stage in (Stage(0, stages[i][0], options.batch) for i in options.stages):
            arguments = (options.seconds, Path(folder), stage, options.network, options.device)
            turns = [[loader.in_its_own_process(seconds_per_step, side, *arguments) for side in (ours, theirs)]
                     for _ in range(options.turns)]
            row = {
                "patch": stage.patch_size, "batch": stage.batch_size,
                "ours_per_second": 1 / statistics.median(a for a, _ in turns),
                "nnunet_per_second": 1 / statistics.median(b for _, b in turns),
                "ratio": statistics.median(b / a for a, b in turns),
            }
            rows.append(row)
            print(f"{stage!s:>18}  steps/s: pgps_jax {row['ours_per_second']:7.2f}, nnU-Net {row['nnunet_per_second']:7.2f}, "
                  f"ratio {row['ratio']:.2f}", flush=True)
            if options.output:
                write_json(options.output, {"what": __doc__.splitlines()[0], **step.about(options.device), "rows": rows}, indent=1)
    print("a ratio above 1 means that pgps_jax is faster")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
