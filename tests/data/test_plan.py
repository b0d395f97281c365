"""Plans are read in every generation of nnU-Net's schema, and what was not changed is written back as it stood."""

import copy
import dataclasses
import json

import pytest

from pgps_jax.data.plan import Plan, check_preprocessing, read_plan, write_plan
from pgps_jax.errors import InputError
from pgps_jax.preparation import configuration_of


def current() -> dict:
    """A small plan in today's schema, with keys that we do not know."""
    stages = {"n_stages": 3, "features_per_stage": [32, 64, 128]}
    fixed = {
        "conv_op": "torch.nn.modules.conv.Conv3d", "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    kwargs = {**stages, "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
              "n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2], **fixed}
    fullres = {
        "data_identifier": "P_3d_fullres", "batch_size": 2, "patch_size": [16, 32, 32], "spacing": [3, 1.0, 1.0],
        "median_image_size_in_voxels": [20, 40.5, 40], "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "batch_dice": True, "preprocessor_name": "Mine", "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet", "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op"]},
    }  # fmt: skip
    return {
        "dataset_name": "Dataset001_X", "plans_name": "P", "original_median_spacing_after_transp": [3, 1, 1],
        "original_median_shape_after_transp": [20, 40, 40], "image_reader_writer": "NibabelIO", "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0], "experiment_planner_used": "SomePlanner", "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}, "my key": {"kept": [1, 2]},
        "configurations": {
            "3d_fullres": fullres,
            "3d_big": {"inherits_from": "3d_fullres", "batch_size": 4, "batch_dice": True, "my note": "kept"},
            "3d_bigger": {"inherits_from": "3d_big", "patch_size": [32, 64, 64]},
        },
    }  # fmt: skip


LEGACY = {
    "data_identifier": "P_2d", "batch_size": 12, "patch_size": [56, 40], "spacing": [1.0, 2.0],
    "median_image_size_in_voxels": [50, 35], "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
    "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 32, "unet_max_num_features": 100,
    "n_conv_per_stage_encoder": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2], "num_pool_per_axis": [2, 2],
    "pool_op_kernel_sizes": [[1, 1], [2, 2], [2, 2]], "conv_kernel_sizes": [[3, 3], [3, 3], [3, 3]], "batch_dice": True,
}  # fmt: skip


def with_kwargs(**kwargs) -> dict:
    content = current()
    content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= kwargs
    return content


def test_a_plan_is_written_back_as_it_was_read():
    content = current()
    assert Plan.from_json(copy.deepcopy(content)).to_json() == content


def test_a_plan_is_typed_and_has_three_axes():
    plan = Plan.from_json(current())
    fullres = plan.configurations["3d_fullres"]
    assert (plan.transpose_forward, plan.transpose_backward) == ((2, 0, 1), (1, 2, 0))
    assert (fullres.patch_size, fullres.spacing, fullres.median_shape) == ((16, 32, 32), (3.0, 1.0, 1.0), (20.0, 40.5, 40.0))
    assert fullres.architecture.backbone == "plain-unet" and fullres.architecture.strides[1] == (1, 2, 2)
    assert fullres.architecture.blocks_per_stage == (2, 2, 2) and not fullres.is_2d


def test_a_child_takes_from_its_parents_what_it_does_not_say():
    bigger = Plan.from_json(current()).configurations["3d_bigger"]
    assert (bigger.patch_size, bigger.batch_size, bigger.spacing) == ((32, 64, 64), 4, (3.0, 1.0, 1.0))


def test_only_what_was_changed_is_written_anew():
    content = current()
    plan = Plan.from_json(copy.deepcopy(content))
    fullres = plan.configurations["3d_fullres"]
    changed = dataclasses.replace(fullres, batch_size=7, architecture=dataclasses.replace(
        fullres.architecture, features_per_stage=(8, 16, 32)))
    written = dataclasses.replace(plan, configurations=plan.configurations | {"3d_fullres": changed}).to_json()
    again = Plan.from_json(written).configurations
    assert again["3d_fullres"] == changed
    assert again["3d_bigger"] == plan.configurations["3d_bigger"], "a change of the parent must not reach its children"
    entry = content["configurations"]["3d_fullres"]
    entry["batch_size"] = 7
    assert {k: v for k, v in written["configurations"]["3d_fullres"].items() if k != "architecture"} == {
        k: v for k, v in entry.items() if k != "architecture"}


