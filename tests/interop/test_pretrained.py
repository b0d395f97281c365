"""Partial loading copies what fits, adapts what nearly fits, and accounts for every parameter."""

import jax
import numpy as np
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.errors import InputError
from pgps_jax.interop.pretrained import load_partially
from pgps_jax.models import build

K3, S1, S2 = (3, 3, 3), (1, 1, 1), (2, 2, 2)
UNET = Architecture("plain-unet", (4, 6), (K3, K3), (S1, S2), (1, 1), (1,))
DEEPER = Architecture("plain-unet", (4, 6, 8), (K3, K3, K3), (S1, S2, S2), (1, 1, 1), (1, 1))


def params(architecture, channels, classes, seed):
    rng = np.random.default_rng(seed)
    state = nnx.state(nnx.eval_shape(lambda: build(architecture, channels, classes, rngs=nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), nnx.to_pure_dict(state))


def paths(tree, prefix=""):
    for key, value in tree.items():
        yield from paths(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


def accounted(report):
    parts = [*report.matched, *report.adapted, *report.skipped]
    assert len(parts) == len(set(parts))
    return set(parts)


def test_equal_networks_are_copied_whole_whether_positions_are_numbers_or_text():
    source, target = params(UNET, 1, 2, 0), params(UNET, 1, 2, 1)
    as_text = jax.tree.map(lambda a: a, source)
    as_text["decoder"] = {
        k: {str(i): v for i, v in part.items()} if isinstance(part, dict) else part for k, part in source["decoder"].items()
    }
    for given in (source, as_text):
        loaded, report = load_partially(target, given)
        jax.tree.map(np.testing.assert_array_equal, loaded, source)
        assert set(report.matched) == set(paths(target))
        assert not report.adapted
        assert not report.skipped


@pytest.mark.parametrize("channels", [1, 3])
def test_another_number_of_channels_answers_alike_to_an_image_whose_channels_are_alike(channels):
    source, target = params(UNET, 2, 2, 0), params(UNET, channels, 2, 1)
    loaded, report = load_partially(target, source)
    assert list(report.adapted) == ["encoder.stages.0.0.convs.0.conv.kernel"]
    assert f"2 image channels became {channels}" in str(report)
    kernel, before = (tree["encoder"]["stages"][0][0]["convs"][0]["conv"]["kernel"] for tree in (loaded, source))
    np.testing.assert_allclose(kernel.sum(axis=-2), before.sum(axis=-2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.ptp(kernel, axis=-2), 0)


def test_classes_are_found_by_name_and_the_others_stay_fresh():
    source, target = params(UNET, 1, 3, 0), params(UNET, 1, 4, 1)
    names = {"source_classes": ["background", "liver", "tumour"], "target_classes": ["background", "tumour", "cyst", "liver"]}
    loaded, report = load_partially(target, source, **names)
    for leaf in ("kernel", "bias"):
        old, own, new = (tree["decoder"]["seg_layers"][0][leaf] for tree in (source, target, loaded))
        np.testing.assert_array_equal(new[..., [0, 1, 3]], old[..., [0, 2, 1]])
        np.testing.assert_array_equal(new[..., 2], own[..., 2])
    assert set(report.adapted.values()) == {"classes copied by name: background, tumour, liver; fresh: cyst"}
    without_names = load_partially(target, source)[1]
    assert set(without_names.skipped) == {"decoder.seg_layers.0.kernel", "decoder.seg_layers.0.bias"}
    with pytest.raises(InputError, match="2 class names"):
        load_partially(target, source, source_classes=["a", "b"], target_classes=names["target_classes"])


def test_every_parameter_of_both_networks_is_accounted_for():
    source, target = params(DEEPER, 1, 2, 0), params(UNET, 1, 2, 1)
    loaded, report = load_partially(target, source)
    assert accounted(report) == set(paths(source)) | set(paths(target))
    assert "encoder.stages.0.0.convs.0.conv.kernel" in report.matched
    assert report.skipped["encoder.stages.2.0.convs.0.conv.kernel"] == "not in this network"
    assert report.skipped["decoder.transpconvs.0.kernel"].startswith("shape differs")
    np.testing.assert_array_equal(
        loaded["decoder"]["transpconvs"][0]["kernel"], target["decoder"]["transpconvs"][0]["kernel"]
    )
    assert f"{len(report.skipped)} skipped" in str(report)


def test_weights_of_another_kind_of_network_are_refused():
    with pytest.raises(InputError, match="Nothing of the pretrained weights fits"):
        load_partially(params(UNET, 1, 2, 0), {"vit": {"kernel": np.zeros((2, 2), np.float32)}})
