"""The peers' networks with their weights, inputs, outputs and gradients, in our layout."""

import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.architecture import Architecture
from pgps_jax.interop import monai_names
from pgps_jax.interop.nnunet_names import params_from_state_dict, state_dict_from_params
from pgps_jax.models import build

BACKBONES = {"PlainConvUNet": "plain-unet", "ResidualEncoderUNet": "resenc-unet"}


def channels_last(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1)


def relative_error(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / (np.abs(theirs).max() or 1.0))


class PeerNetwork(NamedTuple):
    """One golden network: ours with the peer's weights, and what the peer computed."""

    net: nnx.Module
    image: np.ndarray
    outputs: list[np.ndarray]
    cotangents: list[np.ndarray]
    gradients: dict[str, np.ndarray]  # by PyTorch name; "input" is the gradient of the image

    def forward_error(self) -> float:
        """Largest deviation of any head, relative to the head's largest value."""
        logits = compiled(self.net, self.image)(self.image)
        assert len(logits) == len(self.outputs)
        return max(relative_error(a, b) for a, b in zip(logits, self.outputs, strict=True))

    def half_precision_error(self) -> float:
        """Largest |bfloat16 - float32| / |float32| (Euclidean) of the heads, with the peer's weights."""
        half = nnx.clone(self.net)
        for _, module in nnx.iter_modules(half):
            if hasattr(module, "dtype"):
                module.dtype = jnp.bfloat16
        pairs = zip(*(compiled(net, self.image)(self.image) for net in (half, self.net)), strict=True)
        return max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs)

    def gradient_error(self, dtype=jnp.float32) -> float:
        """The same for the gradients that the peer recorded, computed in `dtype`."""
        net = self.net
        for _, module in nnx.iter_modules(net):
            if hasattr(module, "dtype"):
                module.dtype = dtype
        graphdef, params = nnx.split(net, nnx.Param)
        params = jax.tree.map(lambda p: p.astype(dtype), params)

        def objective(params, image):
            logits = nnx.merge(graphdef, params)(image)
            return sum(jnp.sum(a * b) for a, b in zip(logits, self.cotangents, strict=True))

        image = jnp.asarray(self.image, dtype)
        g_params, g_image = compiled(jax.grad(objective, argnums=(0, 1)), params, image)(params, image)
        ours = state_dict_from_params(nnx.to_pure_dict(g_params)) | {"input": np.moveaxis(np.asarray(g_image), -1, 1)}
        assert self.gradients
        return max(relative_error(ours[name], theirs) for name, theirs in self.gradients.items())


@pytest.fixture(scope="session")
def peer_network(golden):
    """peer_network("plain_iso") -> PeerNetwork; see read_peer."""
    return functools.partial(read_peer, golden)


def read_peer(golden: Callable, name: str, weights: str | None = None, gradients: str | None = None) -> PeerNetwork:
    """nnU-Net's network of a golden file; `weights` and `gradients` name the files that hold them, if others."""
    arrays, about = golden(f"nets/{name}")
    weight_arrays, _ = golden(f"nets/{weights or name}")
    architecture, ends = golden_architecture(about), (about["input_channels"], about["num_classes"])
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build(architecture, *ends, rngs=nnx.Rngs(0))))
    state_dict = {k.removeprefix("param:"): v for k, v in weight_arrays.items() if k.startswith("param:")}
    assert set(about["parameter_names"]) == set(state_dict)
    nnx.replace_by_pure_dict(params, jax.tree.map(jnp.asarray, params_from_state_dict(state_dict)))
    net = nnx.merge(graphdef, params)
    expected = {k: v for k, v in arrays.items() if k.startswith("grad_")}
    if gradients:
        expected |= golden(f"nets/{gradients}")[0]
    count = sum(k.startswith("output_") for k in arrays)
    return PeerNetwork(
        net,
        channels_last(arrays["input"]),
        [channels_last(arrays[f"output_{i}"]) for i in range(count)],
        [channels_last(arrays[f"fixed_{i}"]) for i in range(count)],
        {k.removeprefix("grad_param:").removeprefix("grad_"): v for k, v in expected.items()},
    )


