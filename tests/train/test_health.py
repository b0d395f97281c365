"""Words of warning come once, at the right epoch; skipping has a limit."""

import jax
import pytest

from pgps_jax.curriculum import Stage
from pgps_jax.errors import InputError
from pgps_jax.train.health import (
    BACKGROUND_EPOCHS,
    MOST_SKIPPED,
    NotFinite,
    SkippedSteps,
    StageTooLarge,
    concern,
    memory_errors_of,
)


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


SMALL, LARGE = Stage(0, (8, 8, 8), 2), Stage(1, (16, 16, 16), 2)


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")])
def test_out_of_memory_names_the_innermost_stage(error):
    with pytest.raises(StageTooLarge) as caught, memory_errors_of(SMALL), memory_errors_of(LARGE):
        raise error
    assert caught.value.stage == LARGE


@pytest.mark.parametrize("error", [NotFinite(3), InputError("x"), RuntimeError("out of memory, says somebody")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, memory_errors_of(SMALL):
        raise error
    assert caught.value is error
