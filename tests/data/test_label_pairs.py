"""Left and right are found in label names and in the geometry."""

import numpy as np
import pytest

from pgps_jax.data.label_pairs import inner_pairs, label_pairs, left_right_axis, name_pairs, swapped_outputs
from pgps_jax.data.labels import Labels
from pgps_jax.errors import InputError


@pytest.mark.parametrize(("left", "right"), [
    ("kidney_left", "kidney_right"), ("Left-Hippocampus", "Right-Hippocampus"), ("Optic Nerve L", "Optic Nerve R"),
    ("OpticNrv_L", "OpticNrv_R"), ("leftKidney", "rightKidney"), ("lt_parotid", "rt_parotid"), ("ParotidL", "ParotidR"),
    ("lh-insula", "rh-insula"), ("rib_left_3", "rib_right_3"), ("lung_upper_lobe_left", "lung_upper_lobe_right"),
    ("Left Lateral Ventricle", "Right Lateral Ventricle"), ("LEFT FEMUR", "RIGHT FEMUR"),
])
def test_names_that_differ_in_the_side_alone_are_pairs(left, right):
    assert name_pairs(["background", right, "liver", left]) == ((left, right),)


@pytest.mark.parametrize("names", [
    ("kidney_left",), ("kidney_left", "lung_right"), ("liver", "lever"), ("rib_left_3", "rib_right_4"),
    ("left ventricle", "right ventricle"), ("heart_atrium_left", "heart_atrium_right"),
    ("left kidney", "R kidney"), ("left of right lobe", "right of right lobe"),
])
def test_other_names_are_no_pairs(names):
    assert name_pairs(names) == ()


def test_pairs_of_labels_are_pairs_of_values_without_regions():
    names = ("background", "kidney_left", "kidney_right", "lung_left", "lung_right")
    assert label_pairs(Labels(names, (0, 4, 2, 1, 3), None, None)) == ((4, 2), (1, 3))
    assert label_pairs(Labels(names, (0, 4, 2, (1, 5), (3, 6)), None, (1, 2, 3, 4))) == ((4, 2),)


def test_given_pairs_are_in_the_integers_of_the_files():
    labels = Labels.from_json({"labels": {"background": 0, "a": 5, "b": 20, "c": 7, "ignore": 255}})
    assert inner_pairs(labels, [(20, 5)]) == ((3, 1),)
    plain = Labels(("background", "a", "b"), (0, 1, 2))
    assert inner_pairs(plain, [(1, 2)]) == ((1, 2),)
    for pairs, words in (([(1, 5)], "1 is no label"), ([(255, 5)], "255 is no label"), ([(0, 5)], "0 is no label"),
                         ([(5, 7), (7, 20)], "stands in two pairs"), ([(5, 5)], "stands in two pairs")):
        with pytest.raises(InputError, match=words):
            inner_pairs(labels, pairs)


def test_outputs_of_labels_and_regions_are_exchanged_with_their_mirror_images():
    names = ("background", "left", "right", "liver")
    assert swapped_outputs(Labels(names, (0, 2, 1, 3)), [(2, 1)]) == (0, 2, 1, 3)
    regions = Labels(("background", "left", "right", "both", "left core"), (0, (1, 3), (2, 4), (1, 2, 3, 4), 3), None, (1, 2, 1, 3))
    with pytest.raises(InputError, match=r"\[3\] becomes \[4\]"):
        swapped_outputs(regions, [(1, 2), (3, 4)])
    whole = Labels((*regions.names, "right core"), (*regions.values, 4), None, (1, 2, 1, 3, 4))
    assert swapped_outputs(whole, [(1, 2), (3, 4)]) == (1, 0, 2, 4, 3)


def test_the_left_right_axis_follows_orientation_and_transpose():
    ras, sagittal = np.diag([-1.0, 1, 2, 1]), np.array([[0.0, 0, 3, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    tilted = np.array([[0.9, 0.1, 0.5, 0], [-0.1, 1, 0, 0], [-0.2, 0, 5, 0], [0, 0, 0, 1]])
    assert left_right_axis(ras) == 2  # voxel axis x is the last array axis
    assert left_right_axis(tilted) == 2  # thick slices do not outweigh direction
    assert left_right_axis(sagittal) == 0
    assert left_right_axis(ras, (2, 0, 1)) == 0
    assert left_right_axis(ras, (1, 0, 2)) == 2
