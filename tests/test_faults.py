"""Every fault in docs/faults.md is still said, in a sentence, and the document has them all."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import faults  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("fault", faults.FAULTS, ids=[fault.what for fault in faults.FAULTS])
def test_the_fault_is_said_in_a_sentence(tmp_path, fault):
    text = faults.seen(fault, tmp_path)
    assert len(text.split()) > 5 and len(text) < 600 and text.isprintable()


def test_the_document_has_every_fault_and_every_limit():
    text = faults.DOCUMENT.read_text()
    assert all(f"| {fault.what} |" in text for fault in faults.FAULTS) and faults.LIMITS in text
