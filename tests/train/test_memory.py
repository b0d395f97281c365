"""Batch sizes from compiled programs and a budget, without executing anything."""

import math
import types

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgps_jax.curriculum import Stage
from pgps_jax.errors import InputError
from pgps_jax.host_memory import gib
from pgps_jax.train.memory import (
    MOST_COMPILES,
    choose_batch_size,
    device_budget,
    is_out_of_memory,
    program_bytes,
    share_of_dataset,
)

STAGE = Stage(0, (8, 8, 8), 2)


class Compiled(jax.stages.Compiled):
    """A program of which only the size is known."""

    def __init__(self, total):
        self.total = total

    def memory_analysis(self):
        return types.SimpleNamespace(argument_size_in_bytes=self.total, output_size_in_bytes=7, alias_size_in_bytes=7,
                                     temp_size_in_bytes=0, generated_code_size_in_bytes=0)


def compile_convolution(batch):
    def step(kernel, x):
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), [(1, 1)] * 3,
                                         dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))
        return kernel - jnp.tanh(y).sum() * kernel

    kernel = jax.ShapeDtypeStruct((3, 3, 3, 1, 4), jnp.float32)
    x = jax.ShapeDtypeStruct((batch, 8, 8, 8, 1), jnp.float32)
    return jax.jit(step, donate_argnums=0).lower(kernel, x).compile()


def test_program_bytes_count_arguments_outputs_and_temporaries_and_donated_memory_once():
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)

    def plus_one(x):
        return x + 1

    kept, donated = (program_bytes(jax.jit(plus_one, donate_argnums=d).lower(x).compile()) for d in ((), (0,)))
    assert 8000 <= kept < 9000 + donated - 4000
    assert kept - donated == 4000
    bytes_of = [program_bytes(compile_convolution(batch)) for batch in (2, 4)]
    activations = 2 * 8**3 * 4 * 4  # of two more patches, 4 channels of float32
    assert bytes_of[1] - bytes_of[0] >= activations


def test_the_largest_batch_of_a_real_program_is_found_by_compiling_three_times():
    tried = []

    def compile_at(batch):
        tried.append(batch)
        return compile_convolution(batch)

    budget = program_bytes(compile_convolution(23)) + 1
    choice = choose_batch_size(compile_at, STAGE, budget, elements_per_patch=8**3 * 4)
    assert choice.program_bytes <= budget and 22 <= choice.batch_size <= 23
    assert tried[:2] == [2, 4] and len(tried) <= 3
    assert f"patch 8x8x8: batch {choice.batch_size} needs" in choice.reason and "(tried 3, first 2)" in choice.reason


@settings(deadline=None)
@given(fixed=st.integers(0, 10**9), slope=st.integers(1, 10**6), bend=st.floats(1, 1.2), budget=st.integers(1, 10**10),
       devices=st.sampled_from([1, 2, 8]), planned=st.integers(1, 20), oom=st.booleans())
def test_the_choice_was_compiled_fits_and_is_the_largest_on_a_line(fixed, slope, bend, budget, devices, planned, oom):
    tried = []

    def needs(batch):
        return int(fixed + slope * batch ** bend)

    def compile_at(batch):
        tried.append(batch)
        if oom and needs(batch) > budget:  # as XLA itself does on a TPU
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm")
        return Compiled(needs(batch))

    stage = Stage(0, (8, 8, 8), planned)
    try:
        choice = choose_batch_size(compile_at, stage, budget, elements_per_patch=8**3 * 32, multiple_of=devices)
    except InputError:
        assert needs(devices) > budget and min(tried) == devices
        return
    assert choice.batch_size in tried and choice.batch_size % devices == 0
    assert choice.program_bytes == needs(choice.batch_size) <= budget
    assert choice.batch_size / devices * 8**3 * 32 < 2**31
    assert len(tried) == len(set(tried)) <= MOST_COMPILES + 5
    if bend == 1 and not oom:
        ceiling = (2**31 - 1) * devices // (8**3 * 32) // devices * devices
        best = min(ceiling, (budget - fixed) // slope // devices * devices)
        assert best / 1.03 - devices <= choice.batch_size <= best


def test_limits_other_than_memory_are_named():
    roomy = dict(compile_at=lambda batch: Compiled(batch), stage=STAGE, budget_bytes=10**12)
    by_size = choose_batch_size(**roomy, elements_per_patch=32 * 128**3)
    assert by_size.batch_size == 31 and "limited by 2^31 elements per tensor" in by_size.reason
    by_caller = choose_batch_size(**roomy, elements_per_patch=1, max_batch=12)
    assert by_caller.batch_size == 12 and "limited by its upper limit" in by_caller.reason


def test_what_a_batch_needs_outside_of_the_program_counts():
    def choose(outside):
        return choose_batch_size(lambda batch: Compiled(100 * batch), STAGE, 10_000, elements_per_patch=1, outside=outside).batch_size

    assert choose(lambda batch: 0) == 100
    assert choose(lambda batch: 25 * batch) == 80
    assert choose(lambda batch: 5000 + 25 * batch) == 40


def test_a_patch_that_does_not_fit_at_all_is_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"8x8x8: even a batch of 1 needs 1\.00 GiB, and 1\.0 MiB are free; use fewer"):
        choose_batch_size(lambda batch: Compiled(batch * 2**30), STAGE, 2**20, elements_per_patch=1)


def test_an_error_that_is_not_about_memory_comes_through():
    def broken(batch):
        raise ValueError("shapes do not match")

    with pytest.raises(ValueError, match="shapes"):
        choose_batch_size(broken, STAGE, 2**20, elements_per_patch=1)


def test_out_of_memory_is_recognised_also_as_a_cause():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")
    assert is_out_of_memory(error) and is_out_of_memory(MemoryError())
    try:
        raise RuntimeError("stage 3") from error
    except RuntimeError as outer:
        assert is_out_of_memory(outer)
    assert not is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED"))  # not the device's own error
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INVALID_ARGUMENT"))


def test_the_budget_of_accelerators_is_that_of_the_fullest_one():
    devices = [dict(bytes_limit=1000, bytes_in_use=100), dict(bytes_limit=1000, bytes_in_use=300)]
    assert device_budget(0.9, devices) == 600
    assert device_budget(0.1, devices) == 0


def test_cpu_devices_share_what_the_machine_has_left():
    whole, half = device_budget(0.5, [None]), device_budget(0.5, [None, None])
    assert 2**20 < half < whole
    assert half == pytest.approx(whole / 2, rel=0.2)


def test_the_share_of_dataset():
    assert share_of_dataset(260 * 36 * 50 * 35, (40, 56, 40)) == 9
    assert share_of_dataset(1000, (128, 128, 128)) == 2
    assert share_of_dataset(10**9, (10, 10, 10)) == 50_000


def test_an_accelerator_that_tells_no_limit_has_an_unknown_one_not_that_of_the_host():
    assert device_budget(0.9, [None], "tpu") == device_budget(0.9, [{"bytes_in_use": 5}], "gpu") == math.inf
    assert device_budget(0.9, [None, dict(bytes_limit=1000, bytes_in_use=100)], "gpu") == 800
    assert gib(device_budget(0.9, [None], "tpu")) == "an unknown amount"
