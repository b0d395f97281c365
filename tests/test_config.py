"""Configs survive JSON, and a run refuses to go on under another config, naming the keys."""

import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from pgps_jax.commands import Command
from pgps_jax.config import FREE_TO_CHANGE, NetworkConfig, RunConfig, check_same, from_json, to_json
from pgps_jax.curriculum import CurriculumConfig
from pgps_jax.data.sampling import SamplingConfig
from pgps_jax.errors import InputError
from pgps_jax.train.augment import AugmentConfig


@pytest.fixture
def config():
    return RunConfig(dataset=Path("raw/Dataset001_X"), fold="all", epochs=7, curriculum=CurriculumConfig(mode="performance"),
                     network=NetworkConfig(base_features=8))


def test_a_config_read_back_from_json_is_equal(config):
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config))), "config.json") == config


def test_every_default_is_spelled_out_in_json():
    values = to_json(RunConfig(dataset=Path("x")))
    assert set(values) == {f.name for f in dataclasses.fields(RunConfig)}
    assert values["optim"]["momentum"] == 0.99


@pytest.mark.parametrize("change, words", [
    ({"epoch": 3}, "unknown keys epoch"),
    ({"epochs": "three"}, "config.json: epochs"),
    ({"fold": "none"}, "fold"),
    ({"optim": 3}, "optim"),
    ({"epochs": True}, "epochs"),
])
def test_bad_json_is_refused_naming_the_key(config, change, words):
    with pytest.raises(InputError, match=words):
        from_json(RunConfig, to_json(config) | change, "config.json")


def test_a_missing_key_without_default_is_named(config):
    values = to_json(config)
    del values["dataset"]
    with pytest.raises(InputError, match="lacks the keys dataset"):
        from_json(RunConfig, values, "config.json")


def test_going_on_with_the_same_config_is_fine_also_elsewhere_and_with_more_threads(config):
    stored = to_json(config)
    check_same(dataclasses.replace(config, threads=7, workspace=Path("/elsewhere"), device="cpu"), stored, Path("run"))


@pytest.mark.parametrize("change", [{"epochs": 8}, {"seed": 1}, {"network": NetworkConfig(base_features=16)}])
def test_going_on_with_another_config_is_refused_naming_the_keys(config, change):
    with pytest.raises(InputError, match=next(iter(change))):
        check_same(dataclasses.replace(config, **change), to_json(config), Path("run"))


def test_the_fields_that_may_change_exist():
    assert {f.name for f in dataclasses.fields(RunConfig)} >= FREE_TO_CHANGE


def test_patches_are_drawn_as_in_the_paper_of_the_mode_unless_asked_otherwise():
    def scheme(mode, **sampling):
        return RunConfig(Path("x"), curriculum=CurriculumConfig(mode=mode), sampling=SamplingConfig(**sampling)).sampling_of_mode.scheme

    assert {scheme(mode) for mode in ("pgps", "pgps-plus", "rpss")} == {"per-case"}
    assert {scheme(mode) for mode in ("constant", "efficiency", "performance", "reversed", "random-order")} == {"paired"}
    assert (scheme("pgps", scheme="paired"), scheme("performance", scheme="per-case")) == ("paired", "per-case")


def parsed(*arguments):
    return tyro.cli(Command, args=["train", "raw", *arguments], config=(tyro.conf.OmitSubcommandPrefixes,))


def test_every_option_of_sampling_augmentation_and_reading_is_on_the_command_line():
    sampling = parsed("--sampling.scheme", "per-case", "--sampling.foreground-fraction", "0.33", "--sampling.jitter", "0.2",
                      "--sampling.class-weights", "1", "2", "--sampling.case-weights", "a", "1", "b", "2.5").sampling
    assert sampling == SamplingConfig("per-case", 0.33, 0.2, (1.0, 2.0), (("a", 1.0), ("b", 2.5)))
    augment = parsed("--augment.preset", "light", "--augment.per-stage", "--augment.mirror", "label-swap",
                     "--augment.label-pairs", "1", "2", "3", "4", "--augment.left-right-axis", "2").augment
    assert augment == AugmentConfig("light", "label-swap", ((1, 2), (3, 4)), 2, True)
    reading = parsed("--threads", "4", "--loader-processes", "3", "--cache-gb", "2", "--accumulate", "auto", "--dataset-share", "0.05")
    assert (reading.threads, reading.loader_processes, reading.cache_gb, reading.accumulate) == (4, 3, 2.0, "auto")
    assert reading.curriculum.dataset_share == 0.05 and parsed("--accumulate", "3").accumulate == 3
