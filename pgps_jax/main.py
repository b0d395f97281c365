"""The command line: parses, calls, prints. `python -m pgps_jax.main --help` lists the commands."""

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

import tyro

from pgps_jax import __version__, preparation, workspace
from pgps_jax.bench import check_bench, chosen_stages, host_of, measure_stage, open_bench
from pgps_jax.commands import (
    Bench,
    Command,
    Compare,
    ConvertMsd,
    Demo,
    Doctor,
    Evaluate,
    ExportMonai,
    ExportNnunet,
    ExportPreprocessed,
    FetchMsd,
    FindPostprocessing,
    ImportMonai,
    ImportNnunet,
    PlanCommand,
    Postprocess,
    Predict,
    Preprocess,
    Reproduce,
    Run,
    ShowSchedule,
    Train,
)
from pgps_jax.config import RunConfig, from_json
from pgps_jax.data.decathlon import convert_decathlon, converted_name
from pgps_jax.data.doctor import examine
from pgps_jax.data.download import fetch_msd
from pgps_jax.data.repair import repair
from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.errors import InputError
from pgps_jax.evaluate.postprocess import apply_postprocessing, decide_postprocessing, read_postprocessing, write_postprocessing
from pgps_jax.evaluate.summary import check_output_file, evaluate_folder, without_prediction
from pgps_jax.exchange import export_monai, export_nnunet, import_monai, import_nnunet
from pgps_jax.infer.predict import predict_folder
from pgps_jax.interop.preprocessed import export_properties
from pgps_jax.json_file import read_json, write_json
from pgps_jax.report.bench import advice, bench_table, overall_limit
from pgps_jax.report.comparison import class_names, compare, comparison_table, plot_comparison, read_contenders
from pgps_jax.report.doctor_page import write_doctor_report
from pgps_jax.report.environment import differences, environment
from pgps_jax.report.progress import CaseProgress
from pgps_jax.report.reproduce import command_line
from pgps_jax.report.run_log import Spoken, complain, console, say
from pgps_jax.report.schedule import plot_schedule, schedule_table, stage_rows, voxel_share
from pgps_jax.train.device import choose_platform, warnings
from pgps_jax.train.loop import Stopped, train
from pgps_jax.train.only_process import only_process
from pgps_jax.train.pretrained import check_pretrained, prepare_start, write_start
from pgps_jax.train.programs import enable_compilation_cache
from pgps_jax.train.sizing import sized
from pgps_jax.validate import checkpoint_steps, dice_table, load_predictor, other_orientations, unfinished, validate

EXIT_BAD_INPUT = 2
CACHE_BYTES = 4 * 2**30
EXIT_STOPPED = 75  # EX_TEMPFAIL: a scheduler may start the same command again
DatasetCommand = PlanCommand | Preprocess | RunConfig


def plan(command: PlanCommand) -> None:
    """Plan a dataset, unless it is planned."""
    with CaseProgress("planning") as progress:
        dataset, plans, folder = preparation.plan_dataset(
            command.dataset, command.workspace, command.planner, say, progress, command.workers,
            command.overwrite, command.overrides, command.group_by)
    for line in (*plans.notes, *(preparation.explanation(dataset, plans, folder) if command.explain else ())):
        say(line)
    for name, c in plans.configurations.items():
        say(f"{name}: patch {c.patch_size}, batch {c.batch_size}, spacing {tuple(round(s, 4) for s in c.spacing)} mm")
    say(f"plans: {folder / preparation.PLANS_FILE[command.planner]}")


def preprocess(command: Preprocess | RunConfig) -> None:
    """Preprocess the cases of a planned dataset that are not done yet."""
    with CaseProgress("preprocessing") as progress:
        dataset, plans, folder = preparation.plan_dataset(
            command.dataset, command.workspace, command.planner, say, progress, command.workers)
        configuration = preparation.configuration_of(plans, command.configuration)
        store = preparation.preprocess(dataset, plans, configuration, folder, command.workers, progress, say)
    say(f"{len(store.ids)} preprocessed cases: {store.folder}")