def golden_architecture(about: dict) -> Architecture:
    kwargs = about["arch_kwargs"]
    return Architecture(
        BACKBONES[about["network"]],
        tuple(kwargs["features_per_stage"]),
        tuple(map(tuple, kwargs["kernel_sizes"])),
        tuple(map(tuple, kwargs["strides"])),
        tuple(kwargs.get("n_conv_per_stage") or kwargs["n_blocks_per_stage"]),
        tuple(kwargs["n_conv_per_stage_decoder"]),
    )


class InitialStatistics(NamedTuple):
    """Deviations of a fresh network from the peer's initial distributions."""

    shapes: dict[str, tuple[int, ...]]
    peer_shapes: dict[str, tuple[int, ...]]
    wrong: list[str]  # parameters whose mean or standard deviation lies outside 4 standard errors


@pytest.fixture(scope="session")
def initial_statistics(golden):
    """initial_statistics(net, key of the golden file) -> InitialStatistics."""

    def compare(net: nnx.Module, key: str) -> InitialStatistics:
        _, about = golden("nets/init_statistics")
        peer = {p["name"]: p for p in about["networks"][key]["parameters"]}
        ours = state_dict_from_params(nnx.to_pure_dict(nnx.state(net, nnx.Param)))
        wrong = []
        for name, p in peer.items():
            array, n = ours[name], ours[name].size
            # the peer's draw is one of the same distribution: its error adds to ours
            error = 4 * np.sqrt(2) * p["std"] / np.sqrt(n)
            same = abs(array.mean() - p["mean"]) <= error and abs(array.std() - p["std"]) <= error / np.sqrt(2)
            wrong += [] if same else [name]
        return InitialStatistics(
            {k: v.shape for k, v in ours.items() if k in peer}, {k: tuple(p["shape"]) for k, p in peer.items()}, wrong
        )

    return compare


@pytest.fixture(scope="session")
def bfloat16_error():
    """bfloat16_error(architecture) -> |bfloat16 - float32| / |float32| of a fresh network's logits (Euclidean)."""

    def measure(architecture: Architecture) -> float:
        x = jax.random.normal(jax.random.key(0), (2, 16, 16, 16, 1))

        def logits(x):
            nets = (build(architecture, 1, 3, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.float32, jnp.bfloat16))
            return [net(x, deep_supervision=False)[0] for net in nets]

        full, half = compiled(logits, x)(x)
        assert full.dtype == half.dtype == jnp.float32
        return float(jnp.linalg.norm((half - full).ravel()) / jnp.linalg.norm(full.ravel()))

    return measure


class Deviation(NamedTuple):
    """Of one array from the peer's: largest relative to the largest value, and root mean square relative to its own."""

    largest: float
    rms: float


def deviation(ours, theirs) -> Deviation:
    difference = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
    return Deviation(relative_error(ours, theirs), float(difference / np.linalg.norm(theirs.astype(np.float64))))


class MonaiNetwork(NamedTuple):
    """One of MONAI's networks: ours with its weights, and what MONAI computed."""

    graphdef: nnx.GraphDef
    params: nnx.State
    image: np.ndarray
    cotangent: np.ndarray
    peer: dict[str, np.ndarray]  # "output_0" or, at every second voxel, "output_0_stride2"; gradients
    about: dict

    def errors(self) -> dict[str, "Deviation"]:
        """Deviations of the output and of each recorded gradient."""

        def objective(params, image):
            (logits,) = nnx.merge(self.graphdef, params)(image)
            return jnp.sum(logits * self.cotangent), logits

        run = compiled(jax.value_and_grad(objective, (0, 1), has_aux=True), self.params, self.image)
        (_, logits), (g_params, g_image) = run(self.params, self.image)
        ours = {"grad_param:" + k: v for k, v in monai_names.state_dict_from_params(nnx.to_pure_dict(g_params)).items()}
        ours["grad_input"] = np.moveaxis(np.asarray(g_image), -1, 1)
        ours["grad_input_stride2"] = ours["grad_input"][:, :, ::2, ::2, ::2]
        ours["output_0"] = np.moveaxis(np.asarray(logits), -1, 1)
        ours["output_0_stride2"] = ours["output_0"][:, :, ::2, ::2, ::2]
        return {k: deviation(ours[k], v) for k, v in self.peer.items() if k.startswith(("output", "grad"))}

    def forward_error(self) -> "Deviation":
        """Deviation of the output alone."""
        (logits,) = compiled(nnx.merge(self.graphdef, self.params), self.image)(self.image)
        logits = np.moveaxis(np.asarray(logits, np.float32), -1, 1)
        if "output_0" in self.peer:
            return deviation(logits, self.peer["output_0"])
        return deviation(logits[:, :, ::2, ::2, ::2], self.peer["output_0_stride2"])