def test_a_child_whose_parent_was_removed_is_written_whole():
    plan = Plan.from_json(current())
    alone = dataclasses.replace(plan, configurations={"3d_bigger": plan.configurations["3d_bigger"]})
    assert Plan.from_json(alone.to_json()).configurations["3d_bigger"] == plan.configurations["3d_bigger"]


def test_plans_of_nnunet_2_0_are_read_and_written_back():
    content = current() | {"configurations": {"2d": LEGACY}}
    plan = Plan.from_json(copy.deepcopy(content))
    found = plan.configurations["2d"]
    assert found.is_2d and found.patch_size == (1, 56, 40) and found.spacing == (3.0, 1.0, 2.0)
    assert found.architecture.features_per_stage == (32, 64, 100) and found.architecture.backbone == "plain-unet"
    assert found.architecture.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2))
    assert found.architecture.kernel_sizes == ((1, 3, 3),) * 3 and found.architecture.convs_per_stage_decoder == (2, 2)
    assert plan.to_json() == content
    wider = dataclasses.replace(found, architecture=dataclasses.replace(found.architecture, features_per_stage=(4, 8, 16)))
    written = dataclasses.replace(plan, configurations={"2d": wider}).to_json()
    assert "UNet_class_name" not in written["configurations"]["2d"]
    assert Plan.from_json(written).configurations["2d"] == wider


def test_one_number_may_stand_for_all_stages_and_axes():
    kwargs = {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 1, "kernel_sizes": [3, 3, 3], "strides": [1, 2, 2]}
    found = Plan.from_json(with_kwargs(**kwargs)).configurations["3d_fullres"].architecture
    assert found.blocks_per_stage == (2, 2, 2) and found.convs_per_stage_decoder == (1, 1)
    assert found.kernel_sizes == ((3, 3, 3),) * 3 and found.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}, "BatchNorm3d"),
        ({"conv_bias": False}, "conv_bias False"),
        ({"dropout_op": "torch.nn.Dropout3d"}, "Dropout3d"),
        ({"nonlin": "torch.nn.ReLU"}, "torch.nn.ReLU"),
        ({"nonlin_kwargs": {"negative_slope": 0.2}}, "negative_slope 0.2"),
        ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, "0.001"),
        ({"nonlin_first": True}, "nonlin_first"),
    ],
)
def test_networks_that_are_not_built_here_are_told_apart(kwargs, words):
    plan = Plan.from_json(with_kwargs(**kwargs))
    backbone = plan.configurations["3d_fullres"].architecture.backbone
    assert backbone.startswith("plain-unet with ") and words in backbone
    assert plan.to_json() == with_kwargs(**kwargs)


def test_other_networks_keep_their_options():
    plan = Plan.from_json(current())
    unetr = dataclasses.replace(
        plan.configurations["3d_fullres"].architecture, backbone="unetr", features_per_stage=(), kernel_sizes=(), strides=(),
        blocks_per_stage=(), convs_per_stage_decoder=(), options={"feature_size": 16, "img_size": (16, 32, 32), "qkv_bias": False})
    changed = dataclasses.replace(plan.configurations["3d_fullres"], architecture=unetr)
    written = dataclasses.replace(plan, configurations={"3d_fullres": changed}).to_json()
    assert Plan.from_json(json.loads(json.dumps(written))).configurations["3d_fullres"].architecture == unetr


