"""The way back to the image's frame, against plain resampling of all classes at once."""

import numpy as np
import pytest

from pgps_jax.data.resample import resample_image
from pgps_jax.infer.export import Grids, axis_taps, decide_classes, decide_regions, interpolate

ISOTROPIC = ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
COARSE = ((5.0, 1.0, 1.0), (6.0, 0.8, 0.8))
GRIDS = [
    ((9, 10, 11), Grids((12, 10, 17), *ISOTROPIC)),
    ((9, 10, 11), Grids((5, 4, 6), *ISOTROPIC)),
    ((9, 10, 11), Grids((9, 10, 11), *ISOTROPIC)),
    ((6, 10, 11), Grids((5, 13, 8), *COARSE)),
    ((4, 10, 11), Grids((8, 13, 8), *COARSE)),
]


def blobs(num_classes, shape, seed=0):
    """Logits as networks give them: background wins nearly everywhere, each class in a small place of its own."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (num_classes, *shape)).astype(np.float32)
    logits[0] += 4
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    for k in range(1, num_classes):
        centre = rng.uniform(0, shape)
        logits[k] += 9 * np.exp(-np.sum((grid - centre) ** 2, -1) / 4)
    return logits


@pytest.mark.parametrize(("shape", "grids"), GRIDS)
def test_classes_equal_resampling_them_all_and_taking_the_largest(shape, grids):
    logits = blobs(6, shape)
    values = (0, 1, 2, 3, 4, 300)
    whole = resample_image(logits, *grids, order=1)
    top = np.sort(whole, axis=0)
    clear = top[-1] - top[-2] > 1e-5  # the sums run in another order, so that ties may fall either way
    ours = decide_classes(logits, grids, values)
    expected = np.array(values)[whole.argmax(0)]
    assert ours.dtype == np.uint16 and clear.mean() > 0.999
    assert len(np.unique(expected)) >= 4, "the example should show several classes"
    np.testing.assert_array_equal(ours[clear], expected[clear])


@pytest.mark.parametrize(("shape", "grids"), GRIDS)
def test_regions_equal_resampling_them_all_and_writing_in_order(shape, grids):
    logits = blobs(4, shape)[1:] - 4
    whole = resample_image(logits, *grids, order=1)
    expected = np.zeros(grids.shape, int)
    for k, value in enumerate((2, 1, 3)):
        expected[whole[k] > 0] = value
    ours = decide_regions(logits, grids, (2, 1, 3))
    clear = np.abs(whole).min(0) > 1e-5
    assert ours.dtype == np.uint8 and clear.mean() > 0.99 and expected.any()
    np.testing.assert_array_equal(ours[clear], expected[clear])


def test_a_later_region_overwrites_an_earlier_one():
    logits = np.full((2, 2, 2, 2), -1.0, np.float32)
    logits[:, 0] = 1
    logits[1, 0, 0] = -1
    decided = decide_regions(logits, Grids((2, 2, 2), *ISOTROPIC), (1, 2))
    np.testing.assert_array_equal(decided, [[[1, 1], [2, 2]], [[0, 0], [0, 0]]])


def test_classes_that_never_win_are_absent_and_equals_go_to_the_first():
    logits = np.zeros((3, 4, 4, 4), np.float32)
    logits[2, 1] = 1
    decided = decide_classes(logits, Grids((8, 4, 4), *ISOTROPIC), (0, 1, 2))
    assert set(np.unique(decided)) == {0, 2}
    np.testing.assert_array_equal(decided[:, 0, 0], [0, 2, 2, 2, 2, 0, 0, 0])


@pytest.mark.parametrize(("shape", "grids"), GRIDS)
def test_interpolation_equals_that_of_preprocessing(shape, grids):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = resample_image(x[None], *grids, order=1)[0]
    np.testing.assert_allclose(interpolate(x, axis_taps(shape, grids)), expected, atol=2e-6)


def test_the_coarse_axis_takes_whole_slices():
    x = np.random.default_rng(0).normal(size=(4, 10, 11)).astype(np.float32)
    taken = interpolate(x, axis_taps((4, 10, 11), Grids((8, 10, 11), *COARSE)))
    np.testing.assert_array_equal(taken, np.repeat(x, 2, 0))


def test_memory_does_not_grow_with_the_number_of_classes():
    import tracemalloc

    def peak(num_classes):
        logits = blobs(num_classes, (20, 20, 20))
        tracemalloc.start()
        decide_classes(logits, Grids((60, 60, 60), *ISOTROPIC), range(num_classes))
        bytes_used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return bytes_used

    assert peak(40) < 1.3 * peak(4) < 40 * 60**3 * 4 / 2
