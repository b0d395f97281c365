"""Hippocampus (MSD Task04) on two CPU cores, efficiency mode, with constant patches beside it for comparison.

Command:   python configs/hippocampus_cpu.py DATASET
           python configs/hippocampus_cpu.py DATASET --mode constant --name hippocampus_cpu_constant
Hardware:  2 cores
RESULTS
"""

import sys
from pathlib import Path

from pgps_jax.config import NetworkConfig, RunConfig
from pgps_jax.curriculum import CurriculumConfig
from pgps_jax.main import experiment
from pgps_jax.train.augment import AugmentConfig

CONFIG = RunConfig(
    dataset=Path("../shared/data/Hippocampus"),
    name="hippocampus_cpu",
    batch_size=2,
    epochs=15,
    steps_per_epoch=100,
    validation_steps=4,
    curriculum=CurriculumConfig(mode="efficiency"),
    augment=AugmentConfig(preset="light"),
    network=NetworkConfig(base_features=16),
)

if __name__ == "__main__":
    sys.exit(experiment(CONFIG))
