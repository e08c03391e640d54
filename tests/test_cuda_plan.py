"""The CUDA launch plan keeps every limit of every card, covers the layer, and takes what a card can hold."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gatewise as gw
from compiler import ROOT
from plans import (
    CAPABILITIES,
    CARDS,
    CELL_SLOTS,
    DTYPES,
    FRAGMENT_BYTES,
    KB,
    MB,
    DeviceLimits,
    Plan,
    StepProblem,
    cuda_include,
    library,
    plan,
    problem,
    reason,
)
from plans import device as device_of

needs_toolkit = pytest.mark.skipif(cuda_include() is None, reason="no CUDA toolkit: no nvcc on PATH")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- What a plan must keep ---------------------------------------------------------------------------------


def check(limits: DeviceLimits, asked: StepProblem, made: Plan, source: ctypes.CDLL) -> None:
    """Everything here follows from the problem and the hardware, nothing from how the plan was found."""
    (check_persistent if made.persistent else check_stepwise)(limits, asked, made, source)
    assert made.block % 32 == 0 and 0 < made.block <= limits.threads_per_block


def check_persistent(limits: DeviceLimits, asked: StepProblem, made: Plan, source: ctypes.CDLL) -> None:
    # Each unit is one block's, no block is without any, and all blocks are resident at once
    assert made.units >= 1 and made.grid_rows == 1
    assert (made.grid_units - 1) * made.units < asked.H <= made.grid_units * made.units
    assert 1 <= made.blocks_per_multiprocessor <= limits.blocks_per_multiprocessor
    assert made.grid_units <= made.blocks_per_multiprocessor * limits.multiprocessors
    assert made.blocks_per_multiprocessor * made.block <= limits.threads_per_multiprocessor
    assert made.blocks_per_multiprocessor * made.block * made.registers <= limits.registers_per_multiprocessor
    assert made.shared_bytes <= limits.shared_per_block
    if hasattr(source, "nvidia_resident"):
        count = source.nvidia_resident(limits, made.block, made.registers, made.shared_bytes)
        assert made.blocks_per_multiprocessor == count

    # The block's weights are on chip
    rows, columns = (made.units, asked.gates * asked.H) if asked.backward else (asked.gates * made.units, asked.R)
    assert made.fragments * FRAGMENT_BYTES >= rows * columns * asked.storage
    assert 0 <= made.register_fragments <= made.fragments
    assert made.register_fragments * FRAGMENT_BYTES <= made.block * made.weight_registers * 4
    in_shared = (made.fragments - made.register_fragments) * FRAGMENT_BYTES
    on_chip = limits.multiprocessors * (4 * limits.registers_per_multiprocessor + limits.shared_per_multiprocessor)
    assert asked.gates * asked.H * asked.R * asked.storage <= on_chip

    # There is room for what else a step needs: sums of a tile for each run of columns, the states that a thread keeps
    warps, row_groups = made.block // 32, ceil_div(rows, 32)
    runs = min(warps // row_groups, ceil_div(columns * asked.storage, 64))
    assert made.shared_bytes >= in_shared + runs * rows * made.batch_tile * asked.accumulator
    states, words = asked.has_c + asked.backward, asked.accumulator // 4
    tiles, tile = ceil_div(asked.N, made.batch_tile), min(asked.N, made.batch_tile)
    assert tiles * ceil_div(tile * made.units, made.block) <= CELL_SLOTS
    assert made.weight_registers + CELL_SLOTS * states * words < made.registers == 255
    assert 2 * asked.N * columns * asked.storage <= limits.l2_bytes

    # No cell that the persistent kernel cannot run
    assert asked.has_product and not asked.has_middle and asked.R == asked.H


def check_stepwise(limits: DeviceLimits, asked: StepProblem, made: Plan, source: ctypes.CDLL) -> None:
    assert source.reason_sentence(made.reason_number)
    assert made.units >= 1 and made.batch_tile >= 1
    assert made.grid_units == ceil_div(asked.H, made.units) and made.grid_rows == ceil_div(asked.N, made.batch_tile)
    assert made.shared_bytes <= 48 * KB
    assert source.resident(limits, made.block, 255, made.shared_bytes) >= 1 or limits.warp_size != 32
    # A small problem on an ordinary cell is not refused: 32 KB of weights fit anywhere, beside 20 KB of sums
    slice_rows = (1 if asked.backward else asked.gates) * ceil_div(asked.H, limits.multiprocessors)
    columns = asked.gates * asked.H if asked.backward else asked.R
    small = (
        ceil_div(slice_rows, 8) * ceil_div(columns * asked.storage, 64) * FRAGMENT_BYTES <= 32 * KB and slice_rows <= 32
    )
    fits = small and 1 <= asked.N <= 16 and 2 * asked.N * columns * asked.storage <= limits.l2_bytes
    plain = asked.has_product and not asked.has_middle and asked.R == asked.H > 0
    assert not (plain and fits and limits.warp_size == 32 and limits.major >= 8)


# An example worked by hand. 132 multiprocessors, so a block of the grid has ceil(1024 / 132) = 8 units or more: 4 x 8 =
# 32 rows of 1024 floats, 4 tiles of 8 rows, 64 fragments each: 256, 128 KB. Each of 8 warps takes 8 pieces of all tiles
# and holds 128 / 4 = 32 fragments in registers, all that it has. So shared memory has the sums only: of 8 warps, 32
# sequences, 32 rows and 8 more, 4 bytes each.
EXAMPLE = CARDS["H100 SXM"], ("lstm", 32, 1024, "f32", False)
WORKED = (0, 128, 1, 256, 8, 32, 8 * 32 * 40 * 4, 128, 255, 256, 256, 1)


def check_example(source: ctypes.CDLL) -> None:
    made = plan(EXAMPLE[0], problem(*EXAMPLE[1]), source)
    assert tuple(getattr(made, name) for name, _ in Plan._fields_) == WORKED


def check_residents(source: ctypes.CDLL) -> None:
    """Our count of resident blocks is NVIDIA's, for any kernel."""
    for limits in CARDS.values():
        kernels = itertools.product(range(32, 1025, 96), range(8, 300, 13), range(0, limits.shared_per_block + 1, 7777))
        for kernel in kernels:
            assert source.resident(limits, *kernel) == source.nvidia_resident(limits, *kernel), (limits, kernel)


