"""Every backbone: parameters, seconds and memory of a training step at one patch, and how far it is from its peer.

    python -m benchmarks.backbones                          # CPU or GPU, whichever JAX takes: batch 2 of 32x32x32
    python -m benchmarks.backbones --patch 64 64 64 --features 16

A step is forward, loss (Dice + cross-entropy), backward and Nesterov SGD, without augmentation; seconds are the median of
five. Memory is what the compiled program says of itself (arguments and temporaries); "kept" are the bytes that the
forward pass hands to the backward pass, without and with --network.remat, as traced: on CPU XLA undoes rematerialisation,
so that temporaries show little of it there. Errors are taken from the golden files of the tests: largest deviation relative to
the largest value, outputs and heads in float32, gradients in float32 for U-Nets and float64 for transformers (in float32 the
peers' own are up to 3e-3 off). Writes results/backbones.json.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.data.labels import Labels
from pgps_jax.models import build
from pgps_jax.models.conv import compiler_options
from pgps_jax.train.losses import segmentation_loss
from pgps_jax.train.optim import OptimConfig, make_optimizer
from pgps_jax.train.state import init_state, split

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
LABELS = Labels(("background", "organ", "lesion"), (0, 1, 2))
GOLDEN = {"plain-unet": ("plain_iso", "plain_anisotropic"), "resenc-unet": ("resenc",), "unetr": ("monai_unetr",),
          "swin-unetr": ("monai_swinunetr_v1",), "swin-unetr v2": ("monai_swinunetr_v2",)}  # fmt: skip
FLOAT64 = ("monai_swinunetr_v1", "monai_swinunetr_v2", "plain_anisotropic")  # whose gradients have a file of their own


def architectures(patch: tuple[int, int, int], features: int) -> dict[str, Architecture]:
    """Small networks of every kind, of four levels and the same number of features at full resolution where that is free."""
    kernels, strides = ((3, 3, 3),) * 4, ((1, 1, 1),) + ((2, 2, 2),) * 3
    stages = tuple(features * 2**i for i in range(4))
    unetr = {"feature_size": features, "hidden_size": 12 * features, "mlp_dim": 48 * features, "num_heads": 12, "table_size": patch}
    swin = {"feature_size": 12 * max(1, features // 12)}
    return {
        "plain-unet": Architecture("plain-unet", stages, kernels, strides, (2,) * 4, (2,) * 3),
        "resenc-unet": Architecture("resenc-unet", stages, kernels, strides, (1, 3, 4, 6), (1,) * 3),
        "unetr": Architecture("unetr", options=unetr),
        "swin-unetr": Architecture("swin-unetr", options=swin),
        "swin-unetr v2": Architecture("swin-unetr", options=swin | {"v2": True}),
    }


def measure(architecture: Architecture, patch: tuple[int, int, int], batch: int) -> dict:
    """Parameters, seconds and bytes of a training step."""
    platform = jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    optimizer = make_optimizer(OptimConfig())
    image = jax.random.normal(jax.random.key(0), (batch, *patch, 1))
    label = (image[..., 0] > 0.5).astype(jnp.int32)

    def network(remat: bool) -> nnx.Module:
        return build(architecture, 1, 3, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))

    def objective(params, remat=False):
        graphdef, _ = split(nnx.eval_shape(lambda: network(remat)))
        return segmentation_loss(nnx.merge(graphdef, params)(image), label, LABELS, True)

    def step(state):
        loss, gradients = jax.value_and_grad(objective)(state.params)
        directions, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return state._replace(params=jax.tree.map(lambda p, d: p - 0.01 * d, state.params, directions), opt_state=opt_state), loss

    def kept(params, remat: bool) -> int:
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda q: objective(q, remat), p)[1], params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback)) - 4 * count

    params = jax.jit(lambda: split(network(False))[1]).lower().compile({"xla_backend_optimization_level": 0})()
    count = sum(x.size for x in jax.tree.leaves(params))
    state = init_state(params, optimizer)
    began = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state).compile(compiler_options(platform) or None)
    compiled = time.perf_counter() - began
    memory = program.memory_analysis()
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        state, loss = program(state)
        jax.block_until_ready(loss)
        seconds.append(time.perf_counter() - began)
    return {
        "parameters": count, "step_seconds": round(statistics.median(seconds[1:]), 4), "compile_seconds": round(compiled, 1),
        "program_mib": round((memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**20, 1),
        "kept_mib": round(kept(params, False) / 2**20, 1), "kept_mib_remat": round(kept(params, True) / 2**20, 1),
    }  # fmt: skip


def parity(names: tuple[str, ...]) -> dict:
    """Largest deviations from the peer of the full-resolution output, of the other heads where there are any, and of the gradients."""
    found = {}
    for name in names:
        for part, error in (monai_errors(name) if name.startswith("monai") else unet_errors(name)).items():
            found[part] = max(found.get(part, 0.0), float(f"{error:.2g}"))
    return found


def unet_errors(name: str) -> dict[str, float]:
    """Of a golden U-Net."""
    peer = _tests().read_peer(_golden, name, gradients=f"{name}_float64" if name in FLOAT64 else None)
    logits = jax.jit(peer.net)(peer.image)
    heads = [_tests().relative_error(a, b) for a, b in zip(logits, peer.outputs, strict=True)]
    return {"output": heads[0], "heads": max(heads[1:], default=0.0), "gradients": peer.gradient_error()}


def monai_errors(name: str) -> dict[str, float]:
    """Of a golden transformer."""
    forward = _tests().read_monai(_golden, name).forward_error().largest
    with jax.enable_x64(True):
        expected = f"{name}_float64" if name in FLOAT64 else None
        errors = _tests().read_monai(_golden, name, jnp.float64, expected).errors()
    return {"output": forward, "gradients": max(e.largest for k, e in errors.items() if k.startswith("grad"))}


def _tests():
    """The readers of the golden files, which live with the tests."""
    spec = importlib.util.spec_from_file_location("golden_networks", ROOT / "tests" / "models" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    folder = ROOT / "tests" / "golden"
    arrays = folder / f"{name}.npz"
    return (dict(np.load(arrays)) if arrays.exists() else {}), json.loads((folder / f"{name}.json").read_text())


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--patch", type=int, nargs=3, default=(32, 32, 32), help="multiples of 32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--features", type=int, default=12)
    parser.add_argument("--only", nargs="*", help="names of backbones")
    parser.add_argument("--output", type=Path, default=RESULTS / "backbones.json")
    arguments = parser.parse_args()
    patch = tuple(arguments.patch)
    rows = {}
    for name, architecture in architectures(patch, arguments.features).items():
        if arguments.only and name not in arguments.only:
            continue
        rows[name] = measure(architecture, patch, arguments.batch) | {"error": parity(GOLDEN[name])}
        print(f"{name:14}", json.dumps(rows[name]), flush=True)
    about = {"patch": patch, "batch": arguments.batch, "features": arguments.features, "platform": jax.default_backend(),
             "devices": [d.device_kind for d in jax.devices()], "cores": os.cpu_count(), "load": os.getloadavg()[0], "jax": version("jax")}
    arguments.output.write_text(json.dumps({"about": about, "backbones": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
