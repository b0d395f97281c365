"""Seconds per training step at the stages of efficiency mode: pgps_jax against PyTorch with nnU-Net's or MONAI's network.

    python -m benchmarks.step                      # Hippocampus plan, all stages, and 2 x 40x56x40
    python -m benchmarks.step --stages 0 7 14      # some of them
    python -m benchmarks.step --network resenc-unet --plan 128
    python -m benchmarks.step --network unetr --batch 2
    python -m benchmarks.step --device gpu         # bfloat16 against PyTorch's AMP with torch.compile

Both sides run forward, loss (Dice + cross-entropy with deep supervision), backward, clipping and Nesterov SGD on the
same device, each in a process of its own, in turns; a figure is the median over the turns, a ratio the median over the
ratios of neighbours. On CPU both compute in float32 and PyTorch is eager. Needs the extra `bench`.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


NETWORKS = ("plain-unet", "resenc-unet", "unetr", "swin-unetr")
TRANSFORMERS = {"unetr": 16, "swin-unetr": 32}  # and the voxels of which their patches are multiples


class StepPlan(NamedTuple):
    """What is trained: a network, U-Nets with strides of 2, its planned patch and batch."""

    features: tuple[int, ...]
    patch: tuple[int, int, int]
    batch: int
    classes: int = 3
    backbone: str = "plain-unet"

    def with_backbone(self, backbone: str) -> "StepPlan":
        """The plan of another network, its patch rounded up to one that the network can take."""
        if backbone in TRANSFORMERS:
            step = TRANSFORMERS[backbone]
            return self._replace(backbone=backbone, patch=tuple(-(-n // step) * step for n in self.patch))
        return self._replace(backbone=backbone)

    @property
    def limits(self):
        """Smallest patch and increment."""
        from pgps_jax.models import limits

        return limits(self.architecture)

    def stages(self, mode: str = "efficiency"):
        """Patch and batch of every stage of a mode, smallest patch first."""
        from pgps_jax.curriculum import CurriculumConfig, batch_policy, batch_sizes, patch_ladder

        ladder = patch_ladder(mode, self.patch, self.limits)
        return list(zip(ladder, batch_sizes(batch_policy(CurriculumConfig(mode=mode)), ladder, self.batch), strict=True))

    @property
    def architecture(self):
        """Transformers have their default options."""
        from pgps_jax.architecture import Architecture

        if self.backbone in TRANSFORMERS:
            return Architecture(self.backbone, options={"table_size": self.patch} if self.backbone == "unetr" else {})
        n, plain = len(self.features), self.backbone == "plain-unet"
        blocks = (2,) * n if plain else (1, 3, 4, 6, 6, 6)[:n]
        strides = ((1, 1, 1),) + ((2, 2, 2),) * (n - 1)
        return Architecture(self.backbone, self.features, ((3, 3, 3),) * n, strides, blocks, (2 if plain else 1,) * (n - 1))

    def flops(self, patch, batch: int) -> float | None:
        """Multiplications and additions of a plain U-Net's convolutions, forward and backward (three times the forward)."""
        if self.backbone != "plain-unet":
            return None
        total, before = 0.0, 1
        for level, f in enumerate(self.features):
            voxels = batch * math.prod(patch) / 8**level
            convs = before * f + f * f  # encoder
            if level < len(self.features) - 1:
                convs += 2 * f * f + f * f  # decoder
            total += 2 * 27 * voxels * convs
            before = f
        return 3 * total


PLANS = {
    "hippocampus": StepPlan((32, 64, 128, 256), (40, 56, 40), 9),
    "128": StepPlan((32, 64, 128, 256, 320, 320), (128, 128, 128), 2),
}


