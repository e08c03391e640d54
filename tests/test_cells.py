"""Each cell's backward is the derivative of its own forward, and each arch keeps its code to itself."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import gatewise as gw
from compiler import ARCHS, INCLUDE, ROOT, compile, compile_kernels, run

# Values are of order 10 and the chains a dozen operations long: a few dozen roundings of 2^-53.
BOUND = 1e-14


def errors_of_cells(include: Path, folder: Path) -> dict[str, float]:
    compile("-O1", ROOT / "tests/cells.cpp", "-o", folder / "cells", include=include)
    return {name: float(error) for name, error in map(str.split, run(folder / "cells").splitlines())}


def test_backward_is_the_derivative_of_forward(tmp_path: Path) -> None:
    errors = errors_of_cells(INCLUDE, tmp_path)
    assert set(errors) == set(gw.cells())
    assert all(error <= BOUND for error in errors.values()), errors


HEADER = (INCLUDE / "gatewise/cells.hpp").read_text()


def wrong_lines() -> Iterator[tuple[str, slice, str]]:
    """(cell, place in cells.hpp, what to put there): each value that a backward computes or returns, off by one."""
    statement = re.compile(r"^ +(?:(const V \w+|d(?:g[xh]|w)\[[^]]+\]) = ([^=;]+)|return ({[^;]+}));", re.M)
    for cell in re.finditer(r'^struct [^}]* name = "(\w+)".*?^};', HEADER, re.M | re.S):
        backward = HEADER.index(" backward(", cell.start())
        d_output = HEADER.find(" d_output(", cell.start(), backward)
        for line in statement.finditer(HEADER, backward if d_output < 0 else d_output, cell.end()):
            target, value, returned = line.groups()
            place = slice(line.start(), line.end())
            if target:
                yield cell[1], place, f"{target} = {value} + V(1);"
            elif line.start() < backward:
                for part in ("middle", "prev_h"):
                    yield cell[1], place, f"Staged<V> s{returned}; s.{part} = s.{part} + V(1); return s;"
            else:
                for part in "hc" if gw.cells()[cell[1]]["has_c"] else "h":
                    yield cell[1], place, f"State<V> s{returned}; s.{part} = s.{part} + V(1); return s;"


WRONG: dict[str, list[tuple[slice, str]]] = {}
for cell, place, text in wrong_lines():
    WRONG.setdefault(cell, []).append((place, text))


@pytest.mark.parametrize("k", range(max(map(len, WRONG.values()))))
def test_a_wrong_line_in_a_backward_is_seen(tmp_path: Path, k: int) -> None:
    """The k-th line of every cell's backward, made wrong: the check above would have passed none of these cells."""
    wrong = {cell: lines[k] for cell, lines in WRONG.items() if k < len(lines)}
    header = HEADER
    for place, text in sorted(wrong.values(), key=lambda line: -line[0].start):
        header = header[: place.start] + text + header[place.stop :]
    shutil.copytree(INCLUDE, tmp_path / "include")
    (tmp_path / "include/gatewise/cells.hpp").write_text(header)
    errors = errors_of_cells(tmp_path / "include", tmp_path)
    assert {name for name, error in errors.items() if not error <= BOUND} == {*wrong}


def test_no_backward_is_left_out() -> None:
    """Each has its gradients of gx, one a gate or one for all, and what it returns."""
    for cell, facts in gw.cells().items():
        assert len(WRONG[cell]) > (facts["U"] > 0 if facts["normed"] else facts["G"])


@pytest.mark.parametrize("arch", ARCHS)
def test_an_arch_exports_its_table_and_nothing_else(arch: str, tmp_path: Path) -> None:
    """Otherwise the linker may keep one arch's copy of a shared function, and another CPU dies of it."""
    # Without inlining: what it would hide is there to be seen. A cell with a projection and one of each stage.
    cells = "-DGATEWISE_CELLS=Lstm,GruResetBefore,LstmNorm"
    path = compile_kernels(arch, tmp_path, "-O1", "-fno-inline-functions", cells)
    lines = run("nm", "-C", "--defined-only", "--extern-only", path).splitlines()
    # a personality reference is data of the compiler's own, the same in every object
    names = [name for name in (line.split()[-1] for line in lines) if not name.startswith("DW.ref.")]
    assert names == [f"gatewise::{arch}::kernels"]
