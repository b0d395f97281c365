"""Cost of augmentation inside the compiled step, per preset and patch size, beside nnU-Net's transforms; as JSON.

    python -m benchmarks.augment --output benchmarks/results/cpu/augment.json        (--peer needs the extra `bench`)

Ours: the compiled `augment` alone, on batches as the host would deliver them. nnU-Net's: its default training
transforms, sample by sample in one thread, as its workers run them. Times are means over batches with fresh random
numbers, since transforms fire at random; CPU seconds count all threads and suffer less from a busy machine.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pgps_jax.architecture import Size
from pgps_jax.train.augment import AugmentConfig, augment, crop_size, make_policy

# batch and patch size of stages, the last one of each line as planned: Hippocampus, isotropic, pseudo-2D
CASES: list[list[tuple[int, Size]]] = [
    [(9, (8, 8, 8)), (9, (16, 24, 16)), (9, (40, 56, 40))],
    [(40, (24, 24, 24)), (2, (128, 128, 128))],
    [(2, (20, 320, 256))],
]


def crops(batch: int, size: Size, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth noise and a label map of three classes, as the host would cut them."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, *size, channels)).astype(np.float32)
    return image, rng.integers(0, 3, (batch, *size)).astype(np.int8)


def measure(call: Callable[[int], None], repeats: int) -> dict:
    """Mean wall and CPU seconds of `call(i)`, and the fastest."""
    call(0)
    wall = []
    start_cpu = time.process_time()
    for i in range(1, repeats + 1):
        start = time.perf_counter()
        call(i)
        wall.append(time.perf_counter() - start)
    cpu = (time.process_time() - start_cpu) / repeats
    return {"seconds": statistics.mean(wall), "fastest_seconds": min(wall), "cpu_seconds": cpu}


def ours(preset: str, batch: int, patch: Size, planned: Size, channels: int, repeats: int) -> dict:
    """Compile and run seconds of one batch."""
    policy = make_policy(AugmentConfig(preset), planned)
    image, label = map(jnp.asarray, crops(batch, crop_size(policy, patch), channels))
    start = time.perf_counter()
    program = jax.jit(augment, static_argnums=(3, 4)).lower(jax.random.key(0), image, label, policy, patch).compile()
    compile_seconds = time.perf_counter() - start
    keys = [jax.random.key(i) for i in range(repeats + 1)]
    result = measure(lambda i: jax.block_until_ready(program(keys[i], image, label)), repeats)
    return result | {"compile_seconds": compile_seconds}


def peer(batch: int, patch: Size, planned: Size, channels: int, repeats: int) -> dict:
    """The same batch through nnU-Net's default training transforms, sample by sample in one thread."""
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(1)
    policy = make_policy(AugmentConfig(), planned)
    image, label = crops(batch, crop_size(policy, patch), channels)
    image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 1)))
    label = torch.from_numpy(label[:, None].astype(np.int16))
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-policy.max_angle, policy.max_angle), None, policy.mirror_axes, policy.planar
    )

    def call(_: int) -> None:
        for x, y in zip(image, label, strict=True):
            transforms(image=x.clone(), segmentation=y.clone())

    return measure(call, repeats)


def main() -> None:
    """Print one line per case; write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--peer", action="store_true", help="measure nnU-Net's transforms too")
    args = parser.parse_args()
    rows = []
    for cases in CASES:
        planned = cases[-1][1]
        for batch, patch in cases:
            voxels = batch * math.prod(patch)
            for preset in ("default", "light"):
                row = {"preset": preset, "batch": batch, "patch": patch, "channels": args.channels}
                row |= ours(preset, batch, patch, planned, args.channels, args.repeats)
                row["seconds_per_voxel"] = row["seconds"] / voxels
                line = (f"{preset:8s} {batch} x {patch}: {1e3 * row['seconds']:.1f} ms ({1e3 * row['cpu_seconds']:.1f} CPU ms), "
                        f"{1e9 * row['seconds_per_voxel']:.1f} ns per voxel, compiled in {row['compile_seconds']:.1f} s")
                if args.peer and preset == "default":
                    row["peer"] = peer(batch, patch, planned, args.channels, args.repeats)
                    row["cpu_ratio"] = row["cpu_seconds"] / row["peer"]["cpu_seconds"]
                    line += f"; nnU-Net {1e3 * row['peer']['cpu_seconds']:.1f} CPU ms, ratio {row['cpu_ratio']:.2f}"
                print(line, flush=True)
                rows.append(row)
    if args.output:
        report = {
            "command": "python -m benchmarks.augment", "device": str(jax.devices()[0]), "cores": os.cpu_count(),
            "machine": platform.processor() or platform.machine(), "jax": version("jax"),
            "load": os.getloadavg() if hasattr(os, "getloadavg") else None, "rows": rows,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
