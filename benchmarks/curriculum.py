"""Whole trainings, constant patch against the curricula, at equal steps: wall time, voxels, Dice; optionally PyTorch beside them.

    python -m benchmarks.curriculum DATASET --steps 1500 --output benchmarks/results/cpu/curriculum.json
    python -m benchmarks.curriculum DATASET --torch            # also nnU-Net's loader, network and step on the same schedules

Every training starts with an empty compile cache in a process of its own, one after the other; seconds are those of the
run's own log: steps, waiting for programs, validation while training. Dice is that of fold 0 over whole volumes, without
mirroring. With --torch the same steps are made with PyTorch (constant and efficiency mode), its weights are imported and
measured with the same predictor. With --device gpu both compute in half precision, PyTorch with torch.compile. Needs the extra
`bench` for --torch only.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pgps_jax.train.device import choose_platform

MODES = ("constant", "efficiency", "performance")


def command(name: str, options, mode: str, *more: str) -> list[str]:
    """A command line of pgps_jax for one of the trainings."""
    epochs = -(-options.steps // 100)
    return [
        sys.executable, "-m", "pgps_jax.main", name, str(options.dataset), "--workspace", str(options.workspace), "--mode", mode,
        "--name", f"curriculum_{mode}_{options.steps}", "--batch-size", str(options.batch), "--epochs", str(epochs),
        "--steps-per-epoch", str(options.steps // epochs), "--validation-steps", "4", "--augment.preset", options.augment,
        "--network.base-features", str(options.features), "--no-mirror-tta", "--device", options.device, *more,
    ]


def our_training(options, mode: str) -> tuple[dict, Path]:
    """Train and measure; a row of the table, and the run folder."""
    schedule = json.loads(subprocess.run(command("schedule", options, mode, "--json"), check=True, capture_output=True, text=True).stdout)
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run(command("train", options, mode, "--fresh"), check=True, env=os.environ | {"XDG_CACHE_HOME": cache})
    run = options.workspace / "runs" / options.dataset.resolve().name / f"curriculum_{mode}_{options.steps}" / "fold_0"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def seconds(kind: str, key: str) -> float:
        return sum(r[key] for r in records if r.get("kind") == kind)

    parts = {"steps": seconds("step", "seconds"), "stalls": seconds("stage", "stall_seconds"),
             "validation": seconds("epoch", "validation_seconds")}
    row = {"side": "pgps_jax", "mode": mode, "seconds": sum(parts.values()), "parts": parts, "voxel_share": schedule["voxel_share"],
           "dice": json.loads((run / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]}
    return row, run


def nnunet_folder(preprocessed: Path, folder: Path) -> None:
    """The same preprocessed cases as nnU-Net's loader wants them."""
    from pgps_jax.data.store import CaseStore
    from pgps_jax.interop.preprocessed import nnunet_properties

    store = CaseStore(preprocessed)
    for case in map(store.open, store.ids):
        for ending in (".b2nd", "_seg.b2nd"):
            (folder / f"{case.id}{ending}").symlink_to((preprocessed / f"{case.id}{ending}").resolve())
        (folder / f"{case.id}.pkl").write_bytes(pickle.dumps(nnunet_properties(case)))


def torch_training(options, run: Path, mode: str, cases: Path) -> dict:
    """The schedule of one of our runs with nnU-Net's loader, network and step, then its weights measured like ours."""
    import numpy as np

    from benchmarks import loader, step
    from pgps_jax.config import RunConfig, from_json
    from pgps_jax.json_file import read_json
    from pgps_jax.workspace import open_experiment

    experiment = open_experiment(from_json(RunConfig, read_json(run / "config.json"), "config.json"))
    planned, schedule = experiment.configuration, experiment.schedule
    pools = tuple(int(np.log2(n)) for n in np.prod(planned.architecture.strides, axis=0))
    plan = loader.BenchPlan(planned.patch_size, planned.batch_size, pools, (0, 0, 0), 0)
    train_on = step.torch_trainer(planned.architecture, experiment.labels.num_outputs, options.device, experiment.channels)
    where = {"cpu": "cpu", "gpu": "cuda"}[options.device]
    spent = 0.0
    for stage, first, count in schedule.runs():
        began = time.perf_counter()
        if options.device == "gpu":
            step.forget_shapes()
        batches = loader.nnunet_workers(loader.nnunet_loader(cases, stage, plan, list(experiment.train_ids)), options.cores)
        for number in range(first, first + count):
            train_on.optimizer.param_groups[0]["lr"] = float(experiment.learning_rates[number])
            found = next(batches)
            target = found["target"][0] if isinstance(found["target"], list) else found["target"]
            train_on(found["data"].to(where), target[:, 0].to(where).long().clamp(min=0))
        spent += time.perf_counter() - began
        batches._finish()
        print(f"PyTorch, {mode}: {first + count} of {experiment.num_steps} steps, {spent:.0f} s", flush=True)
    return {"side": "PyTorch", "mode": mode, "seconds": spent, "dice": dice_of(train_on.network, experiment, run)}


