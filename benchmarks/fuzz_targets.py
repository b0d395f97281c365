"""What a stranger's file can be, a good one of each kind, and what the package does with it."""

import gzip
import io
import json
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from fuzz_mutations import damaged, damaged_head, damaged_json

from pgps_jax.config import RunConfig, check_same, from_json, to_json
from pgps_jax.curriculum import CurriculumConfig, make_schedule, schedule_from_json, schedule_to_json
from pgps_jax.data.dataset import open_dataset
from pgps_jax.data.decathlon import convert_decathlon, is_decathlon
from pgps_jax.data.fingerprint import Fingerprint
from pgps_jax.data.folds import cases_of_fold, read_folds
from pgps_jax.data.nifti import file_shape, read_channels, read_header, read_volume, write_volume
from pgps_jax.data.plan import read_plan, write_plan
from pgps_jax.data.store import CaseStore, Preprocessed, write_case
from pgps_jax.evaluate.postprocess import read_postprocessing
from pgps_jax.inference import read_inference
from pgps_jax.interop.nnunet_model import read_nnunet_model, write_checkpoint
from pgps_jax.interop.pickles import read_properties
from pgps_jax.json_file import read_json, write_json
from pgps_jax.models import limits
from pgps_jax.report.run_log import read_records
from pgps_jax.train.checkpoint import Checkpoints
from pgps_jax.train.state import TrainState, abstract

Damage = Callable[[bytes, random.Random], bytes]


class Target(NamedTuple):
    """A kind of file. `make` writes good files into a folder and returns those to damage; `read` does what the package does."""

    name: str
    make: Callable[[Path], list[Path]]
    read: Callable[[Path], None]
    damage: Damage
    share: float = 1.0  # of the inputs asked for; less where reading takes long


# ------------------------------------------------------------------------------------------------------------- damage


def in_bytes(content: bytes, rng: random.Random) -> bytes:
    return damaged(content, [content], rng)


def mostly_in_head(length: int) -> Damage:
    return lambda content, rng: damaged_head(content, length, rng) if rng.random() < 0.6 else in_bytes(content, rng)


def in_json(content: bytes, rng: random.Random) -> bytes:
    return damaged_json(content, rng)


def under_gzip(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return in_bytes(content, rng)
    return gzip.compress(mostly_in_head(352)(gzip.decompress(content), rng), 1)


def in_archive(content: bytes, rng: random.Random) -> bytes:
    """The archive damaged, or one with the right sums around damaged members."""
    if rng.random() < 0.3:
        return in_bytes(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, in_bytes(member, rng) if rng.random() < (0.9 if name.endswith("pkl") else 0.1) else member)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------ volumes


def make_nifti(ending: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        write_volume(folder / f"x{ending}", np.arange(210, dtype=np.int16).reshape(5, 6, 7), np.diag([1, 2, 3, 1.0]))
        return [folder / f"x{ending}"]

    return make


def read_nifti(path: Path) -> None:
    file_shape(path)
    read_header(path)
    read_volume(path)
    read_channels(path)


# ----------------------------------------------------------------------------------------------------------- datasets


def make_dataset(folder: Path) -> list[Path]:
    for place in ("imagesTr", "labelsTr"):
        (folder / place).mkdir()
    files = ["imagesTr/a_0000.nii.gz", "imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"]
    for file in files:
        write_volume(folder / file, np.ones((2, 2, 2), np.uint8), np.eye(4))
    write_json(folder / "dataset.json", {
        "channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2], "numTraining": 1, "file_ending": ".nii.gz", "name": "X",
        "dataset": {"a": {"images": files[:2], "label": files[2]}, "b": {"images": files[:2], "label": f"{folder}/{files[2]}"}}})
    return [folder / "dataset.json"]


def read_dataset(path: Path) -> None:
    dataset = open_dataset(path.parent)
    _ = dataset.labels.num_outputs, dataset.labels.in_files, dataset.labels.foreground
    for file in (file for case in dataset.cases for file in (*case.images, case.label)):
        assert file.resolve().is_relative_to(path.parent.resolve()), f"{file} is outside"


def make_decathlon(folder: Path) -> list[Path]:
    source = folder / "Task01_X"
    for place in ("imagesTr", "labelsTr"):
        (source / place).mkdir(parents=True)
        write_volume(source / place / "a.nii.gz", np.ones((2, 2, 2), np.uint8), np.eye(4))
    write_json(source / "dataset.json", {
        "name": "X", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a"}, "numTraining": 1, "numTest": 0,
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}], "test": []})
    return [source / "dataset.json"]


def read_decathlon(path: Path) -> None:
    output = path.parent.parent / "out"
    shutil.rmtree(output, ignore_errors=True)
    if is_decathlon(path.parent):
        convert_decathlon(path.parent, output, workers=1)
        open_dataset(output)


# ------------------------------------------------------------------------------------------------ plans and schedules

