"""What is left of the machine's memory, also in a container, and the most that this process held."""

import numpy as np
import pytest

from pgps_jax.host_memory import host_bytes_left, peak_bytes


@pytest.mark.parametrize(("line", "folder", "limit", "usage", "cached"), [
    ("0::/job/task", "job", "memory.max", "memory.current", "inactive_file"),
    ("4:memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
])
def test_the_limit_of_a_container_counts_where_it_is_less_than_the_machine_has(
    tmp_path, line, folder, limit, usage, cached
):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 2000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(line + "\n")
    left = lambda: host_bytes_left(tmp_path / "proc", tmp_path / "cgroup")  # noqa: E731
    assert left() == 2000 * 1024

    group = tmp_path / "cgroup" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("1000000\n")
    (group / usage).write_text("700000\n")
    (group / "memory.stat").write_text(f"anon 600000\n{cached} 50000\n")
    assert left() == 350_000
    (group / limit).write_text("max\n")
    assert left() == 2000 * 1024


def test_the_peak_rises_with_what_is_held_and_does_not_fall_again():
    before = peak_bytes()
    held = np.ones(max(before, 2**27), np.uint8)  # more than was ever held
    during = peak_bytes()
    assert during > before + 2**26 and held.nbytes
    del held
    assert peak_bytes() >= during
