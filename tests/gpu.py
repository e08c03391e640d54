"""The CUDA kernels on the GPU that is here: `make test-gpu`. Every problem of the CPU's suite, in both loops, against
the float64 reference and the CPU's kernels; what only hardware shows: streams, sizes, PyTorch's tensors.

pytest collects this file where it is named, and `make test` does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import gatewise as gw
import problems
from compiler import ROOT
from problems import Problem

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_speed as gpu

LIBRARIES = {kind.name: kind for kind in (gpu.CuPy, gpu.Torch)}
if reason := gpu.missing():
    pytest.exit(f"test-gpu: {reason}", returncode=2)


@pytest.fixture(scope="session", params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> gpu.Library:
    """Each library that has the device; one is enough."""
    if reason := LIBRARIES[request.param].missing():
        pytest.skip(reason)
    return LIBRARIES[request.param]()


@pytest.fixture(scope="session")
def lends() -> gpu.Library:
    """The library whose arrays go through all problems."""
    return gpu.library()


def persists(cell: str) -> bool:
    facts = gw.cells()[cell]
    return facts["product"] and facts["middle"] == "none" and not facts["normed"]


def check(problem: Problem, library: gpu.Library, loop: str) -> bool:
    """Whether it ran, and then as it must: within the suite's bounds of the reference, twice that of the CPU's kernels,
    the same bits again."""
    try:
        found = gpu.results(problem, library, loop)
    except gpu.Refused:
        return False
    problems.check(problem, found)
    again = gpu.results(problem, library, loop)
    for name, numbers in found.items():
        assert np.array_equal(numbers, again[name], equal_nan=True), f"{problem}: {name} has other bits the second time"
    if problem.dtype == "f64":  # where the CPU's own error is small
        cpu = problems.run(problem, problems.draw(problem), "cpu")
        shape = problem.T, problem.N, problem.I, problem.H
        for name, numbers in cpu.items():
            scale = max(gpu.largest(a) for other, a in cpu.items() if other.startswith("d") == name.startswith("d"))
            bound = 2 * gw.check.bound(problem.cell, "float64", shape, name) * scale
            assert gpu.largest(numbers - found[name]) <= bound, f"{problem}: {name} is not the CPU's"
    return True


@pytest.mark.parametrize("loop", gpu.LOOPS)
@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("cell", problems.CELLS)
def test_every_problem(lends: gpu.Library, cell: str, dtype: str, loop: str) -> None:
    ran = sum(check(problem, lends, loop) for problem in problems.biting(cell, dtype))
    assert bool(ran) == (loop == "stepwise" or persists(cell))


@pytest.mark.parametrize("operands", gpu.OPERANDS[1:])
@pytest.mark.parametrize("cell", [cell for cell in problems.CELLS if persists(cell)])
def test_rounded_operands(lends: gpu.Library, cell: str, operands: str) -> None:
    """Tensor cores: the very fragments that no host has checked."""
    ran = 0
    for problem in problems.biting(cell, "f32"):
        if problem.options & (gpu.NOT_THERE | {"saturated", "zeros", "empty"}) or problem.T * problem.N == 0:
            continue
        try:
            found = gpu.results(problem, lends, "persistent", operands)
        except gpu.Refused:
            continue
        gpu.hold(problem, found, operands)
        ran += 1
    assert ran > 5


@pytest.mark.parametrize("options", ["train", "lengths,h0,reverse", "packed,h0", "infer"])
def test_every_library(library: gpu.Library, options: str) -> None:
    for cell in ("lstm", "gru"):
        assert check(Problem.parse(f"{cell}:T9,N7,I5,H40:f32:{options}"), library, "planned")


# Beyond what a grid has in one direction, beyond one batch tile, beyond what fits on chip, and as large as in use
SIZES = ["T2,N70000,I3,H5", "T3,N2,I70000,H4", "T2,N3,I5,H3000", "T40,N130,I33,H257", "T128,N64,I512,H1024"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm_norm"])
def test_large_sizes(lends: gpu.Library, cell: str, size: str) -> None:
    """Against the CPU's kernels, which the reference would take too long to check here."""
    problem = Problem.parse(f"{cell}:{size}:f32:h0")
    cpu = problems.run(problem, problems.draw(problem), "cpu")
    found = gpu.results(problem, lends)
    shape = problem.T, problem.N, problem.I, problem.H
    for name, numbers in cpu.items():
        scale = max(gpu.largest(a) for other, a in cpu.items() if other.startswith("d") == name.startswith("d"))
        bound = 2 * gw.check.bound(cell, "float32", shape, name) * scale
        assert gpu.largest(numbers - found[name]) <= bound, name


@pytest.fixture
def cupy() -> Iterator[gpu.CuPy]:
    if reason := gpu.CuPy.missing():
        pytest.skip(reason)
    yield gpu.CuPy()


def outputs(problem: Problem, inputs: problems.Inputs) -> dict[str, Any]:
    """What a training step gives back, without a look at its tape, for which the CPU would wait."""
    tape = problems.tape_of(problem, inputs, None)
    gradients = gw.backward(tape, inputs.dy, inputs.dhn, inputs.dcn)
    named = {"y": tape.y, "hn": tape.hn, "cn": tape.cn, **gradients._asdict()}
    return {name: array for name, array in named.items() if array is not None}


@pytest.mark.parametrize("loop", gpu.LOOPS)
def test_the_callers_stream(cupy: gpu.CuPy, loop: str) -> None:
    """A call waits for what its stream still does to its arguments, for nothing else, and returns before it is done."""
    problem = Problem.parse("lstm:T64,N32,I64,H128:f32:h0")
    expected = gpu.results(problem, cupy, loop)
    xp, inputs = cupy.cupy, problems.draw(problem)
    busy = xp.ones((4096, 4096), np.float32)
    with xp.cuda.Stream(non_blocking=True) as stream:
        late = cupy.placed(inputs._replace(x=np.full_like(inputs.x, np.nan)))
        x = cupy.send(inputs.x)
        stream.synchronize()
        for _ in range(50):
            busy = busy @ busy
        late.x[...] = x  # only now are they numbers
        with gpu.execution(loop):
            found = outputs(problem, late)
        assert not stream.done, "the call waited for the stream"
        stream.synchronize()
        for name, array in found.items():
            assert np.array_equal(cupy.fetch(array), expected[name]), name


def test_calls_on_several_streams_do_not_meet(cupy: gpu.CuPy) -> None:
    """Also where each wants all of the device at once."""
    problem = Problem.parse("gru:T64,N16,I32,H256:f32:h0")
    expected = gpu.results(problem, cupy, "persistent")
    streams = [cupy.cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
    given = [cupy.placed(problems.draw(problem)) for _ in streams]
    cupy.cupy.cuda.Device().synchronize()
    found = []
    with gpu.execution("persistent"):
        for stream, inputs in zip(streams, given):
            with stream:
                found.append(outputs(problem, inputs))
    for stream, results in zip(streams, found):
        stream.synchronize()
        for name, array in results.items():
            assert np.array_equal(cupy.fetch(array), expected[name]), name
