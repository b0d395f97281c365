"""Whether half precision computes what float32 does on this device: convolutions and their gradients.

    python -m benchmarks.precision --output benchmarks/results/gpu/precision.json

To be run before anything is timed on a new GPU or cuDNN: some versions return wrong gradients of bfloat16 3D convolutions. Errors are
relative, ||half - float32|| / ||float32||; exit code 1 when one is above 2 % or no number.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pgps_jax.models.conv import conv3d, conv_transpose3d

LIMIT = 0.02
# batch, size, channels in and out, kernel, stride: as in the networks, with the image's single channel, one-voxel bottlenecks and
# features that are no multiple of 8
CONVOLUTIONS = [
    (2, (32, 32, 32), 1, 32, (3, 3, 3), (1, 1, 1)),
    (2, (32, 32, 32), 32, 32, (3, 3, 3), (1, 1, 1)),
    (2, (32, 32, 32), 64, 32, (3, 3, 3), (1, 1, 1)),
    (2, (32, 32, 32), 32, 64, (3, 3, 3), (2, 2, 2)),
    (2, (16, 64, 64), 32, 64, (1, 3, 3), (1, 2, 2)),
    (2, (4, 4, 4), 320, 320, (3, 3, 3), (1, 1, 1)),
    (9, (1, 1, 1), 256, 256, (3, 3, 3), (1, 1, 1)),
    (2, (16, 16, 16), 12, 20, (3, 3, 3), (1, 1, 1)),
    (2, (40, 56, 40), 64, 32, (3, 3, 3), (1, 1, 1)),
    (2, (128, 128, 128), 32, 32, (3, 3, 3), (1, 1, 1)),
]


def relative(half, whole) -> float:
    whole = whole.astype(jnp.float32)
    return float(jnp.linalg.norm(half.astype(jnp.float32) - whole) / jnp.linalg.norm(whole))


def errors(function, x, kernel, dtype) -> dict[str, float]:
    """Of the output, and of the gradients by input and kernel."""
    @jax.jit
    def run(x, kernel, g):
        y, pullback = jax.vjp(function, x, kernel)
        return y, *pullback(g.astype(y.dtype))

    g = jax.random.normal(jax.random.key(2), jax.eval_shape(function, x, kernel).shape)
    with jax.default_matmul_precision("highest"):
        whole = run(x, kernel, g)
    half = run(x.astype(dtype), kernel.astype(dtype), g)
    return dict(zip(("output", "by_input", "by_kernel"), map(relative, half, whole), strict=True))


def largest(rows: list[dict]) -> float:
    """The largest error of all; not a number where one is not."""
    return float(np.max([row[name] for row in rows for name in ("output", "by_input", "by_kernel")]))  # max() would pass NaN over


def is_right(worst: float) -> bool:
    """Whether the largest error is within the limit; what is not a number is not."""
    return worst <= LIMIT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--largest", type=int, default=10**7, help="leave out convolutions with more voxels than this")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    rows = []
    for batch, size, ci, co, kernel_size, stride in CONVOLUTIONS:
        if batch * size[0] * size[1] * size[2] > options.largest:
            continue
        x = jax.random.normal(jax.random.key(0), (batch, *size, ci))
        for what, function, shape in (
            ("convolution", lambda x, k, stride=stride: conv3d(x, k, stride=stride), (*kernel_size, ci, co)),
            ("transposed", conv_transpose3d, (2, 2, 2, ci, co)),
        ):
            kernel = jax.random.normal(jax.random.key(1), shape) / (ci * 27) ** 0.5
            found = errors(function, x, kernel, jnp.dtype(options.dtype))
            about = {"what": what, "batch": batch, "size": size, "channels": [ci, co], "kernel": kernel.shape[:3], "stride": stride}
            rows.append(about | found)
            print(f"{what:>12} {batch} x {'x'.join(map(str, size)):<12} {ci:>3} -> {co:<3} " +
                  "  ".join(f"{name} {error:.4f}" for name, error in found.items()), flush=True)
    worst = largest(rows)
    print(f"largest {worst:.4f}, limit {LIMIT}")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"what": __doc__.splitlines()[0], "device": jax.devices()[0].device_kind, "versions": {"jax": version("jax")}}
        options.output.write_text(json.dumps(about | {"dtype": options.dtype, "largest": worst, "rows": rows}, indent=1) + "\n")
    return int(not is_right(worst))


if __name__ == "__main__":
    sys.exit(main())
