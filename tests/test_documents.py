"""Configs, notebooks and the README speak of things that exist."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import tyro

from pgps_jax.commands import Command
from pgps_jax.config import RunConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_opens_with_command_hardware_duration_and_expected_dice(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module.CONFIG, RunConfig)
    for word in ("Command:", "Hardware:", "Duration:", "Dice"):
        assert word in module.__doc__, word
    assert f"configs/{path.name}" in module.__doc__


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_holds_valid_python_and_no_outputs(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert not cell["outputs"]
        for node in ast.walk(ast.parse("".join(line for line in cell["source"] if line[0] not in "!%"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("pgps_jax"):
                assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_leaves_the_device_to_the_trainings_that_it_starts(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not any("import jax" in line and line[0] != "!" for line in cell["source"])


def command_lines():
    """Every `pgps_jax.main` command line in README, BUILD and notebooks, up to the first thing that is no word of it."""
    texts = [(path.name, path.read_text()) for path in (ROOT / "README.md", ROOT / "BUILD.md")]
    texts += [(path.name, "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])) for path in NOTEBOOKS]
    return [(name, line.split()) for name, text in texts for line in re.findall(r"pgps_jax\.main ([^\n`|]+)", text)]


@pytest.mark.parametrize("name, words", command_lines())
def test_a_command_that_is_written_down_is_understood(name, words):
    tyro.cli(Command, args=[word for word in words if word != "--help"] if words != ["--help"] else ["demo"],
             config=(tyro.conf.OmitSubcommandPrefixes,))


def test_the_readme_names_only_files_that_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
