"""Start from the weights of another network: copy what fits, adapt what nearly fits, and say what became of the rest."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgps_jax.errors import InputError
from pgps_jax.interop.parameter_tree import leaves

# Layers that see the image, and layers that give the classes: U-Nets, then UNETR and Swin UNETR
_INPUT = re.compile(
    r"encoder\.stages\.0\.0\.convs\.0\.conv\.kernel|encoder\.stem\.convs\.0\.conv\.kernel"
    r"|vit\.patch_embedding\.patch_embeddings\.kernel|swinViT\.patch_embed\.proj\.kernel"
    r"|encoder1\.layer\.conv[13]\.conv\.kernel"
)
_HEAD = re.compile(r"decoder\.seg_layers\.\d+\.(kernel|bias)|out\.conv\.conv\.(kernel|bias)")


class Report(NamedTuple):
    """What became of each parameter, by its path ("encoder.stages.0..."); each path is in exactly one part."""

    matched: tuple[str, ...]  # copied as they are
    adapted: dict[str, str]  # path -> how
    skipped: dict[str, str]  # path -> why the network keeps its own, or why the source's is of no use

    def __str__(self) -> str:
        """A line for each kind of outcome, not for each parameter."""
        lines = [f"{len(self.matched)} parameters copied, {len(self.adapted)} adapted, {len(self.skipped)} skipped"]
        for what, part in (("adapted", self.adapted), ("skipped", self.skipped)):
            for reason in dict.fromkeys(part.values()):
                paths = [path for path, why in part.items() if why == reason]
                more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
                lines.append(f"  {what}: {', '.join(paths[:3])}{more}: {reason}")
        return "\n".join(lines)


def load_partially(
    target: Mapping,
    source: Mapping,
    *,
    target_classes: Sequence[str] | None = None,
    source_classes: Sequence[str] | None = None,
) -> tuple[dict, Report]:
    """A network's parameters with all that another one's can give it.

    * Same path, same shape: copied.
    * The first layers, where only the number of image channels differs: every channel gets the mean of the source's
      kernels over channels, times source channels / target channels. An image whose channels are all alike then gives the
      activations that it gave before.
    * Class heads, when both lists of names are given: each class gets the weights of the source's class of the same name, in
      whatever order, and keeps its own if there is none. Without names, heads are copied if their shapes agree.
    * All else keeps the target's value.

    Args:
        target, source: parameter trees of this package (nested, list positions as int or text), any array type.
        target_classes, source_classes: name of each output channel, background or regions included.

    Returns:
        The tree of `target` with NumPy arrays where something was loaded, in the target's dtype; and the report.

    Raises:
        InputError: nothing fits, or class names do not match the heads.
    """
    theirs, ours = ({".".join(path): value for path, value in leaves(tree)} for tree in (source, target))
    matched, adapted, skipped, loaded = [], {}, {}, {}
    named = target_classes is not None and source_classes is not None
    for path, own in ours.items():
        if path not in theirs:
            skipped[path] = "not in the source"
            continue
        given, shape = np.asarray(theirs[path]), tuple(own.shape)
        if named and _HEAD.fullmatch(path) and given.shape[:-1] == shape[:-1]:
            _check_names(path, given.shape[-1], source_classes, "source")
            _check_names(path, shape[-1], target_classes, "target")
            value, how = _by_name(np.asarray(own), given, target_classes, source_classes)
        elif given.shape == shape:
            value, how = given, None
        elif _INPUT.fullmatch(path) and given.shape[:-2] == shape[:-2] and given.shape[-1] == shape[-1]:
            n, m = given.shape[-2], shape[-2]
            value = np.broadcast_to(given.mean(axis=-2, keepdims=True) * (n / m), shape)
            how = f"{n} image channels became {m}, each their mean times {n}/{m}"
        else:
            skipped[path] = "shape differs: " + _shapes(given.shape, shape)
            continue
        if value is None:
            skipped[path] = how
            continue
        loaded[path] = np.array(value, dtype=np.asarray(own).dtype)
        if how is None:
            matched.append(path)
        else:
            adapted[path] = how
    skipped |= {path: "not in this network" for path in theirs if path not in ours}
    if not loaded:
        raise InputError(
            "Nothing of the pretrained weights fits this network: no parameter of the same name has the same shape. Use "
            "weights of the same backbone with the same features per stage."
        )
    return _replaced(target, loaded), Report(tuple(matched), adapted, skipped)


def _by_name(own, given, target_classes, source_classes) -> tuple[np.ndarray | None, str | None]:
    """Head with the classes of the same name replaced, and how (None: the same classes in the same order)."""
    found = [name for name in target_classes if name in source_classes]
    if not found:
        return None, "no class of the source has a name of this network's classes"
    if tuple(target_classes) == tuple(source_classes):
        return given, None
    value = own.copy()
    for k, name in enumerate(target_classes):
        if name in source_classes:
            value[..., k] = given[..., list(source_classes).index(name)]
    fresh = [name for name in target_classes if name not in source_classes]
    return value, f"classes copied by name: {', '.join(found)}" + (f"; fresh: {', '.join(fresh)}" if fresh else "")


def _check_names(path: str, outputs: int, names: Sequence[str], whose: str) -> None:
    if len(names) != outputs:
        raise InputError(
            f"{path} of the {whose} network has {outputs} outputs, but {len(names)} class names are given for it: "
            f"{', '.join(names)}."
        )


def _shapes(given: tuple[int, ...], own: tuple[int, ...]) -> str:
    return f"{given} in the source, {own} here"


def _replaced(tree: Mapping, values: dict[str, Any], prefix: str = "") -> dict:
    return {
        key: _replaced(value, values, f"{prefix}{key}.") if isinstance(value, Mapping) else values.get(f"{prefix}{key}", value)
        for key, value in tree.items()
    }
