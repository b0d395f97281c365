"""Memory of the machine that this process runs on: what is left, and what the process took at most."""

import os
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


def host_bytes_left(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still take: MemAvailable or what its cgroup leaves, whichever is less."""
    left = [_physical_bytes()]
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            left = [1024 * int(line.split()[1])]
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: limits of all ancestors hold
            folder, limit, usage, cached = cgroup / path.lstrip("/"), "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder, limit, usage, cached = (cgroup / "memory" / path.lstrip("/"), "memory.limit_in_bytes",
                                            "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for place in (folder, *folder.parents):
            maximum = _number(place / limit)
            if maximum is not None:
                reclaimable = [int(x.split()[1]) for x in _lines(place / "memory.stat") if x.split()[0] == cached]
                left.append(maximum - (_number(place / usage) or 0) + sum(reclaimable))
    return max(0, min(left))


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # half of all, where nobody knows better
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def peak_bytes() -> int | None:
    """The most memory that this process has held at once since it began; None where the system does not tell."""
    if resource is None:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def gib(size: int | float) -> str:
    """Bytes in GiB or MiB, for people; infinite ones are unknown."""
    if size == float("inf"):
        return "an unknown amount"
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
