"""Every comparison with the PyTorch peers in one go, with sizes fit for the machine: a table, one JSON, and a plot.

    python -m benchmarks.all                                   # CPU, about 40 minutes on two cores
    python -m benchmarks.all --only step epoch --dataset DATASET
    python -m benchmarks.all --device gpu --dataset DATASET    # about 20 minutes; half precision is checked first

Each part runs in a process of its own, one after the other, and is left out when it takes too long; what one part fails at
does not stop the others. Results lie under benchmarks/results/<device>/, the plot beside them. Needs the extra `bench`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def parts(device: str, dataset: Path | None) -> dict[str, list[str]]:
    """Name -> arguments of `python -m benchmarks.<module>`, in the order in which they run; `{}` is the JSON file."""
    workspace = ["--workspace", "pgps_workspace"]
    if device == "gpu":
        found = {
            "precision": ["precision"],
            "step_hippocampus": ["step", "--device", "gpu", "--stages", "0", "4", "9", "14", "--turns", "3"],
            "step_128": ["step", "--device", "gpu", "--plan", "128", "--stages", "0", "3", "6", "9", "--turns", "3"],
            "memory_hippocampus": ["memory", "--device", "gpu", "--stages", "0", "7", "14"],
            "memory_128": ["memory", "--device", "gpu", "--plan", "128", "--stages", "0", "4", "9"],
            "epoch": ["epoch", "--device", "gpu", "--batch", "9"],
            "stage_switch": ["stage_switch", "--features", "32", "--steps-per-stage", "300"],
        }
        training = ["--steps", "3000", "--batch", "9", "--features", "32", "--augment", "default"]
    else:
        found = {
            "precision": ["precision", "--largest", "300000"],
            "step": ["step", "--turns", "3", "--seconds", "0.5"],
            "step_resenc": ["step", "--network", "resenc-unet", "--turns", "3", "--seconds", "0.5", "--stages", "0", "7", "15"],
            "memory": ["memory", "--stages", "0", "7", "14"],
            "epoch": ["epoch"],
            "infer": ["infer"],
            "augment": ["augment", "--peer"],
            "stage_switch": ["stage_switch"],
        }
        training = ["--steps", "1500"]
    found = {name: [*arguments, "--output", "{}"] for name, arguments in found.items()}
    if dataset:
        found["curriculum"] = ["curriculum", str(dataset), *workspace, *training, "--output", "{}"]
    return found


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
    parser.add_argument("--minutes", type=float, default=30, help="the longest that one part may take")
    options = parser.parse_args()

    folder = RESULTS / options.device
    folder.mkdir(parents=True, exist_ok=True)
    outcome = {}
    for name, arguments in parts(options.device, options.dataset).items():
        if options.only and name not in options.only:
            continue
        module, *rest = (a.format(folder / f"{name}.json") if a == "{}" else a for a in arguments)
        print(f"\n{name}: python -m benchmarks.{module} {' '.join(rest)}", flush=True)
        began = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *rest], timeout=60 * options.minutes).returncode
        except subprocess.TimeoutExpired:
            code = "took too long"
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