def dice_of(network, experiment, run: Path) -> float:
    """Dice of a PyTorch network over the validation cases, by way of nnU-Net's model format and our predictor."""
    from pgps_jax.evaluate.summary import evaluate_folder
    from pgps_jax.exchange import import_nnunet
    from pgps_jax.infer.predict import predict_folder
    from pgps_jax.interop.nnunet_model import write_nnunet_model
    from pgps_jax.interop.nnunet_names import params_from_state_dict
    from pgps_jax.validate import load_predictor

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = getattr(network, "_orig_mod", network)  # as it was before torch.compile
        params = params_from_state_dict({k: v.detach().cpu().numpy() for k, v in network.state_dict().items()})
        write_nnunet_model(folder / "model", experiment.plan.to_json(), experiment.dataset_json, experiment.config.configuration,
                           {0: params}, (0, 1, 2))
        (imported,) = import_nnunet(folder / "model", folder / "run")
        (folder / "images").mkdir()
        for case in experiment.validation_ids:
            for image in (experiment.config.dataset / "imagesTr").glob(f"{case}_*"):
                (folder / "images" / image.name).symlink_to(image.resolve())
        predict_folder(load_predictor(imported, mirror=False), folder / "images", folder / "predictions")
        summary = evaluate_folder(folder / "predictions", experiment.preprocessed / "gt_segmentations",
                                  experiment.labels.in_files, output=folder / "summary.json")
    return summary["foreground_mean"]["Dice"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path("pgps_workspace"))
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--augment", default="light", choices=("none", "light", "default"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--torch", action="store_true", help="also train with PyTorch")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    preparation = ["--workspace", str(options.workspace)]
    for name in ("plan", "preprocess"):
        subprocess.run([sys.executable, "-m", "pgps_jax.main", name, str(options.dataset), *preparation], check=True)
    rows, runs = [], {}
    for mode in options.modes:
        row, runs[mode] = our_training(options, mode)
        rows.append(row)
        show(rows, options)
    if options.torch:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch needs memory of the same device
        choose_platform(options.device)
        with tempfile.TemporaryDirectory() as cases:
            experiment_folder = options.workspace / "preprocessed" / options.dataset.resolve().name
            nnunet_folder(next(p for p in experiment_folder.iterdir() if p.is_dir() and any(p.glob("*_seg.b2nd"))), Path(cases))
            for mode in (m for m in options.modes if m != "performance"):
                rows.append(torch_training(options, runs[mode], mode, Path(cases)))
                show(rows, options)


def show(rows: list[dict], options) -> None:
    """Print the last row with its ratio to the constant patch, and write what there is."""
    row = rows[-1]
    constant = next((r for r in rows if r["side"] == row["side"] and r["mode"] == "constant"), None)
    if constant:
        row["ratio_to_constant"] = row["seconds"] / constant["seconds"]
    print(", ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{value}" for key, value in row.items()), flush=True)
    if options.output:
        from importlib.metadata import version

        options.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"what": __doc__.splitlines()[0], "command": sys.argv[1:], "cores": options.cores, "load_average": os.getloadavg(),
                 "versions": {name: version(name) for name in ("jax", "flax", "numpy")}}
        options.output.write_text(json.dumps(about | {"rows": rows}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
