"""The CPU kernels: the reference's results on every problem, and what they promise beyond results.

Every test runs for every instruction set that this machine can execute (fixture `arch`).
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gatewise as gw
import problems
from conftest import ARCHS
from gatewise import _core
from problems import Inputs, Problem

CELLS = list(problems.GATES)
OPTIONS = [*("lengths", "half", "reverse", "h0", "nobias", "infer", "reset", "reset0", "mask", "zoneout", "expected")]
OPTIONS += [*("clip", "project", "batch", "packed", "strided", "states", "checkpoints")]
Results = dict[str, np.ndarray]


def assert_equal_bits(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name], equal_nan=True), name


def assert_close(a: Results, b: Results) -> None:
    """Equal up to the rounding of a sum taken in another order."""
    for name in a:
        scale = np.abs(b[name]).max(initial=0.0)
        assert problems.distance(a[name], b[name]) <= 64 * np.finfo(b[name].dtype).eps * scale, name


class Guarded:
    """Lends buffers to the kernels: each is full of NaN, or of zeros, and lies between two guards."""

    GUARD = 256  # bytes on either side; a multiple of every alignment a kernel may count on

    def __init__(self) -> None:
        self.buffers: list[np.ndarray] = []

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        buffer = np.full(size + 2 * self.GUARD, 0xFF, np.uint8)  # bytes of 0xFF are NaN in every float type
        self.buffers.append(buffer)
        return buffer[self.GUARD : self.GUARD + size].view(dtype).reshape(shape)

    def zeros(self, shape: Any, dtype: Any) -> np.ndarray:
        buffer = self.empty(shape, dtype)
        buffer[...] = 0
        return buffer

    def check(self) -> None:
        for buffer in self.buffers:
            assert np.all(buffer[: self.GUARD] == 0xFF), "written before the start of a buffer"
            assert np.all(buffer[len(buffer) - self.GUARD :] == 0xFF), "written past the end of a buffer"


def run_guarded(problem: Problem, inputs: Inputs) -> Results:
    """`problems.run` on buffers that are lent to the kernels, every one of them guarded."""
    guarded, dtype = Guarded(), inputs.x.dtype
    extras = gw.functional._extras(problems.options_of(problem, inputs))
    p = _core.Problem(problem.cell, *inputs[:7], inputs.lengths, "reverse" in problem.options, extras)
    states_only = problem.options & {"states", "checkpoints"}
    saved, states, forward_scratch, backward_scratch = p.sizes
    y, hn = guarded.empty(inputs.dy.shape, dtype), guarded.empty((p.N, p.R), dtype)
    cn = guarded.empty((p.N, p.H), dtype) if p.has_c else None
    tape = [None if states_only else guarded.empty(saved, dtype), guarded.empty(states, dtype) if p.has_c else None]
    tape = tape if problem.trains else [None, None]
    _core.forward(p, y, hn, cn, *tape, guarded.empty(forward_scratch, np.uint8), 2)
    results = {"y": y, "hn": hn, "cn": cn}
    if problem.trains:
        like = {**inputs._asdict(), "b_ih": np.empty(p.G * p.H), "b_hh": np.empty(p.G * p.H)}
        like |= {"h0": hn, "c0": cn}
        grads = {}
        for name in gradients(problem):
            make = guarded.empty if name in ("dx", "dh0", "dc0") else guarded.zeros
            grads[name] = make(like[name[1:]].shape, dtype)
        lent = [grads.get(name) for name in gw.functional.Gradients._fields]
        scratch = guarded.empty(backward_scratch, np.uint8)
        _core.backward(p, y, *tape, inputs.dy, inputs.dhn, inputs.dcn, lent, scratch, 2)
        given = (*inputs[:7], inputs.lengths, "reverse" in problem.options, extras)
        whole = gw.functional.Tape(problem.cell, "cpu", True, given, p, y, hn, cn, *tape)
        results = {**results, **problems.kept_of(problem, whole), **grads}
    guarded.check()
    return {name: array for name, array in results.items() if array is not None}


def gradients(problem: Problem) -> list[str]:
    """The gradients there are, in the order of `Gradients`: also of what was not given but could have been."""
    facts = gw.cells()[problem.cell]
    lacks = {
        "dc0": not facts["has_c"], "dw_hh": not facts["product"], "db_ih": facts["normed"], "db_hh": facts["normed"],
        "dw_unit": facts["U"] == 0, "dw_hr": "project" not in problem.options,
    }  # fmt: skip
    return [name for name in gw.functional.Gradients._fields if not lacks.get(name)]


# ---- Results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_problem(cell: str, dtype: str, arch: str) -> None:
    """Outputs, tape and gradients within the bound; every number of them written, none around them."""
    for problem in problems.biting(cell, dtype):
        problems.truth(problem)
        inputs = problems.draw(problem)
        results = run_guarded(problem, inputs)
        problems.check(problem, results)
        assert_equal_bits(problems.run(problem, inputs), results)


@given(
    cell=st.sampled_from(CELLS),
    sizes=st.tuples(st.integers(0, 12), st.integers(0, 20), st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from(list(problems.DTYPES)),
    options=st.sets(st.sampled_from(OPTIONS), max_size=6),
    num_threads=st.integers(1, 4),
    arch=st.sampled_from(ARCHS),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_problem(
    cell: str, sizes: tuple[int, ...], dtype: str, options: set[str], num_threads: int, arch: str
) -> None:
    assume(problems.fits(cell, options))
    sizes = (*sizes[:3], max(sizes[3], 8 * gw.cells()[cell]["normed"]))  # of a few, a deviation may be next to nothing
    problem = Problem(cell, *sizes, dtype, frozenset(options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEWISE_ARCH", arch)
        problems.check(problem, problems.run(problem, problems.draw(problem), num_threads=num_threads))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_go_where_they_go_in_the_reference(cell: str, bad: float, arch: str) -> None:
    for where in ("x", "h0", "w_hh", "dy"):
        if where == "w_hh" and not gw.cells()[cell]["product"]:
            continue
        for dtype in problems.DTYPES:
            problem = Problem.parse(f"{cell}:T5,N4,I3,H18:{dtype}:h0")
            inputs = problems.draw(problem)
            getattr(inputs, where).reshape(-1)[len(getattr(inputs, where)) // 2] = bad
            with np.errstate(all="ignore"):
                exact = problems.run(problem, inputs.astype(np.float64), "reference")
            for name, value in problems.run(problem, inputs).items():
                expected = exact[name].astype(value.dtype)
                assert np.array_equal(np.isnan(value), np.isnan(expected)), (where, dtype, name)
                assert np.array_equal(value[np.isinf(value)], expected[np.isinf(expected)]), (
                    where,
                    dtype,
                    name,
                )
                fine = np.isfinite(value)
                assert np.allclose(value[fine], expected[fine], rtol=1e-3, atol=1e-4), (where, dtype, name)


# ---- Bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        *("T7,N3,I5,H33", "T40,N64,I20,H40", "T8,N9,I70,H264", "T40,N3,I8,H260", "T3,N1,I8,H264"),
        *("T1,N24,I70,H264", "T1,N48,I300,H250"),  # one step through more weights than a cache holds: panels, rows
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_equal_bits_for_every_thread_count(cell: str, shape: str, arch: str) -> None:
    for dtype in problems.DTYPES:
        problem = Problem.parse(f"{cell}:{shape}:{dtype}:lengths,h0")
        inputs = problems.draw(problem)
        one = problems.run(problem, inputs, num_threads=1)
        problems.check(problem, one)
        for num_threads in (2, 3, 7):
            assert_equal_bits(one, problems.run(problem, inputs, num_threads=num_threads))


def rows(inputs: Inputs, index: Any) -> Inputs:
    """Some sequences of a batch, in some order."""
    picked = {k: getattr(inputs, k)[:, index] for k in ("x", "dy")}
    picked |= {
        k: getattr(inputs, k)[index] for k in ("h0", "c0", "dhn", "dcn", "lengths") if getattr(inputs, k) is not None
    }
    return inputs._replace(**{k: np.ascontiguousarray(v) for k, v in picked.items()})


@pytest.mark.parametrize("options", ["h0", "lengths,h0", "lengths,reverse,h0"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_does_not_see_its_batch(cell: str, options: str, arch: str) -> None:
    """The bits of a sequence's results are the same alone, in any company and in any position."""
    by_row = {"y": 1, "gates": 1, "c": 1, "dx": 1, "hn": 0, "cn": 0, "dh0": 0, "dc0": 0}
    for dtype, H in (("f32", 21), ("f32", 130), ("f64", 21)):
        problem = Problem.parse(f"{cell}:T6,N15,I5,H{H}:{dtype}:{options}")
        inputs = problems.draw(problem)
        whole = problems.run(problem, inputs)
        order = np.random.default_rng(0).permutation(15)
        for index in (*([n] for n in range(15)), order, order[:8], order[8:]):
            part = problems.run(problem, rows(inputs, index))
            expected = {name: whole[name].take(index, axis) for name, axis in by_row.items() if name in whole}
            assert_equal_bits({name: part[name] for name in expected}, expected)


