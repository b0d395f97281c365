"""From a config back to the command line that makes it: `reproduce RUN`."""

import dataclasses
import shlex
import typing
from pathlib import Path
from typing import Any

from pgps_jax.config import RunConfig

LEFT_OUT = {"dataset", "fresh"}  # the dataset is no flag; starting over would delete the run that is to be reproduced


def command_line(config: RunConfig, command: str = "run") -> str:
    """The command with every flag that differs from its default, quoted for a shell."""
    default = RunConfig(config.dataset)
    return shlex.join(["pgps-jax", command, str(config.dataset), *_flags(config, default, "")])


def _flags(config: Any, default: Any, prefix: str) -> list[str]:
    """Flags of a part config; those of parts that carry the name "" stand without a prefix, as on the command line."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    found: list[str] = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = field.name.replace("_", "-")
        if value == usual or (field.name in LEFT_OUT and not prefix):
            continue
        if dataclasses.is_dataclass(value):
            found += _flags(value, usual, prefix if _is_nameless(hints[field.name]) else f"{prefix}{name}.")
        elif isinstance(value, bool) and isinstance(usual, bool):
            found.append(f"--{prefix}{'' if value else 'no-'}{name}")
        else:
            found += [f"--{prefix}{name}", *_words(value)]
    return found


def _is_nameless(hint: Any) -> bool:
    return any(getattr(extra, "name", None) == "" for extra in getattr(hint, "__metadata__", ()))


def _words(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [word for part in value for word in _words(part)]
    return [str(value.expanduser()) if isinstance(value, Path) else str(value)]
