"""The commands and their flags; what they do is in main.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgps_jax.config import NetworkConfig, Planner, RunConfig
from pgps_jax.data.planner import Overrides


@dataclass(frozen=True)
class Run(RunConfig):
    """Everything in one go: check, plan, preprocess, train, predict the validation cases, evaluate."""


@dataclass(frozen=True)
class Train(RunConfig):
    """Train on a preprocessed dataset, then predict and evaluate the validation cases. Goes on where it was stopped."""


@dataclass(frozen=True)
class ShowSchedule(RunConfig):
    """Print the stages of a curriculum without training."""

    json: bool = False
    """Print JSON instead of a table."""
    plot: Path | None = None
    """Also draw patch, batch and voxels over steps into this PNG file, and, once the dataset is preprocessed, how large a
    share of the drawn patches is foreground (class balance)."""


@dataclass(frozen=True)
class Bench(RunConfig):
    """Measure how fast batches are read and computed on this machine, per stage, and tell what limits training and what to change.

    Takes the flags of `train`; nothing is trained or written.
    """

    stages: tuple[int, ...] = ()
    """Which stages, by the numbers that `schedule` prints; the first, a middle and the last one when not given."""
    seconds: float = 5.0
    """About how long each of the four measurements of a stage takes."""
    json: Path | None = None
    """Also write the numbers into this JSON file."""


@dataclass(frozen=True)
class PlanCommand:
    """Check a raw dataset, measure it, and plan networks for it (nnU-Net's plans.json)."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder in nnU-Net's raw layout, or a Decathlon folder, which is converted."""
    workspace: Path = Path("pgps_workspace")
    """Folder under which everything is written."""
    planner: Planner = "nnunet"
    """Planning rules: nnU-Net's default or one of its residual encoder presets."""
    overwrite: bool = False
    """Plan again although there is a plan."""
    explain: bool = False
    """Tell in plain words why each number was chosen."""
    overrides: Annotated[Overrides, tyro.conf.arg(name="")] = field(default_factory=Overrides)
    group_by: str | None = None
    """Regular expression that finds the patient in a case id; scans of one patient then stay in one fold."""
    workers: int | None = None
    """Processes; one per core when not given."""


@dataclass(frozen=True)
class Preprocess:
    """Crop, normalise and resample every case of a planned dataset."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder in nnU-Net's raw layout, or a Decathlon folder, which is converted."""
    workspace: Path = Path("pgps_workspace")
    """Folder under which everything is written."""
    configuration: str = "3d_fullres"
    """Configuration of the plans."""
    planner: Planner = "nnunet"
    """Whose plans."""
    workers: int | None = None
    """Processes; one per core when not given."""


@dataclass(frozen=True)
class Predict:
    """Segment new images with a trained run."""

    run: tyro.conf.Positional[Path]
    """Run folder (…/fold_<k>), or its parent to average all folds."""
    images: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """Folder of images in nnU-Net naming: CASE_0000.nii.gz, CASE_0001.nii.gz, …"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the segmentations."""
    mirror_tta: bool = True
    """Average over mirrored images (8 times the work in 3D)."""
    step_size: float = 0.5
    """Step between tiles as a share of the patch."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint."""
    skip_outside: bool = False
    """Leave out tiles in which every channel is constant, such as air masked to zero; what no other tile covers is background."""
    save_probabilities: bool = False
    """Also write CASE.npz with class probabilities, and CASE.pkl, with which nnU-Net reads them."""
    overwrite: bool = False
    """Predict cases again whose segmentation exists; needed where another run or other flags made them."""
    ignore_orientation: bool = False
    """Take images as they are stored, as nnU-Net does, also where their axes run otherwise than the training images'."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Where to compute; auto takes an accelerator when there is one."""


@dataclass(frozen=True)
class Reproduce:
    """Print the command that makes a run again, and what of software, machine and data is not as it was."""

    run: tyro.conf.Positional[Path]
    """Run folder (…/fold_<k>)."""


@dataclass(frozen=True)
class Evaluate:
    """Compare segmentations with references and write nnU-Net's summary.json."""

    predictions: tyro.conf.Positional[Path]
    """Folder of segmentations, or a run: its validation cases, of all folds in it."""
    references: tyro.conf.Positional[Path]
    """Folder of reference labels with the same file names."""
    dataset_json: Path | None = None
    """dataset.json with the labels; looked for in both folders and above them when not given."""
    output: Path | None = None
    """File to write; summary.json in the predictions folder when not given."""
    surface_tolerance: float | None = None
    """Also measure HD95, ASSD and, with this tolerance in mm, NSD (needs the extra `metrics`)."""
    lesions: bool = False
    """Also count lesions found and missed (connected components)."""
    workers: int | None = None
    """Processes; one per core when not given."""


@dataclass(frozen=True)
class Compare:
    """Compare trainings over the cases that they share: Dice with intervals, paired test, time, convergence; also with nnU-Net's."""

    trainings: tyro.conf.Positional[tuple[str, ...]]
    """Two or more of PATH or NAME=PATH, the baseline first: run folders (…/fold_<k>), their parents with all folds, nnU-Net's
    results folders, or summary.json files. The same NAME means repetitions, such as other seeds."""
    dataset_json: Path | None = None
    """dataset.json with the names of the classes; looked for beside the first path when not given."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for comparison.json and comparison.png; nothing is written when not given."""


@dataclass(frozen=True)
class FindPostprocessing:
    """Find out on cross-validation predictions whether keeping only the largest components raises the Dice."""

    predictions: tyro.conf.Positional[Path]
    """Folder of segmentations, or a run: its validation cases, of all folds in it."""
    references: tyro.conf.Positional[Path]
    """Folder of reference labels with the same file names."""
    dataset_json: Path | None = None
    """dataset.json with the labels; looked for in both folders and above them when not given."""
    output: Path | None = None
    """File to write; postprocessing.json in the predictions folder when not given."""


@dataclass(frozen=True)
class Postprocess:
    """Apply what find-postprocessing decided."""

    predictions: tyro.conf.Positional[Path]
    """Folder of segmentations."""
    decision: tyro.conf.Positional[Path]
    """postprocessing.json."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for the postprocessed segmentations."""


@dataclass(frozen=True)
class Demo:
    """Make a labelled synthetic dataset and do everything on it, in a few minutes on two CPU cores."""

    workspace: Path = Path("pgps_workspace/demo")
    """Folder under which everything is written."""
    epochs: int = 8
    """Length of training in epochs of 120 steps."""
    fresh: bool = False
    """Start over."""


@dataclass(frozen=True)
class Doctor:
    """Examine a raw dataset: faults, their cases and their cures, and one picture per class, as a page and as JSON."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder in nnU-Net's raw layout."""
    output: Path | None = None
    """Folder for doctor.html and doctor.json; <workspace>/doctor/<dataset> when not given."""
    workspace: Path = Path("pgps_workspace")
    """Folder under which everything is written."""
    tolerance_mm: float = 0.1
    """How far voxels of image and label may lie apart."""
    repair: Path | None = None
    """Write a new dataset with the safe repairs into this folder."""
    workers: int | None = None
    """Threads; one per core when not given."""


@dataclass(frozen=True)
class FetchMsd:
    """Download and verify a task of the Medical Segmentation Decathlon, such as Task04_Hippocampus; goes on where it was stopped."""

    task: tyro.conf.Positional[str]
    """Name of the task; a wrong one is answered with all names."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path(".")
    """Folder in which the task's folder is made."""


@dataclass(frozen=True)
class ConvertMsd:
    """Convert a Medical Segmentation Decathlon folder (Task04_Hippocampus) to nnU-Net's raw layout."""

    task: tyro.conf.Positional[Path]
    """Decathlon folder with its dataset.json."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path(".")
    """Folder in which Dataset004_Hippocampus is made."""


@dataclass(frozen=True)
class ImportNnunet:
    """Make run folders of a model that nnU-Net has trained; `predict` uses them like our own."""

    results: tyro.conf.Positional[Path]
    """nnU-Net's folder, e.g. …/nnUNetTrainer__nnUNetPlans__3d_fullres."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for fold_0, fold_1, …"""


@dataclass(frozen=True)
class ExportNnunet:
    """Write a trained run as a folder that nnU-Net's predictor loads."""

    run: tyro.conf.Positional[Path]
    """Run folder (…/fold_<k>), or its parent for all folds."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for plans.json, dataset.json and fold_<k>/checkpoint_final.pth."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint."""


@dataclass(frozen=True)
class ExportPreprocessed:
    """Write CASE.pkl beside every preprocessed case, so that nnU-Net can train from the folder."""

    folder: tyro.conf.Positional[Path]
    """…/preprocessed/<dataset>/<plans>_<configuration>."""


@dataclass(frozen=True)
class ImportMonai:
    """Make a run folder of a UNETR or SwinUNETR that was trained with MONAI, so that `predict` can use it."""

    weights: tyro.conf.Positional[Path]
    """Torch file with the state dict, every parameter of the network that --network describes."""
    dataset: tyro.conf.Positional[Path]
    """Planned dataset, or its preprocessed folder: says how images are prepared and what the outputs are."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """New folder, in which fold_0 is made."""
    workspace: Path = Path("pgps_workspace")
    """Folder under which the plan lies."""
    planner: Planner = "nnunet"
    """Whose plans."""
    configuration: str = "3d_fullres"
    """Configuration of the plans."""
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(backbone="swin-unetr"))


@dataclass(frozen=True)
class ExportMonai:
    """Write a trained run of UNETR or SwinUNETR as files that MONAI's classes load strictly."""

    run: tyro.conf.Positional[Path]
    """Run folder (…/fold_<k>), or its parent for all folds."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for fold_<k>.pt (state dicts) and network.json (MONAI's class and its arguments)."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[Preprocess, tyro.conf.subcommand("preprocess")]
    | Annotated[ShowSchedule, tyro.conf.subcommand("schedule")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[FindPostprocessing, tyro.conf.subcommand("find-postprocessing")]
    | Annotated[Postprocess, tyro.conf.subcommand("postprocess")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[FetchMsd, tyro.conf.subcommand("fetch-msd")]
    | Annotated[ConvertMsd, tyro.conf.subcommand("convert-msd")]
    | Annotated[ImportNnunet, tyro.conf.subcommand("import-nnunet")]
    | Annotated[ExportNnunet, tyro.conf.subcommand("export-nnunet")]
    | Annotated[ExportPreprocessed, tyro.conf.subcommand("export-preprocessed")]
    | Annotated[ImportMonai, tyro.conf.subcommand("import-monai")]
    | Annotated[ExportMonai, tyro.conf.subcommand("export-monai")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)
