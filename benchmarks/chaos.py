"""A training run killed again and again: what is lost, repeated or different at its end, against one that was left alone.

    python benchmarks/chaos.py                       # 50 kills in several runs, on CPU
    python benchmarks/chaos.py --kills 8             # a short look
    python benchmarks/chaos.py --device gpu          # with --deterministic

One small training on phantoms is run to its end once. Then the same training is started under other names, killed with
SIGKILL at chosen moments and started again until it ends: during a step, while a checkpoint is saved, at the border of
two stages, in the validation of an epoch, while starting, in the prediction of the validation cases. Which of these and
how long after its beginning is drawn from a seed. The child process runs the command line of the package; it only marks
in a shared file what it is about, and the mark that it left tells what it died in. Compared at the end: parameters of
the last and the best checkpoint bit by bit, every record of steps and epochs but its times, every number of
summary.json. Lost are steps and epochs without a record, repeated those with more than one.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import platform
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"
PHASES = ("starting", "step", "checkpoint", "stage border", "validation", "prediction")
MARK = struct.Struct(f"B{len(PHASES)}I")  # what goes on now, and how often each phase has begun
LASTS = {"starting": 4.0, "step": 0.03, "checkpoint": 0.1, "stage border": 0.15, "validation": 0.1, "prediction": 0.5}  # seconds, about
BEGINS = {"starting": 1, "step": 60, "checkpoint": 5, "stage border": 1, "validation": 4, "prediction": 1}  # a kill waits for at most
STEPS_PER_EPOCH, EPOCHS = 32, 6
TIMES = {"seconds", "input_wait", "input_wait_seconds", "validation_seconds"}
PATIENCE = 300  # seconds for a child to come to the chosen moment
SERVER = multiprocessing.get_context("forkserver")


def training(raw: Path, workspace: Path, name: str, device: str) -> list[str]:
    return ["train", str(raw), "--workspace", str(workspace), "--name", name, "--epochs", str(EPOCHS), "--steps-per-epoch",
            str(STEPS_PER_EPOCH), "--validation-steps", "2", "--network.base-features", "4", "--augment.preset", "light",
            "--no-mirror-tta", "--workers", "1", "--checkpoint-minutes", "0.003", "--device", device,
            *(["--deterministic"] if device == "gpu" else [])]


# ------------------------------------------------------------------------------------------------------ the child process


def child(mark: Path, arguments: list[str], log: Path) -> None:
    """The command line of the package, with marks of what it is about."""
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from pgps_jax import main as program
    from pgps_jax.train import loop

    with mark.open("r+b") as file:
        shared = mmap.mmap(file.fileno(), MARK.size)

    def begin(phase: str) -> int:
        before, *counts = MARK.unpack(shared[:])
        counts[PHASES.index(phase)] += 1
        shared[:] = MARK.pack(PHASES.index(phase), *counts)
        return before

    def marked(function, phase_of, then: str | None = None):
        def wrapper(*args, **kwargs):
            phase = phase_of(*args)
            before = begin(phase)
            try:
                return function(*args, **kwargs)
            finally:
                begin(then or PHASES[before])
        return wrapper

    def border(_session, run, step):
        changes = step and run.schedule.stage_of_step[step] != run.schedule.stage_of_step[step - 1]
        return "stage border" if changes else "starting"

    loop.enter_stage = marked(loop.enter_stage, border, then="step")
    loop.save = marked(loop.save, lambda *_: "checkpoint")
    loop.put = marked(loop.put, lambda *_: "step")  # once per step
    loop.OnlineValidation.__call__ = marked(loop.OnlineValidation.__call__, lambda *_: "validation")
    program.validate = marked(program.validate, lambda *_: "prediction")
    sys.exit(program.main(arguments))


# ------------------------------------------------------------------------------------------------------------- the killer


class Kill(NamedTuple):
    """When to kill: so many seconds after a phase has begun for the n-th time in this process."""

    phase: str
    nth: int
    delay: float


def choose(rng: random.Random, wanted: str) -> Kill:
    return Kill(wanted, rng.randint(1, BEGINS[wanted]), rng.uniform(0, LASTS[wanted]))


class Death(NamedTuple):
    """What a process was about when it was killed, and whether a checkpoint was half written."""

    phase: str
    writing: bool


def start(arguments: list[str], mark: Path, log: Path) -> multiprocessing.Process:
    """Start the child from a process that has done the imports already: that is most of what a start costs."""
    mark.write_bytes(MARK.pack(0, *[0] * len(PHASES)))
    process = SERVER.Process(target=child, args=(mark, arguments, log))
    process.start()
    return process


def run_and_kill(process: multiprocessing.Process, mark: Path, kill: Kill, run_folder: Path) -> Death | None:
    """Kill a process at the chosen moment; None if it ended before."""
    index = PHASES.index(kill.phase)
    with mark.open("r+b") as file, mmap.mmap(file.fileno(), MARK.size) as shared:
        patience = time.monotonic() + PATIENCE
        while kill.phase != "starting" and MARK.unpack(shared[:])[1 + index] < kill.nth:
            if not process.is_alive():
                return None
            if time.monotonic() > patience:
                raise TimeoutError(f"{run_folder}: no {kill.phase} within {PATIENCE} s")
            time.sleep(0.0005)
        time.sleep(kill.delay)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            return None
        phase = PHASES[MARK.unpack(shared[:])[0]]
    return Death(phase, any(run_folder.glob("checkpoints/*/*tmp*")))


# --------------------------------------------------------------------------------------------------------- the comparison


class Difference(NamedTuple):
    lost: int
    repeated: int
    differing: int


def compare(whole: Path, killed: Path) -> Difference:
    import jax
    import numpy as np

    from pgps_jax.report.run_log import read_records
    from pgps_jax.train.checkpoint import load_params

    def records(folder: Path) -> list[tuple[tuple[str, int], dict]]:
        return [((r["kind"], r["step"]), {k: v for k, v in r.items() if k not in TIMES and not k.startswith("host_")})
                for r in read_records(folder / "metrics.jsonl") if r["kind"] in ("step", "epoch")]

    expected, found = records(whole), records(killed)
    counts = Counter(key for key, _ in found)
    values = dict(found)
    differing = sum(key in values and values[key] != record for key, record in expected)
    differing += [key for key, _ in found] != sorted((key for key, _ in found), key=lambda k: (k[1], k[0] == "epoch"))  # order
    for name in ("last", "best"):
        newest = [max(int(p.name) for p in (folder / "checkpoints" / name).iterdir() if p.name.isdigit()) for folder in (whole, killed)]
        differing += newest[0] != newest[1]
        a, b = (jax.tree.leaves(load_params(folder / "checkpoints", name)) for folder in (whole, killed))
        differing += abs(len(a) - len(b)) + sum(not np.array_equal(x, y) for x, y in zip(a, b, strict=False))
    a, b = (json.loads((folder / "validation" / "summary.json").read_text()) for folder in (whole, killed))
    differing += a["mean"] != b["mean"] or a["foreground_mean"] != b["foreground_mean"]
    differing += [case["metrics"] for case in a["metric_per_case"]] != [case["metrics"] for case in b["metric_per_case"]]
    return Difference(sum(key not in counts for key, _ in expected), sum(n - 1 for n in counts.values()), int(differing))


# ------------------------------------------------------------------------------------------------------------ the program


def to_the_end(process: multiprocessing.Process, log: Path) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"{log.read_text()}\na training failed with exit code {process.exitcode}")


def chaos(folder: Path, kills: int, seed: int, device: str) -> dict:
    from pgps_jax.data.synthetic import write_phantom_dataset
    from pgps_jax.main import main as command_line

    rng, began = random.Random(seed), time.monotonic()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    SERVER.set_forkserver_preload(["pgps_jax.main"])
    raw, workspace, mark = folder / "Dataset900_Chaos", folder / "work", folder / "mark"
    write_phantom_dataset(raw, num_cases=6, num_test=0, shape=(12, 12, 12))
    if command_line(["preprocess", str(raw), "--workspace", str(workspace), "--workers", "1"]):
        raise SystemExit("the phantoms could not be preprocessed")
    runs = workspace / "runs" / raw.name
    whole = runs / "whole" / "fold_0"
    to_the_end(start(training(raw, workspace, "whole", device), mark, folder / "whole.log"), folder / "whole.log")
    print(f"left alone: {time.monotonic() - began:.0f} s", flush=True)

    wanted: list[str] = []
    deaths: list[Death] = []
    results: list[Difference] = []
    while len(deaths) < kills:
        name = f"killed_{len(results)}"
        run, arguments, log = runs / name / "fold_0", training(raw, workspace, name, device), folder / f"{name}.log"
        before = len(deaths)
        while True:
            process = start(arguments, mark, log)
            if len(deaths) < kills:
                wanted = wanted or [*rng.sample(PHASES, len(PHASES)), "step", "checkpoint", "stage border", "validation"]
                if death := run_and_kill(process, mark, choose(rng, wanted.pop(0)), run):
                    deaths.append(death)
                    continue
            to_the_end(process, log)
            break
        results.append(compare(whole, run))
        print(f"{name}: {len(deaths) - before} kills, {results[-1]}, {time.monotonic() - began:.0f} s", flush=True)
    return {
        "kills": len(deaths), "runs": len(results), "killed_in": dict(Counter(death.phase for death in deaths)),
        "while_a_checkpoint_was_half_written": sum(death.writing for death in deaths),
        **{name: sum(getattr(result, name) for result in results) for name in Difference._fields},
        "steps_per_run": EPOCHS * STEPS_PER_EPOCH, "seed": seed, "device": device, "seconds": round(time.monotonic() - began),
        "system": platform.platform(), "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "chaos.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = chaos(Path(folder), options.kills, options.seed, options.device)
    for phase in PHASES:
        print(f"killed in {phase:13} {result['killed_in'].get(phase, 0):3}")
    print(f"with a checkpoint half written {result['while_a_checkpoint_was_half_written']}")
    print(f"lost / repeated / differing: {result['lost']} / {result['repeated']} / {result['differing']}   ({result['kills']} kills in "
          f"{result['runs']} runs, {result['seconds']} s)")
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(result["lost"] or result["repeated"] or result["differing"]))


if __name__ == "__main__":
    main()
