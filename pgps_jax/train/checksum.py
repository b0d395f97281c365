"""Checksums that tell whether a checkpoint holds what was saved; its own format would return a flipped bit as a number."""

import json
import zlib
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


def sealed(description: dict, state: PyTree) -> dict:
    """The description with a checksum of every array of the state, and one of itself."""
    content = {**description, "arrays": checksums(state)}
    return {**content, "seal": _of_json(content)}


def check(description: Any, arrays: PyTree, within: str = "") -> None:
    """Compare arrays that were read with the description that `sealed` made. Those of older versions are believed.

    Args:
        within: path in the state of what was read, such as "params".

    Raises:
        ValueError: naming the first array that is not the one that was saved.
    """
    if not isinstance(description, dict):
        raise ValueError("its description is damaged")
    if "arrays" not in description and "seal" not in description:
        return
    if description.get("seal") != _of_json({key: value for key, value in description.items() if key != "seal"}):
        raise ValueError("its description is damaged")
    prefix = f"{within}/" if within else ""
    saved = {name: value for name, value in description["arrays"].items() if name.startswith(prefix)}
    found = checksums(arrays, prefix)
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise ValueError(f"{name} is not what was saved")


def checksums(tree: PyTree, prefix: str = "") -> dict[str, int]:
    """CRC-32 of type, shape and bytes of every array, by its path."""
    return {prefix + jax.tree_util.keystr(path, simple=True, separator="/"): _of_array(np.asarray(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _of_array(array: np.ndarray) -> int:
    kind = zlib.crc32(f"{array.dtype.name}{array.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), kind)


def _of_json(content: dict) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
