"""Which labels are each other's mirror image, and along which array axis left and right lie."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from pgps_jax.data.labels import Labels
from pgps_jax.errors import InputError

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
    members = {n: v if isinstance(v, tuple) else (v,) for n, v in zip(labels.names, labels.values, strict=True)}
    values = {name: value[0] for name, value in members.items() if len(value) == 1 and value[0] > 0}
    return tuple((values[left], values[right]) for left, right in name_pairs(values))


def inner_pairs(labels: Labels, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Pairs given by the integers of the label files, as pairs of the labels 0..K that are used inside.

    Raises InputError if a value is no foreground label or stands in two pairs.
    """
    known = labels.raw_values or range(max(labels.all_labels) + 1)
    inner = {raw: i for i, raw in enumerate(known) if i in labels.all_labels and i != 0}
    given = [value for pair in pairs for value in pair]
    unknown = sorted({value for value in given if value not in inner})
    if unknown:
        raise InputError(f"augment.label-pairs: {', '.join(map(str, unknown))} is no label of this dataset; there are "
                         f"{', '.join(map(str, inner))}")
    if len(set(given)) < len(given):
        raise InputError(f"augment.label-pairs: a label stands in two pairs; found {tuple(pairs)}")
    return tuple((inner[left], inner[right]) for left, right in pairs)


def swapped_outputs(labels: Labels, pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """For every output of a network, the output that it becomes in a mirrored image; twice gives them back.

    Outputs are the labels 0..K, or the regions in the order of dataset.json. Raises InputError if the mirror image of a
    region is no region.

    >>> swapped_outputs(Labels(("background", "left", "right", "liver"), (0, 1, 2, 3)), [(1, 2)])
    (0, 2, 1, 3)
    """
    other = {a: b for left, right in pairs for a, b in ((left, right), (right, left))}
    outputs = [frozenset(np.atleast_1d(value).tolist()) for value in (labels.foreground if labels.has_regions else labels.all_labels)]
    mirrored = [frozenset(other.get(label, label) for label in members) for members in outputs]
    for members, image in zip(outputs, mirrored, strict=True):
        if image not in outputs:
            raise InputError(f"mirror label-swap: the region of labels {sorted(members)} becomes {sorted(image)} in a mirrored image, "
                             "which is no region of dataset.json; add it, or mirror axes or none")
    return tuple(outputs.index(image) for image in mirrored)


def left_right_axis(affine: Float[np.ndarray, "4 4"], transpose_forward: Sequence[int] = (0, 1, 2)) -> int:
    """Axis of the transposed arrays that runs along the patient's left and right.

    Args:
        affine: NIfTI's, from voxel (x, y, z) to world (right, anterior, superior); arrays are (z, y, x).
        transpose_forward: the plan's; axis k of a transposed array is axis transpose_forward[k] of the array.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    array_axis = 2 - int(np.argmax(np.abs(directions[0])))
    return list(transpose_forward).index(array_axis)
