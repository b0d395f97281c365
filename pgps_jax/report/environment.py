"""environment.json: versions, device and commit that a run was made with."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import jax

PACKAGES = ("pgps_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "nibabel", "numpy", "scipy", "blosc2")
OF_THE_MOMENT = {"time", "command", "folder"}  # may differ between two sessions of a run without a word


def environment() -> dict:
    """JSON-able description of the machine and of the software."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _commit(),
    }


def differences(then: dict, now: dict) -> list[str]:
    """What of an environment is not as it was: "jax 0.10.2 then, 0.11.0 now"."""
    then, now = ({**e.get("packages", {}), **{k: v for k, v in e.items() if k not in {"packages", *OF_THE_MOMENT}}} for e in (then, now))
    return [f"{name} {_said(then.get(name))} then, {_said(now.get(name))} now"
            for name in sorted(set(then) | set(now)) if then.get(name) != now.get(name)]


def _said(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} x {value[0]}" if value and len(set(value)) == 1 else ", ".join(map(str, value)) or "none"
    return str(value) if value not in (None, "") else "none"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the source tree that this file lies in, with "-dirty" if files were changed since; None if it is no checkout."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
