"""MONAI's names and layouts of the parameters of UNETR and SwinUNETR, and ours.

Our attribute paths are MONAI's names; only the last part differs (`weight` is `kernel` or `scale`), and kernels are stored
with channels last. SwinUNETR's `relative_position_index` is no parameter: it follows from the window and is written again.
"""

import re

import numpy as np

from pgps_jax.interop.parameter_tree import FROM_CONV, FROM_TRANSPOSED, TO_CONV, TO_TRANSPOSED, bare, insert, leaves, torch_name

_TRANSPOSED = re.compile(r"(^|\.)transp_conv(_init)?\.|^encoder\d+\.blocks\.\d+\.0\.")
_INDEX, _TABLE = "relative_position_index", "relative_position_bias_table"


def params_from_state_dict(state_dict: dict[str, np.ndarray]) -> dict:
    """Nested dict of our parameters, list positions as int keys."""
    params = {}
    for name, array in state_dict.items():
        name = bare(name).replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")  # old names
        array, leaf = np.asarray(array), name.rpartition(".")[2]
        if leaf == _INDEX:
            continue
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            if array.ndim == 2:
                array = array.T
            elif array.ndim == 5:
                array = array.transpose(TO_TRANSPOSED if _TRANSPOSED.search(name) else TO_CONV)
        insert(params, name, leaf, np.ascontiguousarray(array))
    return params


def state_dict_from_params(params: dict, window: tuple[int, int, int] = (7, 7, 7)) -> dict[str, np.ndarray]:
    """State dict that MONAI loads strictly; `window` is SwinUNETR's window size."""
    state_dict = {}
    for path, array in leaves(params):
        name, array = torch_name(path), np.asarray(array)
        if array.ndim == 2 and path[-1] == "kernel":
            array = array.T
        elif array.ndim == 5:
            array = array.transpose(FROM_TRANSPOSED if _TRANSPOSED.search(name) else FROM_CONV)
        state_dict[name] = np.ascontiguousarray(array)
        if path[-1] == _TABLE:
            state_dict[".".join([*path[:-1], _INDEX])] = relative_position_index(window)
    return state_dict


def swin_encoder_from_pretraining(state_dict: dict[str, np.ndarray]) -> tuple[dict, tuple[str, ...]]:
    """Parameters of a self-supervised SwinUNETR encoder, below "swinViT", and the names that are not of the encoder.

    Reads the two published ways of writing them: `module.layers1.0.blocks.0.mlp.fc1.weight` (the encoder alone, perceptrons
    with old names; Tang et al. 2022) and `encoder.layers1.0.0.blocks.0...` (with a pretraining decoder; Valanarasu et al.
    2023), and names that are SwinUNETR's already. Heads, decoders and mask tokens of the pretraining come back by name.
    """
    encoder, others = {}, []
    for name, array in state_dict.items():
        nested = re.sub(r"^encoder\.(layers\d)\.0\.0\.", r"\1.0.", bare(name))
        short = re.sub(r"^(encoder\.(?=patch_embed)|swinViT\.)", "", nested)
        if re.match(r"patch_embed\.|layers\dc?\.0\.", short):
            encoder["swinViT." + short] = array
        else:
            others.append(name)
    return params_from_state_dict(encoder), tuple(others)


def relative_position_index(window: tuple[int, int, int]) -> np.ndarray:
    """Row of the position table for each (query, key) of a window: mixed-radix number of their difference; int64 (n, n)."""
    places = np.stack(np.unravel_index(np.arange(np.prod(window)), window))
    difference = places[:, :, None] - places[:, None, :] + np.reshape(window, (3, 1, 1)) - 1
    return np.ravel_multi_index(tuple(difference), tuple(2 * size - 1 for size in window))

