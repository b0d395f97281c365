"""Plans equal nnU-Net's: published numbers of the planner, and whole plan files of real datasets."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.data.dataset import Dataset, Labels, open_dataset
from pgps_jax.data.fingerprint import Fingerprint
from pgps_jax.data.plan import Plan
from pgps_jax.data.planner import Overrides, Topology, initial_patch, make_plan, memory_estimate, plan_topology, target_spacing
from pgps_jax.errors import InputError

REAL = {"Hippocampus": "Dataset004_Hippocampus", "SarcomaPETCT": "Dataset101_SarcomaPETCT", "SunnybrookCMR": "Dataset102_Sunnybrook"}


def dataset_of(tmp_path, labels: int = 2, cases: int = 100, channels=("MRI",)) -> Dataset:
    names = {"background": 0} | {f"organ {i}": i for i in range(1, labels)}
    content = {"labels": names, "numTraining": cases, "file_ending": ".nii.gz"}
    return Dataset(tmp_path, "Dataset999_Test", channels, Labels.from_json(content), ".nii.gz", (), content)


def fingerprint_of(spacing, shape, cases: int = 2, relative_size: float = 1.0) -> Fingerprint:
    """All cases alike, but for half a voxel in the first axis's median if the shape asks for it."""
    low, high = ([int(f(n)) for n in shape] for f in (math.floor, math.ceil))
    shapes = tuple(tuple(low if i % 2 else high) for i in range(cases))
    properties = {"0": dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)}
    return Fingerprint((tuple(float(s) for s in spacing),) * cases, shapes, properties, relative_size)


GOLDEN = {  # spacing, median shape, labels, cases -> configuration: patch, batch, times that each axis is halved
    "Hippocampus": ((1, 1, 1), (36, 50, 35), 3, 260, {"3d_fullres": ((40, 56, 40), 9, (3, 3, 3))}),
    "Lung": ((1.244979977607727, 0.78515625, 0.78515625), (252, 512, 512), 2, 63, {
        "3d_fullres": ((80, 192, 160), 2, (4, 5, 5)), "3d_lowres": ((80, 192, 160), 2, (4, 5, 5)), "2d": ((1, 512, 512), 12, None)}),
    "PET-CT": ((3.0, 2.0364201068878174, 2.0364201068878174), (326, 400, 400), 2, 500, {
        "3d_fullres": ((128, 128, 128), 2, (5, 5, 5)), "3d_lowres": ((128, 128, 128), 2, (5, 5, 5)), "2d": ((1, 448, 448), 16, None)}),
    "Kidney": ((0.9130857586860657, 0.78515625, 0.81640625), (434.5, 512, 467), 3, 200, {
        "3d_fullres": ((128, 128, 128), 2, (5, 5, 5)), "3d_lowres": ((128, 128, 128), 2, (5, 5, 5))}),
    "isotropic": ((1, 1, 1), (136, 153, 171), 2, 500, {"3d_fullres": ((112, 128, 160), 2, (4, 5, 5))}),
}  # fmt: skip
LOWRES = {
    "Lung": ((2.3855103790575867, 1.5044405671133478, 1.5044405671133478), (132, 267, 267)),
    "PET-CT": ((5.58088371512849, 3.7883412705634814, 3.7883412705634814), (175, 215, 215)),
    "Kidney": ((2.1517464029479867, 1.8502721355776768, 1.923914807640471), (184, 217, 198)),
}


def halvings(strides) -> tuple[int, ...]:
    return tuple(int(n) for n in np.log2(np.prod(strides, axis=0)))


