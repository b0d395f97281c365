"""Where a run lies, and the work before its first step: an experiment is put together from a preprocessed dataset, and checked."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgps_jax.config import RunConfig, check_same, to_json
from pgps_jax.curriculum import Schedule, Stage, batch_policy, make_schedule, schedule_from_json, schedule_to_json
from pgps_jax.data.class_balance import StageBalance, class_balance
from pgps_jax.data.dataset import Labels
from pgps_jax.data.folds import beyond_folds, cases_of_fold, read_folds, read_or_make_folds
from pgps_jax.data.identity import identity, refuse_changed
from pgps_jax.data.label_pairs import left_right_axis, name_pairs
from pgps_jax.data.nifti import axis_codes
from pgps_jax.data.plan import Configuration, Plan, read_plan, write_plan
from pgps_jax.data.similarity import ranked_cases
from pgps_jax.data.store import CaseStore
from pgps_jax.data.stray_cases import stray_cases
from pgps_jax.errors import InputError
from pgps_jax.json_file import read_json, write_json
from pgps_jax.models import limits
from pgps_jax.preparation import check_references, configuration_of, planned
from pgps_jax.train.augment import AugmentPolicy, make_policy
from pgps_jax.train.optim import learning_rate_of_step

Callback = Callable[[int, int], None]
ORIENTATION_SAMPLE = 100  # cases that are asked for the orientation of the training images


@dataclass(frozen=True)
class Experiment:
    """What a training run is made of, fixed before its first step."""

    config: RunConfig
    folder: Path
    preprocessed: Path
    plan: Plan
    configuration: Configuration
    dataset_json: dict
    labels: Labels
    store: CaseStore
    train_ids: tuple[str, ...]
    validation_ids: tuple[str, ...]
    schedule: Schedule
    learning_rates: np.ndarray  # float32, one per step
    policy: AugmentPolicy

    @property
    def num_steps(self) -> int:
        """Length of the run in optimizer updates."""
        return len(self.schedule.stage_of_step)

    @property
    def channels(self) -> int:
        """Image channels."""
        return len(self.configuration.normalization_schemes)

    @property
    def label_dtype(self) -> type:
        """Smallest type of a label map that crosses to the device; -1 is outside the body."""
        return np.int8 if max(self.labels.all_labels) < 127 else np.int16


def run_folder(config: RunConfig) -> Path:
    """RUN = workspace/runs/<dataset>/<run name>/fold_<k>."""
    return config.workspace / "runs" / config.dataset.resolve().name / config.run_name / f"fold_{config.fold}"


def goes_on(config: RunConfig) -> bool:
    """Whether a run of this name is under way and is to go on, not to be started over."""
    return (run_folder(config) / "config.json").exists() and not config.fresh


def check_numbers(config: RunConfig) -> None:
    """Raise InputError if a flag that decides about length, batches or learning rate is out of its range, before any work."""
    config.check_loader()
    config.curriculum.check()
    config.optim.check()
    for name, least in (("epochs", 1), ("steps_per_epoch", 1), ("validation_steps", 1), ("seed", 0)):
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    if config.max_hours is not None and not 0 < config.max_hours < np.inf:
        raise InputError(f"--max-hours {config.max_hours:g}: must be above 0, and finite; leave it out to train all --epochs")
    if config.accumulate != "auto" and config.accumulate < 1:
        raise InputError(f"--accumulate {config.accumulate}: must be at least 1, or auto")
    if config.accumulate != 1 and batch_policy(config.curriculum) == "device-memory":
        raise InputError(f"--accumulate {config.accumulate}: --batch-policy device-memory chooses batches that fit in one part")


def planned_schedule(
    config: RunConfig, configuration: Configuration, num_cases: int, num_steps: int | None = None,
    stages: Sequence[Stage] | None = None, seconds_per_step: Sequence[float] | None = None,
) -> Schedule:
    """The schedule that a config asks for, before any training.

    `num_steps` shortens it; `stages` and their `seconds_per_step` are what a machine found out, see `make_schedule`.
    """
    whole = config.epochs * config.steps_per_epoch
    return make_schedule(
        config.curriculum, configuration.patch_size, configuration.batch_size, limits(configuration.architecture),
        num_steps or whole, config.steps_per_epoch, num_cases=num_cases, whole_steps=whole, stages=stages,
        seconds_per_step=seconds_per_step,
    )


def cases_to_train(
    config: RunConfig, configuration: Configuration, preprocessed: Path, ids: Sequence[str] | None = None
) -> tuple[Sequence[str], Sequence[str]]:
    """Cases of the fold to train on and to validate on: of `ids`, or of those that are preprocessed; InputError if there are none."""
    store = CaseStore(preprocessed / configuration.data_identifier)
    ids = list(store.ids if ids is None else ids)
    if not ids:
        raise InputError(f"{store.folder}: holds no preprocessed cases; use `run`, or `preprocess` before `train`")
    return cases_of_fold(read_or_make_folds(preprocessed / "splits_final.json", ids), ids, config.fold)


def in_order(config: RunConfig, store: CaseStore, train_ids: Sequence[str], progress: Callback | None = None) -> Sequence[str]:
    """The cases to train on, most similar to the others first if there is a case curriculum; the ranking is kept beside the store."""
    if config.curriculum.case_curriculum == "none":
        return train_ids
    return ranked_cases(store.folder.parent / f"similarity_{store.folder.name}_fold_{config.fold}.json", store, train_ids, progress)


def predicted_balance(
    config: RunConfig, configuration: Configuration, preprocessed: Path, schedule: Schedule, progress: Callback | None = None
) -> list[StageBalance]:
    """Share of foreground in the patches of each stage, drawn as training would; empty where nothing is preprocessed yet."""
    store = CaseStore(preprocessed / configuration.data_identifier)
    if not store.folder.is_dir() or not store.ids:
        return []
    train_ids = in_order(config, store, cases_to_train(config, configuration, preprocessed)[0], progress)
    labels = Labels.from_json(read_json(preprocessed / "dataset.json"))
    return class_balance(store, train_ids, schedule, config.sampling_of_mode, configuration.batch_size, labels, seed=config.seed)


def open_experiment(
    config: RunConfig, say: Callable[[str], None] = lambda _: None, progress: Callback | None = None
) -> Experiment:
    """Put an experiment together from a preprocessed dataset, and check that it agrees with its run folder if it goes on.

    Everything that can be refused is refused here, before anything is written or deleted. `say` hears what was not planned this way,
    `progress` of the cases that are compared for a case curriculum.
    """
    check_numbers(config)
    preprocessed, plan, dataset_json = planned(config.dataset, config.workspace, config.planner)
    configuration = configuration_of(plan, config.configuration, config.network, config.batch_size, say)
    store = CaseStore(preprocessed / configuration.data_identifier)
    train_ids, validation_ids = cases_to_train(config, configuration, preprocessed)
    check_references(preprocessed, validation_ids)
    for note in (*stray_cases(store), beyond_folds(read_folds(preprocessed / "splits_final.json", store.ids), config.fold)):
        if note:
            say(note)

    folder = run_folder(config)
    if goes_on(config):
        check_same(config, read_json(folder / "config.json"), folder)
        refuse_changed_plan(configuration, folder)
        schedule = schedule_from_json(read_json(folder / "schedule.json"))
        refuse_strange_schedule(config, configuration, len(train_ids), schedule, folder / "schedule.json")
    else:
        schedule = planned_schedule(config, configuration, len(train_ids))
    train_ids = in_order(config, store, train_ids, progress)  # takes minutes, so what can be refused has been
    labels = Labels.from_json(dataset_json)
    changed = plan.with_configuration(configuration)
    experiment = Experiment(
        config, folder, preprocessed, changed, configuration, dataset_json, labels, store, tuple(train_ids), tuple(validation_ids),
        schedule, learning_rates(config, configuration, schedule), augment_policy(config, plan, configuration, labels, store),
    )
    if goes_on(config) and (folder / "data.json").exists():
        refuse_changed(read_json(folder / "data.json"), identity_of(experiment), folder / "data.json")
    return experiment


def identity_of(run: Experiment) -> dict:
    """What data.json says of the cases of a run."""
    return identity(run.store, run.train_ids, run.validation_ids, run.dataset_json)


def refuse_changed_inputs(config: RunConfig, folder: Path) -> None:
    """Raise InputError when plan or data are not those of the run in `folder` any more, or are gone."""
    now = open_experiment(dataclasses.replace(config, fresh=True))  # as a new run would find them; nothing is deleted here
    refuse_changed_plan(now.configuration, folder)
    if (folder / "data.json").exists():
        refuse_changed(read_json(folder / "data.json"), identity_of(now), folder / "data.json")


def refuse_changed_plan(configuration: Configuration, folder: Path) -> None:
    """Raise InputError when the dataset was planned otherwise since the run in `folder` was started."""
    stored = read_plan(folder / "plan.json").configurations.get(configuration.name)
    names = [f.name for f in dataclasses.fields(Configuration) if f.compare
             and (stored is None or getattr(stored, f.name) != getattr(configuration, f.name))]
    if names:
        raise InputError(f"{folder / 'plan.json'}: the dataset has been planned otherwise since this run was started ({', '.join(names)}); "
                         "restore the plan, use another --name for a new run, or --fresh to start over")


def refuse_strange_schedule(config: RunConfig, configuration: Configuration, num_cases: int, schedule: Schedule, where: Path) -> None:
    """Raise InputError when a stored schedule is none that this run can have; `where` is its file."""
    smallest, increment = limits(configuration.architecture)
    most_steps, most_cases = config.epochs * config.steps_per_epoch, int(schedule.case_pool_of_step.max())
    faults = [] if schedule.num_steps <= most_steps else [f"{schedule.num_steps} steps, and --epochs allows {most_steps}"]
    faults += [] if most_cases <= num_cases else [f"{most_cases} cases in use, of {num_cases}"]
    for stage in schedule.stages:
        edges = zip(stage.patch_size, smallest, increment, configuration.patch_size, strict=True)
        if any(not low <= edge <= planned or (edge - low) % step for edge, low, step, planned in edges):
            faults.append(f"stage {stage.index} has patches of {stage.patch_size}, and the network takes {smallest} and multiples of "
                          f"{increment} more, up to the planned {configuration.patch_size}")
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)}. Restore the file, or start with --fresh")


def learning_rates(config: RunConfig, configuration: Configuration, schedule: Schedule) -> np.ndarray:
    """Learning rate of every step, float32; constant within an epoch as in nnU-Net, but falling to nothing by the last step of a run
    that has to fit a time, or that is less than an epoch long."""
    step_by_step = config.max_hours is not None or schedule.num_steps < config.steps_per_epoch
    batch_size_of_step = np.array([stage.batch_size for stage in schedule.stages])[schedule.stage_of_step]
    return learning_rate_of_step(config.optim, schedule.num_steps, 1 if step_by_step else config.steps_per_epoch, batch_size_of_step,
                                 configuration.batch_size, schedule.stage_of_step)


def notes_on_schedule(config: RunConfig, schedule: Schedule) -> list[str]:
    """Sentences on what training will do otherwise than a schedule that was planned without its machine."""
    curriculum, hours, parts = config.curriculum, config.max_hours, config.accumulate
    found_out = {
        "--batch-policy device-memory": batch_policy(curriculum) == "device-memory" and "batches are as large as fit its device",
        "--max-hours": hours is not None and f"there are as many of these steps as fit {hours:g} hours",
        "--pacing equal-time": curriculum.pacing == "equal-time" and "steps are shared out by measured time, here by voxels",
        f"--accumulate {parts}": parts != 1 and f"{'batches too large for its device' if parts == 'auto' else 'all batches'} come in parts",
    }
    notes = [f"note: {flag}: in training {words}" for flag, words in found_out.items() if words]
    return notes + [note for note in (note_on_warm_up(config, schedule),) if note]


def note_on_warm_up(config: RunConfig, schedule: Schedule) -> str | None:
    """A sentence for stages that end before their learning rate has risen; none where patch sizes take turns."""
    runs = schedule.runs()
    short = [steps for *_, steps in runs if steps < config.optim.warmup_steps]
    if not short or len(runs) > len(schedule.stages):
        return None
    return (f"note: --optim.warmup-steps {config.optim.warmup_steps}: the learning rate does not reach its full height in {len(short)} of "
            f"{len(runs)} stages, the shortest of which has {min(short)} steps")


def with_schedule(run: Experiment, schedule: Schedule) -> Experiment:
    """The same experiment under another schedule."""
    return dataclasses.replace(run, schedule=schedule, learning_rates=learning_rates(run.config, run.configuration, schedule))


def store_schedule(run: Experiment) -> None:
    """Write the schedule of a run that is under way, after it had to be changed."""
    write_json(run.folder / "schedule.json", schedule_to_json(run.schedule))


def augment_policy(config: RunConfig, plan: Plan, configuration: Configuration, labels: Labels, store: CaseStore) -> AugmentPolicy:
    """What is fixed about augmentation; the left-right axis is looked up in the cases where labels are to be swapped."""
    axis = None
    if config.augment.mirror == "label-swap" and config.augment.left_right_axis is None:
        axis = common_left_right_axis(store, store.ids, plan)
    masked = [channel for channel, mask in enumerate(configuration.use_mask_for_norm) if mask]
    return make_policy(config.augment, configuration.patch_size, masked_channels=masked, labels=labels, left_right_axis=axis)


def write_run_folder(experiment: Experiment, environment: dict) -> None:
    """Create RUN with everything that the run depends on; config.json last, as the sign that the folder is complete.

    Only here, when nothing can be refused any more, is an earlier run of the same name deleted if the config asks for that.
    """
    folder = experiment.folder
    try:
        if experiment.config.fresh and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "data.json").exists():
            write_json(folder / "data.json", identity_of(experiment))
        (folder / "writable").touch()
        (folder / "writable").unlink()
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be written to ({error.strerror}); choose another --workspace or another "
                         "--name, or make it writable") from None
    if (folder / "config.json").exists():
        return
    write_json(folder / "environment.json", environment)
    write_plan(experiment.plan, folder / "plan.json")
    write_json(folder / "dataset.json", experiment.dataset_json)
    write_json(folder / "schedule.json", schedule_to_json(experiment.schedule))
    write_json(folder / "inference.json", {
        "configuration": experiment.config.configuration, "mirror_axes": list(experiment.policy.mirror_axes),
        "swap_axis": experiment.policy.swap_axis, "swap_pairs": [list(pair) for pair in experiment.policy.swap_pairs],
        "orientation": training_orientation(experiment.store, experiment.train_ids), "precision": experiment.config.network.precision})
    write_json(folder / "config.json", to_json(dataclasses.replace(experiment.config, fresh=False)))


def training_orientation(store: CaseStore, ids: Sequence[str]) -> str | None:
    """Axis codes, such as "LPS", of most of the images (of a sample of them, if they are many); None if no axes can be told."""
    codes = Counter(axis_codes(affine) for affine in sampled_affines(store, ids).values())
    usual = codes.most_common(1)[0][0]
    return None if "?" in usual else usual


def common_left_right_axis(store: CaseStore, ids: Sequence[str], plan: Plan) -> int:
    """Array axis from left to right, after the plan's transpose; InputError naming two cases in which it is not the same."""
    axis_of = {case_id: left_right_axis(affine, plan.transpose_forward) for case_id, affine in sampled_affines(store, ids).items()}
    first, *others = axis_of
    for other in others:
        if axis_of[other] != axis_of[first]:
            raise InputError(f"augment.mirror label-swap: left and right lie along axis {axis_of[first]} in case {first}, along axis "
                             f"{axis_of[other]} in case {other}; bring all images to one orientation, or mirror axes or none")
    return axis_of[first]


