"""nnU-Net's names and layouts of network parameters, and ours.

Our attribute paths are nnU-Net's names; only the last part differs (`weight` is `kernel` or `scale`), and kernels are
stored with channels last. A state dict also holds the same arrays under second names, because PyTorch modules are
registered twice: these aliases are ignored when read and written again, since nnU-Net loads strictly.
"""

import numpy as np

from pgps_jax.interop.parameter_tree import FROM_CONV, FROM_TRANSPOSED, TO_CONV, TO_TRANSPOSED, bare, insert, leaves, torch_name


def params_from_state_dict(state_dict: dict[str, np.ndarray]) -> dict:
    """Nested dict of our parameters, list positions as int keys; 2D kernels become 3D ones of depth 1.

    Raises ValueError for names and shapes that no network of nnU-Net has.
    """
    params = {}
    for name, array in state_dict.items():
        name = bare(name)
        if name.startswith("decoder.encoder.") or ".all_modules." in name:
            continue
        array, leaf = np.asarray(array), name.rpartition(".")[2]
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        if leaf == "kernel":
            array = array[:, :, None] if array.ndim == 4 else array
            array = array.transpose(TO_TRANSPOSED if _is_transposed(name) else TO_CONV)
        insert(params, name, leaf, np.ascontiguousarray(array))
    return params


def state_dict_from_params(params: dict, planar: bool = False) -> dict[str, np.ndarray]:
    """State dict with all aliases; `planar` drops the depth of kernels, for a 2D configuration of nnU-Net."""
    state_dict = {}
    for path, array in leaves(params):
        name, array = torch_name(path), np.asarray(array)
        if path[-1] == "kernel":
            array = array.transpose(FROM_TRANSPOSED if _is_transposed(name) else FROM_CONV)
            array = np.ascontiguousarray(array[:, :, 0] if planar else array)
        for alias in _aliases(name):
            state_dict[alias] = array
    return state_dict


def _is_transposed(name: str) -> bool:
    return "transpconvs" in name.split(".")


def _aliases(name: str) -> list[str]:
    names = [name]
    for part, position in ((".conv.", 0), (".norm.", 1)):
        if part in name:
            names.append(name.replace(part, f".all_modules.{position}."))
    if name.startswith("encoder."):
        names += [f"decoder.{n}" for n in names]
    return names