def show_schedule(command: ShowSchedule) -> None:
    """Print (and draw) the stages, as far as they are known without compiling anything."""
    workspace.check_numbers(command)
    if command.plot and (command.plot.is_dir() or not command.plot.parent.is_dir()):
        raise InputError(f"--plot {command.plot}: must name a file in a folder that exists")
    note, ids = complain if command.json else say, None
    if preparation.is_preprocessed(command.dataset):
        folder, plans, _ = preparation.planned(command.dataset, command.workspace, command.planner)
    else:
        with CaseProgress("planning") as progress:
            dataset, plans, folder = preparation.plan_dataset(
                command.dataset, command.workspace, command.planner, lambda _: None, progress, command.workers)
        ids = [case.id for case in dataset.cases]
    configuration = preparation.configuration_of(plans, command.configuration, command.network, command.batch_size, note)
    train_ids, _ = workspace.cases_to_train(command, configuration, folder, ids)
    schedule = workspace.planned_schedule(command, configuration, len(train_ids))
    for sentence in workspace.notes_on_schedule(command, schedule):
        note(sentence)
    rows = stage_rows(schedule, configuration.patch_size, configuration.batch_size)
    if command.json:
        planned = {"patch_size": configuration.patch_size, "batch_size": configuration.batch_size}
        print(json.dumps({"planned": planned, "steps": schedule.num_steps, "voxel_share": voxel_share(rows), "stages": rows}, indent=2))
    else:
        console.print(schedule_table(rows, command.curriculum.mode))
    if command.plot:
        with CaseProgress("comparing cases") as progress:
            balance = workspace.predicted_balance(command, configuration, folder, schedule, progress)
        plot_schedule(schedule, command.plot, balance)
        without = "" if balance else " (without class balance: it is measured on preprocessed cases, see `preprocess`)"
        note(f"picture: {command.plot}{without}")


def start_device(name: str, precision: str = "auto", augmentation: str = "none") -> None:
    """Choose where to compute, keep compiled programs from run to run, and say what is known against this machine."""
    choose_platform(name)
    for line in (enable_compilation_cache(cache_folder(), CACHE_BYTES), *warnings(precision, augmentation)):
        if line:
            complain(line)


def run_training(config: RunConfig) -> dict:
    """Train, then measure on the validation cases; returns the summary."""
    start_device(config.device, config.network.precision, config.augment.preset)
    check_pretrained(config)
    if workspace.run_folder(config).is_dir():
        with only_process(workspace.run_folder(config)):
            pass  # only asked here, before long work
    spoken = Spoken()
    with CaseProgress("comparing cases") as progress:
        experiment = workspace.open_experiment(config, spoken.say, progress)
    start = prepare_start(experiment)
    if not workspace.goes_on(config):
        experiment = sized(experiment, spoken.say)
    workspace.write_run_folder(experiment, environment())
    if start:
        write_start(experiment, start)
        spoken.say(f"weights of {start.source}: {start.report}")
    if note := workspace.note_on_sides(experiment):
        spoken.say(note)
    with only_process(experiment.folder):
        train(experiment, spoken.lines)
        with CaseProgress("validation") as progress:
            summary = validate(experiment, progress)
    console.print(dice_table(summary, experiment.labels, "training cases" if config.fold == "all" else "cases"))
    say(f"run: {experiment.folder}\npicture: {experiment.folder / 'progress.png'}\n"
        f"summary: {experiment.folder / 'validation' / 'summary.json'}")
    return summary


def bench(command: Bench) -> None:
    """Measure stages, print rates, limit and advice."""
    check_bench(command.seconds)
    if command.json is not None and not command.json.parent.is_dir():
        raise InputError(f"--json {command.json}: {command.json.parent} is no folder")
    start_device(command.device, command.network.precision, command.augment.preset)
    experiment = open_bench(command, say)
    host, rows = host_of(experiment), []
    stages = chosen_stages(experiment, command.stages)
    with CaseProgress("measuring stages") as progress:
        for done, stage in enumerate(stages):
            progress(done, len(stages))
            rows.append(measure_stage(experiment, stage, command.seconds, say))
        progress(len(stages), len(stages))
    limit, waiting = overall_limit(rows, experiment.schedule, host)
    console.print(bench_table(rows, host))
    say(f"{limit}; training would wait for input {100 * waiting:.0f} % of its time. What to change: {advice(limit, host)}")
    if command.json is not None:
        write_json(command.json, {
            "limit": limit, "input_wait": round(waiting, 4), "advice": advice(limit, host), "host": host._asdict(),
            "stages": [row.record() for row in rows], "environment": environment()})


