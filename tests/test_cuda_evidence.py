"""What the CUDA kernels take of a GPU, as nvcc compiles them: no warning, no spill, no stack, and registers that let
every launch run. All kernels on all targets are in benchmarks/results/cuda_kernels.csv, by `make cuda-evidence`; one
cell's are compiled here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import gatewise as gw
from compiler import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_evidence as evidence
import cuda_page
import cuda_plan

from gatewise import bench
from gatewise.problems import Problem, draw

needs_nvcc = pytest.mark.skipif(evidence.tool("nvcc") is None, reason="no nvcc on PATH")
TABLE = evidence.read(evidence.RESULTS / "cuda_kernels.csv")
CELL = "RnnTanh"  # compiled in the tests: the quickest with a persistent loop
UNWANTED = "stack", "spill_stores", "spill_loads"


def check(rows: Iterable[evidence.Row]) -> None:
    for row in rows:
        assert not any(int(row[name]) for name in UNWANTED), row
        # A block of so many threads can be launched: a multiprocessor has 65536 registers, dealt out in eights
        most, registers = int(row["most_threads"] or 128), -(-int(row["registers"]) // 8) * 8
        assert registers <= 255 + 1 and most * registers <= 65536, row


def test_every_kernel_on_every_target_keeps_its_registers() -> None:
    check(TABLE)
    assert {row["target"] for row in TABLE} == {f"sm_{target}" for target in evidence.TARGETS}
    names = {target: [row["kernel"] for row in TABLE if row["target"] == f"sm_{target}"] for target in evidence.TARGETS}
    for target in evidence.TARGETS:
        assert sorted(names[target]) == sorted(set(names["75"])), f"sm_{target} has other kernels, or one twice"
    for dtype in ("f32", "f64"):
        with_cell = {row["cell"] for row in TABLE if row["dtype"] == dtype}
        assert with_cell - {""} == set(gw.cells())
    assert all(row["dtype"] for row in TABLE if row["cell"])  # what orders rows has neither


def test_every_launch_has_a_block_on_every_card() -> None:
    rows = evidence.read(evidence.RESULTS / "cuda_occupancy.csv")
    assert {row["cell"] for row in rows} - {""} == set(gw.cells())
    assert {row["card"] for row in rows} == set(cuda_plan.SHEETS)
    registers = {(row["kernel"], row["target"]): row["registers"] for row in TABLE}
    for row in rows:
        assert int(row["blocks"]) >= 1 and 0 < float(row["occupancy"]) <= 1, row
        assert row["registers"] in {registers[row["kernel"], f"sm_{target}"] for target in evidence.TARGETS}


@needs_nvcc
def test_what_nvcc_makes_now(tmp_path: Path) -> None:
    """One cell's layer for one target; where the table is of this source and this compiler, these are its rows."""
    now = {row["kernel"]: row for _, row in evidence.kernels("90a", tmp_path, f"-DGATEWISE_CELLS={CELL}")}
    check(now.values())
    assert {row["cell"] for row in now.values()} == {"", evidence.cells()[CELL.lower()]}
    if {(row["source"], row["nvcc"]) for row in TABLE} == {(evidence.fingerprint(), evidence.compiler())}:
        table = {row["kernel"]: row for row in TABLE if row["target"] == "sm_90a"}
        for kernel, row in now.items():
            assert {name: str(value) for name, value in row.items()} == {name: table[kernel][name] for name in row}


