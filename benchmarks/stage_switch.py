"""How long training stands still at each stage's border, with a cold and with a warm compile cache.

    python -m benchmarks.stage_switch                      # phantoms, efficiency mode, 100 steps per stage
    python -m benchmarks.stage_switch --dataset DATASET --steps-per-stage 300 --features 32

The same training is made twice, each time in a process of its own: first with an empty compile cache, then with the one
that the first left. Figures are those of the run's own log. The first stage has nothing to hide behind and is given apart.
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
    parser.add_argument("--steps-per-stage", type=int, default=100)
    parser.add_argument("--features", type=int, default=16)
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

    rows = [{"patch_size": cold["patch_size"], "batch_size": cold["batch_size"], "trace_s": cold["trace_seconds"],
             "compile_s": cold["compile_seconds"], "stall_cold_s": cold["stall_seconds"], "stall_warm_s": warm["stall_seconds"]}
            for cold, warm in zip(measured["cold"], measured["warm"], strict=True)]
    for row in rows:
        print(f"{'x'.join(map(str, row['patch_size'])):>12} batch {row['batch_size']:>3}: traced {row['trace_s']:.2f} s, compiled "
              f"{row['compile_s']:.2f} s; waited cold {row['stall_cold_s']:.2f} s, warm {row['stall_warm_s']:.2f} s")
    later = {cache: [row[f"stall_{cache}_s"] for row in rows[1:]] or [0.0] for cache in measured}
    summary = {f"{cache}_{what}_s": f(values) for cache, values in later.items() for what, f in (("worst", max), ("total", sum))}
    print("borders after the first stage:", ", ".join(f"{key} {value:.2f}" for key, value in summary.items()))
    if options.output:
        about = {"what": __doc__.splitlines()[0], "command": sys.argv[1:], "cores": os.cpu_count(), "load_average": os.getloadavg(),
                 "versions": {name: version(name) for name in ("jax", "flax")}}
        options.output.write_text(json.dumps(about | {"borders": summary, "stages": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
