"""The network that is asked for replaces the planned one, and the patch follows its limits."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.architecture import Architecture
from pgps_jax.chosen_network import nearest_patch, with_network
from pgps_jax.config import NetworkConfig
from pgps_jax.curriculum import CurriculumConfig, make_schedule
from pgps_jax.data.plan import Configuration, configuration_from_json
from pgps_jax.errors import InputError
from pgps_jax.models import limits
from pgps_jax.models.swin_unetr import SwinUnetrOptions
from pgps_jax.models.unetr import UnetrOptions

K3, S1, S2 = (3, 3, 3), (1, 1, 1), (2, 2, 2)
PLANNED = Configuration(
    "3d_fullres", "cases", 2, (40, 56, 40), (1.0, 1.0, 1.0), (36.0, 50.0, 35.0), ("ZScoreNormalization",), (False,), False,
    Architecture("plain-unet", (32, 64, 128, 256), (K3,) * 4, (S1, S2, S2, S2), (2,) * 4, (2,) * 3),
)  # fmt: skip


def chosen(planned: Configuration = PLANNED, **network) -> tuple[Configuration, list[str]]:
    said = []
    return with_network(planned, NetworkConfig(**network), said.append), said


def test_nothing_asked_for_leaves_the_plan_as_it_is():
    assert chosen(backbone="plain-unet") == (PLANNED, [])
    assert chosen() == (PLANNED, [])


def test_the_residual_encoder_keeps_stages_kernels_and_strides():
    asked, said = chosen(backbone="resenc-unet", base_features=8)
    assert asked.architecture == Architecture("resenc-unet", (8, 16, 32, 64), (K3,) * 4, (S1, S2, S2, S2), (1, 3, 4, 6), (1,) * 3)
    assert (asked.patch_size, said) == (PLANNED.patch_size, [])
    assert chosen(asked, backbone="plain-unet", base_features=32, max_features=256)[0] == PLANNED


@pytest.mark.parametrize(("backbone", "patch", "stages"), [("unetr", (32, 48, 32), 5), ("swin-unetr", (32, 64, 32), 2)])
def test_the_nearest_patch_is_taken_and_said_and_the_curriculum_follows(backbone, patch, stages):
    asked, (sentence,) = chosen(backbone=backbone)
    assert asked.patch_size == patch
    assert "40x56x40" in sentence and "x".join(map(str, patch)) in sentence
    schedule = make_schedule(CurriculumConfig(), patch, 2, limits(asked.architecture), 1000, 10)
    assert len(schedule.stages) == stages
    assert schedule.stages[-1].patch_size == patch


@settings(deadline=None)
@given(
    patch=st.tuples(*[st.integers(1, 200)] * 3),
    strides=st.lists(st.tuples(*[st.sampled_from([1, 2, 2, 3])] * 3), min_size=1, max_size=5),
    mode=st.sampled_from(["constant", "efficiency", "performance", "pgps", "pgps-plus"]),
    backbone=st.sampled_from(["plain-unet", "resenc-unet"]),
    is_2d=st.booleans(),
)
def test_any_planned_patch_is_rounded_to_one_that_the_u_net_takes_and_training_ends_at_it(patch, strides, mode, backbone, is_2d):
    if is_2d:
        patch, strides = (1, *patch[1:]), [(1, *stride[1:]) for stride in strides]
    n = len(strides) + 1
    architecture = Architecture(backbone, (4,) * n, (K3,) * n, (S1, *strides), (2,) * n, (2,) * (n - 1))
    planned = dataclasses.replace(PLANNED, patch_size=patch, architecture=architecture, is_2d=is_2d)
    asked, said = chosen(planned)
    smallest, increment = limits(architecture)
    for edge, before, low, step in zip(asked.patch_size, patch, smallest, increment, strict=True):
        assert edge >= low and (edge - low) % step == 0
        assert abs(edge - before) <= step / 2 or edge == low > before
    assert (asked.patch_size == patch) == (not said)
    schedule = make_schedule(CurriculumConfig(mode=mode), asked.patch_size, 2, limits(asked.architecture), 300, 10)
    assert schedule.stages[-1].patch_size == asked.patch_size


def test_a_patch_that_does_not_divide_is_rounded_and_said():
    asked, (sentence,) = chosen(dataclasses.replace(PLANNED, patch_size=(42, 56, 5)))
    assert asked.patch_size == (40, 56, 8)
    assert "42x56x5" in sentence and "40x56x8" in sentence and "plain-unet" in sentence


def test_positions_are_learnt_for_the_largest_patch_unless_another_is_given():
    assert chosen(backbone="unetr")[0].architecture.options["table_size"] == (32, 48, 32)
    asked, _ = chosen(backbone="unetr", unetr=UnetrOptions(table_size=(96, 96, 96)))
    assert asked.architecture.options["table_size"] == (96, 96, 96)


def test_the_nearest_patch_is_no_smaller_than_the_smallest_and_the_smaller_of_two():
    swin = Architecture("swin-unetr")
    assert nearest_patch((10, 48, 49), swin) == (32, 32, 64)
    assert nearest_patch((32, 64, 160), swin) == (32, 64, 160)


@pytest.mark.parametrize("backbone", ["unetr", "swin-unetr"])
def test_options_survive_plans_json(backbone):
    options = {"swin_unetr": SwinUnetrOptions(v2=True, window_size=(7, 7, 5)), "unetr": UnetrOptions(hidden_size=24)}
    name = backbone.replace("-", "_")
    asked, _ = chosen(backbone=backbone, **{name: options[name]})
    assert configuration_from_json("3d_fullres", asked.to_json()) == asked


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"backbone": "unetr", "base_features": 8}, "--network.unetr.feature-size"),
        ({"swin_unetr": SwinUnetrOptions(v2=True)}, "--network.swin-unetr.v2"),
        ({"backbone": "unetr", "swin_unetr": SwinUnetrOptions(feature_size=12)}, "--network.swin-unetr.feature-size"),
        ({"backbone": "swin-unetr", "swin_unetr": SwinUnetrOptions(feature_size=20)}, "multiple of 12"),
        ({"backbone": "unetr", "unetr": UnetrOptions(num_heads=5)}, "num_heads"),
        ({"backbone": "unetr", "unetr": UnetrOptions(hidden_size=0)}, "hidden_size"),
        ({"backbone": "plain-unet", "base_features": 0}, "base-features"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(network, words):
    with pytest.raises(InputError, match=words):
        chosen(**network)


def test_a_planar_configuration_has_no_transformer():
    planar = dataclasses.replace(PLANNED, patch_size=(1, 56, 40), is_2d=True)
    with pytest.raises(InputError, match=r"3d_fullres is planar"):
        chosen(planar, backbone="swin-unetr")