@pytest.mark.parametrize("name", GOLDEN)
def test_published_plans_come_out(tmp_path, name):
    spacing, shape, labels, cases, configurations = GOLDEN[name]
    plan = make_plan(dataset_of(tmp_path, labels, cases), fingerprint_of(spacing, shape))
    assert ("3d_lowres" in plan.configurations) == ("3d_lowres" in configurations)
    for key, (patch, batch, halved) in configurations.items():
        found = plan.configurations[key]
        assert (found.patch_size, found.batch_size) == (patch, batch)
        assert halved is None or halvings(found.architecture.strides) == halved
    if name in LOWRES:
        lowres = plan.configurations["3d_lowres"]
        np.testing.assert_allclose(lowres.spacing, LOWRES[name][0], rtol=1e-12)
        assert lowres.median_shape == LOWRES[name][1]
        cascade = plan.configurations["3d_cascade_fullres"]
        assert cascade.previous_stage == "3d_lowres" and cascade.patch_size == plan.configurations["3d_fullres"].patch_size
        assert plan.to_json()["configurations"]["3d_cascade_fullres"] == {
            "inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        assert plan.configurations["3d_fullres"].batch_dice and not lowres.batch_dice
    else:
        assert not plan.configurations["3d_fullres"].batch_dice


def test_memory_estimates_equal_nnunets():
    cube = plan_topology((1, 1, 1), (128, 128, 128))
    assert memory_estimate(cube, "plain-unet", 2) == 450_699_264
    assert memory_estimate(cube, "resenc-unet", 3) == 557_420_544
    assert memory_estimate(plan_topology((1, 1, 1), (40, 56, 40)), "plain-unet", 3) == 19_174_400
    assert memory_estimate(plan_topology((1, 1, 1), (112, 128, 160)), "plain-unet", 2) == 492_997_120
    seven = Topology(((1, 1),) + ((2, 2),) * 6, ((3, 3),) * 7, (512, 512), (64, 64))
    assert memory_estimate(seven, "resenc-unet", 3) == 129_531_904


def test_anisotropic_axes_are_left_alone_until_the_others_have_caught_up():
    found = plan_topology((8, 1.25, 1.25), (10, 256, 256))
    assert found.strides[1:4] == ((1, 2, 2), (1, 2, 2), (2, 2, 2)) and found.kernel_sizes[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert found.patch_size == (10, 256, 256) and found.divisor == (2, 64, 64)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(0.2, 8)] * 3), st.tuples(*[st.integers(4, 300)] * 3))
def test_a_patch_is_what_its_strides_divide_and_leaves_a_bottleneck(spacing, patch):
    found = plan_topology(spacing, patch)
    assert len(found.kernel_sizes) == len(found.strides) and found.strides[0] == (1, 1, 1)
    assert found.divisor == tuple(np.prod(found.strides, axis=0))
    for asked, rounded, divisor in zip(patch, found.patch_size, found.divisor, strict=True):
        assert rounded % divisor == 0 and asked <= rounded < asked + divisor and rounded // divisor >= 4
    assert all(a <= b for fine, coarse in zip(found.kernel_sizes, found.kernel_sizes[1:], strict=False)
               for a, b in zip(fine, coarse, strict=True))


def test_the_first_patch_is_a_cube_in_mm_within_the_median_case():
    np.testing.assert_array_equal(initial_patch(np.array([2.0, 1, 1]), np.array([1000, 1000, 1000])), [161, 323, 323])
    np.testing.assert_array_equal(initial_patch(np.array([1.0, 1, 1]), np.array([36.5, 50, 1000])), [36.5, 50, 256])


def test_the_coarse_axis_of_thick_slices_takes_the_finest_tenth():
    def spacing(worst: list[float], depth: int = 20):
        spacings = tuple((z, 1.0, 1.0) for z in worst)
        return target_spacing(dataclasses.replace(
            fingerprint_of((5, 1, 1), (depth, 200, 200), len(worst)), spacings=spacings))[0]

    thick = [5.0] * 8 + [2.0, 2.0]
    assert spacing(thick) == 2.0
    assert spacing(thick, depth=100) == 5.0  # many slices: anisotropic in mm only
    assert spacing([2.5] * 8 + [1.5] * 2) == 2.5  # not anisotropic enough
    assert spacing([5.0] * 8 + [0.5, 0.5]) == 1.0 + 1e-5  # never finer than the other axes


def test_the_coarsest_axis_comes_first_and_the_way_back_is_its_inverse(tmp_path):
    plan = make_plan(dataset_of(tmp_path), fingerprint_of((1, 1.5, 3), (100, 90, 60)))
    assert plan.transpose_forward == (2, 0, 1) and plan.transpose_backward == (1, 2, 0)
    assert plan.configurations["3d_fullres"].spacing == (3, 1, 1.5)
    assert plan.configurations["2d"].spacing == (3, 1, 1.5) and plan.configurations["2d"].patch_size[0] == 1
    assert plan.original_median_shape == (60, 100, 90)
    odd = make_plan(dataset_of(tmp_path), fingerprint_of((1, 1, 1), (330.5, 375.5, 76)))
    assert odd.original_median_shape == (330, 376, 76)  # halves to even


def test_the_channel_name_and_the_crop_choose_the_normalisation(tmp_path):
    dataset = dataset_of(tmp_path, channels=("CT", "T1", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "zscore"))
    names = tuple(f"{n}Normalization" for n in ("CT", "ZScore", "No", "RescaleTo01", "RGBTo01", "ZScore"))
    for relative_size, masked in ((0.74, True), (0.75, False)):
        found = make_plan(dataset, fingerprint_of((1, 1, 1), (60, 60, 60), relative_size=relative_size)).configurations["3d_fullres"]
        assert found.normalization_schemes == names
        assert found.use_mask_for_norm == (False, masked, False, False, False, masked)


