"""Each cell's backward is the derivative of its own forward, and each arch keeps its code to itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
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


def wrong_headers() -> Iterator[tuple[str, str, str]]:
    """(cell, line, cells.hpp with that line wrong): each value that a backward computes or returns, off by one."""
    header = (INCLUDE / "gatewise/cells.hpp").read_text()
    statement = re.compile(r"^ +(?:(const V \w+|dg[xh]\[\d\]) = ([^=;]+)|return ({[^;]+}));", re.M)
    for cell in re.finditer(r'^struct [^}]* name = "(\w+)".*?^};', header, re.M | re.S):
        name = cell[1]
        for line in statement.finditer(header, header.index(" backward(", cell.start()), cell.end()):
            target, value, returned = line.groups()
            wrongs = [f"{target} = {value} + V(1);"] if target else []
            if returned:
                parts = "hc" if gw.cells()[name]["has_c"] else "h"
                wrongs = [f"State<V> s{returned}; s.{p} = s.{p} + V(1); return s;" for p in parts]
            for wrong in wrongs:
                yield name, wrong, header[: line.start()] + wrong + header[line.end() :]


WRONG = list(wrong_headers())


@pytest.mark.parametrize(("cell", "header"), [(c, h) for c, _, h in WRONG], ids=[f"{c}:{w}" for c, w, _ in WRONG])
def test_a_wrong_line_in_a_backward_is_seen(tmp_path: Path, cell: str, header: str) -> None:
    """Every line of every backward, made wrong one at a time: the check above would not have passed."""
    shutil.copytree(INCLUDE, tmp_path / "include")
    (tmp_path / "include/gatewise/cells.hpp").write_text(header)
    errors = errors_of_cells(tmp_path / "include", tmp_path)
    assert [name for name, error in errors.items() if not error <= 1e-14] == [cell]


def test_no_backward_is_left_out() -> None:
    """Each has its gradients of gx, one a gate, and what it returns."""
    for cell, facts in gw.cells().items():
        assert sum(name == cell for name, _, _ in WRONG) > facts["G"]


@pytest.mark.parametrize("arch", ARCHS)
def test_an_arch_exports_its_table_and_nothing_else(arch: str, tmp_path: Path) -> None:
    """Otherwise the linker may keep one arch's copy of a shared function, and another CPU dies of it."""
    # Without inlining: what it would hide is there to be seen.
    path = compile_kernels(arch, tmp_path, "-O1", "-fno-inline-functions")
    lines = run("nm", "-C", "--defined-only", "--extern-only", path).splitlines()
    # a personality reference is data of the compiler's own, the same in every object
    names = [name for name in (line.split()[-1] for line in lines) if not name.startswith("DW.ref.")]
    assert names == [f"gatewise::{arch}::kernels"]
