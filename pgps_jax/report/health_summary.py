"""How a run went, in numbers and in a few lines: time, waiting, trouble and memory over all its sessions."""

import statistics
from collections import Counter

from pgps_jax.host_memory import gib

MOST_WARNINGS = 20  # different ones that are quoted


def health_summary(records: list[dict], events: list[dict], peak_bytes: int | None = None) -> dict:
    """JSON-able summary of a run.

    Args:
        records: of metrics.jsonl: what training did, without what was lost by a kill and done again.
        events: of events.jsonl: what happened to the run.
        peak_bytes: most memory that this process has held.
    """
    steps, epochs, stages = ([r for r in records if r["kind"] == kind] for kind in ("step", "epoch", "stage"))
    seconds = sum(r["seconds"] for r in steps)
    waited = sum(r["input_wait"] for r in steps)
    kinds = Counter(event["kind"] for event in events)
    warnings = Counter(event["text"] for event in events if event["kind"] == "warning")
    peaks = [r["host_peak_bytes"] for r in epochs if r.get("host_peak_bytes")] + [peak_bytes or 0]
    return {
        "steps": len(steps), "epochs": len(epochs),
        "resumes": max(kinds["start"] - 1, 0), "stops": kinds["stopped"],
        "seconds_of_steps": round(seconds, 2),
        "seconds_of_validation": round(sum(r["validation_seconds"] for r in epochs), 2),
        "seconds_waiting_for_programs": round(sum(r["stall_seconds"] for r in stages), 2),
        "seconds_waiting_for_input": round(waited, 2),
        "input_wait_share": round(waited / seconds, 4) if seconds else 0.0,
        "input_stalls": kinds["stall"],
        "skipped_steps": sorted({event["step"] for event in events if event["kind"] == "skipped"}),
        "halved_batches": [{"stage": e["stage"], "batch_size": e["batch_size"]} for e in events if e["kind"] == "halved"],
        "warnings": sum(warnings.values()), "warnings_quoted": list(warnings)[-MOST_WARNINGS:],
        "peak_host_bytes": max(peaks) or None,
        "stages": _stages(steps),
    }


def _stages(steps: list[dict]) -> list[dict]:
    """Steps, seconds and waiting of each stage."""
    by_stage: dict[int, list[dict]] = {}
    for record in steps:
        by_stage.setdefault(record["stage"], []).append(record)
    return [{"stage": stage, "steps": len(taken), "seconds": round(sum(r["seconds"] for r in taken), 2),
             "seconds_per_step": round(statistics.median(r["seconds"] for r in taken), 5),
             "seconds_waiting_for_input": round(sum(r["input_wait"] for r in taken), 2)}
            for stage, taken in sorted(by_stage.items())]


def health_lines(summary: dict) -> list[str]:
    """The summary for people: what went well is one line, what did not has its own."""
    total = sum(summary[f"seconds_{what}"] for what in ("of_steps", "of_validation", "waiting_for_programs"))
    lines = [f"health: {summary['steps']} steps in {total:.0f} s ({summary['seconds_of_validation']:.0f} s validation, "
             f"{summary['seconds_waiting_for_programs']:.0f} s waiting for programs, input wait {100 * summary['input_wait_share']:.0f} % "
             f"of the steps), {_times(summary['resumes'], 'resumed')}"
             + (f", at most {gib(summary['peak_host_bytes'])} of memory" if summary["peak_host_bytes"] else "")]
    stages = summary["stages"]
    if len(stages) > 1:
        lines.append("  seconds per stage: " + ", ".join(f"{s['stage']}: {s['seconds']:.0f}" for s in stages))
    if summary["input_stalls"]:
        lines.append(f"  reading stood still {_times(summary['input_stalls'], '')}".rstrip())
    if summary["skipped_steps"]:
        lines.append(f"  skipped for losses that were not finite: steps {', '.join(map(str, summary['skipped_steps']))}")
    for halved in summary["halved_batches"]:
        lines.append(f"  out of memory: stage {halved['stage']} went on with batches of {halved['batch_size']}")
    if summary["warnings"]:
        lines.append(f"  {_times(summary['warnings'], 'warned')}; the last: {summary['warnings_quoted'][-1]}")
    return lines


def _times(number: int, what: str) -> str:
    return f"{'never' if number == 0 else 'once' if number == 1 else f'{number} times'} {what}"
