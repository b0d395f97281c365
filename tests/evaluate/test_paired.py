"""Differences between methods come with an honest measure of their certainty."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wilcoxon

from pgps_jax.evaluate.paired import holm, mean_interval, paired_difference


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [low <= 0.5 <= high for _, low, high in (mean_interval(rng.normal(0.5, 0.1, 40), seed=k) for k in range(60))]
    assert 0.85 <= np.mean(held) <= 1


def test_the_interval_is_as_wide_as_theory_says_and_the_same_every_time():
    values = np.random.default_rng(1).normal(0.8, 0.05, 400)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert mean_interval(values) == (mean, low, high)


def test_pairing_finds_a_small_difference_among_cases_that_differ_much():
    rng = np.random.default_rng(2)
    baseline = {f"case{i}": v for i, v in enumerate(rng.uniform(0.3, 0.9, 30))}
    other = {case: v + 0.01 + 0.002 * rng.normal() for case, v in baseline.items()}
    found = paired_difference(baseline, other)
    assert found.cases == 30 and found.better == 30 and found.worse == 0
    assert 0.005 < found.difference.low < found.difference.mean < found.difference.high < 0.015
    assert found.p_value == pytest.approx(wilcoxon([other[c] - baseline[c] for c in baseline]).pvalue)
    assert found.p_value < 1e-5


def test_only_cases_with_a_number_on_both_sides_are_paired():
    found = paired_difference({"a": 0.5, "b": float("nan"), "c": 0.5, "d": 0.1}, {"a": 0.5, "b": 1.0, "c": 0.7, "e": 1.0})
    assert (found.cases, found.better, found.worse) == (2, 1, 0)
    assert found.difference.mean == pytest.approx(0.1)


def test_equal_methods_do_not_differ():
    found = paired_difference({"a": 0.5, "b": 0.7}, {"a": 0.5, "b": 0.7})
    assert found.difference == (0, 0, 0) and found.p_value == 1


def test_holms_rule_on_a_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_adjusted_p_values_are_never_smaller_and_keep_their_order(p):
    adjusted = holm(p)
    assert all(a >= q - 1e-12 and a <= 1 for a, q in zip(adjusted, p, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])
