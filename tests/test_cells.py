"""Each cell's backward is the derivative of its own forward, and each arch keeps its code to itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import gatewise as gw
from compiler import ARCHS, INCLUDE, ROOT, compile, compile_kernels, run


def errors_of_cells(include: Path, folder: Path) -> dict[str, float]:
    compile("-O1", ROOT / "tests/cells.cpp", "-o", folder / "cells", include=include)
    return {name: float(error) for name, error in map(str.split, run(folder / "cells").splitlines())}


def test_backward_is_the_derivative_of_forward(tmp_path: Path) -> None:
    errors = errors_of_cells(INCLUDE, tmp_path)
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
    shutil.copytree(INCLUDE, tmp_path / "include")
    header = tmp_path / "include/gatewise/cells.hpp"
    text = header.read_text()
    assert text.count(right) == 1
    header.write_text(text.replace(right, wrong))
    errors = errors_of_cells(tmp_path / "include", tmp_path)
    assert [name for name, error in errors.items() if not error <= 1e-14] == [cell]


@pytest.mark.parametrize("arch", ARCHS)
def test_an_arch_exports_its_table_and_nothing_else(arch: str, tmp_path: Path) -> None:
    """Otherwise the linker may keep one arch's copy of a shared function, and another CPU dies of it."""
    # Without inlining: what it would hide is there to be seen.
    path = compile_kernels(arch, tmp_path, "-O1", "-fno-inline-functions")
    lines = run("nm", "-C", "--defined-only", "--extern-only", path).splitlines()
    # a personality reference is data of the compiler's own, the same in every object
    names = [name for name in (line.split()[-1] for line in lines) if not name.startswith("DW.ref.")]
    assert names == [f"gatewise::{arch}::kernels"]
