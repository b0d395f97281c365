"""What the voxels of a label map stand for: labels, regions and the ignore label of a dataset.json."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer, Num

from pgps_jax.errors import InputError, brief

Label = int | tuple[int, ...]  # a tuple is a region: the union of several labels
MOST_LABELS = 2**15 - 2  # label maps are int16, with -1 outside the body
_PIECE = 2**18  # voxels that are translated at once
_MOST_LISTED = 10  # values that are no labels
WHOLE = 1e-4  # how far values of a label file may be from whole numbers: scaled headers give 0.9999999 for 1


@dataclass(frozen=True)
class Labels:
    """What the voxels of a label map stand for.

    Inside, labels are always 0, 1, ..., K without gaps, the ignore label last. Files may use any integers: `raw_values`
    holds what label i is called in the files, and is empty where both agree. `encode` and `decode` translate.
    """

    names: tuple[str, ...]
    values: tuple[Label, ...]  # in the order of dataset.json, including background, without the ignore label
    ignore: int | None = None
    regions_class_order: tuple[int, ...] | None = None
    raw_values: tuple[int, ...] = ()

    @property
    def has_regions(self) -> bool:
        """Overlapping regions, each with an output of its own, instead of exclusive labels."""
        return any(isinstance(value, tuple) for value in self.values)

    @property
    def foreground(self) -> tuple[Label, ...]:
        """Labels or regions other than background, in the order of dataset.json."""
        return tuple(value for value in self.values if value != 0)

    @property
    def all_labels(self) -> tuple[int, ...]:
        """Every integer that is annotated, sorted, with 0 and without the ignore label."""
        members = (value if isinstance(value, tuple) else (value,) for value in self.values)
        return tuple(sorted({label for region in members for label in region}))

    @property
    def num_outputs(self) -> int:
        """Output channels of a network: one per label with background, or one per foreground region."""
        return len(self.foreground) if self.has_regions else len(self.all_labels)

    @property
    def in_files(self) -> "Labels":
        """The same labels by the integers that the dataset's files use: for reading and comparing files as they are."""
        if not self.raw_values:
            return self

        def raw(value: Label) -> Label:
            return tuple(raw(v) for v in value) if isinstance(value, tuple) else self.raw_values[value]

        order = None if self.regions_class_order is None else raw(self.regions_class_order)
        ignore = None if self.ignore is None else raw(self.ignore)
        return Labels(self.names, tuple(raw(v) for v in self.values), ignore, order)

    def encode(self, array: Num[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """Label map of a file -> int16 labels 0..K. Raises ValueError listing the values that are no labels."""
        known = np.asarray(self.raw_values or self.all_labels + (() if self.ignore is None else (self.ignore,)))
        below, above = int(known.min()) - 1, int(known.max()) + 1  # stand for everything outside the known range
        table = np.full(above - below + 1, -1, np.int16)
        table[known - below] = np.arange(len(known))
        encoded, flat, strange = np.empty(array.size, np.int16), array.reshape(-1), np.empty(0, array.dtype)
        for start in range(0, array.size, _PIECE):  # so that what is in between takes no memory to speak of
            piece = flat[start : start + _PIECE]
            whole = np.rint(np.clip(np.nan_to_num(piece.astype(np.float64), nan=below), below, above))
            labels = table[whole.astype(np.int64) - below]
            unknown = (labels < 0) | (np.abs(whole - piece) > WHOLE)
            strange = np.unique(np.concatenate([strange, piece[unknown]]))[: _MOST_LISTED + 1]
            encoded[start : start + _PIECE] = labels
        if len(strange):
            raise ValueError(", ".join(f"{v:g}" for v in strange[:_MOST_LISTED]) + (", ..." if len(strange) > _MOST_LISTED else ""))
        return encoded.reshape(array.shape)

    def decode(self, array: Integer[np.ndarray, "*shape"]) -> Integer[np.ndarray, "*shape"]:
        """Labels 0..K -> the integers that the dataset's files use."""
        return np.asarray(self.raw_values)[array] if self.raw_values else array

    @staticmethod
    def from_json(dataset_json: dict) -> "Labels":
        """Labels of a dataset.json.

        Raises:
            InputError: background is not 0, a label is neither an integer nor a list of integers, the ignore label is a
                region or used otherwise, regions without a fitting `regions_class_order`.
        """
        entries = dataset_json.get("labels")
        if not isinstance(entries, dict) or not entries:
            raise InputError('dataset.json: "labels" must be an object {name: integer}, with "background": 0')
        if all(str(name).lstrip("-").isdigit() and isinstance(value, str) for name, value in entries.items()):
            raise InputError('dataset.json: "labels" is written {"1": "liver"}; nnU-Net wants {"liver": 1}. '
                             "Is this a Medical Segmentation Decathlon folder? Convert it with `convert-msd`")
        if len(entries) > MOST_LABELS:
            raise InputError(f'dataset.json: "labels" has {len(entries)} entries; at most {MOST_LABELS} can be told apart')
        values = {name: _label_value(name, value) for name, value in entries.items()}
        if not any(isinstance(value, tuple) and len(value) > 1 for value in values.values()):
            values = {name: value[0] if isinstance(value, tuple) else value for name, value in values.items()}  # no regions: nnU-Net's rule
        if values.get("background") != 0:
            raise InputError('dataset.json: "labels" must contain "background": 0')
        ignore = values.pop("ignore", None)
        if isinstance(ignore, tuple):
            raise InputError('dataset.json: the label "ignore" must be one integer, not a region')
        labels = Labels(tuple(values), tuple(values.values()), ignore, None)
        if len(labels.all_labels) > MOST_LABELS:
            raise InputError(f'dataset.json: "labels" names {len(labels.all_labels)} values; at most {MOST_LABELS} can be told apart')
        if ignore in labels.all_labels:
            raise InputError(f'dataset.json: the value {ignore} of "ignore" is used by another label too')
        if len(set(labels.values)) != len(labels.values):
            raise InputError('dataset.json: two names in "labels" have the same value; every label needs its own')
        return _without_gaps(_with_class_order(labels, dataset_json.get("regions_class_order")))


def _label_value(name: str, value: object) -> Label:
    members = value if isinstance(value, list) else [value]
    if not members or not all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**24 for v in members):
        raise InputError(f'dataset.json: label "{name}" is {brief(value)}; want an integer, or a list of them for a region')
    return tuple(members) if isinstance(value, list) and not (len(members) == 1 and name in ("background", "ignore")) else members[0]


def _with_class_order(labels: Labels, order: object) -> Labels:
    if not labels.has_regions:
        return labels
    wanted = len(labels.foreground)
    known = set(labels.all_labels)
    if not isinstance(order, list) or len(order) != wanted or not all(type(label) is int and label in known for label in order):
        raise InputError(f'dataset.json: with regions, "regions_class_order" must list the label to write for each of '
                         f"the {wanted} foreground regions, in their order; found {brief(order)}")
    return Labels(labels.names, labels.values, labels.ignore, tuple(order))


def _without_gaps(labels: Labels) -> Labels:
    """Number the labels 0..K, the ignore label last, and remember what the files call them."""
    raw = labels.all_labels if 0 in labels.all_labels[:1] else (0, *(v for v in labels.all_labels if v != 0))
    raw += () if labels.ignore is None else (labels.ignore,)
    if raw == tuple(range(len(raw))):
        return labels

    number = {value: i for i, value in enumerate(raw)}

    def inner(value: Label) -> Label:
        return tuple(inner(v) for v in value) if isinstance(value, tuple) else number[value]

    order = None if labels.regions_class_order is None else inner(labels.regions_class_order)
    ignore = None if labels.ignore is None else len(raw) - 1
    return Labels(labels.names, tuple(inner(v) for v in labels.values), ignore, order, raw)
