"""The command line: parses, calls, prints. `python -m pgps_jax.main --help` lists the commands."""

import dataclasses
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgps_jax import __version__, workspace
from pgps_jax.config import Planner, RunConfig
from pgps_jax.data.dataset import open_dataset
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.errors import InputError
from pgps_jax.evaluate.summary import evaluate_folder
from pgps_jax.infer.predict import predict_folder
from pgps_jax.report.environment import environment
from pgps_jax.report.progress import CaseProgress
from pgps_jax.report.run_log import complain, console, say
from pgps_jax.report.schedule import plot_schedule, schedule_table, stage_rows, voxel_share
from pgps_jax.train.device import choose_platform, warnings
from pgps_jax.train.loop import Stopped, train
from pgps_jax.train.programs import enable_compilation_cache
from pgps_jax.train.sizing import sized
from pgps_jax.validate import dice_table, load_predictor, validate

EXIT_BAD_INPUT = 2
CACHE_BYTES = 4 * 2**30
EXIT_STOPPED = 75  # EX_TEMPFAIL: a scheduler may start the same command again


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
    """Also draw patch, batch and voxels over steps into this PNG file."""


@dataclass(frozen=True)
class PlanCommand:
    """Check a raw dataset, measure it, and plan networks for it (nnU-Net's plans.json)."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder in nnU-Net's raw layout."""
    workspace: Path = Path("pgps_workspace")
    """Folder under which everything is written."""
    planner: Planner = "nnunet"
    """Planning rules: nnU-Net's default or one of its residual encoder presets."""
    overwrite: bool = False
    """Plan again although there is a plan."""
    workers: int | None = None
    """Processes; one per core when not given."""


@dataclass(frozen=True)
class Preprocess:
    """Crop, normalise and resample every case of a planned dataset."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder in nnU-Net's raw layout."""
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
    overlap: float = 0.5
    """Step between tiles as a share of the patch."""
    checkpoint: str = "last"
    """Which checkpoint: last or best."""
    save_probabilities: bool = False
    """Also write CASE.npz with class probabilities."""
    overwrite: bool = False
    """Predict cases again whose segmentation exists."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Where to compute; auto takes an accelerator when there is one."""


@dataclass(frozen=True)
class Evaluate:
    """Compare segmentations with references and write nnU-Net's summary.json."""

    predictions: tyro.conf.Positional[Path]
    """Folder of segmentations."""
    references: tyro.conf.Positional[Path]
    """Folder of reference labels with the same file names."""
    dataset_json: Path | None = None
    """dataset.json with the labels; looked for in both folders and above them when not given."""
    output: Path | None = None
    """File to write; summary.json in the predictions folder when not given."""
    workers: int | None = None
    """Processes; one per core when not given."""


@dataclass(frozen=True)
class Demo:
    """Make a labelled synthetic dataset and do everything on it, in a few minutes on two CPU cores."""

    workspace: Path = Path("pgps_workspace/demo")
    """Folder under which everything is written."""
    epochs: int = 8
    """Length of training in epochs of 120 steps."""
    fresh: bool = False
    """Start over."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[Preprocess, tyro.conf.subcommand("preprocess")]
    | Annotated[ShowSchedule, tyro.conf.subcommand("schedule")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def plan(command: PlanCommand | RunConfig) -> None:
    """Plan a dataset, unless it is planned."""
    with CaseProgress("planning") as progress:
        _, plans, folder = workspace.plan_dataset(
            command.dataset, command.workspace, command.planner, say, progress, command.workers,
            overwrite=getattr(command, "overwrite", False))
    for name, c in plans.configurations.items():
        say(f"{name}: patch {c.patch_size}, batch {c.batch_size}, spacing {tuple(round(s, 4) for s in c.spacing)} mm")
    say(f"plans: {folder / workspace.PLANS_FILE[command.planner]}")


def preprocess(command: Preprocess | RunConfig) -> None:
    """Preprocess the cases of a planned dataset that are not done yet."""
    with CaseProgress("preprocessing") as progress:
        dataset, plans, folder = workspace.plan_dataset(
            command.dataset, command.workspace, command.planner, say, progress, command.workers)
        configuration = workspace.configuration_of(plans, command.configuration)
        store = workspace.preprocess(dataset, plans, configuration, folder, command.workers, progress)
    say(f"{len(store.ids)} preprocessed cases: {store.folder}")


def show_schedule(command: ShowSchedule) -> None:
    """Print (and draw) the stages."""
    with CaseProgress("planning") as progress:
        _, plans, _ = workspace.plan_dataset(
            command.dataset, command.workspace, command.planner, lambda _: None, progress, command.workers)
    configuration = workspace.configuration_of(plans, command.configuration, command.network)
    schedule = workspace.planned_schedule(command, configuration, len(open_dataset(command.dataset).cases))
    rows = stage_rows(schedule, configuration.patch_size, configuration.batch_size)
    if command.json:
        planned = {"patch_size": configuration.patch_size, "batch_size": configuration.batch_size}
        print(json.dumps({"planned": planned, "steps": schedule.num_steps, "voxel_share": voxel_share(rows), "stages": rows}, indent=2))
    else:
        console.print(schedule_table(rows, command.curriculum.mode))
    if command.plot:
        plot_schedule(schedule, command.plot)
        say(f"picture: {command.plot}")


def run_training(config: RunConfig) -> dict:
    """Train, then measure on the validation cases; returns the summary."""
    choose_platform(config.device)
    for line in (enable_compilation_cache(cache_folder(), CACHE_BYTES), *warnings()):
        if line:
            complain(line)
    experiment = workspace.open_experiment(config)
    if not (experiment.folder / "config.json").exists():
        experiment = sized(experiment, say)
    workspace.write_run_folder(experiment, environment())
    rows = stage_rows(experiment.schedule, experiment.configuration.patch_size, experiment.configuration.batch_size)
    console.print(schedule_table(rows, f"{config.curriculum.mode}, {experiment.num_steps} steps"))
    train(experiment)
    with CaseProgress("validation") as progress:
        summary = validate(experiment, progress)
    console.print(dice_table(summary, experiment.labels))
    say(f"run: {experiment.folder}\npicture: {experiment.folder / 'progress.png'}\n"
        f"summary: {experiment.folder / 'validation' / 'summary.json'}")
    return summary


def cache_folder() -> Path:
    """Where compiled programs are kept between runs: the user's own cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgps_jax" / "xla"


