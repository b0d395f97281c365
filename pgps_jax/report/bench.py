"""What limits training, told from measured rates: the input, the disk it comes from, or the computation."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.table import Table

from pgps_jax.curriculum import Schedule, Stage

Limit = Literal["compute-bound", "input-bound", "disk-bound"]
WORTH_CHANGING = 0.1  # share of the time that training waits for input; less is not worth a change
MOSTLY_WAITING = 0.5  # share of the cores' time below which reading threads that touch the disk are held up by it


class StageBench(NamedTuple):
    """Rates of one stage, in batches per second."""

    stage: Stage
    cold: float | None  # input alone, files not in memory; None where the system cannot forget files
    input: float  # input alone, files in memory if they fit
    step: float  # computation alone, on a batch that stays on the device
    both: float  # as in training
    input_wait: float  # share of the time of `both` that was spent waiting for input
    busy: float | None  # share of the cores' time that input alone used; None where worker processes did it
    disk_reads: float  # page faults of `input` that the disk had to answer, per batch

    def record(self) -> dict[str, Any]:
        """JSON-able record."""
        rates = {k: round(v, 4) if isinstance(v, float) else v for k, v in self._asdict().items() if k != "stage"}
        return {"stage": self.stage.index, "patch_size": list(self.stage.patch_size), "batch_size": self.stage.batch_size, **rates}


class Host(NamedTuple):
    """What the rates have to be seen with."""

    cores: int
    threads: int
    processes: int
    cache_bytes: int  # of decompressed cases that are kept in memory
    stored_bytes: int  # of the training cases on disk
    case_bytes: int  # of the training cases decompressed
    free_bytes: int  # of memory
    larger_crops: bool  # cut more than the patch, for rotation and scaling

    @property
    def files_fit(self) -> bool:
        """Whether the system can keep all files in memory once they have been read."""
        return self.stored_bytes < 0.8 * self.free_bytes


def limit_of(row: StageBench, host: Host) -> Limit:
    """What limits a stage. Files that do not fit the memory are read from disk again and again, so their cold rate counts."""
    if not host.files_fit and row.cold is not None and row.cold < (1 - WORTH_CHANGING) * row.step:
        return "disk-bound"
    if row.input_wait <= WORTH_CHANGING:
        return "compute-bound"
    if row.disk_reads >= 1 and row.busy is not None and row.busy < MOSTLY_WAITING:
        return "disk-bound"
    return "input-bound"


def overall_limit(rows: Sequence[StageBench], schedule: Schedule, host: Host) -> tuple[Limit, float]:
    """What limits the whole schedule, and the share of its time that is spent waiting; stages not measured count as the nearest one."""
    steps = np.bincount(schedule.stage_of_step, minlength=len(schedule.stages))
    nearest = [min(rows, key=lambda row, i=i: abs(row.stage.index - i)) for i in range(len(steps))]
    seconds = {row: sum(n / row.both for n, near in zip(steps, nearest, strict=True) if near is row) for row in rows}
    waiting = sum(row.input_wait * spent for row, spent in seconds.items()) / sum(seconds.values())
    spent_on: dict[Limit, float] = {}
    for row, spent in seconds.items():
        limit = limit_of(row, host)
        spent_on[limit] = spent_on.get(limit, 0.0) + spent
    return max(spent_on, key=spent_on.get), float(waiting)


def advice(limit: Limit, host: Host) -> str:
    """What to change, in one sentence."""
    gb = 1e-9
    keep = f"--cache-gb {gb * host.case_bytes * 1.1:.1f} keeps all training cases decompressed in memory"
    can_keep = host.cache_bytes < host.case_bytes < 0.5 * host.free_bytes
    if limit == "compute-bound":
        return "input keeps up with the device; only a faster device or a smaller network makes this faster"
    if limit == "disk-bound":
        return f"copy the preprocessed cases to a local disk{'; ' + keep if can_keep else ''}"
    ways = []
    if not host.processes and host.threads < host.cores:
        ways.append(f"--threads {host.cores} uses all cores")
    if can_keep:
        ways.append(keep)
    if host.larger_crops:
        ways.append("--augment.preset light cuts no more than the patch")
    return "; ".join([*ways, "more CPU cores"])


def bench_table(rows: Sequence[StageBench], host: Host) -> Table:
    """The rates for the terminal."""
    table = Table(title="batches per second", caption="cold, input: from files not in memory, and in memory; step: on one batch; "
                                                      "both: as in training, with the share of the time that waits for input")
    for heading in ("stage", "cold", "input", "step", "both", "wait", "limit"):
        table.add_column(heading, justify="left" if heading in ("stage", "limit") else "right", no_wrap=True)
    for row in rows:
        given = (row.cold, row.input, row.step, row.both)
        rates = ["" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}" for rate in given]
        limit = limit_of(row, host).removesuffix("-bound")
        table.add_row(f"{row.stage.index}: {row.stage}", *rates, f"{100 * row.input_wait:.0f} %", limit)
    return table