def reproduce(run: Path) -> None:
    """Print the command on its own line, and notes on the error stream, so that it can be piped."""
    config = from_json(RunConfig, read_json(run / "config.json"), f"{run / 'config.json'}")
    then, now = read_json(run / "environment.json"), environment()
    print(command_line(config, "train" if config.dataset.is_dir() and preparation.is_preprocessed(config.dataset) else "run"))
    complain(f"started {then.get('time')} in {then.get('folder', 'an unknown folder')}; give another --name to run it again there")
    for change in differences(then, now):
        complain(f"not as then: {change}")
    try:
        workspace.refuse_changed_inputs(config, run)
    except InputError as error:
        complain(f"not as then: {error}")


def cache_folder() -> Path:
    """Where compiled programs are kept between runs: the user's own cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgps_jax" / "xla"


def predict(command: Predict) -> None:
    """Segment a folder of images."""
    start_device(command.device)
    predictor = load_predictor(command.run, command.checkpoint, command.mirror_tta, command.step_size, command.skip_outside)
    for fold in unfinished(command.run):
        complain(f"warning: this training is not finished: {fold}")
    if others := other_orientations(predictor, command.images):
        if command.ignore_orientation:
            complain(f"warning: {others} images are not stored as {predictor.orientation} like the training images, and are taken as they "
                     "are; expect bad segmentations of them")
        else:
            say(f"{others} images are turned to {predictor.orientation}, like the training images, and their segmentations back")
    if command.ignore_orientation:
        predictor = dataclasses.replace(predictor, orientation=None)
    flags = ("checkpoint", "mirror_tta", "step_size", "skip_outside", "ignore_orientation")
    made_by = {"run": str(command.run.resolve()), "steps": checkpoint_steps(command.run, command.checkpoint),
               **{flag: getattr(command, flag) for flag in flags}}
    with CaseProgress("prediction") as progress:
        done = predict_folder(predictor, command.images, command.output, save_probabilities=command.save_probabilities,
                              overwrite=command.overwrite, made_by=made_by, progress=progress, tile_progress=progress)
    kept = f", {done.kept} kept (--overwrite makes them again)" if done.kept else ""
    say(f"{len(done.written)} segmentations written{kept}: {command.output}")


def evaluate(command: Evaluate) -> None:
    """Write summary.json and print the Dice."""
    labels = workspace.find_labels(command.dataset_json, command.predictions, command.references)
    output = command.output or command.predictions / "summary.json"
    with CaseProgress("evaluation") as progress:
        summary = evaluate_folder(command.predictions, command.references, labels, command.workers, progress, output,
                                  command.surface_tolerance, command.lesions)
    console.print(dice_table(summary, labels))
    say_what_does_not_count(command)
    say(f"summary: {output}")


def say_what_does_not_count(command: Evaluate | FindPostprocessing) -> None:
    """Say how many references have no prediction. Raises InputError without folders or predictions."""
    if missing := without_prediction(command.predictions, command.references):
        say(f"{len(missing)} references have no prediction and do not count")


def compare_trainings(command: Compare) -> None:
    """Print how trainings compare, and write numbers and picture if asked to."""
    contenders = read_contenders(command.trainings)
    comparison = compare(contenders, class_names(command.dataset_json, command.trainings[0]))
    console.print(comparison_table(comparison))
    if command.output:
        command.output.mkdir(parents=True, exist_ok=True)
        write_json(command.output / "comparison.json", comparison)
        plot_comparison(contenders, command.output / "comparison.png")
        say(f"numbers and picture: {command.output}")


def find_postprocessing(command: FindPostprocessing) -> None:
    """Write postprocessing.json and say what was decided."""
    labels = workspace.find_labels(command.dataset_json, command.predictions, command.references)
    output = command.output or command.predictions / "postprocessing.json"
    say_what_does_not_count(command)
    check_output_file(output)
    with CaseProgress("trying steps") as progress:
        decision = decide_postprocessing(command.predictions, command.references, labels, progress=progress)
    write_postprocessing(decision, output)
    kept = decision.postprocessing.keep_largest_of
    say(f"largest component is kept of: {', '.join(map(str, kept)) if kept else 'nothing'}; {output}")


def convert(command: ConvertMsd) -> None:
    """Make nnU-Net's layout of a Decathlon folder."""
    with CaseProgress("converting") as progress:
        folder = convert_decathlon(command.task, command.output / converted_name(command.task.resolve().name), progress)
    say(f"dataset: {folder}")


def fetch(command: FetchMsd) -> None:
    """Download a Decathlon task."""
    with CaseProgress("downloading, MB") as progress:
        folder = fetch_msd(command.task, command.output, progress=progress)
    say(f"Decathlon folder: {folder}; `run`, `plan` and `preprocess` take it as it is")


