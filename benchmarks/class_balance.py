"""Share of foreground in the patches of each stage: the claim that class balance falls as patches grow, on real datasets.

    python benchmarks/class_balance.py DATASET [DATASET ...] --workspace /tmp/balance

Plans and preprocesses each dataset (raw nnU-Net layout) with this project, makes the schedule of mode efficiency, and counts labels in
the patches that its sampler draws for fold 0. Writes benchmarks/results/class_balance.json and docs/class_balance.png. Takes minutes on
two cores, most of them for preprocessing; what lies in the workspace already is not done again.
"""

import argparse
import json
import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, PercentFormatter

from pgps_jax import preparation, workspace
from pgps_jax.config import RunConfig
from pgps_jax.main import main as command_line

HERE = Path(__file__).parent


def measure(dataset: Path, folder: Path) -> dict:
    """Balance of every stage of one dataset as a JSON-able record."""
    common = [str(dataset), "--workspace", str(folder)]
    for command in ("plan", "preprocess"):
        assert command_line([command, *common]) == 0
    config = RunConfig(dataset, folder)
    _, plans, preprocessed = preparation.plan_dataset(dataset, folder, config.planner, print)
    configuration = preparation.configuration_of(plans, config.configuration)
    schedule = workspace.planned_schedule(config, configuration, 1)
    rows = [{"patch_size": list(b.stage.patch_size), "patches": b.patches, "foreground": round(b.foreground, 6),
             "classes": {name: round(share, 6) for name, share in b.classes.items()}}
            for b in workspace.predicted_balance(config, configuration, preprocessed, schedule)]  # fmt: skip
    return {"dataset": dataset.name, "stages": rows, "smallest_over_planned": round(rows[0]["foreground"] / rows[-1]["foreground"], 2)}


def plot(results: list[dict], path: Path) -> None:
    """Share over patch volume, one panel per dataset."""
    figure = Figure(figsize=(4.5 * len(results), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        volume = [math.prod(row["patch_size"]) for row in result["stages"]]
        axes.loglog(volume, [row["foreground"] for row in result["stages"]], "o-", color="0.2", markersize=4, label="foreground")
        names = list(result["stages"][0]["classes"])
        for name in names if len(names) > 1 else ():
            axes.loglog(volume, [row["classes"][name] for row in result["stages"]], ".-", markersize=3, label=name)
        axes.set(title=result["dataset"], xlabel="voxels of the patch", ylabel="share of voxels in the patches")
        axes.yaxis.set_major_locator(FixedLocator([0.01, 0.02, 0.05, 0.1, 0.2, 0.4]))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", type=Path, nargs="+")
    parser.add_argument("--workspace", type=Path, default=Path("pgps_workspace"))
    options = parser.parse_args()
    results = [measure(dataset, options.workspace) for dataset in options.datasets]
    for result in results:
        print(f"{result['dataset']}: smallest patch {result['smallest_over_planned']} times the foreground share of the planned one")
    contents = {"what": __doc__.splitlines()[0], "mode": "efficiency", "results": results}
    (HERE / "results" / "class_balance.json").write_text(json.dumps(contents, indent=1) + "\n")
    plot(results, HERE.parent / "docs" / "class_balance.png")


if __name__ == "__main__":
    main()