def broken(**changes) -> dict:
    content = current()
    content["configurations"]["3d_fullres"] |= changes
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({k: v for k, v in current().items() if k != "transpose_forward"}, "'transpose_forward'"),
        (current() | {"transpose_forward": [0, 1, 1]}, "transpose_forward"),
        (current() | {"configurations": {"a": {"inherits_from": "b"}}}, "'a' inherits from 'b'"),
        (current() | {"configurations": {"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}}, "circle: a -> b -> a"),
        (broken(patch_size=[1, 2, 3, 4]), "'3d_fullres'"),
        (broken(batch_size="many"), "'3d_fullres'"),
        (broken(inherits_from="3d_bigger"), "circle"),
        (current() | {"configurations": {"a": {"batch_size": 2}}}, "'a' has no 'patch_size'"),
        (with_kwargs(features_per_stage=[32, 64]), "'3d_fullres'"),
        (current() | {"configurations": {"a": 3}}, "unexpected form"),
    ],
)
def test_plans_that_cannot_be_meant_are_refused(tmp_path, content, words):
    (tmp_path / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words) as error:
        read_plan(tmp_path / "plans.json")
    assert "plans.json" in str(error.value)


def test_a_missing_or_damaged_plan_is_named(tmp_path):
    with pytest.raises(InputError, match=r"plans\.json: this file is missing"):
        read_plan(tmp_path / "plans.json")
    for text in ("{", "[]"):
        (tmp_path / "plans.json").write_text(text)
        with pytest.raises(InputError, match=r"plans\.json"):
            read_plan(tmp_path / "plans.json")


def test_planning_again_keeps_configurations_that_the_user_added(tmp_path):
    path = tmp_path / "plans.json"
    plan = Plan.from_json(current())
    write_plan(plan, path)
    assert json.loads(path.read_text()) == current() and list(tmp_path.iterdir()) == [path]
    fresh = dataclasses.replace(plan, configurations={"3d_fullres": plan.configurations["3d_fullres"]})
    write_plan(fresh, path)
    assert set(read_plan(path).configurations) == {"3d_fullres", "3d_big", "3d_bigger"}


def test_real_plans_survive_reading_and_writing(real_parity):
    files = sorted(real_parity.glob("**/*[pP]lans.json"))
    assert len(files) >= 9
    for path in files:
        content = json.loads(path.read_text())
        plan = Plan.from_json(content)
        assert plan.to_json() == content, path
        for configuration in plan.configurations.values():  # and what we would write of our own is the same
            own = dataclasses.replace(configuration, entry={}, own_keys=()).to_json()
            assert own == content["configurations"][configuration.name]


RESAMPLING = {"preprocessor_name": "DefaultPreprocessor", "resampling_fn_data": "resample_data_or_seg_to_shape",
              "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}}


@pytest.mark.parametrize("changes, words", [
    ({}, None),
    ({"resampling_fn_data_kwargs": {"force_separate_z": None}}, None),  # nnU-Net's defaults stand for what is not named
    ({"resampling_fn_data": "resample_torch_fornnunet"}, "resampling_fn_data 'resample_torch_fornnunet'"),
    ({"resampling_fn_data_kwargs": {"force_separate_z": False}}, "resampling_fn_data_kwargs"),
    ({"resampling_fn_data_kwargs": {"force_separate_z": None, "order": 1}}, "resampling_fn_data_kwargs"),
    ({"preprocessor_name": "Mine"}, "preprocessor_name 'Mine'"),
])  # fmt: skip
def test_a_plan_of_other_preprocessing_can_be_read_but_not_used(changes, words):
    content = current()
    content["configurations"]["3d_fullres"] |= RESAMPLING | changes
    configuration = Plan.from_json(content).configurations["3d_big"]
    if words is None:
        check_preprocessing(configuration)
        return
    with pytest.raises(InputError, match=words):
        check_preprocessing(configuration)


def test_the_second_network_of_a_cascade_is_not_trained_as_if_it_were_alone():
    content = current()
    content["configurations"]["3d_fullres"] |= RESAMPLING
    content["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plan = Plan.from_json(content)
    assert configuration_of(plan, "3d_fullres").previous_stage is None
    with pytest.raises(InputError, match="segmentation of 3d_lowres"):
        configuration_of(plan, "3d_cascade_fullres")
