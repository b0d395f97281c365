"""Surface distances and lesion counts of shapes whose answers are known."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from pgps_jax.data.dataset import Labels
from pgps_jax.errors import InputError
from pgps_jax.evaluate.summary import evaluate_folder
from pgps_jax.evaluate.surface import lesion_metrics, surface_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluate"


def ball(radius: float, spacing=(1.0, 1.0, 1.0), size: int = 40) -> np.ndarray:
    shape = [math.ceil(size / s) for s in spacing]
    grid = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)], indexing="ij")
    return (sum(g**2 for g in grid) <= radius**2).astype(np.int32)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_concentric_balls_are_apart_by_the_difference_of_their_radii(spacing):
    pytest.importorskip("surface_distance")
    small, large = ball(10, spacing), ball(14, spacing)
    for prediction, reference in ((small, large), (large, small)):
        metrics = surface_metrics(prediction, reference, [1], spacing, tolerance=2.0)[1]
        assert metrics["ASSD"] == pytest.approx(4, abs=0.7) and metrics["HD95"] == pytest.approx(4, abs=0.7)
        assert metrics["NSD"] < 0.01
    assert surface_metrics(small, large, [1], spacing, tolerance=6.0)[1]["NSD"] == 1
    assert surface_metrics(large, large, [1], spacing, 0.1)[1] == {"HD95": 0, "ASSD": 0, "NSD": 1}


def test_a_plate_moved_by_three_voxels_of_two_millimetres_is_six_millimetres_away():
    pytest.importorskip("surface_distance")
    prediction, reference = np.zeros((2, 20, 40, 40), np.int32)
    reference[2:12, 2:38, 2:38] = prediction[5:15, 2:38, 2:38] = 1
    metrics = surface_metrics(prediction, reference, [1], (2.0, 1.0, 1.0), 1.0)[1]
    assert metrics["HD95"] == 6 and 0.2 < metrics["NSD"] < 0.5  # the narrow sides stayed where they were


def test_an_absent_structure_costs_the_diagonal_and_two_absent_ones_nothing():
    pytest.importorskip("surface_distance")
    seg, empty = np.zeros((2, 3, 4, 12), np.int32)
    seg[1, 1, 1] = 1
    seg[0, 0, 0] = 3
    metrics = surface_metrics(empty, seg, [1, 2, (1, 2)], (3.0, 1.0, 1.0), 1.0, ignore=3)
    diagonal = math.sqrt(9**2 + 4**2 + 12**2)
    assert metrics[1] == metrics[(1, 2)] == {"HD95": diagonal, "ASSD": diagonal, "NSD": 0.0}
    assert all(math.isnan(value) for value in metrics[2].values())


def test_structures_at_the_border_of_the_volume_have_a_surface_there():
    pytest.importorskip("surface_distance")
    seg = np.ones((6, 6, 6), np.int32)
    assert surface_metrics(seg, seg, [1], (1.0, 1.0, 1.0), 0.5)[1] == {"HD95": 0, "ASSD": 0, "NSD": 1}


def test_lesions_are_counted_by_component():
    prediction, reference = np.zeros((2, 3, 9, 20), np.int32)
    reference[0, 0:3, 0:3] = 1  # found, although by one voxel only
    prediction[0, 2, 2] = 1
    reference[1, 6, 6] = reference[2, 7, 7] = 1  # one lesion, touching by a corner; missed
    reference[0, 8, 10:15] = 1  # one true lesion, predicted in two pieces: found once, neither piece false
    prediction[0, 8, 10] = prediction[0, 8, 13:15] = 1
    prediction[2, 0, 19] = 1  # false
    reference[2, 4, 0:2] = 3  # not judged
    prediction[2, 4, 0:2] = 1
    metrics = lesion_metrics(prediction, reference, [1, 2], ignore=3)
    expected = {"LesionF1": 4 / 6, "lesions_found": 2, "lesions_missed": 1, "lesions_false": 1}
    assert metrics[1] == expected
    assert math.isnan(metrics[2]["LesionF1"])


def test_further_measures_stand_beside_nnunets(tmp_path):
    pytest.importorskip("surface_distance")
    labels = Labels.from_json({"labels": {"background": 0, "a": 1, "b": 2}})
    folder = GOLDEN / "labels"
    summary = evaluate_folder(
        folder / "pred", folder / "ref", labels, output=tmp_path / "s.json", surface_tolerance=2.0, lesions=True
    )
    theirs = json.loads((folder / "summary.json").read_text())
    assert summary["mean"]["1"]["Dice"] == pytest.approx(theirs["mean"]["1"]["Dice"])
    perfect = next(c for c in summary["metric_per_case"] if "f_perfect" in c["prediction_file"])["metrics"]["1"]
    assert (perfect["HD95"], perfect["ASSD"], perfect["NSD"], perfect["LesionF1"]) == (0, 0, 1, 1)
    assert summary["foreground_mean"]["HD95"] > 0


def test_without_the_library_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "surface_distance", None)
    with pytest.raises(InputError, match="pip install"):
        surface_metrics(ball(3), ball(3), [1], (1.0, 1.0, 1.0), 1.0)
