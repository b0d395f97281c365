"""A predictor that any test can follow by hand: its network calls bright voxels foreground."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pgps_jax.data.dataset import Labels
from pgps_jax.data.plan import Plan, write_plan
from pgps_jax.infer.predict import Predictor
from pgps_jax.infer.sliding_window import SlidingWindow
from pgps_jax.models import build
from pgps_jax.train.checkpoint import Checkpoints
from pgps_jax.train.state import TrainState


def plans_json(spacing=(1.0, 1.0, 1.0), transpose=(0, 1, 2), channels=1) -> dict:
    """Plans in nnU-Net's schema for a small plain U-Net, intensities left as they are."""
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [4, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2,
            "strides": [[1, 1, 1], [2, 2, 2]],
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8, 8, 8],
        "median_image_size_in_voxels": [12.0, 12.0, 12.0],
        "spacing": list(spacing),
        "normalization_schemes": ["NoNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": architecture,
        "batch_dice": False,
    }
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = {
            "is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
    back = [list(transpose).index(axis) for axis in range(3)]
    intensities = dict.fromkeys(("max", "mean", "median", "min", "percentile_00_5", "percentile_99_5", "std"), 1.0)
    return {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": [12, 12, 12],
        "image_reader_writer": "NibabelIO",
        "transpose_forward": list(transpose),
        "transpose_backward": back,
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): intensities for c in range(channels)},
    }


@pytest.fixture
def small_plans() -> dict:
    """plans.json of a small network."""
    return plans_json()


@pytest.fixture
def bright_is_foreground():
    """Maker of predictors whose network gives label 1 above 50, label 2 above 100 (sum of the channels)."""

    def make(*, regions=False, channels=1, **plan_settings) -> Predictor:
        def classes(params, tiles):
            x = tiles.sum(-1)
            return jnp.stack([jnp.zeros_like(x) + 50, x, 2 * x - 100], -1)

        def thresholds(params, tiles):
            return jnp.stack([tiles.sum(-1) - 50, tiles.sum(-1) - 100], -1)

        plan = Plan.from_json(plans_json(channels=channels, **plan_settings))
        names = {"background": 0, "all": [1, 2], "bright": 2} if regions else {"background": 0, "dim": 1, "bright": 2}
        labels = Labels.from_json({"labels": names} | ({"regions_class_order": [1, 2]} if regions else {}))
        window = SlidingWindow(thresholds if regions else classes, (8, 8, 8), labels.num_outputs, (0, 1, 2))
        params = ({"unused": np.zeros(1, np.float32)},)
        return Predictor(plan, plan.configurations["3d_fullres"], labels, ("MRI", "T2")[:channels], params, window)

    return make


@pytest.fixture
def run(small_plans, tmp_path):
    """A run folder with random weights, trained, as it says, on LPS images."""
    folder = tmp_path / "run"
    folder.mkdir()
    plan, labels = Plan.from_json(small_plans), {"labels": {"background": 0, "a": 1, "b": 2}}
    write_plan(plan, folder / "plan.json")
    (folder / "dataset.json").write_text(json.dumps({**labels, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}))
    (folder / "inference.json").write_text(json.dumps({"configuration": "3d_fullres", "mirror_axes": [], "orientation": "LPS"}))
    outputs = Labels.from_json(labels).num_outputs
    network = nnx.eval_shape(lambda: build(plan.configurations["3d_fullres"].architecture, 1, outputs, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32),
                          nnx.to_pure_dict(nnx.split(network, nnx.Param)[1]))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save("last", TrainState(jnp.int32(0), params, {}), 0, {})
    return folder
