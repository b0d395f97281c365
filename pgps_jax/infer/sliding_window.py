"""A network over a volume larger than its patch: overlapping tiles, Gaussian weights, mirrored copies, folds.

All of it follows nnU-Net's predictor, except that sums are kept in float32 where nnU-Net keeps float16.
"""

import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from scipy import ndimage

from pgps_jax.architecture import Size
from pgps_jax.errors import InputError

NetworkFunction = Callable[[PyTree, Any], Any]  # (params, tiles (b,d,h,w,c)) -> logits (b,d,h,w,k) at full resolution


def tile_starts(size: Size, patch_size: Size, step: float = 0.5) -> tuple[tuple[int, ...], ...]:
    """First voxel of every tile, per axis: the fewest equally spaced tiles that cover the axis.

    Neighbours are at most `step` patch lengths apart; rounding as NumPy's (halves to even). Each size must be at least
    the patch's. Source: nnU-Net's sliding window.
    """
    starts = []
    for length, patch in zip(size, patch_size, strict=True):
        if length < patch:
            raise ValueError(f"tile_starts: axis of {length} voxels is smaller than the patch ({patch}); pad it first")
        count = math.ceil((length - patch) / max(patch * step, 1)) + 1  # the slices of a 2D network: one tile each
        distance = (length - patch) / (count - 1) if count > 1 else 0.0
        starts.append(tuple(int(np.round(distance * i)) for i in range(count)))
    return tuple(starts)


