"""environment.json: versions, device and commit that a run was made with."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax

PACKAGES = ("pgps_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "nibabel", "numpy", "scipy", "blosc2")


def environment() -> dict:
    """JSON-able description of the machine and of the software."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree that this file lies in, if it is one."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
