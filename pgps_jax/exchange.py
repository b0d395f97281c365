"""Trained models to and from nnU-Net and MONAI: run folders made of their checkpoints, and their files made of our runs."""

from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.data.labels import Labels
from pgps_jax.data.plan import Configuration, Plan, read_plan, write_plan
from pgps_jax.errors import InputError
from pgps_jax.inference import read_inference
from pgps_jax.interop.monai_names import state_dict_from_params
from pgps_jax.interop.nnunet_model import find_folds, read_nnunet_model, write_checkpoint, write_nnunet_model
from pgps_jax.interop.pretrained import load_partially
from pgps_jax.json_file import read_json, write_json
from pgps_jax.models import build
from pgps_jax.models.swin_unetr import SwinUnetrOptions
from pgps_jax.models.unetr import UnetrOptions, read_options
from pgps_jax.train.checkpoint import Checkpoints, load_params
from pgps_jax.train.pretrained import read_pretrained
from pgps_jax.train.state import TrainState, split
from pgps_jax.validate import fold_folders


def import_nnunet(results: Path, output: Path) -> list[Path]:
    """Make one run folder per fold of nnU-Net's results folder; `predict` takes any of them, or `output` for all.

    Raises InputError when the folder holds no model that is understood, the second network of a cascade, or a run folder exists.
    """
    folds = find_folds(results)
    model = read_nnunet_model(results, folds)
    plan = Plan.from_json(model.plans)
    if stage := plan.configurations[model.configuration].previous_stage:
        raise InputError(f"{results}: {model.configuration} takes the segmentation of {stage} beside the image, and cascades are not "
                         "computed here; import 3d_fullres or 3d_lowres")
    # nnU-Net's reorienting reader turns every image to RAS; its others take images as they are
    orientation = "RAS" if plan.image_reader_writer.endswith("WithReorient") else None
    folders = [output / f"fold_{fold}" for fold in folds]
    for folder in folders:
        if folder.exists():
            raise InputError(f"{folder}: exists already; name another output folder")
    for folder, params in zip(folders, model.params, strict=True):
        _write_run(folder, plan, model.dataset, model.configuration, params, list(model.mirror_axes), results, orientation)
    return folders


def export_nnunet(run: Path, output: Path, checkpoint: str = "last") -> str | None:
    """Write the folds of a run as a folder that nnU-Net's predictor loads strictly.

    nnU-Net writes the number of an output as its label, so labels are numbered without gaps in the exported dataset.json;
    returns a sentence about it where that changes them.
    """
    folders = fold_folders(run)
    plan = read_plan(folders[0] / "plan.json")
    inference = read_inference(folders[0], plan)
    dataset = read_json(folders[0] / "dataset.json")
    labels = Labels.from_json(dataset)
    write_nnunet_model(
        output, plan.to_json(), with_consecutive_labels(dataset, labels), inference.configuration,
        {_fold_of(folder): load_params(folder / "checkpoints", checkpoint) for folder in folders},
        [axis for axis in inference.mirror_axes if axis != inference.swap_axis],  # nnU-Net cannot exchange labels
    )
    if not labels.raw_values:
        return None
    changed = ", ".join(f"{raw} as {i}" for i, raw in enumerate(labels.raw_values) if raw != i)
    return f"nnU-Net numbers labels without gaps and will write {changed}; dataset.json of the export says so"


def with_consecutive_labels(dataset: dict, labels: Labels) -> dict:
    """dataset.json with labels 0, 1, ..., K as the network numbers them; `labels` are those of the dataset.json."""
    if not labels.raw_values:
        return dataset
    numbered = {name: list(value) if isinstance(value, tuple) else value for name, value in zip(labels.names, labels.values, strict=True)}
    numbered |= {} if labels.ignore is None else {"ignore": labels.ignore}
    order = {} if labels.regions_class_order is None else {"regions_class_order": list(labels.regions_class_order)}
    return dataset | {"labels": numbered} | order