def jax_side(plan: StepPlan, device: str, options: dict | None = None):
    """(patch, batch) -> (compile seconds, function that runs one step and returns when it is done); `options` for the compiler on top."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory of the same device
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pgps_jax.data.labels import Labels
    from pgps_jax.models import build, lowest_head
    from pgps_jax.models.conv import compiler_options
    from pgps_jax.train.losses import segmentation_loss
    from pgps_jax.train.optim import OptimConfig, make_optimizer

    labels = Labels.from_json({"labels": {"background": 0} | {f"class {i}": i for i in range(1, plan.classes)}})
    network = plan.architecture
    dtype = jnp.float32 if device == "cpu" else jnp.bfloat16

    def fresh():
        return build(network, 1, plan.classes, dtype=dtype, rngs=nnx.Rngs(0))

    graphdef, _ = nnx.split(nnx.eval_shape(fresh), nnx.Param)
    params = jax.jit(lambda: nnx.state(fresh(), nnx.Param))()
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
        label = jax.random.randint(jax.random.key(1), (batch, *patch), 0, plan.classes)
        state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
        lowered = jax.jit(step, donate_argnums=0).lower(state, image, label)
        start = time.perf_counter()
        program = lowered.compile(compiler_options=compiler_options(jax.default_backend()) | (options or {}))
        seconds = time.perf_counter() - start

        def run():
            nonlocal state
            state, loss = program(state, image, label)
            return float(loss)

        return seconds, run

    return prepare


def peer_network(a, classes: int, channels: int, patch):
    """nnU-Net's or MONAI's network of an architecture, for patches of one size."""
    import torch

    if a.backbone == "unetr":
        from monai.networks.nets import UNETR

        return UNETR(channels, classes, patch)
    if a.backbone == "swin-unetr":
        from monai.networks.nets import SwinUNETR

        return SwinUNETR(channels, classes)
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    network, depth = (PlainConvUNet, "n_conv_per_stage") if a.backbone == "plain-unet" else (ResidualEncoderUNet, "n_blocks_per_stage")
    return network(
        channels, len(a.features_per_stage), a.features_per_stage, **{depth: a.blocks_per_stage},
        conv_op=torch.nn.Conv3d, kernel_sizes=a.kernel_sizes, strides=a.strides, num_classes=classes,
        n_conv_per_stage_decoder=a.convs_per_stage_decoder, conv_bias=True, norm_op=torch.nn.InstanceNorm3d,
        norm_op_kwargs=dict(eps=1e-5, affine=True), nonlin=torch.nn.LeakyReLU, nonlin_kwargs=dict(inplace=True), deep_supervision=True,
    )


def torch_trainer(a, classes: int, device: str, channels: int = 1, patch=None):
    """The peer's network of an architecture and one step of its training: (image (b, c, d, h, w), label (b, d, h, w)) -> loss.

    UNETR is made for patches of one size, the others take any.
    """
    import torch
    from torch.nn import functional as F

    net = peer_network(a, classes, channels, patch)
    torch.nn.functional._verify_spatial_size = lambda size: None  # torch refuses to train with a bottleneck of one voxel
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    on_gpu = device == "gpu"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        net = torch.compile(net.cuda(), dynamic=False)  # it would compile for any shape from the second one on, for slower steps
    scaler = torch.amp.GradScaler("cuda", enabled=on_gpu)
    heads_below = len(a.features_per_stage) - 2  # of deep supervision, without the lowest, which has no weight
    weights = [1 / 2**i for i in range(heads_below)] + [0.0] if a.features_per_stage else [1.0]

    def loss_of(logits, label):
        logits = logits.float()
        one_hot = F.one_hot(label, classes).movedim(-1, 1)[:, 1:].float()
        p = logits.softmax(1)[:, 1:]
        overlap = (p * one_hot).sum((2, 3, 4))
        dice = (2 * overlap + 1e-5) / (one_hot.sum((2, 3, 4)) + p.sum((2, 3, 4)) + 1e-5).clip(1e-8)
        return F.cross_entropy(logits, label) - dice.mean()

    def train_on(image, label) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", enabled=on_gpu):
            heads = net(image) if a.features_per_stage else [net(image)]
            loss = 0.0
            for weight, logits in zip(weights, heads, strict=True):
                if weight:
                    target = F.interpolate(label[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0].long()
                    loss = loss + weight / sum(weights) * loss_of(logits, target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    train_on.network, train_on.optimizer = net, optimizer
    return train_on


def forget_shapes() -> None:
    """Let torch.compile start afresh: beyond eight shapes it would stop compiling."""
    import torch

    torch._dynamo.reset()


def torch_side(plan: StepPlan, device: str):
    """The same with PyTorch."""
    import torch

    where = "cuda" if device == "gpu" else "cpu"

    def prepare(patch, batch):
        train_on = torch_trainer(plan.architecture, plan.classes, device, patch=patch)
        image = torch.randn(batch, 1, *patch, device=where)
        label = torch.randint(0, plan.classes, (batch, *patch), device=where)
        start = time.perf_counter()
        if device == "gpu":
            forget_shapes()
            train_on(image, label)  # compiles
        return time.perf_counter() - start, lambda: train_on(image, label)

    return prepare


SIDES = {"jax": jax_side, "torch": torch_side}


def worker(make_side, arguments: tuple, pipe) -> None:
    """Process of one side: takes ("prepare", ...) or ("run", seconds), answers with seconds, until it is sent None."""
    prepare = make_side(*arguments)
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


# Dense bfloat16 (on T4 and V100 float16), 1e12 operations per second, from NVIDIA's data sheets; by a part of the device's name.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "A10": 125,
               "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65}


def peak_tflops(device_name: str) -> float | None:
    """Of a device, when it is a known one."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def start_sides(sides: dict, arguments: tuple) -> dict:
    """One process per side; returns the ends of their pipes."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, side in sides.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=worker, args=(side, arguments, theirs), daemon=True).start()
    return pipes


def in_turns(pipes: dict, job: tuple, turns: int, seconds: float) -> tuple[dict, dict]:
    """What each side's preparation took, and its seconds per step in every turn."""
    prepared = {}
    for side, pipe in pipes.items():
        pipe.send(("prepare", *job))
        prepared[side] = pipe.recv()
    times = {side: [] for side in pipes}
    for _ in range(turns):
        for side, pipe in pipes.items():
            pipe.send(("run", seconds))
            times[side].append(pipe.recv())
    return prepared, times


