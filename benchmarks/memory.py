"""Predicted against measured memory of the training step at the stages of a curriculum.

    python -m benchmarks.memory --output benchmarks/results/cpu/memory.json
    python -m benchmarks.memory --mode performance --features 8      # batches grow as patches shrink; quick
    python -m benchmarks.memory --device gpu --plan 128

Predicted are the bytes of the compiled program (arguments + outputs - aliases + temporaries + code), on which the batch size is
decided. Measured is what three steps add to the peak, and the arguments, which were there before: of the device's allocator on
GPU, of the process's resident memory on CPU, each stage in a process of its own. Where compiling (cuDNN is tried out on the device)
took more than the steps, their peak cannot be seen, and nothing is measured.
"""

import argparse
import os
import resource
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import loader, step
from pgps_jax.json_file import write_json


def measure(plan: step.StepPlan, patch, batch: int, device: str) -> dict:
    """Bytes of one stage, in a fresh process; measured None where the steps' peak cannot be seen."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    from pgps_jax.train.memory import program_bytes

    compiled = []
    original = jax.stages.Lowered.compile
    jax.stages.Lowered.compile = lambda *args, **kwargs: compiled.append(original(*args, **kwargs)) or compiled[-1]
    _, run = step.jax_side(plan, device)(patch, batch)
    sizes = compiled[-1].memory_analysis()
    before, peak_before = in_use_and_peak(jax.local_devices()[0])
    for _ in range(3):
        run()
    _, peak = in_use_and_peak(jax.local_devices()[0])
    if device == "gpu":
        measured = peak - before + sizes.argument_size_in_bytes if peak > peak_before else None
    else:  # code, too, was in memory before; a peak of compiling is not told apart
        measured = peak - before + sizes.argument_size_in_bytes + sizes.generated_code_size_in_bytes
    return {"predicted": program_bytes(compiled[-1]), "measured": measured}


def in_use_and_peak(device) -> tuple[int, int]:
    """Bytes in use and most bytes ever in use: of the device's allocator, or of this process where the device has none."""
    if stats := device.memory_stats():
        return stats["bytes_in_use"], stats["peak_bytes_in_use"]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="hippocampus", choices=step.PLANS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--mode", default="efficiency", choices=["efficiency", "performance"])
    parser.add_argument("--features", type=int, help="channels of the network's first level, doubled at each other one; as planned else")
    parser.add_argument("--stages", type=int, nargs="*")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    plan, rows = step.PLANS[options.plan], []
    if options.features:
        plan = plan._replace(features=tuple(min(options.features * 2**i, 320) for i in range(len(plan.features))))
    stages = plan.stages(options.mode)
    for patch, batch in (stages[i] for i in options.stages or range(len(stages))):
        found = loader.in_its_own_process(measure, plan, patch, batch, options.device)
        seen = found["measured"] is not None
        rows.append({"patch": list(patch), "batch": batch, **found, "ratio": found["predicted"] / found["measured"] if seen else None})
        print(f"{'x'.join(map(str, patch)):>12} batch {batch}: predicted {found['predicted'] / 2**20:8.0f} MiB, " +
              (f"measured {found['measured'] / 2**20:8.0f} MiB, ratio {rows[-1]['ratio']:.2f}" if seen else "not seen"), flush=True)
        if options.output:
            about = {"what": __doc__.splitlines()[0], "command": sys.argv[1:], "versions": {"jax": version("jax")}}
            write_json(options.output, about | {"features": plan.features, "rows": rows}, indent=1)


if __name__ == "__main__":
    loader.multiprocessing.set_start_method("spawn")
    main()
