"""Checkpoints of the training state; the only file that imports orbax.

Two folders: `last` (the newest few, for going on after a stop) and `best` (one). Saving is asynchronous and atomic; an
older checkpoint is deleted only after a newer one is complete. A damaged checkpoint is reported and the one before it is used.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pgps_jax.errors import InputError
from pgps_jax.train.checksum import check, sealed
from pgps_jax.train.state import TrainState, state_bytes

SPACE_FACTOR = 2.2  # free space asked for before saving, in sizes of the state: the new checkpoint exists beside the old
RETRY_SECONDS = 60.0  # after a save that failed, instead of the usual time between checkpoints
LAST_WAITS = (1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 240.0, 480.0)  # seconds between tries to save the end of a run: a quarter of an hour
STOP_WAITS = (1.0, 5.0)  # of a run that was asked to stop: whoever asked will not wait long


class Checkpoints:
    """Saves and restores `TrainState`s of one run.

    `say` receives sentences for the run's log. Close it (or use it as a context manager) so that the last save is on disk.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print, keep: int = 2):
        self._folder = folder
        self.say = say
        self._under_way: dict[str, int] = {}  # step that is being written in the background, by name
        self._saved_at = time.monotonic()
        self._failed = False
        self._managers = {
            name: ocp.CheckpointManager(
                (folder / name).absolute(),
                options=ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True),
            )
            for name, kept in (("last", keep), ("best", 1))
        }

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def due(self, minutes: float) -> bool:
        """Whether it is time to save: `minutes` after the save before, or a minute after one that failed."""
        for name, manager in self._managers.items():
            if name in self._under_way and not manager.is_saving_in_progress():
                self._finish(name)
        return time.monotonic() - self._saved_at > min(60 * minutes, RETRY_SECONDS if self._failed else float("inf"))

    def save(self, name: str, state: TrainState, step: int, description: dict) -> bool:
        """Start saving `state` after `step` updates under "last" or "best"; returns False when it was not saved.

        A full disk or a lost folder is said, never raised: hours of training weigh more than one checkpoint. Saves of
        earlier steps are finished first, so that a new "last" never overtakes the "best" of an earlier step.
        """
        for other in self._managers:
            if self._under_way.get(other) != step:
                self._finish(other)
        self._saved_at = time.monotonic()
        manager, wanted = self._managers[name], SPACE_FACTOR * state_bytes(state)
        try:
            if step in manager.all_steps():
                return True
            free = shutil.disk_usage(self._folder).free
            if free < wanted:
                raise OSError(f"{free / 1e6:.0f} MB are free in {self._folder}, {wanted / 1e6:.0f} MB are wanted")
            manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), description=ocp.args.JsonSave(sealed(description, state))))
        except Exception as error:  # orbax raises many types for what the file system did
            self.not_saved(step, error)
            self._clean_up(name, step)
            return False
        self._under_way[name] = step
        return True

    def finish(self) -> bool:
        """Wait until everything is on disk; False when something could not be written, which is said."""
        return all([self._finish(name) for name in self._managers])

    def has(self, name: str, step: int) -> bool:
        """Whether the state after `step` updates is saved under "last" or "best"."""
        return step in self._managers[name].all_steps()

    def preempted(self, step: int) -> bool:
        """Whether the machine has been told that it will be taken away; only JAX's distributed runtime gets such notices."""
        return jax.distributed.is_initialized() and self._managers["last"].reached_preemption(step)

    def _finish(self, name: str) -> bool:
        """Wait for the save under way; False when it failed, which is said."""
        step = self._under_way.pop(name, None)
        if step is None:
            return True
        try:
            self._managers[name].wait_until_finished()
        except Exception as error:  # as above
            self.not_saved(step, error)
            self._clean_up(name, step)
            return False
        self._failed = False
        return True

    def not_saved(self, step: int, error: Exception) -> None:
        """Say that there is no checkpoint of this step; it is tried again sooner than usual."""
        self._failed, self._saved_at = True, time.monotonic()
        self.say(f"warning: checkpoint of step {step} not saved ({error}); training goes on, older checkpoints are kept")

    def _clean_up(self, name: str, step: int) -> None:
        """Remove what a failed save left: on a full disk it is in the way of the next one."""
        for leftover in (self._folder / name).glob(f"{step}.*tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with suppress(OSError):  # the folder may be gone; it is read again after the next attempt
            self._managers[name].reload()

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """Newest readable state under "last", or None where there are no checkpoints.

        Unreadable newer ones are reported and moved aside to `damaged/`. Raises InputError when none can be read.
        """
        self.finish()
        manager = self._managers["last"]
        unreadable: dict[int, str] = {}
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                state = _restore(manager, step, abstract_state)
            except Exception as error:  # orbax raises many types for damaged files
                unreadable[step] = _reason(error)
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
        for name, manager in self._managers.items():
            self._finish(name)
            manager.close()


def _restore(manager: ocp.CheckpointManager, step: int, abstract_state: TrainState) -> TrainState:
    """The state as it was saved; an exception of any type when it is not."""
    found = manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state), description=ocp.args.JsonRestore()))
    check(found["description"], found["state"])
    return found["state"]


def _reason(error: Exception) -> str:
    """The first line of what orbax says, which may go on for pages."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def load_params(folder: Path, name: str = "last") -> dict:
    """Parameters of the newest checkpoint under `folder/name`, as a nested dict with integer keys for lists of layers.

    Raises InputError when there is none, or it is damaged.
    """
    with ocp.CheckpointManager((folder / name).absolute(), options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{folder / name}: holds no finished checkpoint; train first, or name another run folder")
        try:
            whole = _abstract_on_one_device((folder / name / str(step) / "state").absolute())
            found = manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(whole), description=ocp.args.JsonRestore()))
            params = _with_integer_keys(found["state"]["params"])
            check(found["description"], params, "params")
        except Exception as error:  # orbax raises many types for damaged files
            raise InputError(f"{folder / name / str(step)}: this checkpoint cannot be read ({_reason(error)}); move it out of the "
                             "folder to use the one before") from error
    return params


def _abstract_on_one_device(state: Path) -> dict:
    """Shapes and types in a checkpoint, for this machine: orbax would ask for as many devices as it was trained on."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(state).item_metadata
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), found.tree)


def _with_integer_keys(tree: Any) -> Any:
    """Orbax stores every key as a string; lists of layers have integer keys."""
    if not isinstance(tree, dict):
        return tree
    return {int(key) if isinstance(key, str) and key.isdigit() else key: _with_integer_keys(value) for key, value in tree.items()}
