"""Hippocampus (MSD Task04) on two CPU cores, efficiency mode, with constant patches beside it for comparison.

Command:   python configs/hippocampus_cpu.py DATASET
           python configs/hippocampus_cpu.py DATASET --mode constant --name hippocampus_cpu_constant
Hardware:  2 cores (AMD EPYC, busy with other work at the same time, so the seconds are an upper limit)
Duration:  efficiency 7.6 minutes of training (455 s: 416 steps, 21 validation, 18 waiting for programs; compiling beside them takes
           about 90 s of both cores), constant 15.8 minutes; ratio 0.48, the share of voxels alone is 0.32
Dice:      fold 0, mean foreground over 52 whole volumes: efficiency 0.822, constant 0.859. At 1500 steps of 2 patches efficiency mode has
           seen a third of the voxels and is still behind; a full nnU-Net training (250,000 steps of 9) reaches about 0.89
"""

import sys
from pathlib import Path

from pgps_jax.config import NetworkConfig, RunConfig
from pgps_jax.curriculum import CurriculumConfig
from pgps_jax.main import experiment
from pgps_jax.train.augment import AugmentConfig

CONFIG = RunConfig(
    dataset=Path("Dataset004_Hippocampus"),
    name="hippocampus_cpu",
    batch_size=2,
    epochs=15,
    steps_per_epoch=100,
    validation_steps=4,
    mirror_tta=False,
    curriculum=CurriculumConfig(mode="efficiency"),
    augment=AugmentConfig(preset="light"),
    network=NetworkConfig(base_features=16),
)

if __name__ == "__main__":
    sys.exit(experiment(CONFIG))
