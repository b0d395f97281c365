"""Medical Segmentation Decathlon folders, brought to nnU-Net's raw layout.

    Task04_Hippocampus/dataset.json   modality, labels {"1": name}, training [{image, label}], test [...]
    Task04_Hippocampus/imagesTr/hippocampus_001.nii.gz   3D, or 4D with one channel after the other; labelsTr, imagesTs
"""

import os
import re
import shutil
from pathlib import Path

from pgps_jax.data.dataset import Case, Progress, check_case_id, file_within, map_cases, read_dataset_json
from pgps_jax.data.labels import Labels
from pgps_jax.data.nifti import file_shape, read_channels, write_volume
from pgps_jax.errors import InputError, brief
from pgps_jax.json_file import write_json

ENDING = ".nii.gz"


def is_decathlon(folder: Path) -> bool:
    """Does the folder's dataset.json have the Decathlon's form? False if there is none."""
    if not (folder / "dataset.json").is_file():
        return False
    content = read_dataset_json(folder)
    return "training" in content and "file_ending" not in content


def converted_name(folder_name: str) -> str:
    """Task04_Hippocampus -> Dataset004_Hippocampus; other names stay."""
    match = re.fullmatch(r"Task(\d+)_(.+)", folder_name)
    return f"Dataset{int(match[1]):03d}_{match[2]}" if match else folder_name


def convert_decathlon(
    source: Path, output: Path, progress: Progress | None = None, workers: int | None = None
) -> Path:
    """Write a Decathlon folder to `output` in nnU-Net's layout; the source is not touched.

    Volumes are copied, 4D images split into one file per channel. An interrupted conversion goes on where it was;
    dataset.json is written last. Converting again does nothing.

    Returns:
        `output`.

    Raises:
        InputError: not a Decathlon folder, missing files, images with another number of channels than `modality`, an
            output that holds another dataset, too little space.
    """
    source, output = Path(source), Path(output)
    if not is_decathlon(source):
        raise InputError(f"{source}: no Decathlon folder; its dataset.json has no \"training\" list, or has nnU-Net's layout already")
    content = read_dataset_json(source)
    converted, channels = _converted_json(source, content)
    training, test = _cases(source, content, labelled=True), _cases(source, content, labelled=False)
    converted["numTraining"] = len(training)
    if (output / "dataset.json").exists():
        if read_dataset_json(output) != converted:
            raise InputError(f"{output} holds another dataset; choose another folder, or remove it")
        return output
    needed = sum(path.stat().st_size for case in training + test for path in (*case.images, case.label) if path)
    existing = next(parent for parent in (output, *output.resolve().parents) if parent.exists())
    if shutil.disk_usage(existing).free < needed:
        raise InputError(f"{output}: converting needs about {needed / 1e9:.1f} GB, more than is free there")
    for name in ("imagesTr", "labelsTr", *(["imagesTs"] if test else [])):
        (output / name).mkdir(parents=True, exist_ok=True)
    map_cases(lambda case: _convert_case(case, output, channels), training + test, progress, workers)
    write_json(output / "dataset.json", converted, indent=4)
    return output


def _converted_json(source: Path, content: dict) -> tuple[dict, int]:
    """nnU-Net's dataset.json and the number of channels."""
    where = source / "dataset.json"
    modality, labels = content.get("modality"), content.get("labels")
    if not isinstance(modality, dict) or set(modality) != {str(i) for i in range(len(modality))} or not modality:
        raise InputError(f'{where}: "modality" must be {{"0": "MRI", ...}}; found {brief(modality)}')
    if not isinstance(labels, dict) or not all(re.fullmatch("[0-9]{1,9}", value) and isinstance(n, str) for value, n in labels.items()):
        raise InputError(f'{where}: "labels" must be {{"0": "background", "1": name, ...}}; found {brief(labels)}')
    names = {("background" if int(value) == 0 else name): int(value) for value, name in labels.items()}
    if len(names) != len(labels):
        raise InputError(f'{where}: two entries of "labels" have the same name; every label needs its own')
    kept = {k: v for k, v in content.items() if k not in ("modality", "training", "test", "labels", "file_ending")}
    converted = {**kept, "channel_names": modality, "labels": names, "file_ending": ENDING}
    Labels.from_json(converted)
    return converted, len(modality)


def _cases(source: Path, content: dict, labelled: bool) -> tuple[Case, ...]:
    entries = content["training"] if labelled else content.get("test") or []
    if not isinstance(entries, list) or (labelled and not entries):
        raise InputError(f'{source / "dataset.json"}: "training" must list the cases, [{{"image": path, "label": path}}, ...]')

    def located(text: object) -> Path:
        if not isinstance(text, str) or not text.endswith(ENDING):
            raise InputError(f"{source / 'dataset.json'}: {brief(text)} is no path of a {ENDING} file")
        return file_within(source.resolve(), text, f"{source / 'dataset.json'}")

    cases = {}
    for entry in entries:
        if labelled and not (isinstance(entry, dict) and {"image", "label"} <= set(entry)):
            raise InputError(f'{source / "dataset.json"}: a case in "training" is {brief(entry)}; want {{"image": path, "label": path}}')
        image = located(entry.get("image") if isinstance(entry, dict) else entry)
        case_id = image.name.removesuffix(ENDING)
        if case_id.startswith((".", "_")):  # what macOS leaves behind
            continue
        check_case_id(case_id, source / "dataset.json")
        if case_id in cases:
            raise InputError(f"{source / 'dataset.json'}: the case {case_id} is listed twice")
        cases[case_id] = Case(case_id, (image,), located(entry["label"]) if labelled else None)
    return tuple(cases.values())


def _convert_case(case: Case, output: Path, channels: int) -> None:
    images = output / ("imagesTr" if case.label else "imagesTs")
    targets = [images / f"{case.id}_{channel:04d}{ENDING}" for channel in range(channels)]
    if not all(target.exists() for target in targets):
        shape = file_shape(case.images[0])
        found = shape[3] if len(shape) == 4 else 1
        if found != channels:
            raise InputError(f'case {case.id}: {case.images[0]} has {found} channels, "modality" in dataset.json names {channels}')
        if len(shape) == 3:
            _copy(case.images[0], targets[0])
        else:
            array, affine = read_channels(case.images[0])
            for target, channel in zip(targets, array, strict=True):
                write_volume(target, channel, affine)
    if case.label and not (output / "labelsTr" / f"{case.id}{ENDING}").exists():
        _copy(case.label, output / "labelsTr" / f"{case.id}{ENDING}")


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".copying.{os.getpid()}.{target.name}")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
