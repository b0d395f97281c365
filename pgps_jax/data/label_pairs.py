"""Which labels are each other's mirror image, and along which array axis left and right lie."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from pgps_jax.data.dataset import Labels

SIDES = {"left": 0, "right": 1, "l": 0, "r": 1, "lt": 0, "rt": 1, "lh": 0, "rh": 1}
# Named after their side but no mirror images of each other: the chambers of the heart.
NO_MIRROR_IMAGE = re.compile(r"atri(um|a|al)\b|auric|heart|cardiac|(?<!lateral )ventric|myocard", re.IGNORECASE)


def name_pairs(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Pairs (left, right) of names that differ only in a word for the side: left/right, L/R, lt/rt, lh/rh.

    Words are separated by anything but letters and digits, or by camel case. Heart chambers are no pairs, as the left
    one is no mirror image of the right.

    >>> name_pairs(["background", "kidney_left", "kidney_right", "Hippocampus-L", "Hippocampus-R", "liver"])
    (('kidney_left', 'kidney_right'), ('Hippocampus-L', 'Hippocampus-R'))
    """
    sides: dict[tuple[str, ...], dict[int, str]] = {}
    for name in names:
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
        of_side = [i for i, word in enumerate(words) if word.lower() in SIDES]
        if len(of_side) != 1 or NO_MIRROR_IMAGE.search(" ".join(words)):
            continue
        (i,) = of_side
        words = [word.lower() for word in words]
        # "left" pairs with "right", not with "R": the style is part of the key
        style = {"left": "word", "right": "word"}.get(words[i], f"{len(words[i])}{words[i][1:]}")
        key = (*words[:i], f"<{style}>", *words[i + 1 :])
        sides.setdefault(key, {})[SIDES[words[i]]] = name
    return tuple((both[0], both[1]) for both in sides.values() if len(both) == 2)


def label_pairs(labels: Labels) -> tuple[tuple[int, int], ...]:
    """Pairs (left, right) of label values, by the labels' names; regions are left out, since they consist of labels."""
    values = {n: v for n, v in zip(labels.names, labels.values, strict=True) if isinstance(v, int) and v > 0}
    return tuple((values[left], values[right]) for left, right in name_pairs(values))


def left_right_axis(affine: Float[np.ndarray, "4 4"], transpose_forward: Sequence[int] = (0, 1, 2)) -> int:
    """Axis of the transposed arrays that runs along the patient's left and right.

    Args:
        affine: NIfTI's, from voxel (x, y, z) to world (right, anterior, superior); arrays are (z, y, x).
        transpose_forward: the plan's; axis k of a transposed array is axis transpose_forward[k] of the array.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    array_axis = 2 - int(np.argmax(np.abs(directions[0])))
    return list(transpose_forward).index(array_axis)
