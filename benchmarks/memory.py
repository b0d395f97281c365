"""Predicted against measured memory of the training step at the stages of efficiency mode.

    python -m benchmarks.memory --output benchmarks/results/memory_cpu.json
    python -m benchmarks.memory --device gpu --plan 128

Predicted are the bytes of the compiled program (arguments + outputs - aliases + temporaries + code), on which the batch size is
decided. Measured is what three steps add to the peak: of the device's allocator on GPU, of the process's resident memory on CPU,
each stage in a process of its own.
"""

import argparse
import json
import os
import resource
import sys
from importlib.metadata import version
from pathlib import Path

from benchmarks import loader, step


def measure(plan: step.StepPlan, patch, batch: int, device: str) -> dict:
    """Bytes of one stage, in a fresh process."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    from pgps_jax.train.memory import program_bytes

    compiled = []
    original = jax.stages.Lowered.compile
    jax.stages.Lowered.compile = lambda *args, **kwargs: compiled.append(original(*args, **kwargs)) or compiled[-1]
    _, run = step.jax_side(plan, "plain-unet", device)(patch, batch)
    predicted = program_bytes(compiled[-1])
    sizes = compiled[-1].memory_analysis()
    before = resident()
    for _ in range(3):
        run()
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return {"predicted": predicted, "measured": stats["peak_bytes_in_use"]}
    # arguments are there already; what the program adds is its temporaries and outputs, and a peak once reached stays
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"predicted": predicted, "measured": added + sizes.argument_size_in_bytes + sizes.generated_code_size_in_bytes}


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="hippocampus", choices=step.PLANS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--stages", type=int, nargs="*")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()

    plan, rows = step.PLANS[options.plan], []
    ladder = plan.ladder()
    for patch in (ladder[i] for i in options.stages or range(len(ladder))):
        found = loader.in_its_own_process(measure, plan, patch, plan.batch, options.device)
        rows.append({"patch": list(patch), "batch": plan.batch, **found, "ratio": found["predicted"] / found["measured"]})
        print(f"{'x'.join(map(str, patch)):>12} batch {plan.batch}: predicted {found['predicted'] / 2**20:8.0f} MiB, "
              f"measured {found['measured'] / 2**20:8.0f} MiB, ratio {rows[-1]['ratio']:.2f}", flush=True)
    if options.output:
        about = {"what": __doc__.splitlines()[0], "command": sys.argv[1:], "versions": {"jax": version("jax")}}
        options.output.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    loader.multiprocessing.set_start_method("spawn")
    main()
