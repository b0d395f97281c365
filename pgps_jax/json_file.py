"""Read JSON that may come from anyone, within bounds, and write it atomically."""

import json
import os
import re
from pathlib import Path
from typing import Any

from pgps_jax.errors import InputError

LARGEST_FILE = 256 * 1024**2  # bytes; a dataset.json or summary.json of ten thousand cases takes some tens of MB
DEEPEST = 64  # brackets within brackets; plans.json has 6. Code that walks the values may then recurse
LARGEST_INTEGER = 2**63 - 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, kind: type = dict, finite: bool = False, cure: str = "") -> Any:
    """The value in a JSON file.

    Args:
        kind: what it must be, dict or list.
        finite: refuse NaN and Infinity, which Python writes and reads though JSON does not have them.
        cure: what to do when there is no such file.

    Raises:
        InputError: missing or unreadable file, no JSON, another kind of value, or one beyond reason: text that is no
            Unicode, integers of more than 64 bits, more than `DEEPEST` levels, more than `LARGEST_FILE` bytes.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise InputError(f"{path}: larger than {LARGEST_FILE // 1024**2} MiB, more than any such file needs")
        value = parse_json(content.decode("utf-8"), finite)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: this file is missing{'; ' if cure else ''}{cure}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); restore it, or write it again") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise InputError(f"{path}: expected a JSON {wanted}, found a {type(value).__name__}")
    return value


def parse_json(text: str, finite: bool = False) -> Any:
    """The value of JSON text; ValueError or RecursionError for what `read_json` refuses."""
    value = json.loads(text, parse_int=_integer, parse_constant=_not_finite if finite else None)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # half a character can be neither printed nor used as a file name
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level if isinstance(outer, list | dict)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return value
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def write_json(path: Path, content: dict | list, indent: int = 2) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _integer(digits: str) -> int:
    value = int(digits)
    if abs(value) > LARGEST_INTEGER:
        raise ValueError(f"the number {digits[:20]}... has more than 64 bits")
    return value


def _not_finite(name: str) -> float:
    raise ValueError(f"{name} is not a number that can be used here")
