"""Whole predictions: the frame of the original image, folders, bad input, and nnU-Net's own segmentations."""

from dataclasses import replace

import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import tree_map

from pgps_jax.data.dataset import Labels, RawCase
from pgps_jax.data.nifti import Volume, read_volume, reorient, write_volume
from pgps_jax.data.plan import Plan
from pgps_jax.errors import InputError
from pgps_jax.infer.predict import find_cases, make_predictor, predict_folder
from pgps_jax.infer.sliding_window import SlidingWindow
from pgps_jax.interop.pickles import read_properties
from pgps_jax.models import build


def image(shape=(11, 14, 9), seed=0):
    """Zero border of different widths, and inside three plateaus in blocks of two voxels."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice([20.0, 80.0, 140.0], size=[n // 2 + 1 for n in shape])
    x = blocks.repeat(2, 0).repeat(2, 1).repeat(2, 2)[: shape[0], : shape[1], : shape[2]].astype(np.float32)
    x[:2], x[:, -3:], x[:, :, :1] = 0, 0, 0
    return x


def expected(x):
    return np.select([x > 100, x > 50], [2, 1], 0)


def volume(x, spacing=(1.0, 1.0, 1.0)):
    return Volume(x, spacing, np.diag([*spacing[::-1], 1.0]))


AFFINE = np.array([[-1, 0, 0, 10], [0, 1, 0, -5.5], [0, 0, 1, 2], [0, 0, 0, 1.0]])


def write_case(folder, case, channels=1, seed=0, affine=AFFINE):
    folder.mkdir(exist_ok=True)
    for channel in range(channels):
        write_volume(folder / f"{case}_{channel:04d}.nii.gz", image(seed=seed) / channels, affine)


@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("regions", [False, True])
def test_labels_lie_where_the_image_is_bright_whatever_the_crop_and_the_transpose(
    bright_is_foreground, transpose, regions
):
    x = image()
    found = bright_is_foreground(transpose=transpose, regions=regions).predict_case([volume(x)])
    np.testing.assert_array_equal(found, expected(x))


def test_resampling_is_undone(bright_is_foreground):
    spacing = (1.0, 0.5, 2.0)
    x = np.full((12, 24, 8), 20.0, np.float32)
    x[3:9, 6:18, 2:6] = 80
    found = bright_is_foreground(spacing=(1.0, 1.0, 1.0)).predict_case([volume(x, spacing)])
    truth = expected(x)
    assert found.shape == x.shape
    assert 2 * (found * truth).sum() / (found.sum() + truth.sum()) > 0.9
    assert found[4:8, 8:16, 3:5].all() and not found[:2].any() and not found[:, :4].any() and not found[:, :, 0].any()


def test_a_folder_gives_the_same_labels_in_the_frame_of_its_images(bright_is_foreground, tmp_path):
    predictor = bright_is_foreground(channels=2)
    for seed, case in enumerate(["a", "b_1", "c"]):
        write_case(tmp_path / "in", case, channels=2, seed=seed)
    calls, tiles = [], []
    written, kept = predict_folder(predictor, tmp_path / "in", tmp_path / "out", progress=lambda *x: calls.append(x),
                                   tile_progress=lambda *x: tiles.append(x))
    assert kept == 0 and tiles[0] == (0, 3, "tile 1 of 4")
    assert [path.name for path in written] == ["a.nii.gz", "b_1.nii.gz", "c.nii.gz"]
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written)
    for seed, path in enumerate(written):
        label = read_volume(path)
        np.testing.assert_array_equal(label.array, expected(image(seed=seed)))
        np.testing.assert_allclose(label.affine, AFFINE, atol=1e-6)


def test_images_of_another_orientation_are_turned_to_the_trainings_and_labels_back(bright_is_foreground, tmp_path):
    def network(params, tiles):
        ramp = 10 * np.arange(8, dtype=np.float32)[:, None, None]  # to this network up and down differ
        return jnp.stack([jnp.zeros_like(tiles[..., 0]) + 60, tiles[..., 0] + ramp], -1)

    predictor = bright_is_foreground()
    labels = Labels.from_json({"labels": {"background": 0, "bright": 1}})
    predictor = replace(predictor, labels=labels, window=SlidingWindow(network, (8, 8, 8), 2), orientation="LAS")
    x = image()
    as_trained = Volume(x, (1.0, 1.0, 1.0), AFFINE)
    truth = predictor.predict_case([as_trained])
    for codes in ("RAI", "SLP"):
        turned, affine = reorient(x, AFFINE, codes)
        found = predictor.predict_case([Volume(turned, (1.0, 1.0, 1.0), affine)])
        np.testing.assert_array_equal(reorient(found, affine, "LAS")[0], truth)
    ignoring = replace(predictor, orientation=None).predict_case([Volume(*reorient_volume(x, "RAI"))])
    assert (reorient(ignoring, reorient(x, AFFINE, "RAI")[1], "LAS")[0] != truth).any(), "the example should need turning"


def reorient_volume(x, codes):
    turned, affine = reorient(x, AFFINE, codes)
    return turned, (1.0, 1.0, 1.0), affine


def test_existing_segmentations_are_kept_unless_told_otherwise(bright_is_foreground, tmp_path):
    predictor = bright_is_foreground()
    for case in "ab":
        write_case(tmp_path / "in", case)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii.gz").write_bytes(b"mine")
    written, kept = predict_folder(predictor, tmp_path / "in", tmp_path / "out")
    assert [p.name for p in written] == ["b.nii.gz"] and kept == 1
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == b"mine"
    assert len(predict_folder(predictor, tmp_path / "in", tmp_path / "out", overwrite=True).written) == 2
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() != b"mine"
    assert predict_folder(predictor, tmp_path / "in", tmp_path / "out") == ((), 2)


def test_segmentations_made_otherwise_are_neither_kept_silently_nor_mixed_with_new_ones(bright_is_foreground, tmp_path):
    predictor, out = bright_is_foreground(), tmp_path / "out"
    for case in "ab":
        write_case(tmp_path / "in", case)
    one, other = {"run": "one", "step_size": 0.5}, {"run": "other", "step_size": 0.5}
    predict_folder(predictor, tmp_path / "in", out, made_by=one)
    assert predict_folder(predictor, tmp_path / "in", out, made_by=one).kept == 2
    with pytest.raises(InputError, match=r"predict\.json.*run \('one' there, 'other' now\).*--overwrite"):
        predict_folder(predictor, tmp_path / "in", out, made_by=other)
    stopping = replace(predictor, window=SlidingWindow(stop, (8, 8, 8), 3))
    with pytest.raises(KeyboardInterrupt):
        predict_folder(stopping, tmp_path / "in", out, made_by=other, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["predict.json"], "what the first run made must not count as the second's"
    assert len(predict_folder(predictor, tmp_path / "in", out, made_by=other).written) == 2


def stop(*_):
    raise KeyboardInterrupt


def test_probabilities_that_are_asked_for_later_are_made_later(bright_is_foreground, tmp_path):
    write_case(tmp_path / "in", "a")
    predictor = bright_is_foreground()
    predict_folder(predictor, tmp_path / "in", tmp_path / "out")
    assert predict_folder(predictor, tmp_path / "in", tmp_path / "out", save_probabilities=True).kept == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.nii.gz", "a.npz", "a.pkl"]
    properties = read_properties(tmp_path / "out" / "a.pkl")
    np.testing.assert_allclose(properties["nibabel_stuff"]["original_affine"], AFFINE, atol=1e-6)
    assert predict_folder(predictor, tmp_path / "in", tmp_path / "out", save_probabilities=True) == ((), 1)


@pytest.mark.parametrize("regions", [False, True])
def test_saved_probabilities_agree_with_the_labels(bright_is_foreground, tmp_path, regions):
    write_case(tmp_path / "in", "a")
    predictor = bright_is_foreground(regions=regions, transpose=(2, 0, 1))
    predict_folder(predictor, tmp_path / "in", tmp_path / "out", save_probabilities=True)
    probabilities = np.load(tmp_path / "out" / "a.npz")["probabilities"]
    truth = expected(image())
    outside = image() == 0
    if regions:
        np.testing.assert_array_equal(probabilities > 0.5, [truth > 0, truth > 1])
        assert probabilities.shape[0] == 2 and (probabilities[:, outside] < 1e-6).all()
    else:
        np.testing.assert_array_equal(probabilities.argmax(0), truth)
        np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-6)
        assert (probabilities[0][outside] > 0.999).all()


def fault_missing_channel(folder):
    (folder / "b_0001.nii.gz").unlink()
    return "case b: channel 1 .T2. is missing.*b_0001.nii.gz"


def fault_surplus_channel(folder):
    (folder / "b_0002.nii.gz").write_bytes((folder / "b_0001.nii.gz").read_bytes())
    return "case b: .*b_0002.nii.gz is a channel too many"


def fault_shape(folder):
    write_volume(folder / "b_0001.nii.gz", image((11, 14, 10)), AFFINE)
    return "case b: .*b_0001.nii.gz has .11, 14, 10. voxels, its channel 0 has .11, 14, 9."


def fault_affine(folder):
    write_volume(folder / "b_0001.nii.gz", image(), np.diag([-1, 1, 1, 1.0]) @ AFFINE)
    return "case b: .*b_0001.nii.gz has another affine"


def fault_unreadable(folder):
    (folder / "b_0000.nii.gz").write_bytes(b"this is no image")
    return "b_0000.nii.gz"


def fault_no_images(folder):
    for path in folder.iterdir():
        path.rename(path.with_name(path.name.replace("_000", "-")))
    return "no images named CASE_0000.nii.gz"


@pytest.mark.parametrize("fault", [fault_missing_channel, fault_surplus_channel, fault_shape, fault_affine,
                                   fault_unreadable, fault_no_images])
def test_bad_input_is_named_before_anything_is_predicted(bright_is_foreground, tmp_path, fault):
    for case in "ab":
        write_case(tmp_path / "in", case, channels=2)
    message = fault(tmp_path / "in")
    with pytest.raises(InputError, match=message):
        predict_folder(bright_is_foreground(channels=2), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_used_are_named_after_all_others_are_segmented(bright_is_foreground, tmp_path):
    for case in "abcd":
        write_case(tmp_path / "in", case)
    bad = image()
    bad[5, 5, 5] = np.nan
    write_volume(tmp_path / "in" / "a_0000.nii.gz", bad, AFFINE)
    whole = (tmp_path / "in" / "c_0000.nii.gz").read_bytes()
    (tmp_path / "in" / "c_0000.nii.gz").write_bytes(whole[: len(whole) * 3 // 4])
    calls = []
    with pytest.raises(InputError, match=r"2 of 4 cases could not be segmented.*case a: .*not finite.*c_0000\.nii\.gz.*complete"):
        predict_folder(bright_is_foreground(), tmp_path / "in", tmp_path / "out", progress=lambda *x: calls.append(x))
    assert calls[-1] == (4, 4)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b.nii.gz", "d.nii.gz"]


@pytest.mark.parametrize("writer", ["write_volume", "np.savez_compressed"])
def test_a_full_disk_is_named_and_leaves_no_temporary_files(bright_is_foreground, tmp_path, monkeypatch, writer):
    def full(path, *_, **__):
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    write_case(tmp_path / "in", "a")
    if writer == "np.savez_compressed":
        monkeypatch.setattr(np, "savez_compressed", full)
    else:
        monkeypatch.setattr(nibabel, "save", lambda image, path: full(path))
    with pytest.raises(InputError, match=r"a\.nii\.gz: cannot be written \(No space left on device\)"):
        predict_folder(bright_is_foreground(), tmp_path / "in", tmp_path / "out", save_probabilities=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} <= {"a.npz", "a.pkl"}


def test_an_image_that_is_not_named_as_a_channel_is_not_passed_over(bright_is_foreground, tmp_path):
    write_case(tmp_path / "in", "a")
    (tmp_path / "in" / "a.nii.gz").write_bytes(b"the segmentation of a, beside its image")
    (tmp_path / "in" / "._a_0000.nii.gz").write_bytes(b"left by macOS")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    assert len(predict_folder(bright_is_foreground(), tmp_path / "in", tmp_path / "out").written) == 1
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"an image without channel")
    with pytest.raises(InputError, match=r"b\.nii\.gz: an image must be named CASE_0000\.nii\.gz"):
        predict_folder(bright_is_foreground(), tmp_path / "in", tmp_path / "out")


def test_a_turned_image_keeps_the_spacing_of_its_header(bright_is_foreground):
    predictor = replace(bright_is_foreground(), orientation="RAS")
    sideways = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # file axes A, S, R; the affine says 1 mm
    case = predictor.preprocess(RawCase(image()[None], None, (1.1, 1.2, 1.3), sideways))
    assert case.properties["spacing"] == [1.2, 1.3, 1.1], "array axes R, S, A become S, A, R"
    assert case.properties["shape_before_cropping"] == [14, 9, 11]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_cases(tmp_path / "nowhere", ("MRI",), ".nii.gz")


def test_a_case_needs_the_networks_channels(bright_is_foreground):
    with pytest.raises(InputError, match="1 images given, the network takes 2 channels"):
        bright_is_foreground(channels=2).predict_case([volume(image())])


def random_params(plan, labels, seed=0):
    network = nnx.eval_shape(lambda: build(
        plan.configurations["3d_fullres"].architecture, 1, labels.num_outputs, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    shapes = nnx.to_pure_dict(nnx.split(network, nnx.Param)[1])
    return tree_map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.fixture
def small_network(small_plans):
    plan = Plan.from_json(small_plans)
    labels = Labels.from_json({"labels": {"background": 0, "a": 1, "b": 2}})
    return plan, labels


def test_a_planned_network_predicts_and_folds_are_averaged(small_network):
    plan, labels = small_network
    folds = [random_params(plan, labels, seed) for seed in (0, 1)]
    case = volume(image())
    predictor = make_predictor(plan, plan.configurations["3d_fullres"], labels, ("MRI",), folds, mirror=False)
    raw = np.asarray(case.array)[None]
    one, two, both = (predictor.window(params, raw) for params in (folds[:1], folds[1:], folds))
    np.testing.assert_allclose(both, (one + two) / 2, atol=1e-4)
    assert both.shape == (3, *case.array.shape) and np.abs(one - two).max() > 0.1
    assert predictor.predict_case([case]).shape == case.array.shape


def test_weights_that_are_damaged_are_not_turned_into_labels(small_network):
    plan, labels = small_network
    broken = tree_map(lambda x: x * np.nan, random_params(plan, labels))
    with pytest.raises(FloatingPointError, match="not finite"):
        make_predictor(plan, plan.configurations["3d_fullres"], labels, ("MRI",), [broken]).predict_case(
            [volume(image())])
