"""XLA's options for a program: what each costs in compilation and brings to the training step.

    python -m benchmarks.compile_options                               # CPU, or the GPU if JAX finds one
    python -m benchmarks.compile_options --stages 0 14 --only default "autotune level 2"

Every program is compiled in a process of its own: what the compiler has tried out for one, it knows for the next. A set changes or adds
to what is used (`models.conv.compiler_options`). Options that this version of XLA does not know are told, not an error.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from benchmarks import loader, step
from pgps_jax.json_file import write_json

SETS: dict[str, dict[str, dict]] = {
    "cpu": {
        "used": {},
        "XLA's defaults": {"xla_backend_optimization_level": 3, "xla_cpu_experimental_ynn_fusion_type": ""},
        "LLVM level 0": {"xla_backend_optimization_level": 0},
        "LLVM level 2": {"xla_backend_optimization_level": 2},
        "LLVM level 3": {"xla_backend_optimization_level": 3},
        "without fusion emitters": {"xla_cpu_use_fusion_emitters": False},
        "vectors of 512 bits": {"xla_cpu_prefer_vector_width": 512},
    },
    "gpu": {
        "used": {},
        "no command buffers": {"xla_gpu_enable_command_buffer": ""},
        "autotune level 0": {"xla_gpu_autotune_level": 0},
        "autotune level 2": {"xla_gpu_autotune_level": 2},
        "channels last in all convolutions": {"xla_gpu_force_conv_nhwc": True},  # XLA's own choice from Hopper on
        "channels first in all convolutions": {"xla_gpu_force_conv_nchw": True},
        "latency-hiding scheduler": {"xla_gpu_enable_latency_hiding_scheduler": True},
        "no Triton products": {"xla_gpu_enable_triton_gemm": False},
    },
}


def measure(plan: step.StepPlan, patch, batch: int, device: str, options: dict) -> dict:
    """Compile and run one stage's step, in a fresh process."""
    prepare = step.jax_side(plan, device, options)
    before = time.process_time()
    try:
        compile_seconds, run = prepare(patch, batch)
    except Exception as error:
        return {"failed": str(error).splitlines()[0]}
    cpu_seconds = time.process_time() - before
    seconds = []
    for _ in range(14):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {"compile_s": compile_seconds, "compile_cpu_s": cpu_seconds, "step_ms": 1e3 * statistics.median(seconds[4:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=SETS)
    parser.add_argument("--plan", default="hippocampus", choices=step.PLANS)
    parser.add_argument("--network", default="plain-unet", choices=step.NETWORKS)
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 7, 14], help="of efficiency mode")
    parser.add_argument("--batch", type=int, help="patches per step; as planned when not given")
    parser.add_argument("--only", nargs="*", help="some of the sets")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()

    plan, rows = step.PLANS[arguments.plan].with_backbone(arguments.network), []
    stages = plan.stages()
    for patch, planned in (stages[i] for i in arguments.stages):
        batch = arguments.batch or planned
        for name, options in SETS[arguments.device].items():
            if arguments.only and name not in arguments.only:
                continue
            found = loader.in_its_own_process(measure, plan, patch, batch, arguments.device, options)
            rows.append({"patch": patch, "batch": batch, "name": name, "options": options, **found})
            print(f"{'x'.join(map(str, patch)):>12} batch {batch:>3}  {name:<35} " + (
                found.get("failed") or f"compiled in {found['compile_s']:5.1f} s ({found['compile_cpu_s']:5.1f} s of CPU), "
                                       f"step {found['step_ms']:8.1f} ms"), flush=True)
            if arguments.output:
                about = {"what": __doc__.splitlines()[0], "command": sys.argv[1:], "network": arguments.network, "plan": arguments.plan}
                write_json(arguments.output, about | step.about(arguments.device) | {"rows": rows}, indent=1)


if __name__ == "__main__":
    loader.multiprocessing.set_start_method("spawn")
    main()
