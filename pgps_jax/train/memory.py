"""Bytes that a training program needs, bytes that the device has, and the largest batch that brings them together.

Everything here is known from compiling; nothing is executed, so nothing can fail halfway.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from pgps_jax.architecture import Size
from pgps_jax.curriculum import Stage
from pgps_jax.errors import InputError
from pgps_jax.host_memory import gib, host_bytes_left

MOST_ELEMENTS = 2**31 - 1  # larger tensors leave cuDNN's fast kernels and want huge workspaces
FINE_ENOUGH = 0.02  # a batch within this share of the largest that fits is not searched any further
MOST_COMPILES = 6  # per patch size, the two of the first fit included


class BatchChoice(NamedTuple):
    """A batch size, the bytes that its compiled program needs per device, and a sentence that says why this one."""

    batch_size: int
    program_bytes: int
    budget_bytes: int
    reason: str


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Device memory that a program needs while it runs: arguments + outputs - aliases + temporaries + code.

    Donated arguments share their memory with outputs (aliases). XLA's own peak figure is not used: it is wrong on CPU
    and ignores loops. For a sharded program these are the bytes on one device.
    """
    sizes = compiled.memory_analysis()
    return int(
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    )


def device_budget(
    fraction: float, stats: Sequence[dict[str, int] | None] | None = None, platform: str | None = None
) -> int | float:
    """Bytes that a program may use on each device: `fraction` of what there is, minus what is in use.

    Of an accelerator there is what its allocator may take (`bytes_limit`), not what the chip has. CPU devices share
    what memory the machine or the container has left, `fraction` of it. An accelerator that does not tell its limit has
    an unknown one: infinite.

    Args:
        stats, platform: `memory_stats()` and platform of the devices, asked of all local ones when not given.
    """
    platform = platform or jax.local_devices()[0].platform
    stats = [device.memory_stats() for device in jax.local_devices()] if stats is None else stats
    budgets = []
    for of_device in stats:
        if of_device and "bytes_limit" in of_device:
            budgets.append(int(fraction * of_device["bytes_limit"]) - of_device.get("bytes_in_use", 0))
        else:
            budgets.append(int(fraction * host_bytes_left()) // len(stats) if platform == "cpu" else math.inf)
    return max(0, min(budgets))


def share_of_dataset(dataset_voxels: int | float, patch_size: Size, share: float = 0.05) -> int:
    """Batch that holds 5 % (`share`) of the dataset's voxels, and never less than 2: nnU-Net's upper limit when it plans."""
    return max(2, round(share * dataset_voxels / math.prod(patch_size)))


def choose_batch_size(
    compile_at: Callable[[int], jax.stages.Compiled],
    stage: Stage,
    budget_bytes: int,
    *,
    elements_per_patch: int,
    multiple_of: int = 1,
    max_batch: int | None = None,
    outside: Callable[[int], int] = lambda batch: 0,
) -> BatchChoice:
    """The largest batch size whose program fits the budget.

    Compiles at two batch sizes, reads the line bytes = a + b * batch off them, and compiles once more at the batch size
    that the line promises. Where the line was wrong the new point is used to correct it, a few times at most; what is
    returned has been compiled and fits.

    Args:
        compile_at: compiles the stage's program for a batch size. XLA may itself find that it does not fit.
        stage: the patch size in question, with the batch size to begin from.
        budget_bytes: what a program may use on each device.
        elements_per_patch: elements of the largest activation for one patch; the batch keeps it below 2^31.
        multiple_of: number of devices that share a batch.
        max_batch: another upper limit, for example `share_of_dataset`.
        outside: bytes that a batch size needs in the same memory outside of the program (prefetched batches).

    Raises InputError if not even the smallest batch fits.
    """
    ceiling, limit = MOST_ELEMENTS * multiple_of // elements_per_patch, "2^31 elements per tensor"
    if max_batch is not None and max_batch < ceiling:
        ceiling, limit = max_batch, "its upper limit"
    ceiling = max(multiple_of, ceiling // multiple_of * multiple_of)
    measured: dict[int, float] = {}

    def measure(batch: int) -> None:
        try:
            measured[batch] = float(program_bytes(compile_at(batch)) + outside(batch))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            measured[batch] = math.inf

    first = min(ceiling, -(-stage.batch_size // multiple_of) * multiple_of)
    for batch in dict.fromkeys((first, min(2 * first, ceiling))):
        measure(batch)
    while True:
        low = max((batch for batch, needed in measured.items() if needed <= budget_bytes), default=0)
        high = min((batch for batch in measured if batch > low), default=ceiling + multiple_of)
        promised = int(min(_line(measured, budget_bytes), ceiling)) // multiple_of * multiple_of
        good = low and (promised <= low * (1 + FINE_ENOUGH) or len(measured) >= MOST_COMPILES)
        if good or high - low <= multiple_of:
            break
        measure(max(low + multiple_of, min(promised, high - multiple_of)))

    patch = "x".join(map(str, stage.patch_size))
    if not low:
        least = measured[min(measured)]
        wants = "more than the device has" if math.isinf(least) else gib(least)
        raise InputError(
            f"patch {patch}: even a batch of {min(measured)} needs {wants}, and {gib(budget_bytes)} are free; "
            "use fewer features, a smaller patch, a larger --memory-fraction or, on CPU, less --cache-gb"
        )
    why = f"limited by {limit}" if low == ceiling else f"the largest that fits {gib(budget_bytes)}"
    reason = f"patch {patch}: batch {low} needs {gib(measured[low])}, {why} (tried {len(measured)}, first {first})"
    return BatchChoice(low, math.ceil(measured[low]), budget_bytes, reason)


def _line(measured: dict[int, float], budget: int) -> int | float:
    """Batch size at which the line through the two measurements nearest to the budget reaches it."""
    nearest = sorted((abs(needed - budget), batch, needed) for batch, needed in measured.items() if needed < math.inf)
    if len(nearest) < 2:  # no line yet: the double of what fits, or half of what does not
        return 2 * nearest[0][1] if nearest and nearest[0][2] <= budget else min(measured) / 2
    (_, b1, n1), (_, b2, n2) = nearest[:2]
    slope = (n2 - n1) / (b2 - b1)
    return math.inf if slope <= 0 else b1 + (budget - n1) / slope


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, is a device or compiler telling that memory does not suffice."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, MemoryError) or (
            isinstance(seen, jax.errors.JaxRuntimeError)
            and any(word in text for word in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "HbmOom"))
        ):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
