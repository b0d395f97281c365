"""RunConfig: everything that a run is made of, assembled from the part configs beside the code that they configure."""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pgps_jax.curriculum import CurriculumConfig
from pgps_jax.data.dataset import default_workers
from pgps_jax.data.sampling import SamplingConfig
from pgps_jax.errors import InputError, brief
from pgps_jax.json_file import LARGEST_INTEGER
from pgps_jax.models.swin_unetr import SwinUnetrOptions
from pgps_jax.models.unetr import UnetrOptions
from pgps_jax.train.augment import AugmentConfig
from pgps_jax.train.optim import OptimConfig

LONGEST_PATH = 4096  # characters; no system takes more
Planner = Literal["nnunet", "resenc-m", "resenc-l", "resenc-xl"]


@dataclass(frozen=True)
class NetworkConfig:
    """Changes to the planned network."""

    backbone: Literal["plain-unet", "resenc-unet", "unetr", "swin-unetr"] | None = None
    """nnU-Net's U-Nets, or UNETR and SwinUNETR as in MONAI, which take patches of multiples of 16 and 32 voxels. As planned when
    not given."""
    base_features: int | None = None
    """Channels of the first stage; later stages double it up to max_features. As planned when not given."""
    max_features: int | None = None
    """Upper limit of channels per stage. As planned when not given."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the computation; parameters, norms, logits and loss stay float32. auto: bfloat16 on GPU and TPU, float32 on CPU. float32
    is that of CPUs on accelerators too, with all bits, and several times slower there."""
    remat: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    unetr: UnetrOptions = field(default_factory=UnetrOptions)
    swin_unetr: SwinUnetrOptions = field(default_factory=SwinUnetrOptions)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a training run depends on."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder in nnU-Net's raw layout (dataset.json, imagesTr, labelsTr), or a Decathlon folder."""
    workspace: Path = Path("pgps_workspace")
    """Folder under which everything is written: preprocessed/<dataset>/ and runs/<dataset>/<name>/fold_<k>/."""
    name: str | None = None
    """Name of the run's folder; <configuration>_<mode> when not given."""
    fold: int | Literal["all"] = 0
    """Fold of the cross-validation (splits_final.json); "all" trains and validates on every case."""
    configuration: str = "3d_fullres"
    """Configuration of the plans to train."""
    planner: Planner = "nnunet"
    """Planning rules: nnU-Net's default or one of its residual encoder presets."""
    batch_size: int | None = None
    """Patches per step at the planned patch size. As planned when not given."""
    accumulate: int | Literal["auto"] = 1
    """Compute each batch in this many parts, one after the other: less memory, the same numbers but for rounding, and one forward
    pass more. auto: one part where the batch fits the device, found by compiling before the first step, and else as few as fit."""
    epochs: int = 1000
    """Length of training in epochs."""
    steps_per_epoch: int = 250
    """Optimizer updates per epoch; an epoch is a unit of reporting, not a pass over the data."""
    max_hours: float | None = None
    """Shorten the run so that training ends, annealed and at the planned patch, within this many hours on this machine: never more than
    `epochs`, corrected while training, the learning rate falling step by step. The prediction of whole volumes after it comes on top."""
    validation_steps: int = 50
    """Validation batches of planned-size patches at the end of each epoch (pseudo-Dice)."""
    seed: int = 0
    """Seed of initial weights, sampling and augmentation; the same seed gives the same run."""
    curriculum: Annotated[CurriculumConfig, tyro.conf.arg(name="")] = field(default_factory=CurriculumConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    pretrained: Path | None = None
    """Start from the weights of another run (…/fold_<k>), of nnU-Net (checkpoint_final.pth), or of MONAI's UNETR, SwinUNETR or
    self-supervised SwinUNETR encoder (.pt). What does not fit stays fresh; pretrained.json in the run folder says what."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Where to compute; auto takes an accelerator when there is one."""
    deterministic: bool = False
    """On GPU: only deterministic kernels, so that runs repeat bit for bit (CPU and TPU always do) as long as their programs come
    from the same compile cache: compiled anew, another of these kernels may turn out the fastest and be taken."""
    threads: int = field(default_factory=lambda: min(default_workers(), 8))
    """Threads that read and crop patches (in each loader process, if there are any); one per core, at most 8, when not given."""
    loader_processes: int = 0
    """Processes that read and crop patches; with 0 the threads of this process do it, which needs less memory and is
    faster unless many cores lie idle. Batches are the same bits in any layout."""
    cache_gb: float = 0.25
    """Gigabytes of decompressed cases that are kept in memory while training; small datasets fit as a whole. 0 keeps none."""
    workers: int | None = None
    """Processes for preprocessing and evaluation; one per core when not given."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints (one is also saved at each stage's end)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept, beside the best one."""
    mirror_tta: bool = True
    """Mirror test-time augmentation in the validation after training (8 times the work in 3D)."""
    fresh: bool = False
    """Delete what an earlier run of the same name left, and start over."""

    @property
    def run_name(self) -> str:
        """Folder name of the run."""
        return self.name or f"{self.configuration}_{self.curriculum.mode}"

    @property
    def sampling_of_mode(self) -> SamplingConfig:
        """How training patches are drawn: as asked for, and where nothing was, by the scheme of the mode's own paper."""
        by_mode = "per-case" if self.curriculum.mode in ("pgps", "pgps-plus", "rpss") else "paired"
        return dataclasses.replace(self.sampling, scheme=self.sampling.scheme or by_mode)

    def check_loader(self) -> None:
        """Raise InputError if the flags of reading patches are out of their ranges."""
        least_of = {"threads": (self.threads, 1), "loader-processes": (self.loader_processes, 0), "cache-gb": (self.cache_gb, 0)}
        for flag, (value, least) in least_of.items():
            if not (math.isfinite(value) and value >= least):
                raise InputError(f"--{flag} {value}: must be at least {least}, and finite")


# How and where a run is computed: may differ when it is resumed. Everything else must agree.
FREE_TO_CHANGE = frozenset({"dataset", "workspace", "device", "threads", "loader_processes", "cache_gb", "workers", "checkpoint_minutes",
                            "keep_checkpoints", "mirror_tta", "fresh"})


def to_json(config: Any) -> dict:
    """A config dataclass as a JSON-able dict with every default spelled out."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_json(kind: type, values: Any, where: str) -> Any:
    """Inverse of `to_json`. Raises InputError naming unknown or missing keys and wrong types; `where` names the file."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object for {kind.__name__}, found {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise InputError(f"{where}: unknown keys {', '.join(map(str, unknown))}; known are {', '.join(hints)}")
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in values
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise InputError(f"{where}: lacks the keys {', '.join(missing)}")
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as read from JSON, brought to the type that the annotation `hint` asks for."""
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return _value(option, value, where)
            except InputError:
                continue
    elif origin is Literal:
        if any(type(value) is type(option) and value == option for option in options):
            return value
    elif origin is tuple:
        if isinstance(value, list) and options[-1] is Ellipsis:
            return tuple(_value(options[0], v, where) for v in value)
        if isinstance(value, list) and len(value) == len(options):
            return tuple(_value(o, v, where) for o, v in zip(options, value, strict=True))
    elif hint is Path and isinstance(value, str):
        if len(value) <= LONGEST_PATH and value.isprintable():
            return Path(value)
    elif hint in (int, float) and isinstance(value, int | float) and not abs(value) <= LARGEST_INTEGER:
        raise InputError(f"{where}: {brief(value)} is no number that can be used")
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif hint is type(None) and value is None:
        return None
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise InputError(f"{where}: {brief(value)} is not of type {hint}")


def check_same(config: RunConfig, stored: dict, where: Path) -> None:
    """Refuse to go on with a run whose config differs in anything that changes its numbers; keys that it lacks have their default."""
    asked, stored = to_json(config), to_json(from_json(RunConfig, stored, f"{where / 'config.json'}"))
    different = []

    def compare(a: Any, b: Any, key: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for name in sorted(set(a) | set(b)):
                compare(a.get(name), b.get(name), f"{key}.{name}" if key else name)
        elif a != b:
            different.append(f"{key} ({json.dumps(b)} there, {json.dumps(a)} now)")

    compare({k: v for k, v in asked.items() if k not in FREE_TO_CHANGE},
            {k: v for k, v in stored.items() if k not in FREE_TO_CHANGE}, "")
    if different:
        raise InputError(f"{where}: this run was started with another config: {'; '.join(different)}. "
                         "Use the same values to go on, another --name for a new run, or --fresh to start over")
