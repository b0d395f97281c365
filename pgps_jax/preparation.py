"""A dataset in its workspace, before any training: converted, planned, preprocessed."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from pgps_jax.chosen_network import with_network
from pgps_jax.config import NetworkConfig, Planner
from pgps_jax.data.dataset import Dataset, check_dataset, open_dataset
from pgps_jax.data.decathlon import convert_decathlon, converted_name, is_decathlon
from pgps_jax.data.download import TASKS
from pgps_jax.data.explain import explain
from pgps_jax.data.fingerprint import Fingerprint, extract_fingerprint
from pgps_jax.data.folds import Fold, leaks, make_folds, read_folds
from pgps_jax.data.plan import Configuration, Plan, check_preprocessing, read_plan, write_plan
from pgps_jax.data.planner import Overrides, make_plan
from pgps_jax.data.preprocess import keep_references, preprocess_dataset
from pgps_jax.data.store import CaseStore
from pgps_jax.data.stray_cases import stray_cases
from pgps_jax.errors import InputError
from pgps_jax.evaluate.summary import references_of
from pgps_jax.folder_lock import hold_folder
from pgps_jax.json_file import read_json, write_json

PLANS_FILE: dict[Planner, str] = {
    "nnunet": "nnUNetPlans.json",
    "resenc-m": "nnUNetResEncUNetMPlans.json",
    "resenc-l": "nnUNetResEncUNetLPlans.json",
    "resenc-xl": "nnUNetResEncUNetXLPlans.json",
}
Callback = Callable[[int, int], None]


def raw_folder(dataset: Path, workspace: Path, say: Callable[[str], None], progress: Callback | None = None) -> Path:
    """The dataset itself, or <workspace>/raw/Dataset004_Hippocampus made of the Decathlon folder Task04_Hippocampus.

    What is converted already is not converted again. Raises InputError as `convert_decathlon` does.
    """
    if not dataset.exists() and dataset.name in TASKS:
        raise InputError(f"{dataset}: no such folder; `fetch-msd {dataset.name} -o {dataset.parent}` downloads it")
    if not is_decathlon(dataset):
        return dataset
    folder = workspace / "raw" / converted_name(dataset.resolve().name)
    if not (folder / "dataset.json").exists():
        say(f"converting {dataset} to {folder}")
    return convert_decathlon(dataset, folder, progress)


def preprocessed_folder(dataset: Path, workspace: Path) -> Path:
    """Where a dataset's plans and preprocessed cases lie: the folder itself if it is one made by nnU-Net or by us."""
    if not dataset.is_dir():
        raise InputError(f"{dataset}: no such folder; give the path of a dataset folder (dataset.json, imagesTr, labelsTr)")
    if is_preprocessed(dataset):
        return dataset
    return workspace / "preprocessed" / dataset.resolve().name


def is_preprocessed(folder: Path) -> bool:
    """Does this folder hold plans and preprocessed cases rather than raw images?"""
    return any((folder / name).exists() for name in PLANS_FILE.values()) and not (folder / "imagesTr").exists()


def plan_dataset(
    dataset_folder: Path, workspace: Path, planner: Planner, say: Callable[[str], None], progress: Callback | None = None,
    workers: int | None = None, overwrite: bool = False, overrides: Overrides = Overrides(), group_by: str | None = None,  # noqa: B008
) -> tuple[Dataset, Plan, Path]:
    """Check a raw dataset and plan it, or read the plan that is there; returns dataset, plan and preprocessed folder.

    Raises InputError for faults of the dataset, and for wishes (overrides, group_by) where there is a plan already.
    """
    folder = preprocessed_folder(dataset_folder, workspace)
    dataset = open_dataset(dataset_folder)
    plans_file = folder / PLANS_FILE[planner]
    new = overwrite or not plans_file.exists()
    if new:  # faults are found before anything is written
        folds = _folds(dataset, folder / "splits_final.json", group_by, say)
        say(f"checking {len(dataset.cases)} cases")
        check_dataset(dataset, progress=progress, workers=workers)
    folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(folder, lambda: say(f"another process is at work in {folder}; waiting for it")):
        if new and (overwrite or not plans_file.exists()):  # another process may have planned it meanwhile
            say("measuring the dataset")
            fingerprint = extract_fingerprint(dataset, workers=workers, progress=progress)
            plan = make_plan(dataset, fingerprint, planner, overrides)
            write_json(folder / "dataset_fingerprint.json", fingerprint.to_json())
            write_json(folder / "dataset.json", dataset.json)
            if not (folder / "splits_final.json").exists():
                write_json(folder / "splits_final.json", folds, indent=4)
            write_plan(plan, plans_file)  # last: its existence says that planning is complete
            return dataset, plan, folder
        if overrides != Overrides() or group_by is not None:
            raise InputError(f"{plans_file}: the dataset is planned already; add --overwrite to plan it as asked now")
        if read_json(folder / "dataset.json") != dataset.json:
            raise InputError(f"{folder / 'dataset.json'}: differs from {dataset_folder / 'dataset.json'}, so the plan is not for "
                             "this dataset any more; run `plan --overwrite` to plan again, or restore dataset.json")
        return dataset, read_plan(plans_file), folder


