"""What prediction does for accelerators: it computes in the precision of the training, and never waits for a branch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgps_jax import validate
from pgps_jax.infer.sliding_window import SlidingWindow
from pgps_jax.validate import load_predictor


@pytest.mark.parametrize(("stored", "dtype"), [({"precision": "float32"}, np.dtype(np.float32)), ({"precision": "auto"}, None), ({}, None)])
def test_a_network_trained_in_float32_predicts_in_float32_and_others_in_what_the_device_is_fast_in(run, monkeypatch, stored, dtype):
    (run / "inference.json").write_text(json.dumps({"configuration": "3d_fullres", "mirror_axes": [], **stored}))
    asked, make = [], validate.make_predictor
    monkeypatch.setattr(validate, "make_predictor", lambda *args, **options: asked.append(options["dtype"]) or make(*args, **options))
    load_predictor(run)
    assert asked == [dtype]


def test_mirroring_is_chosen_without_a_branch():
    window = SlidingWindow(lambda params, x: jnp.concatenate([x, -x], -1), (4, 4, 4), 2, (0, 1, 2), swap=(2, (1, 0)), tile_batch=1)
    tiles, total = jnp.zeros((1, 4, 4, 4, 1)), jnp.zeros((1, 4, 4, 4, 2))
    program = str(jax.make_jaxpr(window._add_pass)({}, tiles, total, window._flips[3]))
    assert "rev[" in program and "cond[" not in program
