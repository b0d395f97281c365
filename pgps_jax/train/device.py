"""Where a run computes, and how batches and state are laid out there."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pgps_jax.architecture import Size
from pgps_jax.curriculum import Stage
from pgps_jax.data.pipeline import PatchBatch
from pgps_jax.errors import InputError

CUDNN_WITH_RIGHT_CONV3D = 91600  # 9.8 to 9.15 compute some 3D convolutions wrongly without saying so
FIRST_WITH_BFLOAT16 = 8.0  # compute capability of NVIDIA's GPUs, A100's; on T4 (7.5) and V100 (7.0) XLA computes in float32 and casts


class Device(NamedTuple):
    """Batches are split over the devices (`split`), the state is whole on every one (`whole`); `dtype` computes."""

    platform: str
    split: NamedSharding
    whole: NamedSharding
    dtype: type

    @property
    def transport(self) -> type:
        """Type in which image patches cross to the device: half the bytes where there is a bus to cross."""
        return np.float32 if self.platform == "cpu" else np.float16

    @property
    def count(self) -> int:
        """Number of devices that share a batch."""
        return self.split.mesh.size


def choose_platform(name: str) -> None:
    """Make JAX use a platform ("auto": its own choice). Call it before anything is computed.

    Raises InputError when there is no such device.
    """
    if name == "auto":
        return
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    try:
        jax.devices(name)  # by name: a platform chosen earlier in this process stays the default
    except RuntimeError as error:
        jax.config.update("jax_platforms", before)
        raise InputError(f"--device {name}: JAX finds no such device ({str(error).splitlines()[0]}); "
                         "use --device cpu, or install the matching extra (cuda12, cuda13, tpu)") from None


def open_device(stages: tuple[Stage, ...], precision: str) -> Device:
    """Devices of the default platform, as many as divide every stage's batch (all of them without stages)."""
    devices = jax.devices()
    count = math.gcd(len(devices), *(stage.batch_size // stage.parts for stage in stages))
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])
    platform = devices[0].platform
    dtype = jnp.float32 if precision == "float32" or (precision == "auto" and platform == "cpu") else jnp.bfloat16
    return Device(platform, NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()), dtype)


def abstract_batch(device: Device, batch_size: int, crop: Size, channels: int, label_dtype: type) -> PatchBatch:
    """Shapes, types and layout of the batches that the programs of a stage take."""
    return PatchBatch(
        jax.ShapeDtypeStruct((batch_size, *crop, channels), device.transport, sharding=device.split),
        jax.ShapeDtypeStruct((batch_size, *crop), label_dtype, sharding=device.split),
    )


def put(batch: PatchBatch, device: Device) -> PatchBatch:
    """Start moving a batch to the device."""
    return PatchBatch(*(jax.device_put(array, device.split) for array in batch))


def warnings(precision: str = "auto", augmentation: str = "none") -> list[str]:
    """Sentences about what this machine is known to compute wrongly or slowly.

    Args:
        precision: of the network, as in its config.
        augmentation: preset of the training; "none" for prediction.
    """
    device, found = jax.devices()[0], []
    if device.platform == "tpu" and augmentation == "default":
        found.append("warning: TPUs fetch the voxels of rotated and scaled patches one by one, which takes longer than the network; "
                     "--augment.preset light trains without both")
    if device.platform == "gpu" and precision != "float32" and _compute_capability(device) < FIRST_WITH_BFLOAT16:
        found.append(f"warning: {device.device_kind} cannot compute in bfloat16: it needs the time of float32 and more; a "
                     "network with --network.precision float32 is faster here, but needs more memory")
    if device.platform == "gpu" and _cudnn_version() < CUDNN_WITH_RIGHT_CONV3D:
        found.append(f"warning: cuDNN {_cudnn_version()} computes some 3D convolutions wrongly; install nvidia-cudnn-cu12>=9.16 (or -cu13)")
    return found


def _compute_capability(device) -> float:
    """Of an NVIDIA GPU, such as 7.5; infinite where it is not told."""
    try:
        return float(device.compute_capability)
    except (AttributeError, ValueError):
        return math.inf


def _cudnn_version() -> float:
    """Such as 91600; infinite where it is not told."""
    try:
        from jax._src.lib import cuda_versions  # jax offers the version nowhere else

        return cuda_versions.cudnn_get_version()
    except (ImportError, AttributeError, RuntimeError):
        return math.inf
