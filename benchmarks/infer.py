"""nnU-Net's predictor and ours on the same weights, volume and cores: seconds, ratio and agreement, as JSON.

    python -m benchmarks.infer --output benchmarks/results/cpu/infer.json      (needs the extra `bench`: torch, nnunetv2)
    python -m benchmarks.infer --device gpu                                # the network on GPU: bfloat16 against float16

Two parts: `tiles` is the sliding window with and without mirroring over a network as planned for Hippocampus (random
weights); `export` is the way from logits back to a label map, for few and for many classes. Both sides run alternately
in one process; times are medians. A ratio below 1 means that ours is faster.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pgps_jax.data.dataset import Case, Labels, read_case
from pgps_jax.data.plan import Plan
from pgps_jax.data.preprocess import preprocess_case
from pgps_jax.infer.export import restore_labels
from pgps_jax.infer.predict import make_predictor
from pgps_jax.interop.nnunet_model import read_nnunet_model
from pgps_jax.interop.nnunet_names import params_from_state_dict
from pgps_jax.interop.pickles import read_checkpoint
from pgps_jax.json_file import write_json
from pgps_jax.train.device import choose_platform


def plans_json(features: list[int], patch_size: list[int], spacing: list[float]) -> dict:
    """A plan in nnU-Net's schema for a plain U-Net with one pooling per further entry of `features`."""
    stages = len(features)
    resampling = {f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")}
    rule = {"order_z": 0, "force_separate_z": None}
    kwargs = {
        f"resampling_fn_{what}_kwargs": {"is_seg": what == "seg", "order": order, **rule}
        for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
    }
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "bench",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": patch_size,
        "median_image_size_in_voxels": [float(n) for n in patch_size],
        "spacing": spacing,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": architecture,
        **resampling,
        **kwargs,
    }
    return {
        "dataset_name": "Dataset999_Bench",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": spacing,
        "original_median_shape_after_transp": patch_size,
        "image_reader_writer": "NibabelIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
        },
    }


def dataset_json(num_classes: int) -> dict:
    """A dataset.json with background and `num_classes` - 1 structures."""
    labels = {"background": 0} | {f"structure {k}": k for k in range(1, num_classes)}
    return {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}


