"""The stages of every mode for two plans, as Markdown: python -m benchmarks.stages > docs/stages.md"""

from benchmarks.step import PLANS
from pgps_jax.curriculum import CurriculumConfig, make_schedule
from pgps_jax.report.schedule import stage_rows, voxel_share

MODES = ("efficiency", "performance", "pgps", "pgps-plus", "rpss")
EPOCHS, STEPS_PER_EPOCH = 1000, 250  # nnU-Net's
INTRODUCTION = """# Stages of every mode

At nnU-Net's 1000 epochs of 250 steps; share is the voxels of one step over those of a step with the planned patch and batch. `rpss` draws
one of its patches for every step; `reversed` and `random-order` have the stages of `efficiency` in another order. Made by
`python -m benchmarks.stages`."""


def main() -> None:
    print(INTRODUCTION)
    for name, plan in PLANS.items():
        title = "x".join(map(str, plan.patch))
        print(f"\n## {name}: planned patch {title}, batch {plan.batch}\n")
        print("| mode | voxels of all steps against constant | stages: patch·batch (share) |\n|---|---|---|")
        print(f"| constant | 1.000 | {title} batch {plan.batch} |")
        for mode in MODES:
            schedule = make_schedule(CurriculumConfig(mode=mode), plan.patch, plan.batch, plan.limits,
                                     EPOCHS * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
            rows = stage_rows(schedule, plan.patch, plan.batch)
            stages = ", ".join(f"{'x'.join(map(str, row['patch_size']))}·{row['batch_size']} ({row['share']:.3f})" for row in rows)
            print(f"| {mode} | {voxel_share(rows):.3f} | {stages} |")


if __name__ == "__main__":
    main()
