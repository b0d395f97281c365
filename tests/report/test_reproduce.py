"""The command that `reproduce` prints is parsed back to the same config, whatever the flags."""

import dataclasses
import shlex
from pathlib import Path

import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgps_jax.commands import Command
from pgps_jax.config import RunConfig, from_json, to_json
from pgps_jax.report.reproduce import command_line

DEFAULT = RunConfig(Path("data"))
NAMES = st.text(st.characters(categories=["L", "N", "Zs"], include_characters="-_'\"$"), min_size=1).filter(
    lambda s: not s.startswith("-") and s.strip() == s)


def parsed(line: str) -> RunConfig:
    command = tyro.cli(Command, args=shlex.split(line)[1:], config=(tyro.conf.OmitSubcommandPrefixes,))
    return RunConfig(**{f.name: getattr(command, f.name) for f in dataclasses.fields(RunConfig)})


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_printed_command_gives_the_same_config_back(data):
    def draw(value, **choices):
        return dataclasses.replace(value, **{name: data.draw(strategy, name) for name, strategy in choices.items()})

    numbers = st.floats(0.001, 1000)
    config = draw(
        DEFAULT, dataset=NAMES.map(Path), workspace=NAMES.map(Path), name=st.none() | NAMES, fold=st.integers(0, 4) | st.just("all"),
        max_hours=st.none() | numbers, mirror_tta=st.booleans(), deterministic=st.booleans(), seed=st.integers(0, 2**31),
        batch_size=st.none() | st.integers(1, 99), keep_checkpoints=st.integers(1, 9))
    weights = st.lists(st.tuples(NAMES, numbers), max_size=3).map(tuple)
    config = dataclasses.replace(
        config, sampling=draw(config.sampling, case_weights=weights, class_weights=st.lists(numbers, max_size=3).map(tuple)),
        curriculum=draw(config.curriculum, mode=st.sampled_from(["efficiency", "performance", "constant", "rpss"])),
        augment=draw(config.augment, preset=st.sampled_from(["default", "light"]), per_stage=st.booleans()),
        network=draw(config.network, base_features=st.none() | st.integers(1, 99), remat=st.booleans()))
    assert parsed(command_line(config)) == config


def test_defaults_are_not_printed_and_neither_is_starting_over():
    assert command_line(dataclasses.replace(DEFAULT, fresh=True)) == "pgps-jax run data"
    assert command_line(DEFAULT, "train") == "pgps-jax train data"


def test_an_experiment_comes_back_from_its_stored_config():
    config = dataclasses.replace(DEFAULT, epochs=7, augment=dataclasses.replace(DEFAULT.augment, mirror="none"))
    stored = from_json(RunConfig, to_json(config), "config.json")
    assert command_line(stored) == "pgps-jax run data --epochs 7 --augment.mirror none"
