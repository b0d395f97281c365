"""Two processes never train in one run folder, and a killed one leaves no lock behind."""

import subprocess
import sys

import pytest

from pgps_jax.errors import InputError
from pgps_jax.train.only_process import only_process

HOLD = "import sys, pathlib\nfrom pgps_jax.train.only_process import only_process\n" \
       "with only_process(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"


def test_a_second_process_is_refused_until_the_first_is_gone_even_if_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process is training this run"), only_process(tmp_path):
            pass
        other.kill()
        other.wait()
    with only_process(tmp_path):
        pass
    with only_process(tmp_path):
        pass
