"""One process per run folder: two that train in the same one would spoil each other's records and checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pgps_jax.errors import InputError
from pgps_jax.folder_lock import hold_folder


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold a run folder; the system lets go of it when the process ends, however it ends.

    Raises InputError when another process holds it. Where the file system knows no locks, nothing is held.
    """
    def refuse() -> None:
        raise InputError(f"{folder}: another process is training this run; wait for it, stop it (touch {folder / 'STOP'}), "
                         "or use another --name")

    with hold_folder(folder, refuse):
        yield
