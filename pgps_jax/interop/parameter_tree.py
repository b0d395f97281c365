"""Nested parameters, their dotted names in PyTorch, and the layouts of kernels on both sides."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# PyTorch (out, in, d, h, w) <-> (d, h, w, in, out); transposed convolutions hold (in, out, d, h, w) there
TO_CONV, TO_TRANSPOSED = (2, 3, 4, 1, 0), (2, 3, 4, 0, 1)
FROM_CONV, FROM_TRANSPOSED = (4, 3, 0, 1, 2), (3, 4, 0, 1, 2)
DEEPEST = 32  # parts of a name
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DataParallel and torch.compile


def bare(name: str) -> str:
    """The name of a parameter without what PyTorch's wrappers put before it."""
    return _WRAPPERS.sub("", name)


def insert(tree: dict, name: str, leaf: str, array: Any) -> None:
    """Put an array where a dotted name says, but with `leaf` for its last part; numbers become int keys.

    Raises ValueError for a name that is too deep, or both an array and a part of the network.
    """
    *folders, _ = name.split(".")
    if len(folders) > DEEPEST:
        raise ValueError(f"a name of {len(folders)} parts")
    for part in folders:
        tree = tree.setdefault(int(part) if part.isdecimal() else part, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{name[:100]} goes through an array")
    if isinstance(tree.get(leaf), dict):
        raise ValueError(f"{name[:100]} is both an array and a part of the network")
    tree[leaf] = array


def leaves(tree: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of every parameter, list positions as text."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def torch_name(path: tuple[str, ...]) -> str:
    """The dotted name in PyTorch, where kernels and scales are weights."""
    *folders, leaf = path
    return ".".join([*folders, "weight" if leaf in ("kernel", "scale") else leaf])
