"""Several trainings side by side: Dice over the same cases, time, and convergence; ours and nnU-Net's.

A training is read from a run folder (fold_<k>), from its parent with several folds, from an nnU-Net results folder of either
kind, or from a summary.json alone, which has no curve. Trainings that are given the same name are repetitions (seeds): a case
counts with the mean over them. Everything is measured on the cases that all have in common.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from pgps_jax.data.labels import Labels
from pgps_jax.errors import InputError
from pgps_jax.evaluate.paired import Interval, holm, mean_interval, paired_difference
from pgps_jax.evaluate.summary import ENDINGS, case_id_of
from pgps_jax.json_file import read_json
from pgps_jax.report.run_log import read_records

_NNUNET_EPOCH = re.compile(r"Pseudo dice \[(?P<dice>.*?)\]|Epoch time: (?P<seconds>[\d.]+) s")
_NUMBER = re.compile(r"(?<![\w.])(?:nan|\d+(?:\.\d+)?(?:e-?\d+)?)(?![\w.])")


@dataclass(frozen=True)
class Curve:
    """Convergence of one training: after each epoch the share of training done, seconds since its start, and the pseudo-Dice."""

    progress: tuple[float, ...]
    seconds: tuple[float, ...]
    pseudo_dice: tuple[float, ...]


@dataclass(frozen=True)
class Contender:
    """One name with all its trainings: Dice per case and class (NaN where neither segmentation has the class), the curve of every
    fold and repetition (None: unknown), and the mean Dice of each repetition."""

    name: str
    dice: dict[str, dict[str, float]]
    curves: tuple[Curve | None, ...]
    repetition_means: tuple[float, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Seconds of training per fold, on average; None where it is unknown for one."""
        return float(np.mean([c.seconds[-1] for c in self.curves])) if self.curves and all(self.curves) else None

    @property
    def by_case(self) -> dict[str, float]:
        """Mean over classes of each case, without the classes that it does not have."""
        return {case: mean_known(list(classes.values())) for case, classes in self.dice.items()}


def read_contenders(arguments: Sequence[str]) -> list[Contender]:
    """The trainings that the command line names, `PATH` or `NAME=PATH`, the baseline first.

    Raises InputError: fewer than two names, two trainings of one name that was not given, a path without results, a case
    measured twice in one training, or no case in common.
    """
    trainings: dict[str, list[Contender]] = {}
    for argument in arguments:
        path, name = path_and_name(argument)
        if name is None and (name := default_name(path)) in trainings:
            raise InputError(f"{path}: another training is called {name} too; name them NAME=PATH (the same name means repetitions)")
        trainings.setdefault(name, []).append(read_training(path, name))
    if len(trainings) < 2:
        raise InputError(f"a comparison needs two names, found {', '.join(trainings) or 'none'}; give another run, or name them "
                         "NAME=PATH (the same name means repetitions)")
    contenders = [repeated(name, group) for name, group in trainings.items()]
    for other in contenders[1:]:
        if not contenders[0].dice.keys() & other.dice.keys():
            raise InputError(f"{contenders[0].name} and {other.name} have no case in common (for example "
                             f"{next(iter(contenders[0].dice))} and {next(iter(other.dice))}); compare the same fold of the same dataset")
    return contenders


def path_and_name(argument: str) -> tuple[Path, str | None]:
    """Path and, where one is given, name of an argument; what exists is a path, whatever characters it has."""
    name, given, path = argument.partition("=")
    return (Path(path), name) if given and not Path(argument).exists() else (Path(argument), None)


def default_name(path: Path) -> str:
    """Name of the run of a path: that of the folder above fold_<k>, or of the folder itself."""
    parts = [part for part in path.resolve().parts if not re.fullmatch(r"fold_(\d+|all)|validation|summary\.json", part)]
    return parts[-1] if parts else str(path)


def read_training(path: Path, name: str) -> Contender:
    """One training from its folder or summary; see the top of this file."""
    if path.is_file():
        return Contender(name, dice_of(path), ())
    folders = [path] if (path / "validation" / "summary.json").exists() else sorted(path.glob("fold_*"))
    measured = [folder for folder in folders if (folder / "validation" / "summary.json").exists()]
    if not measured:
        raise InputError(f"{path}: no validation/summary.json there or in a fold_<k> below it; train to the end first, or give the "
                         "summary.json that `evaluate` wrote")
    dice: dict[str, dict[str, float]] = {}
    for folder in measured:
        of_fold = dice_of(folder / "validation" / "summary.json")
        if twice := sorted(dice.keys() & of_fold.keys()):
            raise InputError(f"{path}: case {twice[0]} was validated in several folds; give the folds one by one")
        dice |= of_fold
    return Contender(name, dice, tuple(map(read_curve, measured)))