def check_many(source: ctypes.CDLL) -> None:
    cells = "lstm", "gru", "rnn_tanh", "indrnn_tanh", "gru_reset_before"
    sizes = 1, 7, 64, 130, 300, 700, 1024, 1400, 2048, 3000
    half = DeviceLimits.from_buffer_copy(CARDS["A100 40GB"])
    half.shared_per_block //= 2  # of what a multiprocessor has; the cards let a block have all of it
    for limits in (*CARDS.values(), half):
        for cell, H, dtype, N, backward in itertools.product(
            cells, sizes, DTYPES, (1, 17, 100, 256, 700), (False, True)
        ):
            asked = problem(cell, N, H, dtype, backward)
            check(limits, asked, plan(limits, asked, source), source)


# ---- The tests ---------------------------------------------------------------------------------------------

small_or_any = st.integers(0, 40) | st.integers(0, 5000)
devices = st.sampled_from(list(CARDS.values())) | st.builds(
    device_of, st.integers(1, 200), st.integers(1, 128).map(lambda n: n * MB), st.sampled_from(list(CAPABILITIES))
)


@st.composite
def problems(draw: st.DrawFn) -> StepProblem:
    H = draw(small_or_any)
    R = draw(st.just(H) | st.integers(min(1, H), H))
    return problem(
        draw(st.sampled_from(list(gw.cells()))), draw(st.integers(0, 600)), H, draw(st.sampled_from(list(DTYPES))),
        draw(st.booleans()), R,
    )  # fmt: skip


@given(limits=devices, asked=problems())
@settings(max_examples=1000, deadline=None)
def test_a_plan_keeps_all_limits_and_covers_the_layer(limits: DeviceLimits, asked: StepProblem) -> None:
    made = plan(limits, asked)
    check(limits, asked, made, library())
    assert repr(plan(limits, asked)) == repr(made)


@given(limits=devices, asked=problems(), more=st.integers(1, 1 << 20))
@settings(max_examples=500, deadline=None)
def test_a_larger_device_takes_what_a_smaller_one_does(limits: DeviceLimits, asked: StepProblem, more: int) -> None:
    if not plan(limits, asked).persistent:
        return
    for names in (["multiprocessors"], ["shared_per_block", "shared_per_multiprocessor"], ["l2_bytes"],
                  ["registers_per_multiprocessor"], ["threads_per_multiprocessor"]):  # fmt: skip
        larger = DeviceLimits.from_buffer_copy(limits)
        for name in names:
            setattr(larger, name, getattr(limits, name) + more)
        assert plan(larger, asked).persistent, f"{names} + {more}"


@given(asked=problems(), limits=devices, share=st.floats(0, 2))
@settings(max_examples=100, deadline=None)
def test_every_H_up_to_the_largest_is_persistent(asked: StepProblem, limits: DeviceLimits, share: float) -> None:
    largest = library().largest_H(limits, asked)
    asked.H = asked.R = max(1, round(largest * share))
    assert plan(limits, asked).persistent == (largest >= asked.H)


