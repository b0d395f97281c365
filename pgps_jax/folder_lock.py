"""One process at a time in a folder: the system lets go of a lock when its holder ends, however it ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"  # network file systems lock files that are open for writing, not folders


@contextmanager
def hold_folder(folder: Path, when_taken: Callable[[], None]) -> Iterator[None]:
    """Hold an existing folder against others that hold it by this function.

    Where nothing can be locked (no right to write to the folder, a file system without locks), nothing is held.

    Args:
        when_taken: called when another process holds the folder: it raises, or returns, and then the turn is waited for.
    """
    try:
        file = (folder / LOCK_FILE).open("a")
    except OSError:
        yield
        return
    with file:
        if fcntl is not None:
            _lock(file.fileno(), when_taken)
        yield


def _lock(descriptor: int, when_taken: Callable[[], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        when_taken()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # some network file systems have no locks