def test_single_slices_are_planned_in_2d_only(tmp_path):
    assert list(make_plan(dataset_of(tmp_path), fingerprint_of((5, 1, 1), (1, 300, 300))).configurations) == ["2d"]


# ---------------------------------------------------------------------------------------------------------- overrides


def fullres(tmp_path, **wishes):
    plan = make_plan(dataset_of(tmp_path), fingerprint_of((1, 1, 1), (136, 153, 171)), "nnunet", Overrides(**wishes))
    return plan.configurations["3d_fullres"], plan.notes


def test_a_wished_patch_is_rounded_up_and_the_reason_said(tmp_path):
    found, notes = fullres(tmp_path, patch_size=(60, 97, 128))
    assert found.patch_size == (64, 112, 128) and len(notes) == 1
    assert notes[0].startswith("patch size 60 x 97 x 128 became 64 x 112 x 128") and "multiples of 16 x 16 x 16" in notes[0]
    assert fullres(tmp_path, patch_size=(64, 96, 128))[1] == ()


def test_a_patch_or_batch_beyond_the_memory_is_kept_with_a_warning(tmp_path):
    found, notes = fullres(tmp_path, patch_size=(192, 192, 192), batch_size=6)
    assert found.patch_size == (192, 192, 192) and found.batch_size == 6
    assert "times the memory of 8 GB" in notes[0] and "batch size 6" in notes[1]
    assert fullres(tmp_path, batch_size=1)[0].batch_size == 1


def test_more_memory_gives_larger_patches_and_less_memory_smaller_ones(tmp_path):
    voxels = [math.prod(fullres(tmp_path, gpu_memory_target=gb)[0].patch_size) for gb in (2.0, 8.0, 24.0)]
    assert voxels == sorted(set(voxels))


def test_a_wished_spacing_is_in_the_files_axes(tmp_path):
    assert fullres(tmp_path, target_spacing=(1.0, 2.0, 1.5))[0].spacing == (2, 1, 1.5)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"patch_size": (4, 4, 4)}, "--patch-size 4 x 4 x 4: too small"),
        ({"patch_size": (0, 64, 64)}, "--patch-size"),
        ({"target_spacing": (1.0, -1.0, 1.0)}, "--target-spacing"),
        ({"batch_size": 0}, "--batch-size"),
        ({"gpu_memory_target": math.nan}, "--gpu-memory-target"),
        ({"gpu_memory_target": 1e-4}, "too little for any patch"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(tmp_path, wishes, words):
    with pytest.raises(InputError, match=words):
        fullres(tmp_path, **wishes)


def test_an_unknown_planner_is_refused(tmp_path):
    with pytest.raises(InputError, match="resenc-m, resenc-l, resenc-xl"):
        make_plan(dataset_of(tmp_path), fingerprint_of((1, 1, 1), (9, 9, 9)), "resenc")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    ("planner", "file"), [("nnunet", "nnUNetPlans"), ("resenc-m", "nnUNetResEncUNetMPlans"), ("resenc-l", "nnUNetResEncUNetLPlans")]
)
def test_real_plans_equal_nnunets_in_every_field(real_data, real_parity, name, planner, file):
    folder = real_parity / "plans" / REAL[name]
    fingerprint = Fingerprint.from_json(json.loads((folder / "dataset_fingerprint.json").read_text()))
    dataset = dataclasses.replace(open_dataset(real_data / name), name=REAL[name])
    want = json.loads((folder / f"{file}.json").read_text())
    found = make_plan(dataset, fingerprint, planner)
    assert found.to_json() == want and Plan.from_json(want) == found


@pytest.mark.parametrize(("wished", "ending", "planned", "noted"), [
    (None, ".nii.gz", "SimpleITKIO", False), ("None", ".nii", "NibabelIO", False), ("NibabelIO", ".nii.gz", "NibabelIO", False),
    ("NibabelIOWithReorient", ".nii.gz", "SimpleITKIO", True), (["odd"], ".nii", "NibabelIO", True)])
def test_the_plan_names_a_reader_that_takes_images_as_they_are_taken_here(tmp_path, wished, ending, planned, noted):
    dataset = dataset_of(tmp_path)
    dataset = dataclasses.replace(dataset, file_ending=ending, json=dataset.json | {"overwrite_image_reader_writer": wished})
    plan = make_plan(dataset, fingerprint_of((1, 1, 1), (36, 50, 35)))
    assert plan.image_reader_writer == planned
    assert [f"reader {wished!r}, which is not used here" in note for note in plan.notes] == [True] * noted