def gaussian_map(patch_size: Size) -> Float[np.ndarray, "d h w"]:
    """Weight of each voxel of a tile: Gaussian at voxel patch//2, sigma patch/8, maximum 10, never zero.

    Values are rounded to float16 and those that underflow there take the smallest value left, as in nnU-Net: this
    decides what counts where all tiles that cover a voxel are near their border.
    """
    impulse = np.zeros(patch_size)
    impulse[tuple(n // 2 for n in patch_size)] = 1
    weight = ndimage.gaussian_filter(impulse, [n / 8 for n in patch_size], mode="constant")
    half = (weight / (weight.max() / 10)).astype(np.float16)
    half[half == 0] = half[half > 0].min()
    return half.astype(np.float32)


def pad_to_patch(size: Size, patch_size: Size) -> tuple[tuple[int, int], ...]:
    """Voxels to add before and after each axis so that a patch fits; an odd one goes to the end."""
    missing = [max(patch - length, 0) for length, patch in zip(size, patch_size, strict=True)]
    return tuple((n // 2, n - n // 2) for n in missing)


class SlidingWindow:
    """Logits of whole volumes by one network; keeps what is compiled, so that the next volume starts at once.

    There is one program per (number of channels, shape of the parameters): tile shape and tile batch are fixed, short
    batches are filled with a repeated tile. Mirroring is done inside the program, by flags: eight mirrored passes cost
    one compilation, and XLA's fast CPU convolutions stay in use (they are not inside a loop).
    """

    def __init__(
        self,
        network_fn: NetworkFunction,
        patch_size: Size,
        num_outputs: int,
        mirror_axes: Sequence[int] = (),
        *,
        swap: tuple[int, Sequence[int]] | None = None,
        tile_batch: int | None = None,
        step: float = 0.5,
        outside: Sequence[float] | None = None,
        memory_limit: int = 4 * 2**30,
        compiler_options: dict[str, str] | None = None,
    ):
        """Describe the prediction; nothing is compiled yet.

        Args:
            network_fn: (params, tiles (b,d,h,w,c)) -> logits (b,d,h,w,k) at full resolution.
            patch_size: tile shape (d,h,w).
            num_outputs: k.
            mirror_axes: spatial axes (0, 1, 2) over whose subsets the logits are averaged; empty for none.
            swap: (axis, order): logits of a tile mirrored along this axis are put into this order of outputs before they
                are added, so that left stays left (`data.label_pairs.swapped_outputs`).
            tile_batch: tiles per program call; by default 1 on CPU, on accelerators about two million voxels.
            step: distance of neighbouring tiles in patch lengths, in (0, 1].
            outside: logits (k values) of background. If given, tiles whose channels are all constant (outside the
                body) are skipped and voxels that no tile covers take these logits.
            memory_limit: bytes of logits kept in memory; beyond it they go to an unnamed temporary file, which the
                operating system pages.
            compiler_options: XLA's, for the platform.
        """
        if not 0 < step <= 1:
            raise InputError(f"tile step: {step} given, must be above 0 and at most 1 (in patch lengths)")
        if any(axis not in (0, 1, 2) for axis in mirror_axes):
            raise InputError(f"mirror axes: {tuple(mirror_axes)} given, only 0, 1 and 2 exist")
        if swap is not None and (swap[0] not in (0, 1, 2) or sorted(swap[1]) != list(range(num_outputs))):
            raise InputError(f"mirror label-swap: axis {swap[0]} and order {tuple(swap[1])} given for {num_outputs} outputs")
        if outside is not None and len(outside) != num_outputs:
            raise ValueError(f"outside: {len(outside)} logits given for {num_outputs} outputs")
        self.patch_size = patch_size
        self.num_outputs = num_outputs
        self.mirror_axes = tuple(sorted(set(mirror_axes)))
        self.tile_batch = tile_batch or default_tile_batch(patch_size)
        self.step = step
        self.outside = outside
        self.memory_limit = memory_limit
        self._weight = gaussian_map(patch_size)
        axes = self.mirror_axes
        self._flips = [np.isin(axes, chosen) for n in range(len(axes) + 1) for chosen in itertools.combinations(axes, n)]
        self._add_pass = jax.jit(partial(_add_pass, network_fn, axes, swap), donate_argnums=2, compiler_options=compiler_options)
        self._finish = jax.jit(_finish)

    def __call__(
        self,
        fold_params: Sequence[PyTree],
        image: Float[np.ndarray, "c d h w"],
        progress: Callable[[int, int], None] | None = None,
    ) -> Float[np.ndarray, "k d h w"]:
        """Mean of the folds' logits for one preprocessed volume, float32.

        Args:
            fold_params: parameters of each fold; on the device already, or NumPy arrays.
            image: preprocessed channels.
            progress: called with (tiles done, tiles in all).

        Raises InputError when logits beyond the memory limit do not fit the disk of temporary files.
        """
        size = image.shape[1:]
        padding = pad_to_patch(size, self.patch_size)
        padded = np.pad(image, ((0, 0), *padding))
        starts = self._tiles(padded)
        logits = _accumulator((self.num_outputs, *padded.shape[1:]), self.memory_limit)
        weight = np.zeros(padded.shape[1:], np.float32)

        waiting: tuple[list[Size], Array] | None = None  # one batch computes while the one before it is added up
        done = 0
        for batch in [*_batches(starts, self.tile_batch), None]:
            launched = None if batch is None else (batch, self._launch(fold_params, padded, batch))
            if waiting is not None:
                for start, tile in zip(waiting[0], np.asarray(waiting[1]), strict=False):
                    box = tuple(slice(s, s + n) for s, n in zip(start, self.patch_size, strict=True))
                    logits[(slice(None), *box)] += tile
                    weight[box] += self._weight
                done += len(waiting[0])
                if progress is not None:
                    progress(done, len(starts))
            waiting = launched
        inside = tuple(slice(before, before + n) for (before, _), n in zip(padding, size, strict=True))
        return self._divide(logits[(slice(None), *inside)], weight[inside])

    def _tiles(self, padded: np.ndarray) -> list[Size]:
        """Starts of the tiles to compute, first axis slowest."""
        starts = list(itertools.product(*tile_starts(padded.shape[1:], self.patch_size, self.step)))
        if self.outside is None:
            return starts
        return [start for start in starts if not _is_constant(self._cut(padded, start))]

    def _cut(self, padded: np.ndarray, start: Size) -> np.ndarray:
        return padded[(slice(None), *(slice(s, s + n) for s, n in zip(start, self.patch_size, strict=True)))]

    def _launch(self, fold_params: Sequence[PyTree], padded: np.ndarray, batch: list[Size]) -> Array:
        """Weighted logits (b,k,d,h,w) of a batch of tiles, still computing."""
        cuts = [self._cut(padded, start) for start in batch]
        cuts += cuts[-1:] * (self.tile_batch - len(cuts))
        tiles = jnp.asarray(np.ascontiguousarray(np.moveaxis(np.stack(cuts), 1, -1), np.float32))
        total = jnp.zeros((self.tile_batch, *self.patch_size, self.num_outputs), jnp.float32)
        for params in fold_params:
            for flips in self._flips:
                total = self._add_pass(params, tiles, total, flips)
        return self._finish(total, self._weight / np.float32(len(fold_params) * len(self._flips)))

    def _divide(self, logits: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Weighted sums to means, class by class in place: no second array of all classes."""
        bare = weight == 0
        weight = np.where(bare, 1, weight)
        for k in range(self.num_outputs):
            logits[k] /= weight
            if self.outside is not None:
                logits[k][bare] = self.outside[k]
        return logits


def default_tile_batch(patch_size: Size) -> int:
    """Tiles per call: 1 on CPU (a tile fills the cores); elsewhere enough small tiles to fill the device, at most 8."""
    if jax.default_backend() == "cpu":
        return 1
    return int(np.clip(2**21 // math.prod(patch_size), 1, 8))


def _add_pass(network_fn: NetworkFunction, axes: tuple[int, ...], swap: tuple[int, Sequence[int]] | None, params: PyTree,
              tiles: Array, total: Array, flips: Array) -> Array:
    """Add the logits of one mirrored pass, mirrored back. `flips` tells while running which of the `axes` to mirror.

    By selection: for a branch the host would wait on GPU until the device has come to it.
    """

    def mirrored(x: Array) -> Array:
        for flip, axis in zip(flips, axes, strict=True):
            x = jnp.where(flip, jnp.flip(x, axis + 1), x)
        return x

    logits = mirrored(network_fn(params, mirrored(tiles)).astype(jnp.float32))
    if swap and swap[0] in axes:
        logits = jnp.where(flips[axes.index(swap[0])], logits[..., np.array(swap[1])], logits)
    return total + logits


def _finish(total: Array, weight: Array) -> Array:
    """Weight the summed logits and put classes before space: the host adds contiguous blocks."""
    return jnp.moveaxis(total * weight[None, ..., None], -1, 1)


def _batches(starts: list[Size], length: int) -> Iterator[list[Size]]:
    for i in range(0, len(starts), length):
        yield starts[i : i + length]


def _is_constant(tile: np.ndarray) -> bool:
    return all(channel.min() == channel.max() for channel in tile)


def _accumulator(shape: tuple[int, ...], memory_limit: int) -> np.ndarray:
    """Zeros, in a file beyond the limit; its space is taken now, for a mapped file on a full disk ends the process without a word."""
    needed = math.prod(shape) * 4
    if needed <= memory_limit:
        return np.zeros(shape, np.float32)
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps the unnamed file alive; it vanishes with the array
            if shutil.disk_usage(folder).free < needed:
                raise OSError("too little space")
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
            return np.memmap(file, np.float32, "w+", shape=shape)
    except OSError as error:
        raise InputError(f"the logits of this volume need {needed / 1e9:.1f} GB of temporary files, but {folder} has "
                         f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free ({error}); free some, or name a larger folder by the "
                         "environment variable TMPDIR") from None
