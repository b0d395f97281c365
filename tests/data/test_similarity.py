"""Ranking of cases by similarity, against plainer implementations and the measures of scikit-image."""

import json

import numpy as np
import pytest

from pgps_jax.data import similarity
from pgps_jax.data.similarity import RULE, compare, rank, ranked_cases, shrink, to_unit_range
from pgps_jax.data.store import CaseStore, Preprocessed, write_case

rng = np.random.default_rng(0)


def images(n=4, channels=2, cells=9):
    common = rng.random((1, channels, cells, cells, cells))
    return np.clip(0.6 * common + 0.4 * rng.random((n, channels, cells, cells, cells)), 0, 1)


def test_ssim_psnr_and_mse_equal_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    volumes = images()
    ours = compare(volumes)
    for i in range(len(volumes)):
        for j in range(len(volumes)):
            a, b = volumes[i], volumes[j]
            assert ours.mse[i, j] == pytest.approx(metrics.mean_squared_error(a, b))
            ssim = metrics.structural_similarity(a, b, data_range=1.0, channel_axis=0)
            assert ours.ssim[i, j] == pytest.approx(ssim, abs=1e-9)
            if i != j:
                assert ours.psnr[i, j] == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0))


def test_the_universal_quality_index_equals_its_definition_window_by_window():
    volumes = images(n=3, channels=1)
    ours = compare(volumes)

    def plain(a, b):
        values = []
        for z, y, x in np.ndindex(3, 3, 3):
            p, q = (v[0, z : z + 7, y : y + 7, x : x + 7].ravel() for v in (a, b))
            cov = np.cov(p, q)
            mp, mq = p.mean(), q.mean()
            values.append(4 * cov[0, 1] * mp * mq / ((cov[0, 0] + cov[1, 1]) * (mp**2 + mq**2)))
        return np.mean(values)

    for i, j in [(0, 1), (0, 2), (2, 1)]:
        assert ours.uqi[i, j] == pytest.approx(plain(volumes[i], volumes[j]), abs=1e-9)


def test_equal_images_are_as_similar_as_can_be_even_where_they_are_constant():
    volumes = np.zeros((2, 1, 9, 9, 9))
    volumes[:, :, 6:] = 0.5
    ours = compare(volumes)
    assert (ours.mse == 0).all() and (ours.psnr == 100).all()
    assert np.allclose(ours.ssim, 1) and np.allclose(ours.uqi, 1)


def test_shrinking_averages_and_does_not_read_more_than_a_slab_at_a_time():
    class Lazy:
        def __init__(self, array):
            self.array, self.shape, self.thickest = array, array.shape, 0

        def __getitem__(self, index):
            self.thickest = max(self.thickest, self.array[index].shape[1])
            return self.array[index]

    image = rng.random((2, 32, 48, 64)).astype(np.float32)
    lazy = Lazy(image)
    assert np.allclose(shrink(lazy), image.reshape(2, 16, 2, 16, 3, 16, 4).mean(axis=(2, 4, 6)))
    assert lazy.thickest == 2


@pytest.mark.parametrize("shape", [(1, 5, 20, 33), (3, 1, 16, 17), (1, 100, 3, 2)])
def test_shrinking_takes_any_shape_and_keeps_the_range(shape):
    image = rng.random(shape)
    small = shrink(image)
    assert small.shape == (shape[0], 16, 16, 16)
    assert image.min() <= small.min() and small.max() <= image.max()
    assert np.allclose(shrink(np.full(shape, 7.0)), 7)


def test_the_unit_range_is_common_to_all_cases_and_separate_for_channels():
    volumes = images()
    scaled = to_unit_range(volumes * np.array([1, 1000]).reshape(1, 2, 1, 1, 1))
    assert scaled.min() == 0 and scaled.max() == 1
    assert np.allclose(scaled, to_unit_range(volumes))
    assert np.allclose(to_unit_range(np.full((2, 1, 7, 7, 7), 3.0)), 0)


def test_the_odd_case_comes_last_and_the_typical_one_first():
    typical, noise = rng.random((1, 9, 9, 9)), rng.normal(size=(2, 1, 9, 9, 9))
    close, other, odd = typical + 0.05 * noise[0], typical + 0.15 * noise[1], rng.random(typical.shape)
    ranked = rank(["d", "c", "b", "a"], compare(np.clip([odd, other, close, typical], 0, 1)))
    assert [case["id"] for case in ranked] == ["a", "b", "c", "d"]
    assert ranked[-1]["mean_rank"] == 4 and ranked[0]["mean_rank"] < ranked[1]["mean_rank"]
    assert ranked[0]["mse"] < ranked[-1]["mse"] and ranked[0]["ssim"] > ranked[-1]["ssim"]


def test_ties_are_ordered_by_id_and_a_single_case_is_ranked():
    same = np.repeat(images(n=1), 3, axis=0)
    assert [case["id"] for case in rank(["c", "a", "b"], compare(same))] == ["a", "b", "c"]
    assert [case["id"] for case in rank(["only"], compare(images(n=1)))] == ["only"]


def test_the_ranking_is_kept_and_read_again_only_for_the_same_cases(tmp_path, monkeypatch):
    path, folder, read = tmp_path / "similarity.json", tmp_path / "cases", []
    monkeypatch.setattr(similarity, "shrink", lambda image: read.append(image.shape) or shrink(image))
    folder.mkdir()
    ids = [f"case{i}" for i in range(4)]
    for case, image in zip(ids, images(n=4).astype(np.float32), strict=True):
        label = np.zeros((1, 9, 9, 9), np.int16)
        write_case(folder, case, Preprocessed(image, label, {}, {1: np.zeros((0, 3), np.int32)}), (8, 8, 8))
    store, seen = CaseStore(folder), []
    assert store.ids == tuple(ids)

    first = ranked_cases(path, store, ids, lambda done, total: seen.append((done, total)))
    assert sorted(first) == ids and len(read) == 4 and seen == [(i, 4) for i in (1, 2, 3, 4)]
    assert json.loads(path.read_text())["rule"] == RULE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cases", "similarity.json"]

    assert ranked_cases(path, store, ids[::-1]) == first and len(read) == 4
    assert set(ranked_cases(path, store, ["case0", "case2"])) == {"case0", "case2"} and len(read) == 6
    path.write_text("{ not json")
    assert ranked_cases(path, store, ids) == first and len(read) == 10

    image = rng.random((2, 9, 9, 9)).astype(np.float32)  # a case that was preprocessed otherwise since then
    write_case(folder, ids[0], Preprocessed(image, np.zeros((1, 9, 9, 9), np.int16), {}, {1: np.zeros((0, 3), np.int32)}), (8, 8, 8))
    ranked_cases(path, store, ids)
    assert len(read) == 14