def compare(pipes: dict, patch, batch: int, options) -> dict:
    """One row of the table."""
    prepared, times = in_turns(pipes, (patch, batch), options.turns, options.seconds)
    return {
        "patch": list(patch),
        "batch": batch,
        "jax_ms": 1e3 * statistics.median(times["jax"]),
        "torch_ms": 1e3 * statistics.median(times["torch"]),
        "ratio": statistics.median(j / t for j, t in zip(times["jax"], times["torch"], strict=True)),
        "best_ratio": min(times["jax"]) / min(times["torch"]),
        "compile_s": prepared["jax"],
        "torch_prepare_s": prepared["torch"],
    }


def line(row: dict, flops: float | None, peak: float | None) -> str:
    text = (f"{'x'.join(map(str, row['patch'])):>12} {row['batch']:>5} {row['jax_ms']:>8.1f} ms {row['torch_ms']:>8.1f} ms "
            f"{row['ratio']:>6.2f} {row['best_ratio']:>6.2f} {row['compile_s']:>6.1f} s")
    if flops:
        text += f" {flops / row['jax_ms'] / 1e6:>8.0f} GFLOP/s"
    return text + (f" {flops / row['jax_ms'] / 1e7 / peak:>5.1f} % of peak" if flops and peak else "")


def about(device: str) -> dict:
    """Machine, versions and how busy it was."""
    names = ("jax", "flax", "torch", "nnunetv2")
    machine = platform.processor() or platform.machine()
    if device == "gpu":
        import torch

        machine = torch.cuda.get_device_name()
    return {"device": machine, "cores": os.cpu_count(), "load_average": os.getloadavg(), "versions": {n: version(n) for n in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="plain-unet", choices=NETWORKS)
    parser.add_argument("--plan", default="hippocampus", choices=PLANS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--stages", type=int, nargs="*", help="stages of efficiency mode; default all, and the planned patch with batch 2")
    parser.add_argument("--batch", type=int, help="patches per step; as planned when not given")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each side's turn")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the share of it that is used; known for some GPUs")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    plan = PLANS[options.plan].with_backbone(options.network)
    if options.batch:
        plan = plan._replace(batch=options.batch)
    jobs = [*plan.stages(), *([(plan.patch, 2)] if plan.batch != 2 else [])]
    jobs = [jobs[i] for i in options.stages] if options.stages else jobs
    pipes, peak = start_sides(SIDES, (plan, options.device)), options.peak_tflops or peak_tflops(about(options.device)["device"])
    print(f"{'patch':>12} {'batch':>5} {'pgps_jax':>11} {'PyTorch':>11} {'ratio':>6} {'best':>6} {'compile':>8}")
    rows = []
    for patch, batch in jobs:
        rows.append(compare(pipes, patch, batch, options))
        print(line(rows[-1], plan.flops(patch, batch), peak), flush=True)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            chosen = {"what": __doc__.splitlines()[0], "network": options.network, "plan": options.plan}
            result = chosen | about(options.device) | {"rows": rows}
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
