"""Hippocampus (MSD Task04) as nnU-Net trains it, with the efficiency curriculum: 1000 epochs of 250 steps.

Command:   python configs/hippocampus_nnunet.py DATASET
Hardware:  one GPU with bfloat16 (NVIDIA, from 8 GB)
Duration:  not measured here yet; `train` prints a forecast for your machine shortly after each stage begins
Expected:  a full nnU-Net training reaches about 0.89 mean foreground Dice on fold 0; the paper reports the same for
           efficiency mode in 44 % of the time

Any flag of `python -m pgps_jax.main run` can be added, e.g. --fold 1, --mode performance, --case-curriculum pdl
or --max-hours 8; README.md has a table of them.
"""

import sys
from pathlib import Path

from pgps_jax.config import RunConfig
from pgps_jax.curriculum import CurriculumConfig
from pgps_jax.main import experiment

CONFIG = RunConfig(
    dataset=Path("Dataset004_Hippocampus"),
    name="hippocampus_nnunet",
    curriculum=CurriculumConfig(mode="efficiency"),
)

if __name__ == "__main__":
    sys.exit(experiment(CONFIG))
