"""Seconds per training step of the Hippocampus plan network at every stage of efficiency mode: pgps_jax against PyTorch.

    python benchmarks/step.py                      # all stages, and 2 x 40x56x40
    python benchmarks/step.py --stages 0 7 14      # some of them
    python benchmarks/step.py --network resenc-unet

Both sides run forward, loss (Dice + cross-entropy with deep supervision), backward, clipping and Nesterov SGD in float32 on
the same cores, each in a process of its own, in turns; a figure is the median over the turns, a ratio the median over the
ratios of neighbours. PyTorch is nnU-Net's network in eager mode. Needs the extra `bench`.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

FEATURES = (32, 64, 128, 256)
RESENC_BLOCKS = (1, 3, 4, 6)
PATCH, BATCH, CLASSES = (40, 56, 40), 9, 3
HEAD_WEIGHTS = (2 / 3, 1 / 3, 0.0)
RESULTS = Path(__file__).parent / "results"


def architecture(backbone: str):
    from pgps_jax.architecture import Architecture

    n = len(FEATURES)
    plain = backbone == "plain-unet"
    return Architecture(
        backbone,
        FEATURES,
        ((3, 3, 3),) * n,
        ((1, 1, 1),) + ((2, 2, 2),) * (n - 1),
        (2,) * n if plain else RESENC_BLOCKS,
        (2 if plain else 1,) * (n - 1),
    )


def jax_side(backbone: str):
    """(patch, batch) -> (compile seconds, function that runs one step and returns when it is done)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pgps_jax.data.dataset import Labels
    from pgps_jax.models import build, lowest_head
    from pgps_jax.models.conv import compiler_options
    from pgps_jax.train.losses import segmentation_loss
    from pgps_jax.train.optim import OptimConfig, make_optimizer

    labels = Labels.from_json({"labels": {"background": 0, "anterior": 1, "posterior": 2}})
    network = architecture(backbone)
    graphdef, params = nnx.split(build(network, 1, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = make_optimizer(OptimConfig(), lowest_head(network))

    def step(state, image, label):
        params, opt_state = state

        def objective(params):
            return segmentation_loss(nnx.merge(graphdef, params)(image), label, labels, False)

        loss, gradients = jax.value_and_grad(objective)(params)
        directions, opt_state = optimizer.update(gradients, opt_state, params)
        return (jax.tree.map(lambda p, d: p - 0.01 * d, params, directions), opt_state), loss

    def prepare(patch, batch):
        image = jax.random.normal(jax.random.key(0), (batch, *patch, 1))
        label = jax.random.randint(jax.random.key(1), (batch, *patch), 0, CLASSES)
        state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
        lowered = jax.jit(step, donate_argnums=0).lower(state, image, label)
        start = time.perf_counter()
        program = lowered.compile(compiler_options=compiler_options(jax.default_backend()))
        seconds = time.perf_counter() - start

        def run():
            nonlocal state
            state, loss = program(state, image, label)
            return float(loss)

        return seconds, run

    return prepare


def torch_side(backbone: str):
    """The same with PyTorch and nnU-Net's networks."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
    from torch.nn import functional as F

    a = architecture(backbone)
    shared = dict(
        conv_op=torch.nn.Conv3d,
        kernel_sizes=a.kernel_sizes,
        strides=a.strides,
        num_classes=CLASSES,
        n_conv_per_stage_decoder=a.convs_per_stage_decoder,
        conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs=dict(eps=1e-5, affine=True),
        nonlin=torch.nn.LeakyReLU,
        nonlin_kwargs=dict(inplace=True),
        deep_supervision=True,
    )
    if backbone == "plain-unet":
        net = PlainConvUNet(1, len(FEATURES), FEATURES, n_conv_per_stage=a.blocks_per_stage, **shared)
    else:
        net = ResidualEncoderUNet(1, len(FEATURES), FEATURES, n_blocks_per_stage=a.blocks_per_stage, **shared)
    torch.nn.functional._verify_spatial_size = lambda size: None  # torch refuses to train with a bottleneck of one voxel
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)

    def loss_of(logits, label):
        one_hot = F.one_hot(label, CLASSES).movedim(-1, 1)[:, 1:].float()
        p = logits.softmax(1)[:, 1:]
        overlap = (p * one_hot).sum((2, 3, 4))
        dice = (2 * overlap + 1e-5) / (one_hot.sum((2, 3, 4)) + p.sum((2, 3, 4)) + 1e-5).clip(1e-8)
        return F.cross_entropy(logits, label) - dice.mean()

    def prepare(patch, batch):
        image = torch.randn(batch, 1, *patch)
        label = torch.randint(0, CLASSES, (batch, *patch))

        def run():
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for weight, logits in zip(HEAD_WEIGHTS, net(image), strict=True):
                if weight:
                    target = F.interpolate(label[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0].long()
                    loss = loss + weight * loss_of(logits, target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 12)
            optimizer.step()
            return float(loss)

        return 0.0, run

    return prepare


SIDES = {"jax": jax_side, "torch": torch_side}


def worker(side: str, backbone: str, pipe) -> None:
    """Process of one side: takes ("prepare", patch, batch) or ("run", seconds), answers with seconds."""
    prepare = SIDES[side](backbone)
    run = None
    while (order := pipe.recv()) is not None:
        if order[0] == "prepare":
            run = None
            seconds, run = prepare(*order[1:])
            for _ in range(2):
                run()
            pipe.send(seconds)
        else:
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < order[1]:
                run()
                count += 1
            pipe.send((time.perf_counter() - start) / count)


def measure(pipes: dict, patch, batch: int, turns: int, seconds: float) -> dict:
    compile_seconds = {}
    for side, pipe in pipes.items():
        pipe.send(("prepare", patch, batch))
        compile_seconds[side] = pipe.recv()
    times = {side: [] for side in pipes}
    for _ in range(turns):
        for side, pipe in pipes.items():
            pipe.send(("run", seconds))
            times[side].append(pipe.recv())
    return {
        "patch": list(patch),
        "batch": batch,
        "jax_ms": 1e3 * statistics.median(times["jax"]),
        "torch_ms": 1e3 * statistics.median(times["torch"]),
        "ratio": statistics.median(j / t for j, t in zip(times["jax"], times["torch"], strict=True)),
        "best_ratio": min(times["jax"]) / min(times["torch"]),
        "compile_s": compile_seconds["jax"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="plain-unet", choices=["plain-unet", "resenc-unet"])
    parser.add_argument("--stages", type=int, nargs="*", help="stages of efficiency mode; default all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each side's turn")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()

    import importlib.metadata as metadata

    from pgps_jax.architecture import PatchLimits
    from pgps_jax.curriculum import patch_ladder

    ladder = patch_ladder("efficiency", PATCH, PatchLimits((8, 8, 8), (8, 8, 8)))
    jobs = [(patch, BATCH) for patch in ladder] + [(PATCH, 2)]
    jobs = [jobs[i] for i in args.stages] if args.stages else jobs

    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(side, args.network, theirs), daemon=True))
        processes[-1].start()
    print(f"{'patch':>12} {'batch':>5} {'pgps_jax':>10} {'PyTorch':>10} {'ratio':>6} {'best':>6} {'compile':>8}")
    rows = []
    for patch, batch in jobs:
        row = measure(pipes, patch, batch, args.turns, args.seconds)
        rows.append(row)
        print(
            f"{'x'.join(map(str, patch)):>12} {batch:>5} {row['jax_ms']:>7.1f} ms {row['torch_ms']:>7.1f} ms "
            f"{row['ratio']:>6.2f} {row['best_ratio']:>6.2f} {row['compile_s']:>6.1f} s",
            flush=True,
        )
    for pipe in pipes.values():
        pipe.send(None)
    if args.json:
        packages = {name: metadata.version(name) for name in ("jax", "flax", "torch", "nnunetv2")}
        about = {"device": platform.processor() or platform.machine(), "cores": multiprocessing.cpu_count()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"network": args.network, **about, "versions": packages, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
