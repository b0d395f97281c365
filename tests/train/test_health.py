"""Words of warning come once, at the right epoch; skipping has a limit."""

import pytest

from pgps_jax.errors import InputError
from pgps_jax.train.health import BACKGROUND_EPOCHS, MOST_SKIPPED, SkippedSteps, concern


def epochs(*dice):
    ema, records = None, []
    for d in dice:
        ema = d if ema is None else 0.9 * ema + 0.1 * d
        records.append({"pseudo_dice_mean": d, "pseudo_dice_ema": ema})
    return records


def test_background_only_is_said_once_after_some_epochs():
    assert concern(epochs(*[0.0] * (BACKGROUND_EPOCHS - 1))) is None
    assert "background only" in concern(epochs(*[0.0] * BACKGROUND_EPOCHS))
    assert concern(epochs(*[0.0] * (BACKGROUND_EPOCHS + 1))) is None


def test_a_collapse_is_said_once():
    assert "fallen below half" in concern(epochs(0.8, 0.8, 0.1))
    assert concern(epochs(0.8, 0.8, 0.1, 0.1)) is None
    assert concern(epochs(0.8, 0.8, 0.7)) is None


def test_no_epoch_is_no_concern():
    assert concern([]) is None


def test_skipped_steps_are_remembered_and_limited(tmp_path):
    for step in range(MOST_SKIPPED):
        SkippedSteps(tmp_path).add(step)
    assert SkippedSteps(tmp_path).steps == set(range(MOST_SKIPPED))
    with pytest.raises(InputError, match="learning-rate"):
        SkippedSteps(tmp_path).add(99)