@pytest.fixture(scope="session")
def monai_network(golden):
    """monai_network("monai_unetr") -> MonaiNetwork; see read_monai."""
    return functools.partial(read_monai, golden)


def read_monai(golden: Callable, name: str, dtype=jnp.float32, expected: str | None = None, **changes) -> MonaiNetwork:
    """MONAI's network of a golden file; weights follow the recipe in the sidecar.

    `expected` names the file with what the peer computed, if another; `changes` are options to change. With dtype float64
    (inside jax.enable_x64) all is float64.
    """
    arrays, about = golden(f"nets/{name}")
    recipe = about["weight_recipe"]
    weights = {k: hashed(recipe["name_prefix"] + k, **v) for k, v in recipe["parameters"].items()}
    for key, total in recipe["parameter_sums_float64"].items():
        assert abs(weights[key].sum(dtype=np.float64) - total) < 1e-6
    graphdef, params = nnx.split(nnx.eval_shape(lambda: build_monai(about, dtype, **changes)))
    wide = np.promote_types(dtype, np.float32)
    loaded = jax.tree.map(lambda array: jnp.asarray(array, wide), monai_names.params_from_state_dict(weights))
    nnx.replace_by_pure_dict(params, loaded)
    cotangent = hashed(f"{name}.fixed_0", about["output_checksums"][0]["shape"], 0.0, 1.0)
    image, cotangent = (channels_last(array).astype(wide) for array in (arrays["input"], cotangent))
    return MonaiNetwork(graphdef, params, image, cotangent, golden(f"nets/{expected}")[0] if expected else arrays, about)


def build_monai(about: dict, dtype=jnp.float32, **changes) -> nnx.Module:
    """A fresh network of a golden's architecture."""
    options = dict(about["arch_kwargs"])
    ends = options.pop("in_channels"), options.pop("out_channels")
    renamed = {{"img_size": "table_size", "use_v2": "v2"}.get(k, k): v for k, v in options.items()}
    renamed = {k: tuple(v) if isinstance(v, list) else v for k, v in renamed.items()}
    backbone = "unetr" if about["network"].endswith(".UNETR") else "swin-unetr"
    return build(Architecture(backbone, options=renamed | changes), *ends, dtype=dtype, rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def filled():
    """filled(make) -> the module that `make` builds, with random parameters: compiling each of its own draws takes long."""

    def fill(make: Callable[[], nnx.Module]) -> nnx.Module:
        graphdef, params = nnx.split(nnx.eval_shape(make))
        rng = np.random.default_rng(0)
        return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), params))

    return fill


@pytest.fixture(scope="session")
def run_quickly():
    """run_quickly(function, *args): compiled as a whole, with little optimisation."""
    return lambda function, *args: compiled(function, *args)(*args)


def compiled(function: Callable, *args) -> Callable:
    """Compiled without LLVM's optimisations, which take most of the time and change no number that matters here."""
    return jax.jit(lambda *a: function(*a)).lower(*args).compile({"xla_backend_optimization_level": 0})


def hashed(name: str, shape: list[int], offset: float, scale: float) -> np.ndarray:
    """The golden files' recipe for reproducible weights: an integer hash of (name, index), uniform in offset +- scale."""
    low = np.uint64(2**32 - 1)
    h = np.arange(np.prod(shape, dtype=int), dtype=np.uint64) * np.uint64(2654435761)
    h = (h + np.uint64(zlib.crc32(name.encode()))) & low
    h ^= h >> np.uint64(15)
    h = (h * np.uint64(2246822519)) & low
    h ^= h >> np.uint64(13)
    u = (h >> np.uint64(8)) / 2.0**24
    return (offset + scale * (2 * u - 1)).astype(np.float32).reshape(shape)