def from_raw_folder(command: DatasetCommand) -> DatasetCommand:
    """The same command on nnU-Net's layout, converted into the workspace, where it names a Decathlon folder."""
    with CaseProgress("converting") as progress:
        folder = preparation.raw_folder(
            command.dataset, command.workspace, (lambda _: None) if isinstance(command, ShowSchedule) else say, progress)
    return command if folder == command.dataset else dataclasses.replace(command, dataset=folder)


def doctor(command: Doctor) -> int:
    """Examine a dataset, and repair what is safe if asked to; exit code 1 when something would spoil a training."""
    output = command.output or command.workspace / "doctor" / command.dataset.resolve().name
    with CaseProgress("examining") as progress:
        examination = examine(command.dataset, tolerance_mm=command.tolerance_mm, workers=command.workers, progress=progress)
    page, facts = write_doctor_report(examination, output)
    for finding in examination.findings:
        say(f"{finding.severity}: {finding.reason} ({len(finding.cases)} cases). {finding.cure}")
    say(f"{len(examination.findings) or 'no'} findings; page: {page}, JSON: {facts}")
    if command.repair is not None:
        with CaseProgress("repairing") as progress:
            for repaired in repair(examination, command.repair, progress):
                say(str(repaired))
        say(f"repaired dataset: {command.repair}")
    return int(any(finding.severity == "error" for finding in examination.findings))


def demo(command: Demo) -> int:
    """Phantoms, training, held-out prediction and evaluation, with the commands that a user would type; exit code."""
    raw = command.workspace / "raw" / "Dataset900_Phantoms"
    if not (raw / "dataset.json").exists():
        write_phantom_dataset(raw, num_cases=25, num_test=5)
    common = ["--workspace", str(command.workspace)]
    run = ["run", str(raw), *common, "--name", "demo", "--epochs", str(command.epochs), "--steps-per-epoch", "120",
           "--validation-steps", "4", "--network.base-features", "8", "--augment.preset", "light", "--no-mirror-tta"]
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
    command = tyro.cli(Command, prog="pgps-jax", args=arguments, description=description, config=(tyro.conf.OmitSubcommandPrefixes,))
    return execute(command)


def execute(command: object) -> int:
    """Carry out one parsed command; returns the exit code."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells its life story there
    try:
        if isinstance(command, DatasetCommand):
            command = from_raw_folder(command)
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
                workspace.check_numbers(command)
                check_pretrained(command)
                plan(PlanCommand(command.dataset, command.workspace, command.planner, workers=command.workers))
                preprocess(command)
                run_training(command)
            case Bench():
                bench(command)
            case Predict():
                predict(command)
            case Reproduce():
                reproduce(command.run)
            case Evaluate():
                evaluate(command)
            case Compare():
                compare_trainings(command)
            case FindPostprocessing():
                find_postprocessing(command)
            case Postprocess():
                with CaseProgress("postprocessing") as progress:
                    apply_postprocessing(read_postprocessing(command.decision), command.predictions, command.output, progress)
            case Doctor():
                return doctor(command)
            case FetchMsd():
                fetch(command)
            case ConvertMsd():
                convert(command)
            case ImportNnunet():
                for folder in import_nnunet(command.results, command.output):
                    say(f"run: {folder}")
            case ExportNnunet():
                if note := export_nnunet(command.run, command.output, command.checkpoint):
                    say(note)
                say(f"nnU-Net model: {command.output}")
            case ExportPreprocessed():
                with CaseProgress("exporting") as progress:
                    export_properties(command.folder, progress)
                say(f"nnU-Net's properties of cases: {command.folder}")
            case ImportMonai():
                _, planned, dataset = preparation.planned(command.dataset, command.workspace, command.planner)
                configuration = preparation.configuration_of(planned, command.configuration, command.network, say=say)
                say(f"run: {import_monai(command.weights, planned, dataset, configuration, command.output)}")
            case ExportMonai():
                for file in export_monai(command.run, command.output, command.checkpoint):
                    say(f"MONAI state dict: {file}")
            case Demo():
                return demo(command)
    except (InputError, OSError) as error:
        complain(f"error: {error}")
        return EXIT_BAD_INPUT
    except Stopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        complain("interrupted" + ("; the same command goes on from the last checkpoint" if isinstance(command, RunConfig) else ""))
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