def sampled_affines(store: CaseStore, ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Affines of the images as they were preprocessed, of a sample of the cases if they are many."""
    found = {}
    for case_id in ids[:: -(-len(ids) // ORIENTATION_SAMPLE)]:
        stuff = store.open(case_id).properties["nibabel_stuff"]
        # nnU-Net's reader that turns images stores both
        found[case_id] = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), np.float64)
    return found


def note_on_sides(run: Experiment) -> str | None:
    """A sentence for a dataset with left and right labels that are mirrored as if they were none."""
    pairs = name_pairs(run.labels.names)
    if not pairs or run.config.augment.mirror != "axes" or not run.policy.mirror_axes:
        return None
    others = "and others " if len(pairs) > 1 else ""
    return (f"note: {' and '.join(pairs[0])} {others}look like left and right; mirroring along all axes makes them hard to tell "
            "apart, --augment.mirror label-swap exchanges them, none leaves mirroring out")


def find_labels(dataset_json: Path | None, predictions: Path, references: Path) -> Labels:
    """Labels from a dataset.json: the given one, or the first found in or above the two folders."""
    if dataset_json is not None:
        return Labels.from_json(read_json(dataset_json))
    places = [folder / "dataset.json" for f in (predictions, references) for folder in (f, f.parent)]
    places += sorted(predictions.glob("fold_*/dataset.json"))  # of all folds of a run
    for place in places:
        if place.exists():
            return Labels.from_json(read_json(place))
    raise InputError(f"no dataset.json in {', '.join(str(p.parent) for p in places)}: it says which labels there are; "
                     "name it with --dataset-json")
