"""Each cell's backward is the derivative of its own forward, and each arch keeps its code to itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import gatewise as gw

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
ARCH_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
    "neon": [],
}


def run(*command: str | Path) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def compile_cells(include: Path, program: Path) -> dict[str, float]:
    assert COMPILER, "no C++ compiler on PATH, though one built the package; set CXX"
    run(COMPILER, "-std=c++17", "-O1", f"-I{include}", ROOT / "tests/cells.cpp", "-o", program)
    return {name: float(error) for name, error in map(str.split, run(program).splitlines())}


def test_backward_is_the_derivative_of_forward(tmp_path: Path) -> None:
    errors = compile_cells(ROOT / "cpp/include", tmp_path / "cells")
    assert set(errors) == set(gw.cells())
    # Values are of order 10 and the chains a dozen operations long: a few dozen roundings of 2^-53.
    assert all(error <= 1e-14 for error in errors.values()), errors


MUTATIONS = [
    ("rnn_tanh", "dgx[0] = d.h * d_tanh(saved[0])", "dgx[0] = d.h * d_sigmoid(saved[0])"),
    ("rnn_relu", "dgx[0] = d.h * d_relu(saved[0])", "dgx[0] = d.h"),
    ("lstm", "const V dc = d.c + d.h * o * d_tanh(tanh_c)", "const V dc = d.c + d.h * o"),
    ("lstm", "dgx[0] = dc * g * d_sigmoid(i)", "dgx[0] = dc * i * d_sigmoid(i)"),
    ("lstm", "dgx[1] = dc * prev.c * d_sigmoid(f)", "dgx[1] = dc * next.c * d_sigmoid(f)"),
    ("lstm", "dgx[2] = dc * i * d_tanh(g)", "dgx[2] = dc * i * d_sigmoid(g)"),
    ("lstm", "dgx[3] = d.h * tanh_c * d_sigmoid(o)", "dgx[3] = d.h * next.c * d_sigmoid(o)"),
    ("lstm", "return {V(0), dc * f}", "return {V(0), dc}"),
    ("gru", "const V dn = d.h * (V(1) - z) * d_tanh(n)", "const V dn = d.h * z * d_tanh(n)"),
    ("gru", "dgx[0] = dn * gh_n * d_sigmoid(r)", "dgx[0] = dn * d_sigmoid(r)"),
    ("gru", "dgx[1] = d.h * (prev.h - n) * d_sigmoid(z)", "dgx[1] = d.h * (n - prev.h) * d_sigmoid(z)"),
    ("gru", "dgx[2] = dn;", "dgx[2] = dn * r;"),
    ("gru", "dgh[2] = dn * r", "dgh[2] = dn"),
    ("gru", "return {d.h * z, V(0)}", "return {V(0), V(0)}"),
]


@pytest.mark.parametrize(("cell", "right", "wrong"), MUTATIONS, ids=[f"{m[0]}:{m[1][:20]}" for m in MUTATIONS])
def test_a_wrong_line_in_a_backward_is_seen(tmp_path: Path, cell: str, right: str, wrong: str) -> None:
    """Every line of every backward, made wrong one at a time: the check above would not have passed."""
    shutil.copytree(ROOT / "cpp/include", tmp_path / "include")
    header = tmp_path / "include/gatewise/cells.hpp"
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    errors = compile_cells(tmp_path / "include", tmp_path / "cells")
    assert [name for name, error in errors.items() if not error <= 1e-14] == [cell]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kernels.cpp for every arch of this package, unoptimised: what inlining would hide is there to be seen."""
    folder = tmp_path_factory.mktemp("objects")
    assert COMPILER
    for arch, _ in gw._core.archs:
        run(
            COMPILER, "-std=c++17", "-O1", "-fno-inline-functions", f"-DGATEWISE_ARCH={arch}", *ARCH_FLAGS[arch],
            f"-I{ROOT / 'cpp/include'}", "-c", ROOT / "cpp/cpu/kernels.cpp", "-o", folder / f"{arch}.o",
        )  # fmt: skip
    return {arch: folder / f"{arch}.o" for arch, _ in gw._core.archs}


def test_an_arch_exports_its_table_and_nothing_else(objects: dict[str, Path]) -> None:
    """Otherwise the linker may keep one arch's copy of a shared function, and another CPU dies of it."""
    for arch, path in objects.items():
        symbols = [line.split()[-2:] for line in run("nm", "-C", "--defined-only", "--extern-only", path).splitlines()]
        # a personality reference is data of the compiler's own, the same in every object
        names = [name for kind, name in symbols if not name.startswith("DW.ref.")]
        assert names == [f"gatewise::{arch}::kernels"]
