"""Training batches per second that the host can feed: pgps_jax's pipeline against nnU-Net's loader with augmentation.

    python benchmarks/loader.py                        # Hippocampus-like cases, performance mode, every second stage
    python benchmarks/loader.py --mode efficiency --stages 0 7 14
    python benchmarks/loader.py --plan ct              # large volumes, planned patch 128x128x128

Both sides read the same folder, written by nnU-Net, with all cores of this machine: pgps_jax with one thread per core,
nnU-Net with one process per core. They are run in turns; a figure is the median over the turns, a ratio the median over
the ratios of neighbours. Two measures: batches per second as they come, and core-seconds that one batch takes without
any workers, which also means something while the machine has other work to do (--core-seconds measures only that).
pgps_jax cuts the crops that its augmentation needs and augments on the device, inside the training step; nnU-Net does
both on the host, which is what this compares. Needs the extra `bench`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

RESULTS = Path(__file__).parent / "results"


class BenchPlan(NamedTuple):
    patch: tuple[int, int, int]
    batch: int
    pools: tuple[int, int, int]
    shape: tuple[int, int, int]
    cases: int


PLANS = {
    "hippocampus": BenchPlan((40, 56, 40), 9, (3, 3, 3), (36, 50, 35), 60),
    "ct": BenchPlan((128, 128, 128), 2, (5, 5, 5), (160, 320, 320), 6),
}


def write_cases(folder: Path, plan: BenchPlan) -> None:
    """Smooth noise with two classes, as nnU-Net stores it: 10,000 voxels of each class are remembered."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    for number in range(plan.cases):
        shape = tuple(int(n * rng.uniform(0.9, 1.1)) for n in plan.shape)
        image = gaussian_filter(rng.normal(size=shape), 2)[None]
        image = (image / image.std() + 0.05 * rng.normal(size=image.shape)).astype(np.float32)
        seg = ((image > 1.5).astype(np.int16) + (image > 2.0)).astype(np.int16)
        locations = {k: np.argwhere(seg == k) for k in (1, 2)}
        locations = {k: rng.permutation(voxels)[: max(10_000, len(voxels) // 100)] for k, voxels in locations.items()}
        blocks, chunks = comp_blosc2_params(image.shape, plan.patch, image.itemsize)
        blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, plan.patch, seg.itemsize)
        properties = {"class_locations": locations, "nibabel_stuff": {"original_affine": np.eye(4)}}
        nnUNetDatasetBlosc2.save_case(
            image, seg, properties, str(folder / f"case_{number:03d}"), chunks=chunks, blocks=blocks,
            chunks_seg=chunks_seg, blocks_seg=blocks_seg,
        )


class Measured(NamedTuple):
    core_seconds: float  # per batch, made one after the other in one thread
    per_second: float  # batches, from all cores
    bytes: int  # of memory that belongs to the workers


def core_seconds(make_batch, seconds: float) -> float:
    began, count = time.process_time(), 0
    make_batch()
    if (first := time.process_time() - began) > 4 * seconds:
        return first  # so long that what is done only once does not matter
    began = time.process_time()
    while count < 1 or time.process_time() - began < seconds:
        make_batch()
        count += 1
    return (time.process_time() - began) / count


def rate(batches, seconds: float) -> float:
    """Batches per second in the steady state: what was read ahead before does not count."""
    for _ in range(2):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or count < 2:
        next(batches)
        count += 1
    return count / (time.perf_counter() - began)


def our_source(folder: Path, stage, plan: BenchPlan, image_dtype: str):
    """Batches of one stage as pgps_jax's training gets them, for a very long time."""
    from pgps_jax.curriculum import Schedule
    from pgps_jax.data.pipeline import PatchSource
    from pgps_jax.data.sampling import SamplingConfig
    from pgps_jax.data.store import CaseStore
    from pgps_jax.train.augment import AugmentConfig, crop_size, make_policy

    store, steps = CaseStore(folder), 1_000_000
    schedule = Schedule((replace(stage, index=0),), np.zeros(steps, np.int32), np.full(steps, len(store.ids), np.int32))
    crop = crop_size(make_policy(AugmentConfig(), plan.patch), stage.patch_size)
    return PatchSource(
        store, store.ids, schedule, SamplingConfig(), [crop], plan.batch, seed=0, label_dtype=np.int8, image_dtype=image_dtype)


def ours(folder: Path, stage, plan: BenchPlan, options) -> Measured:
    from pgps_jax.data.pipeline import PatchStream

    before = memory()
    source = our_source(folder, stage, plan, options.image_dtype)
    steps = iter(range(1_000_000))
    alone = core_seconds(lambda: source.batch_of_step(next(steps)), options.seconds)
    if options.core_seconds:
        return Measured(alone, float("nan"), memory() - before)
    with PatchStream(source, threads=options.cores) as batches:
        return Measured(alone, rate(batches, options.seconds), memory() - before)


def nnunet_loader(folder: Path, stage, plan: BenchPlan, ids: list[str] | None = None):
    """nnU-Net's loader and augmentation for the same patch and batch, from all cases or those named."""
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    planar = max(stage.patch_size) / stage.patch_size[0] > 3
    angle = np.pi if planar else np.pi / 6
    crop = get_patch_size(stage.patch_size, (-angle, angle), (-angle, angle), (-angle, angle), (0.85, 1.25))
    crop = [stage.patch_size[0], *crop[1:]] if planar else crop
    scales = [[1 / 2**min(i, n) for n in plan.pools] for i in range(max(plan.pools))]
    transforms = nnUNetTrainer.get_training_transforms(
        np.array(stage.patch_size), (-angle, angle), scales, (0, 1, 2), planar, use_mask_for_norm=[False],
        foreground_labels=[1, 2], regions=None, ignore_label=None,
    )
    labels = LabelManager({"background": 0, "one": 1, "two": 2}, None)
    return nnUNetDataLoader(
        nnUNetDatasetBlosc2(str(folder), ids), stage.batch_size, crop, stage.patch_size, labels, oversample_foreground_percent=0.33,
        transforms=transforms,
    )


def nnunet_workers(loader, cores: int):
    """The same batches, made by one process per core."""
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

    return NonDetMultiThreadedAugmenter(
        loader, None, num_processes=cores, num_cached=max(6, cores // 2), seeds=None, pin_memory=False, wait_time=0.002)


def theirs(folder: Path, stage, plan: BenchPlan, options) -> Measured:
    import torch

    torch.set_num_threads(1)
    loader = nnunet_loader(folder, stage, plan)
    alone = core_seconds(lambda: next(loader), options.seconds)
    if options.core_seconds:
        return Measured(alone, float("nan"), 0)
    workers = nnunet_workers(loader, options.cores)
    try:
        found = rate(workers, options.seconds)
        return Measured(alone, found, sum(memory(child.pid) for child in multiprocessing.active_children()))
    finally:
        workers._finish()


def memory(pid: int | str = "self") -> int:
    """Resident bytes of a process that are its own, not shared with others."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def in_its_own_process(function, *args):
    """What a function returns when it runs in a fresh process, so that neither side inherits the other's state."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender, function, args) -> None:
    warnings.simplefilter("ignore")
    sender.send(function(*args))


def line(stage, row: dict) -> str:
    ms, mib = 1e3, 1 / 2**20
    text = f"{stage!s:26} core-ms per batch {ms * row['ours_core_seconds']:8.1f} and {ms * row['nnunet_core_seconds']:9.1f}"
    text += f", ratio {row['core_seconds_ratio']:6.1f}"
    if row["per_second_ratio"] == row["per_second_ratio"]:  # measured
        text += f";  batches/s {row['ours_per_second']:7.1f} and {row['nnunet_per_second']:6.2f}, ratio {row['per_second_ratio']:5.1f}"
        text += f";  {mib * row['ours_bytes']:.0f} and {mib * row['nnunet_bytes']:.0f} MiB"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="hippocampus")
    parser.add_argument("--mode", choices=("efficiency", "performance"), default="performance")
    parser.add_argument("--stages", type=int, nargs="*", help="which stages; every second one by default")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="per side, stage and turn")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    parser.add_argument("--image-dtype", default="float32")
    parser.add_argument("--core-seconds", action="store_true", help="leave out the batches per second of all cores")
    options = parser.parse_args()

    from pgps_jax.architecture import PatchLimits
    from pgps_jax.curriculum import CurriculumConfig, make_schedule

    plan = PLANS[options.plan]
    smallest = tuple(2**n for n in plan.pools)  # one voxel at the bottleneck
    schedule = make_schedule(CurriculumConfig(options.mode), plan.patch, plan.batch, PatchLimits(smallest, smallest), 1000, 1)
    chosen = options.stages if options.stages is not None else range(0, len(schedule.stages), 2)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_cases(Path(folder), plan)
        for stage in (schedule.stages[i] for i in chosen):
            turns = [
                tuple(in_its_own_process(side, Path(folder), stage, plan, options) for side in (ours, theirs))
                for _ in range(options.turns)
            ]
            row = {"stage": stage.index, "patch": stage.patch_size, "batch": stage.batch_size}
            for name in Measured._fields:
                row[f"ours_{name}"], row[f"nnunet_{name}"] = (statistics.median(getattr(t[i], name) for t in turns) for i in (0, 1))
            row["core_seconds_ratio"] = statistics.median(b.core_seconds / a.core_seconds for a, b in turns)
            row["per_second_ratio"] = statistics.median(a.per_second / b.per_second for a, b in turns)
            rows.append({k: None if v != v else v for k, v in row.items()})
            print(line(stage, row), flush=True)
    result = {
        "what": __doc__.splitlines()[0], "plan": options.plan, "mode": options.mode, "cores": options.cores,
        "load_average": os.getloadavg(), "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("nnunetv2", "batchgeneratorsv2", "torch", "grain", "blosc2", "numpy")},
        "image_dtype": options.image_dtype, "stages": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"loader_{options.plan}_{options.mode}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
