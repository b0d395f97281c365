"""A short, seeded run of benchmarks/fuzz.py: damaged files are read or refused with a sentence, never anything else."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgps_jax.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import fuzz  # noqa: E402
import fuzz_targets  # noqa: E402
from fuzz_mutations import places  # noqa: E402

sys.path.remove(str(BENCHMARKS))
TARGETS = {target.name: target for target in fuzz_targets.TARGETS}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(tmp_path, name):
    target = TARGETS[name]
    result = fuzz.fuzz(target, int(30 * target.share), seed=1, seconds=20.0, workspace=tmp_path)
    assert not result.kinds
    assert result.refused + result.accepted == result.inputs


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.damage is fuzz_targets.in_json])
def test_json_with_any_value_in_any_place_is_read_or_refused(tmp_path, name):
    target = TARGETS[name]
    path = target.make(tmp_path)[0]
    good = path.read_text()
    numbers = range(sum(1 for _ in places(json.loads(good))))

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(st.sampled_from(numbers), JSON)
    def check(place, value):
        content = json.loads(good)
        holder, key = list(places(content))[place]
        holder[key] = value
        path.write_text(json.dumps(content))
        try:
            target.read(path)
        except InputError as error:
            str(error).encode()

    check()


def test_the_fuzzer_sees_other_exceptions_endless_loops_and_strangers_files(tmp_path):
    def breaks(path: Path) -> None:
        raise KeyError("x")

    def hangs(path: Path) -> None:
        while True:
            pass

    good = TARGETS["schedule.json"]
    for read, words in ((breaks, "KeyError"), (hangs, "TooSlow")):
        first = iter([True])
        target = good._replace(read=lambda path, read=read, first=first: None if next(first, False) else read(path))
        kinds = fuzz.fuzz(target, 2, seed=0, seconds=0.05, workspace=tmp_path).kinds
        assert sum(kinds.values()) == 2 and all(words in kind for kind in kinds)
    guard = fuzz.Guard(tmp_path)
    (tmp_path.parent / "elsewhere").write_text("")
    with fuzz.watching(guard):
        (tmp_path / "within").write_text("")
        (tmp_path.parent / "elsewhere").read_text()
    assert [event.split("/")[-1] for event in guard.seen] == ["elsewhere"]
