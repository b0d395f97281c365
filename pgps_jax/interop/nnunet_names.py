"""nnU-Net's names and layouts of network parameters, and ours.

Our attribute paths are nnU-Net's names; only the last part differs (`weight` is `kernel` or `scale`), and kernels are
stored with channels last. A state dict also holds the same arrays under second names, because PyTorch modules are
registered twice: these aliases are ignored when read and written again, since nnU-Net loads strictly.
"""

import re

import numpy as np

# PyTorch (out, in, d, h, w) -> (d, h, w, in, out); transposed convolutions hold (in, out, d, h, w)
_TO_CONV, _TO_TRANSPOSED = (2, 3, 4, 1, 0), (2, 3, 4, 0, 1)
_FROM_CONV, _FROM_TRANSPOSED = (4, 3, 0, 1, 2), (3, 4, 0, 1, 2)
DEEPEST = 32  # parts of a name
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # of DataParallel and torch.compile


def params_from_state_dict(state_dict: dict[str, np.ndarray]) -> dict:
    """Nested dict of our parameters, list positions as int keys; 2D kernels become 3D ones of depth 1.

    Raises ValueError or AttributeError for names and shapes that no network of nnU-Net has.
    """
    params = {}
    for name, array in state_dict.items():
        name = _PREFIXES.sub("", name)
        if name.startswith("decoder.encoder.") or ".all_modules." in name:
            continue
        *folders, leaf = name.split(".")
        if len(folders) > DEEPEST:
            raise ValueError(f"a name of {len(folders)} parts")
        array = np.asarray(array)
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        if leaf == "kernel":
            array = array[:, :, None] if array.ndim == 4 else array
            array = array.transpose(_TO_TRANSPOSED if "transpconvs" in folders else _TO_CONV)
        here = params
        for part in folders:
            here = here.setdefault(int(part) if part.isdecimal() else part, {})
        if isinstance(here.get(leaf), dict):
            raise ValueError(f"{name[:100]} is both an array and a part of the network")
        here[leaf] = np.ascontiguousarray(array)
    return params


def state_dict_from_params(params: dict, planar: bool = False) -> dict[str, np.ndarray]:
    """State dict with all aliases; `planar` drops the depth of kernels, for a 2D configuration of nnU-Net."""
    state_dict = {}
    for path, array in _leaves(params, ()):
        *folders, leaf = path
        array = np.asarray(array)
        if leaf == "kernel":
            array = array.transpose(_FROM_TRANSPOSED if "transpconvs" in folders else _FROM_CONV)
            array = np.ascontiguousarray(array[:, :, 0] if planar else array)
        name = ".".join([*folders, "weight" if leaf in ("kernel", "scale") else leaf])
        for alias in _aliases(name):
            state_dict[alias] = array
    return state_dict


def _leaves(tree, path):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _aliases(name: str) -> list[str]:
    names = [name]
    for part, position in ((".conv.", 0), (".norm.", 1)):
        if part in name:
            names.append(name.replace(part, f".all_modules.{position}."))
    if name.startswith("encoder."):
        names += [f"decoder.{n}" for n in names]
    return names
