"""A folder is held by one process at a time; others wait for their turn, and a killed holder leaves no lock behind."""

import subprocess
import sys
import threading

import pytest

from pgps_jax.folder_lock import hold_folder

HOLD = "import sys, pathlib\nfrom pgps_jax.folder_lock import hold_folder\n" \
       "with hold_folder(pathlib.Path(sys.argv[1]), lambda: None):\n    print('held', flush=True)\n    sys.stdin.read()"


@pytest.fixture
def other(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_comes_second_is_told_and_has_its_turn_when_the_first_is_killed(tmp_path, other):
    told, done = threading.Event(), threading.Event()

    def wait_for_turn():
        with hold_folder(tmp_path, told.set):
            done.set()

    second = threading.Thread(target=wait_for_turn, daemon=True)
    second.start()
    assert told.wait(30) and not done.is_set()
    other.kill()
    assert done.wait(30)


def test_who_comes_second_may_refuse_to_wait(tmp_path, other):
    with pytest.raises(ZeroDivisionError), hold_folder(tmp_path, lambda: 1 / 0):
        pass


def test_a_folder_that_cannot_be_written_to_is_not_held_but_can_be_read(tmp_path):
    (tmp_path / ".lock").mkdir()  # stands for a folder without the right to write
    with hold_folder(tmp_path, lambda: 1 / 0), hold_folder(tmp_path, lambda: 1 / 0):
        pass