def dice_of(path: Path) -> dict[str, dict[str, float]]:
    """Case -> class -> Dice of a summary.json, ours or nnU-Net's."""
    found = {}
    try:
        for entry in read_json(path)["metric_per_case"]:
            file = Path(entry["prediction_file"])
            case = case_id_of(file) if file.name.endswith(ENDINGS) else file.name
            found[case] = {str(label): float("nan") if (dice := metrics["Dice"]) is None else float(dice)
                           for label, metrics in entry["metrics"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: no summary.json of an evaluation ({error!r}); write it again with `evaluate`") from None
    if not found:
        raise InputError(f"{path}: holds no case")
    return found


def read_curve(folder: Path) -> Curve | None:
    """Convergence from our metrics.jsonl or nnU-Net's training log; None without either."""
    if (folder / "metrics.jsonl").exists():
        return our_curve(read_records(folder / "metrics.jsonl"))
    logs = sorted(folder.glob("training_log_*.txt"))
    return nnunet_curve("\n".join(log.read_text(errors="replace") for log in logs)) if logs else None


def our_curve(records: Sequence[Mapping[str, Any]]) -> Curve | None:
    """From the records of a run; seconds are those of steps, validation and waiting for programs."""
    seconds, rows = 0.0, []
    for record in records:
        kind = record.get("kind")
        seconds += {"step": record.get("seconds"), "stage": record.get("stall_seconds"),
                    "epoch": record.get("validation_seconds")}.get(kind) or 0.0
        if kind == "epoch":
            dice = record.get("pseudo_dice_mean")
            rows.append((record["step"] + 1, seconds, float("nan") if dice is None else dice))
    return _curve(rows)


def nnunet_curve(log: str) -> Curve | None:
    """From nnU-Net's training log: every epoch says its pseudo-Dice per class, then its seconds."""
    seconds, dice, rows = 0.0, float("nan"), []
    for match in _NNUNET_EPOCH.finditer(log):
        if match["seconds"] is None:
            dice = mean_known([float(number) for number in _NUMBER.findall(match["dice"])])
        else:
            seconds += float(match["seconds"])
            rows.append((len(rows) + 1, seconds, dice))
    return _curve(rows)


def _curve(rows: Sequence[tuple[int, float, float]]) -> Curve | None:
    if not rows:
        return None
    done, seconds, dice = zip(*rows, strict=True)
    return Curve(tuple(n / done[-1] for n in done), seconds, dice)


def repeated(name: str, trainings: Sequence[Contender]) -> Contender:
    """Repetitions as one contender: every case with the mean over those that measured it."""
    cases = dict.fromkeys(case for training in trainings for case in training.dice)
    dice = {}
    for case in cases:
        found = [training.dice[case] for training in trainings if case in training.dice]
        dice[case] = {label: mean_known([of.get(label, float("nan")) for of in found]) for label in found[0]}
    means = tuple(mean_known(list(training.by_case.values())) for training in trainings)
    return Contender(name, dice, tuple(curve for training in trainings for curve in training.curves), means)


def class_names(dataset_json: Path | None, first: str) -> dict[str, str]:
    """Label as summaries write it -> its name, from a dataset.json: the given one, or one beside the first training; else none."""
    path, _ = path_and_name(first)
    places = [dataset_json] if dataset_json else [folder / "dataset.json" for folder in (path, *list(path.absolute().parents)[:2])]
    found = next((place for place in places if place.exists() or dataset_json), None)
    if found is None:
        return {}
    labels = Labels.from_json(read_json(found)).in_files
    return {str(value): name for name, value in zip(labels.names, labels.values, strict=True)}


def mean_known(values: Sequence[float]) -> float:
    """Mean without NaN; NaN when nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def compare(contenders: Sequence[Contender], class_names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """JSON-able comparison of all contenders with the first, over the cases that all have.

    Each row holds the mean Dice with its 95 % bootstrap interval, the same per class, every case's, the means of the repetitions,
    and, but for the first, the paired difference with its interval and Holm-adjusted Wilcoxon p value, and the ratio of seconds.
    """
    names = class_names or {}
    shared = [case for case in contenders[0].dice if all(case in other.dice for other in contenders)]
    baseline = {case: contenders[0].by_case[case] for case in shared}
    rows = []
    for contender in contenders:
        by_case = {case: contender.by_case[case] for case in shared}
        per_class = {label: [contender.dice[case].get(label, float("nan")) for case in shared] for label in contender.dice[shared[0]]}
        row: dict[str, Any] = {
            "name": contender.name, "cases_left_out": len(contender.dice) - len(shared),
            "dice": _interval(mean_interval(_known(by_case.values()))),
            "dice_per_class": {names.get(label, label): _interval(mean_interval(_known(v))) for label, v in per_class.items()},
            "dice_per_repetition": [_json(mean) for mean in contender.repetition_means],
            "dice_per_case": {case: _json(value) for case, value in by_case.items()}, "training_seconds": contender.seconds}
        if contender is not contenders[0]:
            found = paired_difference(baseline, by_case)
            row["difference"] = found._asdict() | {"difference": _interval(found.difference)}
            row["seconds_ratio"] = contender.seconds / contenders[0].seconds if contender.seconds and contenders[0].seconds else None
        rows.append(row)
    for row, p in zip(rows[1:], holm([row["difference"]["p_value"] for row in rows[1:]]), strict=True):
        row["difference"]["p_adjusted"] = p
    return {"baseline": contenders[0].name, "cases": len(shared), "rows": rows}


def _known(values) -> np.ndarray:
    found = np.array(list(values), float)
    return found[~np.isnan(found)]


def _interval(interval: Interval) -> dict[str, float | None]:
    return {key: _json(value) for key, value in interval._asdict().items()}


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """The comparison for the terminal; Dice with 95 % intervals over cases."""
    left_out = [f"{row['cases_left_out']} of {row['name']}" for row in comparison["rows"] if row["cases_left_out"]]
    table = Table(title=f"Dice over {comparison['cases']} cases and training time per fold, against {comparison['baseline']}",
                  box=box.SIMPLE, padding=(0, 1, 0, 0),
                  caption="95 % bootstrap intervals over cases; p: Wilcoxon signed-rank over paired cases, Holm-adjusted"
                  + (f"; cases not shared by all: {', '.join(left_out)}" if left_out else ""))
    table.add_column("training", overflow="fold")
    for heading in ("Dice", "difference", "better / worse", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison["rows"]:
        means = row["dice_per_repetition"]
        name = row["name"] + (f"\n{len(means)} repetitions, SD {np.std(means, ddof=1):.4f}" if len(means) > 1 and None not in means else "")
        time = "unknown" if row["training_seconds"] is None else f"{row['training_seconds'] / 60:.1f} min"
        cells = [name, _shown(row["dice"], "")]
        if difference := row.get("difference"):
            cells += [_shown(difference["difference"], "+"),
                      f"{difference['better']} / {difference['worse']}\np = {difference['p_adjusted']:.2g}",
                      time + (f"\nratio {row['seconds_ratio']:.2f}" if row["seconds_ratio"] else "")]
        else:
            cells += ["", "", time]
        table.add_row(*cells)
    return table


def _shown(interval: Mapping[str, float | None], sign: str) -> str:
    if interval["mean"] is None:
        return "unknown"
    return f"{interval['mean']:{sign}.4f}\n[{interval['low']:{sign}.3f}, {interval['high']:{sign}.3f}]"


def plot_comparison(contenders: Sequence[Contender], path: Path) -> None:
    """Pseudo-Dice over the share of training and over time, and each case's Dice against the baseline's."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    share, time, cases = figure.subplots(1, 3)
    baseline = contenders[0].by_case
    for number, contender in enumerate(contenders):
        color = f"C{number % 10}"
        for k, curve in enumerate(filter(None, contender.curves)):
            label = contender.name if k == 0 else None
            share.plot(curve.progress, curve.pseudo_dice, color=color, label=label)
            time.plot(np.array(curve.seconds) / 60, curve.pseudo_dice, color=color, label=label)
        if number:
            other = contender.by_case
            shared = [case for case in baseline if case in other]
            cases.scatter([baseline[c] for c in shared], [other[c] for c in shared], s=14, color=color, label=contender.name, alpha=0.7)
    for axis, title, x in ((share, "pseudo-Dice", "share of training"), (time, "pseudo-Dice", "minutes")):
        axis.set(title=title, xlabel=x, ylim=(0, 1))
    low = np.nanmin([*baseline.values(), *(v for c in contenders for v in c.by_case.values())])
    low = 0.0 if math.isnan(low) else max(0.0, low - 0.02)
    cases.plot([low, 1], [low, 1], color="0.6", linewidth=1)
    cases.set(title="Dice of each case", xlabel=contenders[0].name, ylabel="the others", xlim=(low, 1), ylim=(low, 1))
    for axis in (share, time, cases):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    temporary = path.with_name(path.name + ".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