# A kernel of 64 sums a thread, more than the 32 registers that each of 2 x 1024 threads can have
SOURCE = """
extern "C" __global__ void __launch_bounds__({bounds}) sums(const float* a, float* b, int n) {{
  float sum[64] = {{}};
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = fmaf(a[k * 64 + i], a[k], sum[i]);
#pragma unroll
  for (int i = 0; i < 64; ++i) b[threadIdx.x * 64 + i] = sum[i];
  {planted}
}}
"""
PLANTED = {
    "a spill": ("1024, 2", "", "[Ss]pill"),
    "an array on the stack": ("256", "float local[64]; for (int i = 0; i < n; ++i) local[a[i] > 0 ? i : 0] = a[i];"
                                     "for (int i = 0; i < n; ++i) b[i] = local[int(a[i])];", "Local memory"),
    "a variable that nobody reads": ("256", "int unused;", "never referenced"),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_seen(tmp_path: Path, planted: str) -> None:
    bounds, text, words = PLANTED[planted]
    source = tmp_path / "sums.cu"
    source.write_text(SOURCE.format(bounds=bounds, planted=text))
    with pytest.raises(evidence.Failed, match=words):
        evidence.compile("80", tmp_path, source=source)


@needs_nvcc
def test_a_kernel_is_read_as_the_compiler_says(tmp_path: Path) -> None:
    source = tmp_path / "sums.cu"
    source.write_text(SOURCE.format(bounds=256, planted=""))
    ((name, row),) = evidence.kernels("80", tmp_path, source=source)
    assert name == "sums" and row["most_threads"] == 256 and row["registers"] > 64 and row["static_shared"] == 0
    if evidence.tool("nvdisasm"):
        assert row["FFMA"] % 64 == 0 < row["FFMA"] and row["STG"] == 64 and row["BAR"] == row["DFMA"] == 0
        assert row["instructions"] > row["FFMA"] + row["STG"] + row["LDG"]
    with pytest.raises(AssertionError):
        check([row | {"spill_loads": 4}])
    with pytest.raises(AssertionError):
        check([row | {"registers": 136, "most_threads": 512}])


def test_names_are_a_readers() -> None:
    mangled = "_ZN8gatewise4cuda12cell_forwardINS_6scalar4LstmEfEEvNS0_11ForwardStepIT0_EE"
    assert evidence.demangled([mangled, "sums"]) == ["cell_forward<Lstm, float>", "sums"]
    assert evidence.of_name("cell_forward<Lstm, float>") == {
        "kernel": "cell_forward<Lstm, float>", "cell": "lstm", "dtype": "f32"}  # fmt: skip
    assert evidence.of_name("multiply<double, Tile<8, 4, 4, 2, 2>, true, true>")["cell"] == ""


def test_launches_are_recorded_and_not_run() -> None:
    """A stepwise step is the same launches each time; forward's cell and backward's run once for each step."""
    few, more = (evidence.launches(Problem.parse(f"gru:T{T},N5,I3,H40:f32:infer")) for T in (2, 5))

    def count(calls: list[evidence.Launch], word: str) -> int:
        return sum(word in call.kernel for call in calls)

    assert count(few, "cell_forward") == 2 and count(more, "cell_forward") == 5
    trained = evidence.launches(Problem.parse("gru:T3,N5,I3,H40:f64:train"))
    assert count(trained, "cell_backward") == count(trained, "cell_forward") == 3
    assert all(call.threads > 0 and min(call.grid) > 0 for call in trained)
    # The runtime runs kernels again: results are no longer the NaNs that they were filled with
    import test_cuda_kernels as layer

    problem = Problem.parse("gru:T2,N2,I2,H3:f64:train")
    found = layer.run(evidence.driver(), problem, draw(problem))
    assert all(np.isfinite(numbers).all() for numbers in found.values())


def test_the_roofline_counts_what_the_benchmarks_count() -> None:
    """Operations of a step, forward and backward, are those of a problem by bench.flops; more bytes take more time."""
    for cell in ("lstm", "gru"):
        problem = Problem.parse(f"{cell}:T1,N32,I256,H256:f32:train")
        both = [cuda_plan.step("H100 SXM", cell, "f32", 32, 256, backward) for backward in (False, True)]
        assert sum(row["mflop"] for row in both) == pytest.approx(bench.flops(problem, draw(problem)) / 1e6, rel=1e-5)
    for card, sheet in cuda_plan.SHEETS.items():
        row = cuda_plan.step(card, "lstm", "f32", 32, 2048, False)
        assert row["loop"] == "stepwise" and float(row["least_us"]) >= row["mflop"] / sheet.f32 * 0.99
    h100 = cuda_plan.step("H100 SXM", "lstm", "f32", 1, 2048, False)  # 64 MiB of w_hh: more than its L2 cache holds
    assert h100["bound_by"] == "memory" and float(h100["least_us"]) == pytest.approx(64 * 2**20 / 3350e3, rel=0.01)


def test_the_tables_that_need_no_compiler_are_those_of_the_plan() -> None:
    """cuda_roofline.csv and cuda_plan.csv are what their scripts compute now."""
    committed = {tuple(row[name] for name in ("card", "cell", "dtype", "N", "pass")): row
                 for row in evidence.read(evidence.RESULTS / "cuda_plan.csv")}  # fmt: skip
    for card, cell, dtype, N, backward in (("T4", "lstm", "f32", 1, True), ("H100 SXM", "gru", "bf16", 32, False)):
        row = cuda_plan.row(card, cell, dtype, N, backward)
        assert {name: str(value) for name, value in row.items()} == committed[card, cell, dtype, str(N), row["pass"]]
    rows = evidence.read(evidence.RESULTS / "cuda_roofline.csv")
    assert rows == [{name: str(value) for name, value in row.items()} for row in cuda_plan.roofline()]


def test_the_page_shows_what_the_tables_hold() -> None:
    lines = "\n".join(cuda_page.section(evidence.RESULTS))
    assert (evidence.RESULTS / "README.md").read_text().count(lines) == 1
    assert "none of" in lines and "No kernel has run on a GPU" in lines
    assert all(f"`{row['kernel'].partition('<')[0]}`" in lines for row in TABLE)
