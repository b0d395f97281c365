"""Everything that changes while training. What depends on time is a function of `step`, so this is the whole checkpoint."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PyTree


class TrainState(NamedTuple):
    """Number of optimizer updates done, parameters (nested dict of float32 arrays) and the optimizer's momentum."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def split(network: nnx.Module) -> tuple[nnx.GraphDef, PyTree]:
    """Structure of a network and its parameters as a plain nested dict, the form in which they are trained and saved."""
    graphdef, params = nnx.split(network, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def abstract(tree: PyTree, sharding: jax.sharding.Sharding | None = None) -> PyTree:
    """Shapes and types of a tree, as ahead-of-time compilation and restoring want them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def state_bytes(state: TrainState) -> int:
    """Bytes of all arrays of a state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
