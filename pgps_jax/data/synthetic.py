"""Labelled phantoms written as NIfTI in nnU-Net's raw layout: for the demo, the tests and the notebooks.

Each volume holds a large textured ellipsoid (the organ, label 1) with two to four small bright balls inside (lesions,
label 2), a bright tube outside that looks like a lesion but is none, blur and noise. Easy enough to learn on two cores in
minutes, imbalanced enough that a network which ignores small objects scores badly.
"""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from pgps_jax.architecture import Size
from pgps_jax.data.nifti import write_volume

LABELS = {"background": 0, "organ": 1, "lesion": 2}


def phantom(rng: np.random.Generator, shape: Size) -> tuple[Float[np.ndarray, "d h w"], UInt8[np.ndarray, "d h w"]]:
    """One image (arbitrary units, float32) and its labels (uint8)."""
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in shape], indexing="ij"))
    size = np.asarray(shape, np.float32)
    centre = size * rng.uniform(0.42, 0.58, 3)
    radii = size * rng.uniform(0.24, 0.34, 3)
    organ = _ball(grid, centre, radii)
    label = organ.astype(np.uint8)

    lesion = np.zeros(shape, bool)
    for _ in range(rng.integers(2, 5)):
        direction = rng.normal(size=3)
        position = centre + radii * 0.6 * rng.uniform(0, 1) * direction / np.linalg.norm(direction)
        lesion |= _ball(grid, position, np.full(3, rng.uniform(2.5, 4.5))) & organ
    label[lesion] = LABELS["lesion"]

    corner = size * rng.uniform(0.05, 0.12, 3)
    tube = ((grid[1] - corner[1]) ** 2 + (grid[2] - corner[2]) ** 2 < rng.uniform(2, 3) ** 2) & ~organ
    texture = ndimage.gaussian_filter(rng.normal(size=shape), 3) * 1.5
    image = 1.0 * organ + 1.2 * lesion + 1.8 * tube + texture * (0.3 + 0.4 * organ)
    image = ndimage.gaussian_filter(image, 0.6) + rng.normal(0, 0.15, shape)
    return (image * rng.uniform(80, 120) + rng.uniform(50, 150)).astype(np.float32), label


def _ball(grid: np.ndarray, centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
    return sum(((grid[k] - centre[k]) / radii[k]) ** 2 for k in range(3)) <= 1


def write_phantom_dataset(folder: Path, num_cases: int = 25, num_test: int = 0, shape: Size = (40, 48, 40), seed: int = 0) -> Path:
    """Write `num_cases` labelled phantoms to imagesTr/labelsTr and `num_test` more to imagesTs/labelsTs.

    Volumes differ in size (about `shape` voxels) and spacing (0.9 to 1.1 mm). The same seed gives the same files.
    """
    for name in ("imagesTr", "labelsTr") + (("imagesTs", "labelsTs") if num_test else ()):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(num_cases + num_test):
        rng = np.random.default_rng([seed, index])
        size = tuple(int(n + rng.integers(-3, 4)) for n in shape)
        image, label = phantom(rng, size)
        affine = np.diag([*rng.uniform(0.9, 1.1, 3).round(2), 1.0])
        split = "Tr" if index < num_cases else "Ts"
        write_volume(folder / f"images{split}" / f"phantom_{index:03d}_0000.nii.gz", image, affine)
        write_volume(folder / f"labels{split}" / f"phantom_{index:03d}.nii.gz", label, affine)
    description = {
        "name": folder.name,
        "description": "synthetic phantoms: a large organ with small lesions",
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))
    return folder
