"""nnU-Net's parameter names and ours are the same thing in two layouts."""

import numpy as np
import pytest

from pgps_jax.interop.nnunet_names import params_from_state_dict, state_dict_from_params


@pytest.fixture
def peer(golden):
    def read(name: str):
        arrays, about = golden(f"nets/{name}")
        return {k.removeprefix("param:"): v for k, v in arrays.items() if k.startswith("param:")}, about

    return read


@pytest.mark.parametrize("name", ["plain_iso", "plain_anisotropic", "resenc"])
def test_export_has_nnunets_keys_with_every_alias_and_returns_the_imported_arrays(peer, name):
    state_dict, about = peer(name)
    exported = state_dict_from_params(params_from_state_dict(state_dict))
    assert set(exported) == set(about["all_state_dict_names_in_order"])
    for key, array in state_dict.items():
        np.testing.assert_array_equal(exported[key], array)


def test_aliases_and_wrapper_prefixes_are_ignored_on_import(peer):
    state_dict, about = peer("resenc")
    params = params_from_state_dict(state_dict)
    wrapped = {f"_orig_mod.module.{k}": v for k, v in state_dict_from_params(params).items()}
    assert len(wrapped) == len(about["all_state_dict_names_in_order"]) > len(state_dict)
    again = state_dict_from_params(params_from_state_dict(wrapped))
    assert all((again[k] == v).all() for k, v in state_dict.items())


def test_planar_kernels_become_kernels_of_depth_one_and_go_back():
    weights = {
        "encoder.stages.0.0.convs.0.conv.weight": np.arange(24.0).reshape(4, 2, 3, 1),
        "decoder.transpconvs.0.weight": np.arange(32.0).reshape(4, 2, 2, 2),
    }
    params = params_from_state_dict(weights)
    assert params["encoder"]["stages"][0][0]["convs"][0]["conv"]["kernel"].shape == (1, 3, 1, 2, 4)
    assert params["decoder"]["transpconvs"][0]["kernel"].shape == (1, 2, 2, 4, 2)
    back = state_dict_from_params(params, planar=True)
    assert all((back[k] == v).all() for k, v in weights.items())
