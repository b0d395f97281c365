"""Checkpoints of the training state; the only file that imports orbax.

Two folders: `last` (the newest two, for going on after a stop) and `best` (one). Saving is asynchronous and atomic;
a damaged checkpoint is reported and the one before it is used.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pgps_jax.errors import InputError
from pgps_jax.train.state import TrainState

SPACE_FACTOR = 2.2  # free space asked for before saving, in sizes of the state: the new checkpoint exists beside the old


def _state_bytes(state: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class Checkpoints:
    """Saves and restores `TrainState`s of one run.

    `say` receives sentences for the run's log. Close it (or use it as a context manager) so that the last save is on disk.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print):
        self._folder = folder
        self.say = say
        self._managers = {
            name: ocp.CheckpointManager(
                (folder / name).absolute(),
                options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            )
            for name, keep in (("last", 2), ("best", 1))
        }

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self, name: str, state: TrainState, step: int, description: dict) -> bool:
        """Start saving `state` after `step` updates under "last" or "best"; returns False when it was not saved.

        A full disk or a lost folder is logged, never raised: hours of training weigh more than one checkpoint.
        """
        manager = self._managers[name]
        free = shutil.disk_usage(self._folder).free
        if free < SPACE_FACTOR * _state_bytes(state):
            self.say(f"warning: checkpoint of step {step} not saved: {free / 1e6:.0f} MB are free in {self._folder}, "
                      f"{SPACE_FACTOR * _state_bytes(state) / 1e6:.0f} MB are wanted; older checkpoints are kept")
            return False
        try:
            manager.wait_until_finished()  # raises what went wrong with the save before
            if step in manager.all_steps():
                return True
            manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), description=ocp.args.JsonSave(description)))
        except (OSError, ValueError) as error:
            self.say(f"warning: checkpoint of step {step} not saved ({error}); training goes on")
            return False
        return True

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """Newest readable state under "last", or None where there are no checkpoints.

        Unreadable newer ones are reported and moved aside to `damaged/`. Raises InputError when none can be read.
        """
        manager = self._managers["last"]
        unreadable: dict[int, str] = {}
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                state = _restore(manager, step, abstract_state)
            except Exception as error:  # orbax raises many types for damaged files
                unreadable[step] = str(error).splitlines()[0]
                continue
            for bad, reason in unreadable.items():
                self.say(f"warning: the checkpoint of step {bad} cannot be read ({reason}); going on from step {step}")
                self._move_aside(bad)
            return state
        if unreadable:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in unreadable.items())
            raise InputError(f"{self._folder / 'last'}: no checkpoint can be read ({reasons}); mend the folder, or start over with --fresh")
        return None

    def _move_aside(self, step: int) -> None:
        target = self._folder / "damaged" / str(step)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
        shutil.move(self._folder / "last" / str(step), target)
        self._managers["last"].reload()

    def close(self) -> None:
        """Wait for saves under way and let go of the folder."""
        for manager in self._managers.values():
            try:
                manager.wait_until_finished()
            except (OSError, ValueError) as error:
                self.say(f"warning: the last checkpoint could not be written: {error}")
            manager.close()


def _restore(manager: ocp.CheckpointManager, step: int, abstract_state: TrainState) -> TrainState:
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)))["state"]


def load_params(folder: Path, name: str = "last") -> dict:
    """Parameters of the newest checkpoint under `folder/name`, as a nested dict with integer keys for lists of layers.

    Raises InputError when there is none.
    """
    with ocp.CheckpointManager((folder / name).absolute(), options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{folder / name}: holds no finished checkpoint; train first, or name another run folder")
        tree = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    params = tree["params"] if isinstance(tree, dict) else tree.params
    return _with_integer_keys(params)


def _with_integer_keys(tree: Any) -> Any:
    """Orbax stores every key as a string; lists of layers have integer keys."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if isinstance(key, str) and key.isdigit() else key: _with_integer_keys(value) for key, value in tree.items()}


def describe(folder: Path, name: str = "last") -> dict | None:
    """The JSON written beside the newest checkpoint, or None."""
    steps = [int(path.name) for path in (folder / name).glob("*") if path.name.isdigit()]
    if not steps:
        return None
    files = list((folder / name / str(max(steps)) / "description").glob("*"))
    return json.loads(files[0].read_text()) if files else None
