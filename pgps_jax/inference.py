"""What prediction needs to know beside the plan, the labels and the weights: inference.json of a run folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pgps_jax.config import from_json
from pgps_jax.data.nifti import check_orientation
from pgps_jax.data.plan import Plan
from pgps_jax.errors import InputError, brief
from pgps_jax.json_file import read_json


@dataclass(frozen=True)
class Inference:
    """Content of inference.json."""

    configuration: str
    """Configuration of the plans that was trained."""
    mirror_axes: tuple[int, ...]
    """Axes (0 d, 1 h, 2 w) along which test-time mirroring may flip."""
    swap_axis: int | None = None
    """Axis along which a flip exchanges the labels of `swap_pairs`; None if none does."""
    swap_pairs: tuple[tuple[int, int], ...] = ()
    """Labels of left and right that belong together."""
    orientation: str | None = None
    """Axis codes of the training images, such as "RAS"; imported models know theirs only if nnU-Net turned its images."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the network was trained to compute in; auto is decided by the device."""


def read_inference(run: Path, plan: Plan) -> Inference:
    """Read inference.json of a run folder.

    Raises:
        InputError: missing or damaged, or it does not fit the plan.
    """
    path = run / "inference.json"
    found = from_json(Inference, read_json(path, cure="this is no folder of a trained network"), f"{path}")
    if found.configuration not in plan.configurations:
        raise InputError(f"{path}: configuration {brief(found.configuration)} is not in the plan, which has "
                         f"{', '.join(plan.configurations)}")
    if not {*found.mirror_axes, found.swap_axis or 0} <= {0, 1, 2} or len(set(found.mirror_axes)) != len(found.mirror_axes):
        raise InputError(f"{path}: mirror_axes {brief(found.mirror_axes)} and swap_axis {found.swap_axis} must be of the axes 0, 1, 2")
    if found.orientation is not None:
        try:
            check_orientation(found.orientation)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return found
