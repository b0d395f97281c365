"""Tiles, weights and sums of the sliding window against nnU-Net's numbers and against a plain implementation."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.errors import InputError
from pgps_jax.infer import sliding_window
from pgps_jax.infer.sliding_window import SlidingWindow, gaussian_map, pad_to_patch, tile_starts

PATCH = (4, 6, 4)


def network(params, tiles):
    """Two logits that differ at every position of a tile and do not commute with mirroring."""
    d, h, w = jnp.ogrid[tuple(slice(n) for n in tiles.shape[1:4])]
    ramp = d + 0.1 * h + 0.01 * w
    first = tiles.sum(-1) * params["scale"] + ramp
    return jnp.stack([first, jnp.roll(tiles[..., 0], 1, axis=2) - ramp], -1)


PARAMS = {"scale": np.float32(2)}


def logits_of(network, params, image, patch_size, num_outputs, mirror_axes=(), **options):
    """Logits of one volume by one network."""
    return SlidingWindow(network, patch_size, num_outputs, mirror_axes, **options)([params], image)


def plain(params, image, mirror_axes=(), step=0.5):
    """Sum of weighted logits over sum of weights, one tile and one mirrored copy at a time, in float64."""
    padding = pad_to_patch(image.shape[1:], PATCH)
    padded = np.pad(image, ((0, 0), *padding))
    total, weights = np.zeros((2, *padded.shape[1:])), np.zeros(padded.shape[1:])
    flips = [s for n in range(len(mirror_axes) + 1) for s in itertools.combinations(mirror_axes, n)]
    for start in itertools.product(*tile_starts(padded.shape[1:], PATCH, step)):
        box = tuple(slice(s, s + n) for s, n in zip(start, PATCH, strict=True))
        tile = np.moveaxis(padded[(slice(None), *box)], 0, -1)
        logits = [np.flip(np.asarray(network(params, np.flip(tile, flip)[None]))[0], flip) for flip in flips]
        total[(slice(None), *box)] += np.moveaxis(np.mean(logits, 0, dtype=np.float64), -1, 0) * gaussian_map(PATCH)
        weights[box] += gaussian_map(PATCH)
    inside = tuple(slice(b, n - a) for (b, a), n in zip(padding, padded.shape[1:], strict=True))
    return (total / weights)[(slice(None), *inside)]


def volume(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_tile_starts_equal_nnunets(golden):
    _, sidecar = golden("inference/tile_starts")
    for row in sidecar["rows"]:
        starts = tile_starts(tuple(row["image_size"]), tuple(row["patch_size"]), row["step"])
        assert [list(axis) for axis in starts] == row["starts"], row


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.1, 1))
def test_tiles_cover_the_axis_and_stay_inside(extra, patch, step):
    size = patch + extra - 1
    starts = tile_starts((size,) * 3, (patch,) * 3, step)[0]
    assert starts[0] == 0 and starts[-1] + patch == size
    assert all(b - a <= max(np.ceil(patch * step), 1) for a, b in itertools.pairwise(starts))


def test_padding_surrounds_the_volume_and_puts_the_odd_voxel_at_the_end():
    assert pad_to_patch((3, 4, 9), (8, 6, 4)) == ((2, 3), (1, 1), (0, 0))


def test_a_2d_network_sees_every_slice_once():
    assert tile_starts((5, 9, 8), (1, 6, 8)) == ((0, 1, 2, 3, 4), (0, 3), (0,))


@pytest.mark.parametrize("name", ["gaussian_40x56x40", "gaussian_10x48x64"])
def test_gaussian_map_equals_nnunets_including_what_underflows(golden, name):
    arrays, sidecar = golden(f"inference/{name}")
    expected = arrays["map"].astype(np.float32)
    ours = gaussian_map(expected.shape)
    np.testing.assert_allclose(ours, expected, rtol=2e-3, atol=1e-6)
    assert ours.max() == 10 and ours.min() == pytest.approx(sidecar["minimum"])
    assert np.count_nonzero(ours == ours.min()) == pytest.approx(sidecar["count_of_minimum"], rel=0.01)


@pytest.mark.parametrize("mirror_axes", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(1, 9, 6, 7), (2, 3, 13, 4)])
def test_logits_equal_a_plain_implementation(shape, mirror_axes):
    image = volume(shape)
    ours = logits_of(network, PARAMS, image, PATCH, 2, mirror_axes)
    assert ours.dtype == np.float32 and ours.shape == (2, *shape[1:])
    np.testing.assert_allclose(ours, plain(PARAMS, image, mirror_axes), rtol=1e-5, atol=1e-5)


def two_sided(params, tiles):
    """Background, something left and its mirror image: a network that was trained on mirrored images with swapped labels."""
    ramp = jnp.arange(tiles.shape[3]) ** 2

    def left(x):
        return x * ramp + jnp.roll(x, 1, axis=3)

    x = tiles[..., 0]
    return jnp.stack([jnp.sin(x), left(x), jnp.flip(left(jnp.flip(x, 3)), 3)], -1)


@pytest.mark.parametrize("mirror_axes", [(2,), (0, 1, 2)])
def test_mirrored_copies_with_swapped_labels_agree_with_a_network_that_tells_the_sides_apart(mirror_axes):
    image = volume((1, 6, 9, 7))
    alone = logits_of(two_sided, {}, image, PATCH, 3)
    averaged = logits_of(two_sided, {}, image, PATCH, 3, mirror_axes, swap=(2, (0, 2, 1)))
    np.testing.assert_allclose(averaged, alone, rtol=1e-5, atol=1e-5)
    plainly = logits_of(two_sided, {}, image, PATCH, 3, mirror_axes)
    assert np.abs(plainly - alone).max() > 0.1, "without the swap the sides are mixed"


def test_nothing_is_swapped_where_the_axis_is_not_mirrored():
    image = volume((1, 6, 9, 7))
    swapped, plainly = (logits_of(network, PARAMS, image, PATCH, 2, (0, 1), swap=swap) for swap in ((2, (1, 0)), None))
    np.testing.assert_array_equal(swapped, plainly)


def test_tile_batch_changes_neither_numbers_nor_the_number_of_programs():
    image = volume((1, 9, 13, 9))
    one = logits_of(network, PARAMS, image, PATCH, 2, (0,))
    window = SlidingWindow(network, PATCH, 2, (0,), tile_batch=5)  # the last batch is short
    np.testing.assert_allclose(window([PARAMS], image), one, rtol=1e-5, atol=1e-5)
    window([PARAMS], volume((1, 5, 22, 4)))
    assert window._add_pass._cache_size() == 1, "a volume of another shape must not compile another program"


def test_several_folds_give_the_mean_of_their_logits():
    image = volume((1, 6, 9, 6))
    window = SlidingWindow(network, PATCH, 2)
    folds = [{"scale": np.float32(s)} for s in (1, 2, 6)]
    mean = np.mean([window([params], image) for params in folds], axis=0)
    np.testing.assert_allclose(window(folds, image), mean, rtol=1e-5, atol=1e-5)


def test_a_constant_network_gives_its_constant_whatever_the_weights():
    def constant(_, tiles):
        return jnp.full((*tiles.shape[:-1], 3), 7.0, jnp.bfloat16)

    logits = logits_of(constant, {}, volume((1, 11, 14, 5)), PATCH, 3, (0, 1, 2))
    np.testing.assert_allclose(logits, 7, rtol=1e-6)


def test_tiles_outside_the_body_are_skipped_only_when_asked():
    image = np.full((2, 4, 6, 40), -1.5, np.float32)
    image[:, :, :, :6] = volume((2, 4, 6, 6))
    calls = []
    full = SlidingWindow(network, PATCH, 2)([PARAMS], image, lambda done, total: calls.append(total))
    assert calls[-1] == 19
    window = SlidingWindow(network, PATCH, 2, outside=(5.0, -5.0))
    some = window([PARAMS], image, lambda done, total: calls.append(total))
    assert calls[-1] == 3, "tiles that begin at 0, 2 and 4 touch the body"
    np.testing.assert_array_equal(some[:, :, :, 8:], np.broadcast_to(np.reshape([5, -5], (2, 1, 1, 1)), (2, 4, 6, 32)))
    np.testing.assert_allclose(some[:, :, :, :6], full[:, :, :, :6], atol=1e-3)


def test_logits_beyond_the_memory_limit_go_to_a_file_and_stay_the_same():
    image = volume((1, 9, 13, 9))
    filed = logits_of(network, PARAMS, image, PATCH, 2, memory_limit=0)
    assert isinstance(filed, np.memmap)
    np.testing.assert_array_equal(filed, logits_of(network, PARAMS, image, PATCH, 2))


def test_logits_that_do_not_fit_the_disk_of_temporary_files_are_refused_naming_the_variable(monkeypatch):
    monkeypatch.setattr(sliding_window.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"need 0\.0 GB.*TMPDIR"):
        logits_of(network, PARAMS, volume((1, 9, 13, 9)), PATCH, 2, memory_limit=0)


def test_progress_counts_tiles():
    seen = []
    SlidingWindow(network, PATCH, 2, tile_batch=2)([PARAMS], volume((1, 4, 6, 8)), lambda *x: seen.append(x))
    assert seen == [(2, 3), (3, 3)]


def test_wrong_settings_are_named():
    with pytest.raises(InputError, match="tile step"):
        SlidingWindow(network, PATCH, 2, step=0.0)
    with pytest.raises(InputError, match="mirror axes"):
        SlidingWindow(network, PATCH, 2, (3,))
    for swap in ((3, (0, 1)), (2, (0, 0)), (2, (0, 1, 2))):
        with pytest.raises(InputError, match="label-swap"):
            SlidingWindow(network, PATCH, 2, (0,), swap=swap)
    with pytest.raises(ValueError, match="smaller than the patch"):
        tile_starts((3, 3, 3), PATCH)


def test_parameters_may_live_on_the_device():
    image = volume((1, 4, 6, 8))
    on_device = jax.device_put(PARAMS)
    np.testing.assert_array_equal(
        logits_of(network, on_device, image, PATCH, 2), logits_of(network, PARAMS, image, PATCH, 2))
