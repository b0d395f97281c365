"""MONAI's parameter names and ours are the same thing in two layouts."""

import numpy as np
import pytest

from pgps_jax.interop.monai_names import (
    params_from_state_dict,
    relative_position_index,
    state_dict_from_params,
    swin_encoder_from_pretraining,
)


def random_state_dict(about: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=v["shape"]).astype(np.float32) for k, v in about["weight_recipe"]["parameters"].items()}


@pytest.mark.parametrize("name", ["monai_unetr", "monai_swinunetr_v1", "monai_swinunetr_v2"])
def test_export_has_monais_keys_and_returns_the_imported_arrays(golden, name):
    _, about = golden(f"nets/{name}")
    state_dict = random_state_dict(about)
    exported = state_dict_from_params(params_from_state_dict({f"module.{k}": v for k, v in state_dict.items()}))
    assert set(exported) == set(about["all_state_dict_names_in_order"])
    for key, array in state_dict.items():
        np.testing.assert_array_equal(exported[key], array)
    for key, shape in about["weight_recipe"]["buffers_not_parameters"].items():
        assert list(exported[key].shape) == shape


def test_the_position_index_counts_differences_in_mixed_radix():
    index = relative_position_index((2, 3, 4))
    assert index.shape == (24, 24)
    first, last = index[0, 0], index[23, 0]
    assert first == (1 * 5 + 2) * 7 + 3  # no difference: the middle of 3 x 5 x 7
    assert last == 3 * 5 * 7 - 1
    assert index[0, 1] == first - 1
    assert index[4, 0] == first + 7


def test_both_published_kinds_of_pretraining_become_the_encoder(golden):
    _, about = golden("nets/monai_swinunetr_v1")
    encoder = {k: v for k, v in random_state_dict(about).items() if k.startswith("swinViT.")}
    tang = {
        "module." + k.removeprefix("swinViT.").replace("linear", "fc"): v for k, v in encoder.items()
    } | {"module.rotation_head.weight": np.zeros((4, 4))}
    valanarasu = {
        k.replace("swinViT.patch", "encoder.patch").replace(".0.blocks.", ".0.0.blocks.").replace(
            ".0.downsample", ".0.0.downsample"
        ).replace("swinViT.layers", "encoder.layers"): v
        for k, v in encoder.items()
    } | {"encoder.mask_token": np.zeros(3), "decoder.0.weight": np.zeros((4, 4))}
    assert "module.layers1.0.blocks.0.mlp.fc1.weight" in tang
    assert "encoder.layers1.0.0.blocks.0.mlp.linear1.weight" in valanarasu
    for given, others in ((tang, 1), (valanarasu, 2), (encoder, 0)):
        params, left = swin_encoder_from_pretraining(given)
        assert len(left) == others
        assert list(params) == ["swinViT"]
        again = state_dict_from_params(params)
        assert {k for k in again if not k.endswith("index")} == set(encoder)
        assert all((again[k] == v).all() for k, v in encoder.items())


def test_monai_loads_the_export_strictly(golden):
    torch = pytest.importorskip("torch")
    nets = pytest.importorskip("monai.networks.nets")
    for name, kind in (("monai_unetr", nets.UNETR), ("monai_swinunetr_v2", nets.SwinUNETR)):
        _, about = golden(f"nets/{name}")
        state_dict = random_state_dict(about)
        exported = state_dict_from_params(params_from_state_dict(state_dict))
        network = kind(**about["arch_kwargs"])
        indices = {k: v.numpy() for k, v in network.state_dict().items() if k.endswith("relative_position_index")}
        assert all((exported[k] == v).all() for k, v in indices.items())
        network.load_state_dict({k: torch.from_numpy(v) for k, v in exported.items()}, strict=True)