def predict(command: Predict) -> None:
    """Segment a folder of images."""
    choose_platform(command.device)
    enable_compilation_cache(cache_folder(), CACHE_BYTES)
    predictor = load_predictor(command.run, command.checkpoint, command.mirror_tta, command.overlap)
    with CaseProgress("prediction") as progress:
        done = predict_folder(predictor, command.images, command.output, save_probabilities=command.save_probabilities,
                              overwrite=command.overwrite, progress=progress)
    say(f"{len(done)} segmentations: {command.output}")


def evaluate(command: Evaluate) -> None:
    """Write summary.json and print the Dice."""
    labels = workspace.find_labels(command.dataset_json, command.predictions, command.references)
    output = command.output or command.predictions / "summary.json"
    with CaseProgress("evaluation") as progress:
        summary = evaluate_folder(command.predictions, command.references, labels, command.workers, progress, output)
    console.print(dice_table(summary, labels))
    say(f"summary: {output}")


def demo(command: Demo) -> int:
    """Phantoms, training, held-out prediction and evaluation, with the commands that a user would type; exit code."""
    raw = command.workspace / "raw" / "Dataset900_Phantoms"
    if not (raw / "dataset.json").exists():
        write_phantom_dataset(raw, num_cases=25, num_test=5)
    common = ["--workspace", str(command.workspace)]
    run = ["run", str(raw), *common, "--name", "demo", "--epochs", str(command.epochs), "--steps-per-epoch", "120", "--validation-steps", "4",
           "--network.base-features", "8", "--augment.preset", "light", "--no-mirror-tta"]
    run_folder = command.workspace / "runs" / raw.name / "demo" / "fold_0"
    predictions = command.workspace / "predictions"
    for arguments in (
        [*run, "--fresh"] if command.fresh else run,
        ["predict", str(run_folder), "-i", str(raw / "imagesTs"), "-o", str(predictions), "--no-mirror-tta", "--overwrite"],
        ["evaluate", str(predictions), str(raw / "labelsTs"), "--dataset-json", str(raw / "dataset.json")],
    ):
        say(f"$ pgps-jax {' '.join(arguments)}")
        code = main(arguments)
        if code:
            return code
    say(f"picture of the training: {run_folder / 'progress.png'}")
    return 0


def experiment(config: RunConfig) -> int:
    """Run an experiment file: its config, with flags of the command line laid over it. Returns the exit code."""
    default = Run(**{f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)})
    return execute(tyro.cli(Run, default=default))


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input, 75 stopped on request (start it again to go on)."""
    description = f"pgps_jax {__version__}: train 3D segmentation networks with growing patches."
    command = tyro.cli(Command, prog="pgps_jax", args=arguments, description=description, config=(tyro.conf.OmitSubcommandPrefixes,))
    return execute(command)


def execute(command: object) -> int:
    """Carry out one parsed command; returns the exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells its life story there
    try:
        match command:
            case PlanCommand():
                plan(command)
            case Preprocess():
                preprocess(command)
            case ShowSchedule():
                show_schedule(command)
            case Train():
                run_training(command)
            case Run():
                plan(command)
                preprocess(command)
                run_training(command)
            case Predict():
                predict(command)
            case Evaluate():
                evaluate(command)
            case Demo():
                return demo(command)
    except InputError as error:
        complain(f"error: {error}")
        return EXIT_BAD_INPUT
    except Stopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
