"""Hippocampus (MSD Task04) on two CPU cores, efficiency mode, with constant patches beside it for comparison.

Command:   python configs/hippocampus_cpu.py DATASET
           python configs/hippocampus_cpu.py DATASET --mode constant --name hippocampus_cpu_constant
Hardware:  2 cores (AMD EPYC, busy with other work at the same time, so the seconds are an upper limit)
Duration:  efficiency 9.8 minutes of training (590 s: 532 steps, 20 validation, 38 waiting for programs), constant 21.6 minutes;
           ratio 0.46, the share of voxels alone is 0.33
Dice:      fold 0, mean foreground over 52 whole volumes: efficiency 0.830 (anterior 0.836, posterior 0.823), constant 0.858
           (0.868, 0.848). At 1500 steps of 2 patches efficiency mode has seen a third of the voxels and is still behind; a full
           nnU-Net training (250,000 steps of 9) reaches about 0.89
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
    curriculum=CurriculumConfig(mode="efficiency"),
    augment=AugmentConfig(preset="light"),
    network=NetworkConfig(base_features=16),
)

if __name__ == "__main__":
    sys.exit(experiment(CONFIG))