def _folds(dataset: Dataset, path: Path, group_by: str | None, say: Callable[[str], None]) -> list[Fold]:
    """The folds of `path` or else of the dataset's own splits_final.json, or new ones; `say` hears of patients in both parts."""
    existing = [file for file in (path, dataset.folder / path.name) if file.exists()]
    ids = [case.id for case in dataset.cases]
    folds = read_folds(existing[0], ids) if existing else make_folds(ids, group_by=group_by)
    leaking = leaks(folds, group_by) if group_by else []
    for sentence in leaking:
        say(f"warning: {sentence}")
    if leaking:
        say(f"these are the folds of {existing[0]}, which --group-by does not change; to have folds that keep patients together, delete "
            f"{' and '.join(map(str, existing))} and plan again")
    return folds


def explanation(dataset: Dataset, plan: Plan, folder: Path) -> list[str]:
    """Why the plan's numbers are what they are, in sentences."""
    fingerprint = Fingerprint.from_json(read_json(folder / "dataset_fingerprint.json"))
    return explain(plan, fingerprint, dataset)


def planned(dataset: Path, workspace: Path, planner: Planner) -> tuple[Path, Plan, dict]:
    """Preprocessed folder, plan and dataset.json of a dataset; InputError where it is not planned."""
    folder = preprocessed_folder(dataset, workspace)
    plans_file = folder / PLANS_FILE[planner]
    if not plans_file.exists():
        raise InputError(f"{plans_file}: this dataset is not planned yet; use `run`, or `plan` and `preprocess` before `train`")
    return folder, read_plan(plans_file), read_json(folder / "dataset.json")


def configuration_of(
    plan: Plan, name: str, network: NetworkConfig = NetworkConfig(), batch_size: int | None = None,  # noqa: B008 (frozen)
    say: Callable[[str], None] = lambda _: None,
) -> Configuration:
    """A configuration of the plan, with network and batch size changed as asked; `say` hears of a patch changed on the way.

    Raises InputError for one that the plan does not have, the second network of a cascade, or preprocessing not done here.
    """
    if name not in plan.configurations:
        raise InputError(f"--configuration {name}: the plan has {', '.join(plan.configurations)}")
    configuration = plan.configurations[name]
    if configuration.previous_stage is not None:
        raise InputError(f"--configuration {name}: takes the segmentation of {configuration.previous_stage} beside the image, and cascades "
                         "are not trained here; use 3d_fullres or 3d_lowres")
    check_preprocessing(configuration)
    if batch_size is not None:
        if batch_size < 1:
            raise InputError(f"--batch-size {batch_size}: must be at least 1")
        configuration = dataclasses.replace(configuration, batch_size=batch_size)
    return with_network(configuration, network, say)


def check_references(preprocessed: Path, case_ids: Sequence[str]) -> None:
    """Raise InputError unless every case has its reference label map in gt_segmentations: found out before training, not after."""
    folder = preprocessed / "gt_segmentations"
    missing = sorted(set(case_ids) - set(references_of(folder)))
    if missing:
        raise InputError(f"{folder}: has no reference label map of {len(missing)} of {len(case_ids)} cases, such as {missing[0]}; "
                         "copy them there from labelsTr, or preprocess again")


def preprocess(
    dataset: Dataset, plan: Plan, configuration: Configuration, folder: Path, workers: int | None = None, progress: Callback | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> CaseStore:
    """Preprocess every case that is not done yet, and keep copies of the reference labels beside them as nnU-Net does.

    `say` hears of waiting for another process, and of preprocessed cases that are not in the dataset or in no fold.
    """
    store = CaseStore(folder / configuration.data_identifier)
    with hold_folder(folder, lambda: say(f"another process is at work in {folder}; waiting for it")):
        keep_references(dataset, folder / "gt_segmentations")
        preprocess_dataset(dataset, plan, configuration, store.folder, workers=workers, progress=progress)
    for sentence in stray_cases(store, [case.id for case in dataset.cases]):
        say(sentence)
    return store