def import_monai(weights: Path, plan: Plan, dataset: dict, configuration: Configuration, output: Path) -> Path:
    """Make a run folder, OUTPUT/fold_0, of MONAI's UNETR or SwinUNETR for a planned dataset; `predict` takes it.

    Args:
        weights: torch file with a state dict, as MONAI's training scripts save it.
        configuration: of the plan, with the architecture that the weights are of.

    Raises InputError unless the file has every parameter of the network, in its shape, and no other.
    """
    folder = output / "fold_0"
    if folder.exists():
        raise InputError(f"{folder}: exists already; name another output folder")
    channels, outputs = len(configuration.normalization_schemes), Labels.from_json(dataset).num_outputs
    _, shapes = split(nnx.eval_shape(lambda: build(configuration.architecture, channels, outputs, rngs=nnx.Rngs(0))))
    fresh = jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), shapes)
    loaded, report = load_partially(fresh, read_pretrained(weights).params)
    if report.adapted or report.skipped:
        raise InputError(f"{weights}: is not of the network that is asked for, {configuration.architecture.backbone} with {channels} image "
                         f"channels and {outputs} outputs; give its options by --network.*, or use `train --pretrained`. {report}")
    axes = [axis for axis in range(3) if configuration.patch_size[axis] > 1]
    _write_run(folder, plan.with_configuration(configuration), dataset, configuration.name, loaded, axes, weights)
    return folder


def export_monai(run: Path, output: Path, checkpoint: str = "last") -> list[Path]:
    """Write OUTPUT/fold_<k>.pt, state dicts that MONAI's UNETR or SwinUNETR loads strictly, and network.json.

    network.json names MONAI's class and the arguments to build it with. Raises InputError for a run of a U-Net.
    """
    folders = fold_folders(run)
    plan, dataset = read_plan(folders[0] / "plan.json"), read_json(folders[0] / "dataset.json")
    configuration = plan.configurations[read_inference(folders[0], plan).configuration]
    name, arguments = monai_class(configuration.architecture)
    ends = {"in_channels": len(configuration.normalization_schemes), "out_channels": Labels.from_json(dataset).num_outputs}
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for folder in folders:
        files.append(output / f"fold_{_fold_of(folder)}.pt")
        write_state_dict(load_params(folder / "checkpoints", checkpoint), configuration.architecture, files[-1])
    write_json(output / "network.json", {"class": f"monai.networks.nets.{name}", "arguments": ends | arguments})
    return files


def write_state_dict(params: dict, architecture: Architecture, path: Path) -> None:
    """Write the parameters of UNETR or SwinUNETR as a torch file with MONAI's state dict."""
    window = monai_class(architecture)[1].get("window_size", 7)
    write_checkpoint(path, state_dict_from_params(params, (window,) * 3 if isinstance(window, int) else window))


def monai_class(architecture: Architecture) -> tuple[str, dict]:
    """Name and arguments, without image channels and classes, of MONAI's class for an architecture. InputError if it has none."""
    if architecture.backbone == "unetr":
        options = asdict(read_options(UnetrOptions, architecture))
        return "UNETR", {"img_size": options.pop("table_size")} | options
    if architecture.backbone == "swin-unetr":
        options = asdict(read_options(SwinUnetrOptions, architecture))
        return "SwinUNETR", {"use_v2": options.pop("v2")} | options
    raise InputError(f"MONAI has no {architecture.backbone} of nnU-Net's kind; use `export-nnunet` for this run")


def _write_run(folder: Path, plan: Plan, dataset: dict, configuration: str, params: dict, mirror_axes: list[int], source: Path,
               orientation: str | None = None) -> None:
    """A run folder that was not trained here."""
    folder.mkdir(parents=True)
    write_plan(plan, folder / "plan.json")
    write_json(folder / "dataset.json", dataset)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save("last", TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), {}), 0, {"from": str(source)})
    write_json(folder / "inference.json", {"configuration": configuration, "mirror_axes": mirror_axes, "orientation": orientation})


def _fold_of(folder: Path) -> int | str:
    name = folder.resolve().name.removeprefix("fold_")
    return int(name) if name.isdigit() else name