# Each has more multiprocessors than the one before, each of those at least as much shared memory. Rows come in eights
# and warps in whole groups, so a few more multiprocessors may change nothing.
CHAINS = [("T4", "L4", "RTX 3090", "RTX 4090", "H100 SXM", "B200"), ("RTX 3090", "A100 40GB", "H100 SXM")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
def test_more_memory_on_chip_holds_a_larger_layer(dtype: str, backward: bool) -> None:
    for cell, chain in itertools.product(("rnn_tanh", "gru", "lstm"), CHAINS):
        largest = [library().largest_H(CARDS[card], problem(cell, 1, 0, dtype, backward)) for card in chain]
        assert largest == sorted(largest) and len({*largest}) > len(largest) // 2, dict(zip(chain, largest))


def test_an_example_worked_by_hand() -> None:
    check_example(library())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (problem("lstm", 8, 1 << 14, "f32", False), "more than registers and shared memory hold"),
        (problem("lstm", 4000, 256, "f32", False), "batch"),
        (problem("indrnn_tanh", 8, 64, "f32", False), "no recurrent product"),
        (problem("gru_reset_before", 8, 64, "f32", False), "middle"),
        (problem("lstm_norm", 8, 64, "f32", False), "middle"),
        (problem("lstm", 8, 64, "f32", False, R=32), "projection"),
        (problem("lstm", 0, 64, "f32", False), "no sequence"),
    ],
)
def test_a_refusal_says_why(asked: StepProblem, words: str) -> None:
    made = plan(CARDS["A100 40GB"], asked)
    assert not made.persistent and words in reason(made)


def test_what_a_device_must_have() -> None:
    asked = problem("lstm", 64, 512, "f32", False)
    volta, wide, no_cache = (DeviceLimits.from_buffer_copy(CARDS["T4"]) for _ in range(3))
    volta.minor, wide.warp_size, no_cache.l2_bytes = 0, 64, 100 * KB
    for limits, words in (volta, "capability"), (wide, "warps of 32"), (no_cache, "L2"):
        made = plan(limits, asked)
        assert not made.persistent and words in reason(made)


@needs_toolkit
def test_resident_blocks_are_those_nvidia_counts() -> None:
    assert all(library().nvidia_knows(limits) for limits in CARDS.values())
    check_residents(library())


# Wrong lines of plan.hpp: (what stands there, what to put there)
BUGS = [
    ("row_tiles * fragment_rows / of_unit)", "row_tiles * fragment_rows)"),  # gates share rows
    ("ceil_div(problem.H, units), 1, block", "problem.H / units, 1, block"),  # the last units are nobody's
    ("return problem.backward ? problem.gates * problem.H : problem.R;", "return problem.R;"),  # the gates' gradients
    ("in_shared * fragment_bytes +", "in_shared * 256 +"),
    ("std::min<Index>(of.rounds, held / round_registers)", "of.rounds"),  # more than registers hold
    ("if (shared_bytes > device.shared_per_block) return 0;", ""),
    (" > cell_slots)", " > 1000)"),  # the states of a large batch
    ("return 2 * round_up(problem.N", "return round_up(problem.N"),  # h of one step only
    ("return of.column_groups * batch_tile", "return batch_tile"),  # sums of one warp only
    ("of.column_groups = std::min(warps / of.row_groups, of.pieces);", "of.column_groups = warps;"),  # rows of no warp
    ("if (plan.blocks_per_multiprocessor < 1) continue;", "if (plan.blocks_per_multiprocessor < 2) continue;"),
    ("ceil_div(problem.H, device.multiprocessors)", "ceil_div(problem.H, device.multiprocessors * 2)"),  # not resident
    ("if (problem.has_middle)", "if (false)"),
    ("if (!problem.has_product)", "if (false)"),
    ("plan.grid_units = ceil_div(problem.H, plan.units);", "plan.grid_units = problem.H / plan.units;"),  # stepwise
    ("plan.grid_rows = ceil_div(problem.N, plan.batch_tile);", "plan.grid_rows = 1;"),
]  # fmt: skip
COUNTING_BUGS = [  # in what NVIDIA's header counts as well
    ("device.major >= 8 ? 1024 : 0", "0"),
    ("device.registers_per_multiprocessor / parts / warp_registers * parts / warps",
     "device.registers_per_multiprocessor / warp_registers / warps"),
    ("registers > max_registers", "registers > 1000"),
    ("std::min({by_threads, ", "std::min({"),
    ("by_shared, device.blocks_per_multiprocessor})", "by_shared})"),
    ("= 256;\n  const Index warp_registers", "= 32;\n  const Index warp_registers"),
]  # fmt: skip


def check_with(folder: Path, line: tuple[str, str], *checks: object) -> None:
    text = (ROOT / "cpp/cuda/plan.hpp").read_text()
    assert text.count(line[0]) == 1, f"{text.count(line[0])} times in plan.hpp: {line[0]}"
    (folder / "plan.hpp").write_text(text.replace(*line))
    source = library(folder)
    for run in checks:
        run(source)


@pytest.mark.parametrize("line", BUGS, ids=[old for old, _ in BUGS])
def test_a_wrong_line_is_seen(tmp_path: Path, line: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_with(tmp_path, line, check_many, check_example)


@needs_toolkit
@pytest.mark.parametrize("line", COUNTING_BUGS, ids=[old for old, _ in COUNTING_BUGS])
def test_a_wrong_count_is_seen(tmp_path: Path, line: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_with(tmp_path, line, check_residents)
