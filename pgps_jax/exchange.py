"""Trained models to and from nnU-Net: run folders made of its checkpoints, and its folders made of ours."""

from pathlib import Path

import jax
import jax.numpy as jnp

from pgps_jax.data.plan import Plan, read_plan, write_plan
from pgps_jax.errors import InputError
from pgps_jax.inference import read_inference
from pgps_jax.interop.nnunet_model import find_folds, read_nnunet_model, write_nnunet_model
from pgps_jax.train.checkpoint import Checkpoints, load_params
from pgps_jax.train.state import TrainState
from pgps_jax.validate import fold_folders
from pgps_jax.workspace import read_json, write_json


def import_nnunet(results: Path, output: Path) -> list[Path]:
    """Make one run folder per fold of nnU-Net's results folder; `predict` takes any of them, or `output` for all.

    Raises InputError when the folder holds no model that is understood, or a run folder exists.
    """
    folds = find_folds(results)
    model = read_nnunet_model(results, folds)
    plan = Plan.from_json(model.plans)
    folders = [output / f"fold_{fold}" for fold in folds]
    for folder in folders:
        if folder.exists():
            raise InputError(f"{folder}: exists already; name another output folder")
    for folder, params in zip(folders, model.params, strict=True):
        folder.mkdir(parents=True)
        write_plan(plan, folder / "plan.json")
        write_json(folder / "dataset.json", model.dataset)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save("last", TrainState(jnp.int32(0), jax.tree.map(jnp.asarray, params), {}), 0, {"from": str(results)})
        write_json(folder / "inference.json", {"configuration": model.configuration, "mirror_axes": list(model.mirror_axes)})
    return folders


def export_nnunet(run: Path, output: Path, checkpoint: str = "last") -> None:
    """Write the folds of a run as a folder that nnU-Net's predictor loads strictly."""
    folders = fold_folders(run)
    plan = read_plan(folders[0] / "plan.json")
    inference = read_inference(folders[0], plan)
    write_nnunet_model(
        output, plan.to_json(), read_json(folders[0] / "dataset.json"), inference.configuration,
        {_fold_of(folder): load_params(folder / "checkpoints", checkpoint) for folder in folders},
        [axis for axis in inference.mirror_axes if axis != inference.swap_axis],  # nnU-Net cannot exchange labels
    )


def _fold_of(folder: Path) -> int | str:
    name = folder.resolve().name.removeprefix("fold_")
    return int(name) if name.isdigit() else name