@pytest.mark.parametrize("reverse", ["", ",reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_state_passing(cell: str, reverse: str, arch: str) -> None:
    """One run is two runs: states handed on forward, their gradients handed back."""
    for dtype in problems.DTYPES:
        problem = Problem.parse(f"{cell}:T9,N6,I5,H19:{dtype}:h0{reverse}")
        inputs = problems.draw(problem)
        whole = problems.run(problem, inputs)
        early, late = slice(0, 4), slice(4, 9)
        first, then = (late, early) if reverse else (early, late)

        a = inputs._replace(x=inputs.x[first], dy=inputs.dy[first])
        tape_a = problems.tape_of(problem, a)
        b = inputs._replace(x=inputs.x[then], dy=inputs.dy[then], h0=tape_a.hn, c0=tape_a.cn)
        tape_b = problems.tape_of(problem, b)
        grads_b = gw.functional.backward(tape_b, b.dy, b.dhn, b.dcn)
        grads_a = gw.functional.backward(tape_a, a.dy, grads_b.dh0, grads_b.dc0)

        parts = {"y": np.empty_like(whole["y"]), "dx": np.empty_like(whole["dx"])}
        parts["y"][first], parts["y"][then] = tape_a.y, tape_b.y
        parts["dx"][first], parts["dx"][then] = grads_a.dx, grads_b.dx
        parts |= {"hn": tape_b.hn, "dh0": grads_a.dh0}
        if tape_b.cn is not None:
            parts |= {"cn": tape_b.cn, "dc0": grads_a.dc0}
        assert_equal_bits(parts, {name: whole[name] for name in parts})
        for name in gradients(problem):
            if name.startswith(("dw", "db")):
                assert_close({name: getattr(grads_a, name) + getattr(grads_b, name)}, {name: whole[name]})


@pytest.mark.parametrize("options", ["h0", "lengths,h0"])
@pytest.mark.parametrize("cell", CELLS)
def test_reverse_is_flipping_by_hand(cell: str, options: str, arch: str) -> None:
    for dtype in problems.DTYPES:
        problem = Problem.parse(f"{cell}:T7,N5,I4,H21:{dtype}:{options}")
        inputs = problems.draw(problem)
        t = np.arange(7)[:, None]
        lengths = np.full(5, 7) if inputs.lengths is None else inputs.lengths
        flip = (np.where(t < lengths, lengths - 1 - t, t), np.arange(5))
        forwards = problems.run(problem, inputs)
        flipped = inputs._replace(x=inputs.x[flip], dy=inputs.dy[flip])
        backwards = problems.run(Problem.parse(f"{problem},reverse"), flipped)
        for name in ("y", "gates", "c", "dx"):
            if name in backwards:
                backwards[name] = backwards[name][flip]
        sums = [name for name in forwards if name.startswith(("dw", "db"))]
        assert_close({name: backwards[name] for name in sums}, {name: forwards[name] for name in sums})
        assert_equal_bits(*({k: v for k, v in r.items() if k not in sums} for r in (forwards, backwards)))


@pytest.mark.parametrize("cell", CELLS)
def test_only_wanted_gradients_are_given(cell: str, arch: str) -> None:
    """A gradient has the same bits whatever else is wanted."""
    for dtype in problems.DTYPES:
        problem = Problem.parse(f"{cell}:T6,N5,I4,H19:{dtype}:lengths,h0")
        inputs = problems.draw(problem)
        tape = problems.tape_of(problem, inputs)
        incoming = inputs.dy, inputs.dhn, inputs.dcn
        every = gw.functional.backward(tape, *incoming)._asdict()
        names = [name for name in every if every[name] is not None]
        assert names == gradients(problem)
        for wanted in [[], *([name] for name in names), *(names[k:] for k in range(1, 7)), names[::2]]:
            got = gw.functional.backward(tape, *incoming, wanted=wanted)._asdict()
            assert {name for name in got if got[name] is not None} == set(wanted)
            assert_equal_bits({name: got[name] for name in wanted}, {name: every[name] for name in wanted})


@pytest.mark.parametrize("cell", CELLS)
def test_missing_gradients_are_zeros(cell: str, arch: str) -> None:
    problem = Problem.parse(f"{cell}:T6,N5,I4,H19:f32:lengths,h0")
    inputs = problems.draw(problem)
    tape = problems.tape_of(problem, inputs)
    incoming = [inputs.dy, inputs.dhn, inputs.dcn]
    for given_ in ((0,), (1,), (2,), (0, 1), (1, 2), ()):
        some = [a if k in given_ else None for k, a in enumerate(incoming)]
        zeros = [None if a is None else a if k in given_ else np.zeros_like(a) for k, a in enumerate(incoming)]
        without, with_zeros = (gw.functional.backward(tape, *g)._asdict() for g in (some, zeros))
        for name in without:
            assert np.array_equal(without[name], with_zeros[name]) or without[name] is with_zeros[name] is None, name


@pytest.mark.parametrize("cell", CELLS)
def test_tape_and_inputs_survive(cell: str, arch: str) -> None:
    """Two backward passes over one tape agree to the bit, start from zero and change nothing they borrow."""
    for dtype in problems.DTYPES:
        problem = Problem.parse(f"{cell}:T8,N5,I4,H19:{dtype}:lengths,h0")
        inputs, kept = problems.draw(problem), problems.draw(problem)
        tape = problems.tape_of(problem, inputs)

        def shown(tape: Any) -> Results:
            return {k: v for k in ("y", "hn", "cn", "gates", "c") if (v := getattr(tape, k)) is not None}

        before = {name: array.copy() for name, array in shown(tape).items()}
        first, second = (gw.functional.backward(tape, inputs.dy, inputs.dhn, inputs.dcn)._asdict() for _ in range(2))
        assert_equal_bits(before, shown(tape))
        assert_equal_bits(*({k: v for k, v in g.items() if v is not None} for g in (first, second)))
        assert_equal_bits(*({k: v for k, v in i._asdict().items() if v is not None} for i in (inputs, kept)))


@pytest.mark.parametrize("cell", CELLS)
def test_ticks_are_added_to_and_change_no_result(cell: str, arch: str) -> None:
    """[products, epilogues, all]: the first two are parts of the third, and every call adds to what is there."""
    for num_threads in (1, 2):
        problem = Problem.parse(f"{cell}:{SHARED}:f32:h0")
        inputs = problems.draw(problem)
        before = np.array([2**40, 2**41, 2**42], np.uint64)
        ticks = before.copy()
        extras = gw.functional._extras(problems.options_of(problem, inputs))
        tape = gw.functional._forward(cell, *inputs[:7], num_threads=num_threads, ticks=ticks, extras=extras)
        forward, ticks = ticks - before, before.copy()
        grads = gw.functional._backward(tape, inputs.dy, inputs.dhn, inputs.dcn, num_threads=num_threads, ticks=ticks)
        backward = ticks - before
        for products, epilogues, everything in (forward.tolist(), backward.tolist()):
            assert products > 0 and epilogues > 0 and products + epilogues <= everything < 2**39
        results = {"y": tape.y, "hn": tape.hn, "cn": tape.cn, "gates": tape.gates, "c": tape.c, **grads._asdict()}
        expected = problems.run(problem, inputs, num_threads=num_threads)
        assert_equal_bits({k: v for k, v in results.items() if v is not None}, expected)


# ---- Lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths", [[7, 5, 3, 0, 0], [0, 3, 7, 7, 1], [0, 0, 0, 0, 0], [4, 4, 4, 4, 4], [1, 6, 2, 5, 0]]
)
@pytest.mark.parametrize("reverse", ["", ",reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_past_the_end_matters(cell: str, reverse: str, lengths: list[int], arch: str) -> None:
    """NaN in the padding reaches nothing; y and dx are 0 there; an empty sequence keeps its state."""
    for dtype in problems.DTYPES:
        problem = Problem.parse(f"{cell}:T7,N5,I4,H19:{dtype}:h0{reverse}")
        clean = problems.draw(problem)._replace(lengths=np.array(lengths))
        past = np.arange(7)[:, None] >= clean.lengths
        planted = clean._replace(x=clean.x.copy(), dy=clean.dy.copy())
        planted.x[past] = planted.dy[past] = np.nan
        results = problems.run(problem, planted)
        assert_equal_bits(results, problems.run(problem, clean))
        for name in ("y", "gates", "c", "dx"):
            if name in results:
                assert not results[name][past].any(), name
        empty = clean.lengths == 0
        assert np.array_equal(results["hn"][empty], clean.h0[empty])
        assert np.array_equal(results["dh0"][empty], clean.dhn[empty])
        if "cn" in results:
            assert np.array_equal(results["cn"][empty], clean.c0[empty])
            assert np.array_equal(results["dc0"][empty], clean.dcn[empty])


@pytest.mark.parametrize("cell", CELLS)
def test_full_lengths_are_no_lengths(cell: str, arch: str) -> None:
    for options in ("h0", "h0,reverse"):
        problem = Problem.parse(f"{cell}:T7,N5,I4,H19:f32:{options}")
        inputs = problems.draw(problem)
        full = inputs._replace(lengths=np.full(5, 7))
        assert_equal_bits(problems.run(problem, inputs), problems.run(problem, full))


# ---- Layouts, what the tape keeps, segments -----------------------------------------------------------------


def with_options(problem: Problem, *options: str) -> Problem:
    return replace(problem, options=problem.options | {*options})


@pytest.mark.parametrize("cell", CELLS)
def test_layouts_change_no_bit(cell: str, arch: str) -> None:
    """Batch-major, strided and packed arrays give the numbers of time-major ones, in their own places."""
    for dtype, text in (("f32", "T9,N6,I5,H21"), ("f64", "T30,N20,I8,H40")):
        problem = Problem.parse(f"{cell}:{text}:{dtype}:h0,reverse,reset")
        inputs = problems.draw(problem)
        T, N, I, _ = problem.T, problem.N, problem.I, problem.H
        plain = problems.run(problem, inputs)
        by_step = ("x", "dy", "reset", "y", "gates", "c", "dx")

        def reordered(arrays: Any, order: Any, by_step: Any = by_step) -> Any:
            return {k: np.ascontiguousarray(order(v)) if k in by_step else v for k, v in arrays.items()}

        turned = Inputs(**reordered(inputs._asdict(), lambda a: a.swapaxes(0, 1)))
        batch = problems.run(with_options(problem, "batch"), turned)
        assert_equal_bits(reordered(batch, lambda a: a.swapaxes(0, 1)), plain)

        # a view of batch-major memory needs no option at all
        view = inputs._replace(x=turned.x.swapaxes(0, 1))
        assert not view.x.flags.c_contiguous
        assert_equal_bits(problems.run(problem, view), plain)
        wide = np.full((2 * T, N, I + 2), np.nan, inputs.x.dtype)
        wide[::-2, :, 1:-1] = inputs.x
        assert_equal_bits(problems.run(problem, inputs._replace(x=wide[::-2, :, 1:-1])), plain)

        lengths = np.sort(np.random.default_rng(0).integers(1, T + 1, N))[::-1].copy()
        lengths[0] = T
        live = np.arange(T)[:, None] < lengths
        padded = problems.run(problem, inputs._replace(lengths=lengths))
        rows_ = inputs._replace(batch_sizes=live.sum(1), **{k: getattr(inputs, k)[live] for k in ("x", "dy", "reset")})
        packed = problems.run(with_options(problem, "packed"), rows_)
        assert_equal_bits(packed, {k: v[live] if k in by_step else v for k, v in padded.items()})


@pytest.mark.parametrize("options", ["h0,lengths", "reset,mask,zoneout,reverse,h0", "reset0,expected,project,clip"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_the_tape_keeps_changes_no_bit(cell: str, options: str, arch: str) -> None:
    """Gates computed again are those of before; checkpoints only change in what order weight gradients are summed."""
    own = [option for option in options.split(",") if problems.fits(cell, [option])]
    for dtype, text in (("f32", "T23,N5,I5,H21"), ("f64", "T40,N20,I8,H40"), ("f32", "T9,N5,I4,H264")):
        problem = Problem.parse(f"{cell}:{text}:{dtype}:{','.join(own) or 'train'}")
        inputs = problems.draw(problem)
        for num_threads in (1, 3):
            everything = problems.run(problem, inputs, num_threads=num_threads)
            states = problems.run(with_options(problem, "states"), inputs, num_threads=num_threads)
            assert_equal_bits(states, {name: everything[name] for name in everything if name != "gates"})
            few = problems.run(with_options(problem, "checkpoints"), inputs, num_threads=num_threads)
            sums = [name for name in few if name.startswith(("dw", "db"))]
            assert_close({name: few[name] for name in sums}, {name: everything[name] for name in sums})
            rest = [name for name in few if name not in sums]
            assert_equal_bits({name: few[name] for name in rest}, {name: everything[name] for name in rest})


@pytest.mark.parametrize("cell", CELLS)
def test_the_tape_is_as_small_as_it_says(cell: str) -> None:
    """Bytes kept: gates and c, c, c at every sqrt(T)-th step; for whole registers of units."""
    facts = gw.cells()[cell]
    problem = Problem.parse(f"{cell}:T100,N4,I5,H32:f32:train")
    inputs = problems.draw(problem)
    sizes = {
        save: problems.tape_of(with_options(problem, *save), inputs).nbytes
        for save in ((), ("states",), ("checkpoints",))
    }
    per_state, steps = 4 * 4 * 32, 100
    c = per_state * facts["has_c"]
    assert sizes["states",] == (steps + 1) * c
    assert sizes["checkpoints",] == 10 * c
    assert sizes[()] >= steps * per_state * facts["S"] + (steps + 1) * c


@pytest.mark.parametrize("reverse", ["", "reverse"])
@pytest.mark.parametrize("cell", CELLS)
def test_segments_know_nothing_of_each_other(cell: str, reverse: str, arch: str) -> None:
    """A sequence that is reset is several sequences: the same y and dx to the bit, gradients that add up."""
    for option in ("reset", "reset0"):
        problem = Problem.parse(f"{cell}:T12,N1,I5,H19:f64:h0,{option}{',' * bool(reverse)}{reverse}")
        inputs = problems.draw(problem)._replace(reset=np.zeros((12, 1), bool))
        starts = [0, 4, 5, 9, 12]
        inputs.reset[starts[1:-1]] = True
        whole = problems.run(problem, inputs)
        parts, sums = [], {}
        for begin, end in zip(starts, starts[1:]):
            first, last = (end == 12, begin == 0) if reverse else (begin == 0, end == 12)
            starts_at_zero = option == "reset0" and not first
            part = inputs._replace(
                x=inputs.x[begin:end], dy=inputs.dy[begin:end], reset=None,
                h0=None if starts_at_zero else inputs.h0, c0=None if starts_at_zero else inputs.c0,
                dhn=inputs.dhn if last else None, dcn=inputs.dcn if last else None,
            )  # fmt: skip
            results = problems.run(problem.without(option), part)
            parts.append(results)
            for name in gradients(problem):
                if name != "dx" and not (starts_at_zero and name in ("dh0", "dc0")):
                    sums[name] = sums.get(name, 0) + results[name]
            if last:
                assert_equal_bits(*({n: r[n] for n in ("hn", "cn") if n in r} for r in (whole, results)))
        for name in ("y", "dx"):
            assert np.array_equal(whole[name], np.concatenate([part[name] for part in parts])), name
        assert_close({name: whole[name] for name in sums}, sums)


# ---- The machine -------------------------------------------------------------------------------------------


SHARED = "T20,N40,I16,H64"  # enough work that no kernel keeps it to one thread


def subnormals_live(dtype: type) -> bool:
    """Whether this thread's arithmetic makes and takes subnormal numbers."""
    half, tiny = dtype(0.5), np.finfo(dtype).tiny
    return bool(tiny * half != 0) and bool((tiny * half) * dtype(4) == tiny * dtype(2))


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_subnormals_are_flushed_and_the_callers_mode_kept(cell: str, dtype: str, arch: str) -> None:
    """Gradients too small for a normal number become 0 on every thread; the caller's subnormals live on."""
    problem = Problem.parse(f"{cell}:{SHARED}:{dtype}:h0")
    limits = np.finfo(problems.DTYPES[dtype])
    inputs = problems.draw(problem)
    for name in ("dy", "dhn", "dcn"):
        if (a := getattr(inputs, name)) is not None:
            a *= limits.tiny / 16
            assert np.abs(a).max() > 0

    def compute() -> None:
        assert subnormals_live(limits.dtype.type)
        results = problems.run(problem, inputs, num_threads=2)
        assert subnormals_live(limits.dtype.type)
        for name in gradients(problem):
            assert not results[name].any(), name

    compute()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(compute).result()


def test_calls_from_several_threads(arch: str) -> None:
    texts = [f"{cell}:{SHARED}:f32:h0" for cell in CELLS]
    work = [(problem, problems.draw(problem)) for problem in map(Problem.parse, texts)] * 8
    expected = [problems.run(*w, num_threads=1) for w in work[: len(CELLS)]] * 8
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda w: problems.run(*w, num_threads=2), work), expected):
            assert_equal_bits(got, want)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # by JAX, if the tests of the suite imported it
def test_fork_after_threads(arch: str) -> None:
    """A child of a process that has used several threads can use several threads."""
    problem = Problem.parse(f"lstm:{SHARED}:f32:train")
    inputs = problems.draw(problem)
    expected = problems.run(problem, inputs, num_threads=2)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert_equal_bits(problems.run(problem, inputs, num_threads=2), expected)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert ended[1] == 0, "the child failed"
