"""The first state of a run that starts from other weights: those of another run, of nnU-Net or of MONAI.

The weights are read once and saved as the checkpoint of step 0, from which the run then goes on like any other: a resumed
run does not need their file any more.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from pgps_jax.config import RunConfig
from pgps_jax.data.labels import Labels
from pgps_jax.errors import InputError
from pgps_jax.interop import monai_names, nnunet_names
from pgps_jax.interop.pickles import read_checkpoint
from pgps_jax.interop.pretrained import Report, load_partially
from pgps_jax.json_file import read_json, write_json
from pgps_jax.train.checkpoint import Checkpoints, load_params
from pgps_jax.train.device import open_device
from pgps_jax.train.setup import initial_state
from pgps_jax.train.state import TrainState
from pgps_jax.workspace import Experiment, goes_on, run_folder

_WEIGHTS = ("network_weights", "state_dict", "model_state_dict", "model")  # keys under which files hold a state dict
_SWIN_ENCODER = re.compile(r"(^|\.)layers\dc?\.0\.")


class Pretrained(NamedTuple):
    """Weights in our names, and the name of each output channel where the source tells it."""

    params: dict
    classes: tuple[str, ...] | None


class Start(NamedTuple):
    """The state at step 0, and what became of each parameter."""

    state: TrainState
    report: Report
    source: Path


def check_pretrained(config: RunConfig) -> None:
    """Read the weights that a new run asks for, so that what is missing or unreadable is refused before any work.

    Raises InputError as `read_pretrained`, and for weights that --fresh would delete.
    """
    path, folder = config.pretrained, run_folder(config)
    if path is None or _is_under_way(config):
        return
    if config.fresh and folder.resolve() in (path.resolve(), *path.resolve().parents):
        raise InputError(f"--pretrained {path}: lies in the run folder that --fresh would delete; give the new run another --name")
    read_pretrained(path)


def prepare_start(run: Experiment) -> Start | None:
    """The first state with all that the pretrained weights can give it; None where none are asked for or the run is under way.

    Raises InputError when nothing of them fits; nothing is written.
    """
    path = run.config.pretrained
    if path is None or _is_under_way(run.config):
        return None
    source = read_pretrained(path)
    _, state = initial_state(run, open_device(run.schedule.stages, run.config.network.precision))
    try:
        params, report = load_partially(
            jax.device_get(state.params), source.params, target_classes=output_names(run.labels), source_classes=source.classes)
    except InputError as error:
        raise InputError(f"--pretrained {path}: {error}") from None
    return Start(state._replace(params=params), report, path)


def write_start(run: Experiment, start: Start) -> None:
    """Save the checkpoint of step 0 and pretrained.json, which lists every parameter and what became of it."""
    write_json(run.folder / "pretrained.json", {"source": str(start.source), **start.report._asdict()})
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        if not checkpoints.save("last", start.state, 0, {"step": 0, "pretrained": str(start.source)}):
            raise InputError(f"{run.folder}: the pretrained weights could not be saved there; make room, or name another --workspace")


def read_pretrained(path: Path) -> Pretrained:
    """Weights of a run folder (its newest checkpoint), of nnU-Net's checkpoint_*.pth, or of a torch file with a state dict of
    MONAI's UNETR, SwinUNETR or self-supervised SwinUNETR encoder.

    Raises InputError when there is nothing of the kind.
    """
    if path.is_dir():
        if not (path / "plan.json").exists():
            raise InputError(f"--pretrained {path}: is no run folder (fold_<k>, with plan.json); name one, or a .pth file")
        labels = Labels.from_json(read_json(path / "dataset.json"))
        return Pretrained(load_params(path / "checkpoints"), output_names(labels))
    if not path.is_file():
        raise InputError(f"--pretrained {path}: no such file or run folder")
    contents = read_checkpoint(path)
    dataset = (contents.get("init_args") or {}).get("dataset_json") if isinstance(contents.get("init_args"), dict) else None
    classes = output_names(Labels.from_json(dataset)) if isinstance(dataset, dict) else None
    try:
        return Pretrained(params_of(state_dict_of(contents)), classes)
    except (TypeError, AttributeError, ValueError, IndexError) as error:  # names or shapes that no network has
        raise InputError(f"--pretrained {path}: holds no weights of a network that is known here ({error})") from None


def state_dict_of(contents: dict) -> dict[str, np.ndarray]:
    """The arrays by name in a checkpoint of torch, whether it is a state dict or holds one. Raises ValueError if there are none."""
    inner = next((contents[key] for key in _WEIGHTS if isinstance(contents.get(key), dict)), contents)
    arrays = {name: array for name, array in inner.items() if isinstance(name, str) and isinstance(array, np.ndarray)}
    if not arrays:
        raise ValueError("no arrays in it")
    return arrays


def params_of(state_dict: dict[str, np.ndarray]) -> dict:
    """Our parameter tree of a PyTorch network, whose kind its parameters' names tell."""
    names = [re.sub(r"^(module\.|_orig_mod\.)+", "", name) for name in state_dict]
    if any(name.startswith(("vit.", "swinViT.")) for name in names):
        return monai_names.params_from_state_dict(state_dict)
    if any(_SWIN_ENCODER.search(name) for name in names):
        encoder, others = monai_names.swin_encoder_from_pretraining(state_dict)
        return encoder | {name: state_dict[name] for name in others}  # so that the report names what is of no use
    return nnunet_names.params_from_state_dict(state_dict)


def output_names(labels: Labels) -> tuple[str, ...]:
    """Name of each output channel of a network: labels by value with background, or foreground regions in their order."""
    named = zip(labels.values, labels.names, strict=True)
    if labels.has_regions:
        return tuple(name for value, name in named if value != 0)
    return tuple(name for _, name in sorted(named))


def _is_under_way(config: RunConfig) -> bool:
    """Whether there is a checkpoint to go on from, which holds what the pretrained weights became."""
    checkpoints = (run_folder(config) / "checkpoints" / "last").glob("*")
    return goes_on(config) and any(path.name.isdecimal() for path in checkpoints)
