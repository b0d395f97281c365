"""Every comparison with the PyTorch peers in one go, with sizes fit for the machine: a table, one JSON, and a plot.

    python -m benchmarks.all                                   # CPU, about 40 minutes on two cores
    python -m benchmarks.all --only step epoch --dataset DATASET
    python -m benchmarks.all --device gpu --dataset DATASET    # about 20 minutes; half precision is checked first

Each part runs in a process of its own, one after the other, and is ended when it takes too long, with what it has written until
then; what one part fails at does not stop the others. Results lie under benchmarks/results/<device>/, the plot beside them.
Needs the extra `bench`.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"


class Part(NamedTuple):
    """Arguments of `python -m benchmarks.<module>`, where `{}` is the JSON file, and the minutes after which it is ended."""

    arguments: list[str]
    minutes: float = 30


def parts(device: str, dataset: Path | None) -> dict[str, Part]:
    """The parts by name, in the order in which they run."""
    on = ["--device", device]
    if device == "gpu":
        found = {
            "precision": Part(["precision"], 3),
            "step_hippocampus": Part(["step", *on, "--stages", "0", "4", "9", "14", "--turns", "3"], 5),
            "step_128": Part(["step", *on, "--plan", "128", "--stages", "0", "4", "9", "--turns", "3"], 6),
            "compile_options": Part(["compile_options", *on, "--stages", "9"], 4),
            "memory_hippocampus": Part(["memory", *on, "--stages", "0", "7", "14"], 3),
            "memory_128": Part(["memory", *on, "--plan", "128", "--stages", "0", "9"], 3),
            "epoch": Part(["epoch", *on, "--batch", "9", "--turns", "1"], 5),
            "infer": Part(["infer", *on], 4),
            "stage_switch": Part(["stage_switch", "--features", "32", "--steps-per-stage", "100"], 9),
        }
        training = ["--modes", "constant", "efficiency", "--steps", "3000", "--batch", "9", "--features", "32", "--augment", "default"]
        longest = 15
    else:
        quick = ["--turns", "3", "--seconds", "0.5"]
        found = {
            "precision": Part(["precision", "--largest", "300000"]),
            "step": Part(["step", *quick]),
            "step_resenc": Part(["step", *quick, "--network", "resenc-unet", "--stages", "0", "7", "15"]),
            "step_unetr": Part(["step", *quick, "--network", "unetr", "--batch", "2", "--stages", "0", "3", "7"]),
            "step_swin_unetr": Part(["step", *quick, "--network", "swin-unetr", "--batch", "2", "--stages", "0", "3"]),
            "compile_options": Part(["compile_options", "--batch", "2"]),
            "memory": Part(["memory", "--stages", "0", "7", "14"]),
            "epoch": Part(["epoch"]),
            "infer": Part(["infer"]),
            "augment": Part(["augment", "--peer"]),
            "stage_switch": Part(["stage_switch"]),
        }
        training, longest = ["--steps", "1500"], 60
    if dataset:
        found["curriculum"] = Part(["curriculum", str(dataset), *on, "--workspace", "pgps_workspace", *training], longest)
    return {name: part._replace(arguments=[*part.arguments, "--output", "{}"]) for name, part in found.items()}


def finish(command: list[str], minutes: float) -> int | str:
    """Exit code of a command, or that it took too long; what it has started ends with it."""
    process = subprocess.Popen(command, start_new_session=True)  # with all its processes in one group
    try:
        return process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # a chance to delete temporary folders
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        return "took too long"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def plot(step: dict, path: Path) -> None:
    """Time of a training step against voxels per step, both sides."""
    import matplotlib.pyplot as plt

    rows = sorted(step["rows"], key=lambda row: voxels(row))
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for side, label in (("torch", "nnU-Net's network, PyTorch"), ("jax", "pgps_jax")):
        axes.loglog([voxels(row) for row in rows], [row[f"{side}_ms"] for row in rows], "o-", label=label)
    axes.set_xlabel("voxels per step")
    axes.set_ylabel("training step, ms")
    axes.set_title(f"{step['device']}, {step['cores']} cores" if "cores" in step else step["device"])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def voxels(row: dict) -> int:
    d, h, w = row["patch"]
    return row["batch"] * d * h * w


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--dataset", type=Path, help="a dataset in nnU-Net's raw layout for whole trainings; left out when not given")
    parser.add_argument("--only", nargs="*", help="some of the parts")
    parser.add_argument("--minutes", type=float, help="the longest that a part may take; by default each has its own limit")
    options = parser.parse_args()

    folder = RESULTS / options.device
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {}
    for name, part in parts(options.device, options.dataset).items():
        if options.only and name not in options.only:
            continue
        output = folder / f"{name}.json"
        output.unlink(missing_ok=True)  # results of an earlier time are not those of this one
        module, *rest = (os.path.relpath(output) if a == "{}" else a for a in part.arguments)
        print(f"\n{name}: python -m benchmarks.{module} {' '.join(rest)}", flush=True)
        began = time.perf_counter()
        code = finish([sys.executable, "-m", f"benchmarks.{module}", *rest], options.minutes or part.minutes)
        outcome[name] = {"exit": code, "seconds": round(time.perf_counter() - began, 1)}
        if name == "precision" and code:
            print("half precision is wrong on this device: nothing is timed")
            break

    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in outcome if (folder / f"{name}.json").exists()}
    (folder / "all.json").write_text(json.dumps({"load_average": os.getloadavg(), "parts": outcome, "results": found}, indent=1) + "\n")
    for name in found:
        if name.startswith("step") and "network" in found[name]:
            plot(found[name], folder / f"{name}.png")
    print("\n" + "\n".join(f"{name:>20}  exit {part['exit']}  {part['seconds']:.0f} s" for name, part in outcome.items()))
    return int(any(part["exit"] for part in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
