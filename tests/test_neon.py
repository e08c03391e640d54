"""The NEON kernels without an ARM machine: built by a cross compiler, run under qemu, compared with this machine's.

What an emulator can show is that they compute the right numbers, not how fast, nor that the threads' barriers hold
under an ARM CPU's weaker order of memory accesses: qemu's threads run in this machine's order.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import gatewise as gw
from compiler import ARCHS, built_kernels, compile_kernels, compile_program, run
from problems import DTYPES, Problem, fits

CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CROSS_ARCHS = ["neon", "generic"]

pytestmark = [
    pytest.mark.skipif("neon" in ARCHS, reason="this machine runs NEON itself: the other tests test it"),
    pytest.mark.skipif(not CROSS, reason="aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(not QEMU, reason="qemu-aarch64 is not installed (Debian: qemu-user)"),
]

SHAPES = [
    *("T7,N5,I6,H9:{}:h0", "T6,N9,I3,H33:{}:lengths,reverse,h0", "T1,N1,I2,H8:{}:nobias", "T9,N17,I20,H40:{}:train"),
    *("T9,N4,I3,H20:{}:h0,reset,zoneout,states", "T9,N4,I3,H20:{}:lengths,reset,mask,clip,project,checkpoints"),
]
PROBLEMS = [
    f"{cell}:{shape.format(dtype)}"
    for cell in gw.cells()
    for shape in SHAPES
    for dtype in ("f32", "f64")
    if fits(cell, shape.split(":")[-1].split(","))
]

Results = dict[tuple[str, str], dict[str, np.ndarray]]  # of (arch, problem): of a name: its numbers


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The command that runs tests/kernels.cpp with the cross-built kernels. Static: qemu needs no ARM libraries."""
    folder = tmp_path_factory.mktemp("neon")
    strict = ["-Wall", "-Wextra", "-Werror"]
    with ThreadPoolExecutor() as pool:
        objects = list(
            pool.map(lambda arch: compile_kernels(arch, folder, "-O2", *strict, compiler=CROSS), CROSS_ARCHS)
        )
    program = compile_program("tests/kernels.cpp", objects, CROSS_ARCHS, folder / "kernels", "-O1", "-static", *strict,
                              compiler=CROSS)  # fmt: skip
    return [QEMU, program]


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    folder = tmp_path_factory.mktemp("native")
    return [compile_program("tests/kernels.cpp", built_kernels(folder), ARCHS, folder / "kernels", "-O1")]


def results(command: list[str | Path]) -> Results:
    found: Results = {}
    for line in run(*command, "--results", *PROBLEMS).splitlines():
        arch, problem, name, *values = line.split()
        if not values:
            continue  # a cell that has no such result
        found.setdefault((arch, problem), {})[name] = np.array(values, float)
    return found


def faults(here: Results, there: Results) -> Iterator[str]:
    """Where two machines' results differ by more than both may err: each of them is within `bound` of the truth."""
    for (arch, problem), got in there.items():
        p = Problem.parse(problem)
        for (native_arch, native_problem), want in here.items():
            if native_problem != problem:
                continue
            sums = max(
                np.abs(want[name]).max() for name in gw.check.SUMS if name in want
            )  # which share a scale; see there
            for name in want:
                error = gw.check.relative_error(got[name], want[name], sums if name in gw.check.SUMS else None)
                bound = 2 * gw.check.bound(p.cell, DTYPES[p.dtype], (p.T, p.N, p.I, p.H), name)
                if not error <= bound:
                    yield f"{problem} {name}: {arch} is {error:.1e} from {native_arch}, not within {bound:.1e}"


def test_every_result_is_that_of_this_machine(native: list[str | Path], emulated: list[str | Path]) -> None:
    here, there = results(native), results(emulated)
    assert set(there) == {(arch, problem) for arch in CROSS_ARCHS for problem in PROBLEMS}
    assert {problem for _, problem in here} == set(PROBLEMS)
    assert not list(faults(here, there))
    # And a wrong digit near the last would have been seen, in any result and either dtype
    for problem in PROBLEMS:
        for name, want in there["neon", problem].items():
            if want.any():
                wrong = want * (1 + 1e-3 if ":f32:" in problem else 1 + 1e-11)
                assert list(faults(here, {("neon", problem): {**there["neon", problem], name: wrong}})), (problem, name)


def test_any_number_of_threads_gives_the_same_bits(emulated: list[str | Path]) -> None:
    printed = run(*emulated, "neon").strip()  # generic is the same code on this CPU, and emulation is slow
    assert printed.endswith(" problems") and printed != "0 problems"


def test_exp_tanh_and_sigmoid_are_within_two_ulp(monkeypatch: pytest.MonkeyPatch, emulated: list[str | Path]) -> None:
    """The judge is `gatewise check`'s own; only who evaluates changes."""

    def evaluate(name: str, x: np.ndarray, arch: str) -> np.ndarray:
        words = [*emulated, "--evaluate", arch, name, f"f{8 * x.itemsize}"]
        output = subprocess.run(words, input=x.tobytes(), capture_output=True, check=True, timeout=300).stdout
        return np.frombuffer(output, x.dtype)

    monkeypatch.setattr(gw.check._core, "evaluate", evaluate)
    rows = list(gw.check.functions(CROSS_ARCHS))
    assert len(rows) == 6 * len(CROSS_ARCHS)
    assert not [row for row in rows if not row.ok]
