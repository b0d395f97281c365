"""nnU-Net's preprocessing and ours on the same cases, plan and cores: seconds, ratio and agreement, as JSON.

    python -m benchmarks.preprocess DATASET --plans nnUNetPlans.json --cases 40 --workers 2
    python -m benchmarks.preprocess --synthetic 120 320 320 --cases 4

(needs the extra `bench`: torch, nnunetv2). DATASET is a raw folder in nnU-Net's layout. Two times per side: `dataset` is
the whole command in fresh worker processes, start-up included; `case` is one case after the other in this process,
without writing. A ratio below 1 means that ours is faster. `--synthetic` makes CT-like volumes of that shape instead,
0.8 mm in plane and 2.5 mm apart, to be resampled to 1 x 1 x 1.5 mm.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import ndimage

CONFIGURATION = "3d_fullres"
NAME = "Dataset999_Bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--plans", type=Path, help="nnU-Net's plans.json of the dataset")
    parser.add_argument("--synthetic", type=int, nargs=3, metavar=("D", "H", "W"))
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.synthetic:
            plans = make_synthetic(folder / "raw" / NAME, tuple(args.synthetic), args.cases)
        else:
            plans = json.loads(args.plans.read_text())
            copy_cases(args.dataset, folder / "raw" / NAME, args.cases)
        result = {
            "dataset": str(args.synthetic or args.dataset.name),
            "workers": args.workers,
            **measure(folder, plans, args.workers),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),  # of this and all other programs
            "versions": {name: version(name) for name in ("numpy", "scipy", "blosc2", "torch", "nnunetv2")},
        }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def copy_cases(source: Path, target: Path, count: int) -> None:
    labels = sorted((source / "labelsTr").iterdir())[:count]
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
    for label in labels:
        os.symlink(label.resolve(), target / "labelsTr" / label.name)
        case = label.name.removesuffix(".nii.gz")
        for image in source.glob(f"imagesTr/{case}_????.nii.gz"):
            os.symlink(image.resolve(), target / "imagesTr" / image.name)
    content = json.loads((source / "dataset.json").read_text())
    (target / "dataset.json").write_text(json.dumps({**content, "numTraining": len(labels)}))


def make_synthetic(target: Path, shape: tuple[int, int, int], count: int) -> dict:
    from pgps_jax.data.nifti import write_volume

    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    affine = np.diag([0.8, 0.8, 2.5, 1.0])
    for i in range(count):
        coarse = [max(4, n // 8) for n in shape]
        smooth = [ndimage.zoom(rng.normal(size=coarse), np.divide(shape, coarse), order=1) for _ in range(2)]
        image = 100 * smooth[0] + rng.normal(0, 20, shape)
        image[:, :8] = -1000
        write_volume(target / "imagesTr" / f"c{i}_0000.nii.gz", image.round().astype(np.int16), affine)
        label = np.digitize(smooth[1], [0.8, 1.2, 1.6]).astype(np.uint8)
        write_volume(target / "labelsTr" / f"c{i}.nii.gz", label, affine)
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": count, "file_ending": ".nii.gz"}
    (target / "dataset.json").write_text(json.dumps(dataset))
    return synthetic_plans()


def synthetic_plans() -> dict:
    rule = {"order_z": 0, "force_separate_z": None}
    resampling = {}
    for what, is_seg, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        resampling[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{what}_kwargs"] = {"is_seg": is_seg, "order": order, **rule}
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 2, "features_per_stage": [32, 64], "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], "n_conv_per_stage": [2, 2],
            "n_conv_per_stage_decoder": [2], "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [96, 128, 128], "median_image_size_in_voxels": [200.0, 256.0, 256.0], "spacing": [1.5, 1.0, 1.0],
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False], **resampling,
        "architecture": architecture, "batch_dice": False,
    }  # fmt: skip
    intensities = {"max": 500.0, "mean": 0.0, "median": 0.0, "min": -1000.0, "percentile_00_5": -250.0,
                   "percentile_99_5": 250.0, "std": 100.0}  # fmt: skip
    return {
        "dataset_name": NAME, "plans_name": "nnUNetPlans", "original_median_spacing_after_transp": [2.5, 0.8, 0.8],
        "original_median_shape_after_transp": [120, 320, 320], "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration}, "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager", "foreground_intensity_properties_per_channel": {"0": intensities},
    }  # fmt: skip


def measure(folder: Path, plans: dict, workers: int) -> dict:
    """Both sides on folder/raw/NAME; everything is written below `folder`."""
    prepared = folder / "preprocessed" / NAME
    prepared.mkdir(parents=True)
    plans = {**plans, "dataset_name": NAME, "plans_name": "nnUNetPlans"}
    (prepared / "nnUNetPlans.json").write_text(json.dumps(plans))
    shutil.copy(folder / "raw" / NAME / "dataset.json", prepared)
    os.environ.update(nnUNet_raw=str(folder / "raw"), nnUNet_preprocessed=str(folder / "preprocessed"),
                      nnUNet_results=str(folder / "results"))  # fmt: skip
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from pgps_jax.data.dataset import open_dataset, read_case
    from pgps_jax.data.plan import Plan
    from pgps_jax.data.preprocess import preprocess_case, preprocess_dataset

    dataset, plan = open_dataset(folder / "raw" / NAME), Plan.from_json(plans)
    configuration = plan.configurations[CONFIGURATION]
    peer, manager = DefaultPreprocessor(verbose=False), PlansManager(plans)

    times = {"ours": [], "nnunet": []}
    largest, differing, voxels = 0.0, 0, 0
    for case in dataset.cases[: min(10, len(dataset.cases))]:
        start = time.perf_counter()
        ours = preprocess_case(read_case(case, dataset.labels), plan, configuration, dataset.labels)
        middle = time.perf_counter()
        image, seg, _ = peer.run_case([str(p) for p in case.images], str(case.label), manager,
                                      manager.get_configuration(CONFIGURATION), dataset.json)  # fmt: skip
        times["ours"].append(middle - start)
        times["nnunet"].append(time.perf_counter() - middle)
        largest = max(largest, float(np.abs(ours.image - image).max()))
        differing, voxels = differing + int((ours.seg != seg).sum()), voxels + seg.size

    start = time.perf_counter()
    preprocess_dataset(dataset, plan, configuration, folder / "ours", workers)
    middle = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        peer.run(NAME, CONFIGURATION, "nnUNetPlans", num_processes=workers)
    whole = {"ours": middle - start, "nnunet": time.perf_counter() - middle}

    def size(place: Path) -> int:
        return sum(path.stat().st_size for path in place.rglob("*.b2nd"))

    return {
        "cases": len(dataset.cases),
        "dataset_seconds": whole,
        "dataset_ratio": whole["ours"] / whole["nnunet"],
        "case_seconds": {side: float(np.median(values)) for side, values in times.items()},
        "case_ratio": float(np.median(np.divide(times["ours"], times["nnunet"]))),
        "largest_image_difference": largest,
        "share_of_labels_that_differ": differing / voxels,
        "stored_bytes": {"ours": size(folder / "ours"), "nnunet": size(prepared)},
    }


if __name__ == "__main__":
    main()
