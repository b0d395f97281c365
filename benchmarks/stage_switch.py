"""How long training stands still at each stage's border, with a cold and with a warm compile cache.

    python -m benchmarks.stage_switch                      # phantoms, efficiency mode, 40 steps per stage
    python -m benchmarks.stage_switch --dataset DATASET --steps-per-stage 300 --features 32

The same training is made twice, each time in a process of its own: first with an empty compile cache, then with the one
that the first left. Figures are those of the run's own log, written after each of both. The first stage has nothing to hide
behind and is given apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from pgps_jax.data.synthetic import write_phantom_dataset
from pgps_jax.json_file import write_json


def pgps_jax(*arguments: str, cache: Path) -> str:
    """Run one command with its own compile cache; what it prints."""
    found = subprocess.run([sys.executable, "-m", "pgps_jax.main", *arguments], check=True, stdout=subprocess.PIPE, text=True,
                           env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    return found.stdout


def stages_of(run: Path) -> list[dict]:
    """The stage records of a run."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [r for r in records if r.get("kind") == "stage"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="phantoms when not given")
    parser.add_argument("--mode", default="efficiency")
    parser.add_argument("--steps-per-stage", type=int, default=40)
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = options.dataset or write_phantom_dataset(folder / "Dataset900_Phantoms", num_cases=10)
        flags = [str(dataset), "--workspace", str(folder / "workspace")]
        for command in ("plan", "preprocess"):
            pgps_jax(command, *flags, cache=folder)
        flags += ["--mode", options.mode, "--batch-size", str(options.batch), "--network.base-features", str(options.features),
                  "--steps-per-epoch", str(options.steps_per_stage), "--validation-steps", "1", "--no-mirror-tta"]
        planned = json.loads(pgps_jax("schedule", *flags, "--json", cache=folder))
        flags += ["--epochs", str(len(planned["stages"]))]
        measured = {}
        for cache in ("cold", "warm"):
            pgps_jax("train", *flags, "--name", "switch", "--fresh", cache=folder)
            measured[cache] = stages_of(folder / "workspace" / "runs" / dataset.name / "switch" / "fold_0")
            result = summed_up(measured)
            if options.output:
                write_json(options.output, result, indent=1)

    for row in result["stages"]:
        print(f"{'x'.join(map(str, row['patch_size'])):>12} batch {row['batch_size']:>3}: traced {row['trace_s']:.2f} s, compiled "
              f"{row['compile_s']:.2f} s; waited cold {row['stall_cold_s']:.2f} s, warm {row['stall_warm_s']:.2f} s")
    print("borders after the first stage:", ", ".join(f"{key} {value:.2f}" for key, value in result["borders"].items()))


def summed_up(measured: dict[str, list[dict]]) -> dict:
    """The result of the trainings made so far, from their stage records."""
    rows = [{"patch_size": r["patch_size"], "batch_size": r["batch_size"], "trace_s": r["trace_seconds"], "compile_s": r["compile_seconds"]}
            for r in measured["cold"]]
    borders = {}
    for cache, records in measured.items():
        stalls = [r["stall_seconds"] for r in records]
        for row, stall in zip(rows, stalls, strict=True):
            row[f"stall_{cache}_s"] = stall
        borders |= {f"{cache}_worst_s": max(stalls[1:], default=0.0), f"{cache}_total_s": sum(stalls[1:])}
    return {"what": __doc__.splitlines()[0], "command": sys.argv[1:], "cores": os.cpu_count(), "load_average": os.getloadavg(),
            "versions": {name: version(name) for name in ("jax", "flax")}, "borders": borders, "stages": rows}


if __name__ == "__main__":
    main()