def alternate(repeats: int, **sides: Callable) -> tuple[dict[str, float], dict]:
    """Median seconds and last result of each side; the first round warms up (and compiles) and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for _ in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}, results


def bench_tiles(
    plans: dict, dataset: dict, image: np.ndarray, mirror: bool, repeats: int, device: str, weights: dict | None = None
) -> dict:
    """The sliding window of both sides over one preprocessed volume; random weights unless given (nnU-Net's names)."""
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(0)
    network = get_network_from_plans(
        configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import, 1, 3, deep_supervision=False)
    if weights is not None:
        network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
    peer = nnUNetPredictor(
        use_mirroring=mirror, perform_everything_on_device=device == "gpu",
        device=torch.device({"cpu": "cpu", "gpu": "cuda"}[device]), allow_tqdm=False)
    peer.manual_initialization(network, manager, configuration, [network.state_dict()], dataset, "bench", (0, 1, 2))

    plan = Plan.from_json(plans)
    params = params_from_state_dict({name: value.numpy() for name, value in network.state_dict().items()})
    ours = make_predictor(
        plan, plan.configurations["3d_fullres"], Labels.from_json(dataset), ("MRI",), [params], mirror=mirror)
    seconds, logits = alternate(
        repeats,
        nnunet=lambda: peer.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float().numpy(),
        pgps_jax=lambda: ours.window(ours.fold_params, image),
    )
    difference = np.abs(logits["nnunet"] - logits["pgps_jax"])
    return {
        "what": "tiles",
        "weights": "random" if weights is None else "trained by nnU-Net",
        "features": configuration.network_arch_init_kwargs["features_per_stage"],
        "patch_size": configuration.patch_size,
        "volume": image.shape[1:],
        "mirroring": mirror,
        "seconds": seconds,
        "ratio": seconds["pgps_jax"] / seconds["nnunet"],
        "logit_difference_p99": float(np.percentile(difference, 99)),  # nnU-Net adds logits up in float16
        "logit_range": float(np.ptp(logits["pgps_jax"])),
        "equal_labels": float((logits["nnunet"].argmax(0) == logits["pgps_jax"].argmax(0)).mean()),
    }


def bench_random(features: list[int], volume: list[int], mirror: bool, repeats: int, device: str) -> dict:
    """`bench_tiles` of a network with random weights over noise, where neighbouring labels are nearly ties."""
    plans = plans_json(features, [40, 56, 40], [1.0, 1.0, 1.0])
    image = np.random.default_rng(0).normal(size=(1, *volume)).astype(np.float32)
    return bench_tiles(plans, dataset_json(3), image, mirror, repeats, device)


def bench_model(folder: Path, file: Path, mirror: bool, repeats: int, device: str) -> dict:
    """`bench_tiles` of a model that nnU-Net trained, over a real image repeated twice along each axis."""
    model = read_nnunet_model(folder)
    plan, labels = Plan.from_json(model.plans), Labels.from_json(model.dataset)
    raw = read_case(Case("case", (file,), None))
    image = preprocess_case(raw, plan, plan.configurations[model.configuration], labels).image
    weights = read_checkpoint(next(folder.glob("fold_*/checkpoint_final.pth")))["network_weights"]
    return bench_tiles(model.plans, model.dataset, np.tile(image, (1, 2, 2, 2)), mirror, repeats, device, weights)


def bench_export(num_classes: int, shape: list[int], new_shape: list[int], repeats: int) -> dict:
    """Logits back to a label map of both sides; each class is a ball, as organs are."""
    plans, dataset = plans_json([8, 16], [16, 16, 16], [1.0, 1.0, 1.0]), dataset_json(num_classes)
    manager = PlansManager(plans)
    plan, labels = Plan.from_json(plans), Labels.from_json(dataset)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.1, (num_classes, *shape)).astype(np.float32)
    d, h, w = np.ogrid[tuple(slice(n) for n in shape)]
    for k in range(1, num_classes):
        centre = rng.uniform(0.1, 0.9, 3) * shape
        distance = np.sqrt((d - centre[0]) ** 2 + (h - centre[1]) ** 2 + (w - centre[2]) ** 2)
        logits[k] += np.clip(rng.uniform(0.06, 0.15) * min(shape) - distance, -10, 10)
    properties = {
        "spacing": [n / m for n, m in zip(shape, new_shape, strict=True)],
        "shape_before_cropping": new_shape,
        "bbox_used_for_cropping": [[0, n] for n in new_shape],
        "shape_after_cropping_and_before_resampling": new_shape,
    }
    seconds, decided = alternate(
        repeats,
        nnunet=lambda: convert_predicted_logits_to_segmentation_with_correct_shape(
            torch.from_numpy(logits), manager, manager.get_configuration("3d_fullres"),
            manager.get_label_manager(dataset), properties),
        pgps_jax=lambda: restore_labels(logits, properties, plan, plan.configurations["3d_fullres"], labels),
    )
    return {
        "what": "export",
        "classes": num_classes,
        "shape": shape,
        "new_shape": new_shape,
        "seconds": seconds,
        "ratio": seconds["pgps_jax"] / seconds["nnunet"],
        "equal_labels": float((np.asarray(decided["nnunet"]) == decided["pgps_jax"]).mean()),
    }


def main() -> None:
    """Run all parts, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu/infer.json"))
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"], help="of the networks; the export is the host's work")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="results folder of a model that nnU-Net trained, measured as well")
    parser.add_argument("--image", type=Path, help="an image for that model")
    arguments = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side needs memory of the same device
    choose_platform(arguments.device)
    planned, repeats, device = [32, 64, 128, 256], arguments.repeats, arguments.device
    runs = [
        lambda: bench_random(planned, [60, 84, 60], False, repeats, device),
        lambda: bench_random(planned, [40, 56, 60], True, repeats, device),
        lambda: bench_export(3, [80, 120, 120], [100, 180, 180], repeats),
        lambda: bench_export(60, [60, 90, 90], [80, 130, 130], repeats),
    ]
    if arguments.model:
        runs.append(lambda: bench_model(arguments.model, arguments.image, True, repeats, device))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows, busy = [], os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for run in runs:
        rows.append(run())
        row = rows[-1]
        seconds = row["seconds"]
        print(f"{row['what']:7} nnU-Net {seconds['nnunet']:7.2f} s   pgps_jax {seconds['pgps_jax']:7.2f} s   ratio "
              f"{row['ratio']:.2f}   equal labels {100 * row['equal_labels']:.3f} %", flush=True)
        write_json(arguments.output, about(arguments.device, busy) | {"rows": rows}, indent=1)


def about(device: str, busy: float | None) -> dict:
    """Machine and versions; above the number of cores of `busy` both sides waited, and the ratio is less certain."""
    name = torch.cuda.get_device_name() if device == "gpu" else platform.processor() or platform.machine()
    return {
        "command": " ".join(["python -m benchmarks.infer", *sys.argv[1:]]),
        "device": f"{name}, {torch.get_num_threads()} threads, jax on {jax.default_backend()}, torch on {device}",
        "load_average_before": busy,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "torch", "nnunetv2", "numpy", "scipy")},
    }


if __name__ == "__main__":
    main()