KERNELS, STRIDES = [[3, 3, 3]] * 3, [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
NETWORK = {"n_stages": 3, "features_per_stage": [4, 8, 16], "kernel_sizes": KERNELS, "strides": STRIDES, "n_conv_per_stage": [2, 2, 2],
           "n_conv_per_stage_decoder": [2, 2], "conv_bias": True, "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
FULLRES = {"data_identifier": "p_3d", "batch_size": 2, "patch_size": [16, 16, 16], "median_image_size_in_voxels": [20, 20, 20],
           "spacing": [1.0, 1.0, 1.0], "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False], "batch_dice": True,
           "architecture": {"network_class_name": "x.architectures.unet.PlainConvUNet", "arch_kwargs": NETWORK}}
LEGACY = {k: v for k, v in FULLRES.items() if k != "architecture"} | {
    "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 16, "n_conv_per_stage_encoder": [2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2], "num_pool_per_axis": [2, 2, 2], "pool_op_kernel_sizes": STRIDES, "conv_kernel_sizes": KERNELS}
PLANS = {"dataset_name": "X", "plans_name": "p", "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
         "original_median_shape_after_transp": [20, 20, 20], "image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2],
         "transpose_backward": [0, 1, 2], "experiment_planner_used": "ExperimentPlanner", "label_manager": "LabelManager",
         "configurations": {"3d_fullres": FULLRES, "child": {"inherits_from": "3d_fullres", "batch_size": 4}, "legacy": LEGACY},
         "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 2.0, "percentile_00_5": 0.0, "percentile_99_5": 9.0}}}


def make_json(name: str, content: dict | list, **beside: dict) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        for other, value in beside.items():
            write_json(folder / f"{other}.json", value)
        write_json(folder / name, content)
        return [folder / name]

    return make


def read_plans(path: Path) -> None:
    plan = read_plan(path)
    write_plan(plan, path.with_name("again.json"))
    path.with_name("again.json").unlink()
    for configuration in plan.configurations.values():
        make_schedule(CurriculumConfig(), configuration.patch_size, configuration.batch_size, limits(configuration.architecture), 1000, 10)


def read_schedule(path: Path) -> None:
    schedule = schedule_from_json(read_json(path))
    schedule.runs()
    schedule_to_json(schedule)


def read_config(path: Path) -> None:
    content = read_json(path)
    from_json(RunConfig, content, f"{path}")
    check_same(RunConfig(Path("x")), content, path)


# ----------------------------------------------------------------------------------------------------- stored cases


def make_case(folder: Path) -> Preprocessed:
    rng = np.random.default_rng(0)
    image, seg = rng.normal(size=(2, 9, 12, 10)).astype(np.float32), rng.integers(-1, 3, (1, 9, 12, 10)).astype(np.int16)
    case = Preprocessed(image, seg, {"spacing": [1.0, 1.0, 1.0], "nibabel_stuff": {"original_affine": np.eye(4).tolist()}},
                        {1: np.argwhere(seg[0] == 1).astype(np.int32), (1, 2): np.argwhere(seg[0] > 0).astype(np.int32)})
    write_case(folder, "a", case, (4, 8, 8))
    return case


def make_stored(*names: str) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        make_case(folder)
        return [folder / name for name in names]

    return make


def read_stored(path: Path) -> None:
    folder = path.parent if path.suffix in (".b2nd", ".pkl") else path.parent.parent
    case = CaseStore(folder).open("a")
    for array in (case.image, case.seg):
        _ = array[:, 2:5, 1:9, 3:4], array[:]
    for voxels in case.locations.values():
        voxels.sum()


def make_pickled(folder: Path) -> list[Path]:
    case = make_case(folder)
    shutil.rmtree(folder / "properties")
    locations = {label: np.pad(voxels, ((0, 0), (1, 0))).astype(np.int64) for label, voxels in case.locations.items()}
    geometry = {"spacing": (1.0, 1.0, 1.0), "origin": (0.0, 0.0, 0.0), "direction": tuple(np.eye(3).reshape(-1).tolist())}
    properties = {"spacing": [np.float64(1), 1.0, 2.0], "shape_before_cropping": (9, 12, 10), "sitk_stuff": geometry,
                  "bbox_used_for_cropping": [[0, 9], [0, 12], [0, 10]], "class_locations": locations}
    files = [folder / "a.pkl", folder / "other.pkl"]
    files[0].write_bytes(pickle.dumps(properties))
    files[1].write_bytes(pickle.dumps(properties, 2))
    return files


def read_pickled(path: Path) -> None:
    read_properties(path)
    if path.name == "a.pkl":
        read_stored(path)


# ------------------------------------------------------------------------------------------------- networks and runs


def make_model(folder: Path) -> list[Path]:
    (folder / "fold_0").mkdir()
    write_json(folder / "plans.json", PLANS)
    write_json(folder / "dataset.json", {"labels": {"background": 0, "a": 1}})
    rng = np.random.default_rng(0)
    weights = {f"encoder.stages.{i}.0.convs.0.conv.{part}": rng.normal(size=shape).astype(np.float32)
               for i in range(3) for part, shape in (("weight", (4, 2, 3, 3, 3)), ("bias", (4,)))}
    write_checkpoint(folder / "fold_0/checkpoint_final.pth", {
        "network_weights": weights, "optimizer_state": {"state": {0: {"momentum_buffer": weights["encoder.stages.0.0.convs.0.conv.bias"]}}},
        "logging": {"train_losses": [0.5, 0.25]}, "init_args": {"configuration": "3d_fullres", "fold": 0, "plans": PLANS},
        "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": (0, 1, 2), "current_epoch": 2})
    return [folder / "fold_0/checkpoint_final.pth"]


def read_model(path: Path) -> None:
    read_nnunet_model(path.parent.parent)


def run_state(step: int) -> TrainState:
    kernel = np.random.default_rng(step).normal(size=(40, 50)).astype(np.float32)
    return TrainState(jnp.int32(step), {"stages": {0: {"kernel": jnp.asarray(kernel)}}}, {"stages": {0: {"kernel": jnp.asarray(kernel)}}})


def make_checkpoints(folder: Path) -> list[Path]:
    with Checkpoints(folder / "good") as checkpoints:
        for step in (1, 2):
            checkpoints.save("last", run_state(step), step, {"step": step})
    return [path for path in sorted((folder / "good/last/2").rglob("*")) if path.is_file() and path.stat().st_size]


def read_checkpoints(path: Path) -> None:
    """Go on from a copy, because the damaged one is moved aside; whatever is read must be what was saved."""
    good = next(parent for parent in path.parents if parent.name == "good")
    copy = good.with_name("run")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    with Checkpoints(copy, lambda _: None) as checkpoints:
        state = checkpoints.restore(abstract(run_state(0)))
    assert state is not None, "nothing was restored"
    for found, saved in zip(_numbers(state), _numbers(run_state(int(state.step))), strict=True):
        assert np.array_equal(found, saved), "other numbers than were saved"


def _numbers(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(tree["stages"][0]["kernel"]) for tree in (state.params, state.opt_state)]


RECORDS = "".join(json.dumps({"kind": "epoch", "step": i, "pseudo_dice": [0.1, 0.2]}) + "\n" for i in range(5))


def make_records(folder: Path) -> list[Path]:
    (folder / "metrics.jsonl").write_text(RECORDS)
    return [folder / "metrics.jsonl"]


FINGERPRINT = {"spacings": [[1.0, 1.0, 1.0]], "shapes_after_crop": [[9, 9, 9]], "median_relative_size_after_cropping": 0.5,
               "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0, "std": 1.0}}}
SCHEDULE = {"stages": [{"patch_size": [8, 8, 8], "batch_size": 4}, {"patch_size": [16, 8, 8], "batch_size": 2}],
            "stage_of_step": "0x250 1x500", "case_pool_of_step": "20x750"}
INFERENCE = {"configuration": "3d_fullres", "mirror_axes": [0, 1, 2], "swap_axis": 2, "swap_pairs": [[1, 2]], "orientation": "RAS"}

TARGETS = (
    Target("volume .nii", make_nifti(".nii"), read_nifti, mostly_in_head(352)),
    Target("volume .nii.gz", make_nifti(".nii.gz"), read_nifti, under_gzip),
    Target("dataset.json", make_dataset, read_dataset, in_json),
    Target("dataset.json of the Decathlon", make_decathlon, read_decathlon, in_json),
    Target("dataset_fingerprint.json", make_json("x.json", FINGERPRINT), lambda path: Fingerprint.from_json(read_json(path)) and None,
           in_json),
    Target("plans.json", make_json("plans.json", PLANS), read_plans, in_json),
    Target("splits_final.json", make_json("x.json", [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]),
           lambda path: cases_of_fold(read_folds(path, ["a", "b", "c"]), ["a", "b", "c"], 0) and None, in_json),
    Target("schedule.json", make_json("x.json", SCHEDULE), read_schedule, in_json),
    Target("config.json", make_json("x.json", to_json(RunConfig(Path("x")))), read_config, in_json),
    Target("inference.json", make_json("inference.json", INFERENCE, plan=PLANS),
           lambda path: read_inference(path.parent, read_plan(path.with_name("plan.json"))) and None, in_json),
    Target("postprocessing.json", make_json("x.json", {"keep_largest_component_of": [1, [1, 2]]}),
           lambda path: read_postprocessing(path) and None, in_json),
    Target("metrics.jsonl", make_records, lambda path: read_records(path) and None, in_bytes),
    Target("stored arrays .b2nd", make_stored("a.b2nd", "a_seg.b2nd"), read_stored, mostly_in_head(300)),
    Target("stored locations .npy", make_stored("properties/a_locations.npy"), read_stored, mostly_in_head(128)),
    Target("stored properties .json", make_stored("properties/a.json"), read_stored, in_json),
    Target("nnU-Net's properties .pkl", make_pickled, read_pickled, in_bytes),
    Target("nnU-Net's checkpoint .pth", make_model, read_model, in_archive),
    Target("checkpoint of a run", make_checkpoints, read_checkpoints, in_bytes, 0.5),
)
