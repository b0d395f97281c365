"""Trainings, ours and nnU-Net's, are compared over the cases that they share."""

import io
import json

import pytest
from rich.console import Console

from pgps_jax.errors import InputError
from pgps_jax.main import main
from pgps_jax.report.comparison import compare, comparison_table, nnunet_curve, our_curve, read_contenders

LOG = """
2026-01-01 11:14:20.981851: Pseudo dice [np.float32(0.25), np.float32(0.75)]
2026-01-01 11:14:20.981902: Epoch time: 11.5 s
2026-01-01 11:14:32.507193: Pseudo dice [0.5, nan]
2026-01-01 11:14:32.507242: Epoch time: 8.5 s
"""


def write_summary(path, dice, ending=".nii.gz"):
    """A summary.json with two classes whose Dice is that of the case."""
    cases = [{"metrics": {"1": {"Dice": d}, "2": {"Dice": d}}, "prediction_file": f"/elsewhere/{case}{ending}"} for case, d in dice.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metric_per_case": cases}))


def write_run(folder, dice, seconds=2.0):
    write_summary(folder / "validation" / "summary.json", dice)
    records = [{"kind": "stage", "step": 0, "stall_seconds": 4.0}]
    for step in range(4):
        records.append({"kind": "step", "step": step, "seconds": seconds})
        if step % 2:
            records.append({"kind": "epoch", "step": step, "pseudo_dice_mean": 0.2 * step, "validation_seconds": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def dice(offset=0.0, cases=range(12)):
    return {f"case_{i:02d}": 0.5 + 0.03 * i + offset + 0.001 * (i % 3) for i in cases}


def test_a_run_and_nnunets_results_are_compared_over_shared_cases_with_times_and_curves(tmp_path):
    ours = write_run(tmp_path / "runs" / "ours" / "fold_0", dice(), seconds=1.0)
    theirs = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    write_summary(theirs / "fold_0" / "validation" / "summary.json", dice(-0.02, range(6)), ".nrrd")
    write_summary(theirs / "fold_1" / "validation" / "summary.json", dice(-0.02, range(6, 20)))
    (theirs / "fold_0" / "training_log_2026_1_1.txt").write_text(LOG)
    contenders = read_contenders([f"nnU-Net={theirs}", str(ours)])
    assert [c.name for c in contenders] == ["nnU-Net", "ours"]
    comparison = compare(contenders)
    first, second = comparison["rows"]
    assert (comparison["cases"], first["cases_left_out"], second["cases_left_out"]) == (12, 8, 0)
    assert first["dice_per_case"] == pytest.approx(dice(-0.02))
    assert second["difference"]["difference"]["mean"] == pytest.approx(0.02)
    assert second["difference"]["better"] == 12 and second["difference"]["p_adjusted"] < 0.01
    assert (first["training_seconds"], second["training_seconds"]) == (None, 4 * 1.0 + 2 * 1.0 + 4.0)  # one fold has no log
    (theirs / "fold_1" / "training_log_2026_1_1.txt").write_text(LOG)
    assert compare(read_contenders([f"nnU-Net={theirs}", str(ours)]))["rows"][1]["seconds_ratio"] == pytest.approx(0.5)


def test_convergence_is_read_from_nnunets_log_and_from_our_records(tmp_path):
    theirs = nnunet_curve(LOG)
    assert theirs.pseudo_dice == (0.5, 0.5) and theirs.seconds == (11.5, 20.0) and theirs.progress == (0.5, 1.0)
    ours = our_curve([json.loads(line) for line in (write_run(tmp_path, dice()) / "metrics.jsonl").read_text().splitlines()])
    assert ours.seconds == (9.0, 14.0) and ours.pseudo_dice == pytest.approx((0.2, 0.6)) and ours.progress == (0.5, 1.0)
    assert nnunet_curve("nothing") is None


def test_the_same_name_means_repetitions_and_their_mean_counts(tmp_path):
    for k, offset in enumerate((0.01, 0.03)):
        write_run(tmp_path / f"seed{k}" / "fold_0", dice(offset))
    write_run(tmp_path / "base" / "fold_0", dice())
    first, second = compare(read_contenders([f"{tmp_path / 'base'}", f"x={tmp_path / 'seed0'}", f"x={tmp_path / 'seed1'}"]))["rows"]
    assert len(second["dice_per_repetition"]) == 2 and second["difference"]["difference"]["mean"] == pytest.approx(0.02)
    assert second["training_seconds"] == first["training_seconds"]


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    for name in ("lr=0.1", "lr=0.2"):
        write_run(tmp_path / name / "fold_0", dice())
    contenders = read_contenders([str(tmp_path / "lr=0.1"), f"other={tmp_path / 'lr=0.2'}"])
    assert [c.name for c in contenders] == ["lr=0.1", "other"]


def test_classes_that_a_case_does_not_have_do_not_count(tmp_path):
    cases = [{"metrics": {"1": {"Dice": 0.5}, "2": {"Dice": float("nan")}}, "prediction_file": "a.nii.gz"},
             {"metrics": {"1": {"Dice": 0.7}, "2": {"Dice": 0.9}}, "prediction_file": "b.nii.gz"}]
    for name in "xy":
        (tmp_path / f"{name}.json").write_text(json.dumps({"metric_per_case": cases}))
    row, _ = compare(read_contenders([f"x={tmp_path / 'x.json'}", f"y={tmp_path / 'y.json'}"]), {"2": "tumour"})["rows"]
    assert row["dice"]["mean"] == pytest.approx((0.5 + 0.8) / 2)
    assert row["dice_per_class"]["1"]["mean"] == pytest.approx(0.6)
    assert row["dice_per_class"]["tumour"]["mean"] == pytest.approx(0.9)


def test_the_command_prints_a_table_and_writes_numbers_and_a_picture(tmp_path, capsys):
    for name, offset in (("constant", 0.0), ("efficiency", -0.01)):
        run = write_run(tmp_path / name / "fold_0", dice(offset))
        (run / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 2}}))
    paths = [str(tmp_path / name / "fold_0") for name in ("constant", "efficiency")]
    assert main(["compare", *paths, "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "efficiency" in printed and "-0.0100" in printed and "0 / 12" in printed
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(found["rows"][0]["dice_per_class"]) == ["liver", "tumour"]
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


def test_the_table_says_unknown_where_nothing_was_measured(tmp_path):
    for name in "xy":
        write_summary(tmp_path / f"{name}.json", {"a": float("nan")})
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison_table(compare(read_contenders([f"x={tmp_path / 'x.json'}", f"y={tmp_path / 'y.json'}"]))))
    assert console.file.getvalue().count("unknown") == 5


@pytest.mark.parametrize("arguments, message", [
    (["{0}/a/fold_0"], "needs two names"),
    (["{0}/a/fold_0", "{0}/a"], "called a too"),
    (["x={0}/a/fold_0", "x={0}/a"], "needs two names"),
    (["{0}/a", "{0}/nothing"], "no validation/summary.json"),
    (["{0}/a", "{0}/b"], "no case in common"),
    (["{0}/a", "{0}/twice"], "several folds"),
    (["{0}/a", "{0}/broken.json"], "no summary.json of an evaluation"),
    (["{0}/a", "{0}/empty.json"], "holds no case"),
])
def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path, arguments, message):
    write_run(tmp_path / "a" / "fold_0", dice())
    write_run(tmp_path / "b" / "fold_0", {"other": 0.5})
    for k in range(2):
        write_run(tmp_path / "twice" / f"fold_{k}", dice())
    (tmp_path / "broken.json").write_text('{"metric_per_case": [{"metrics": 3}]}')
    (tmp_path / "empty.json").write_text('{"metric_per_case": []}')
    with pytest.raises(InputError, match=message):
        read_contenders([argument.format(tmp_path) for argument in arguments])
