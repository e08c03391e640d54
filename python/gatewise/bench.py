"""Measures layers against their peers, and says how near they come to what the machine can do.

A measurement verifies first: every party's answer is held to the same computation in float64. Then all parties take
turns, window by window, so that they meet the same machine, together with a loop of nothing but multiply-adds, whose
rate is the peak that no kernel can pass. What is reported are medians over the rounds: times, ratios of windows of
the same round, and the share of the peak.
"""

from __future__ import annotations

import csv
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from functools import cache, lru_cache
from math import exp, log, sqrt
from pathlib import Path
from typing import Any, NamedTuple, Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from . import __version__, _core, check
from .backends import available_cores
from .peers import OURS, PEERS, NumPy, Ours, Party, Reference
from .problems import DTYPES, GATES, Inputs, Problem, draw

Array = NDArray[Any]

WINDOW = 0.03  # seconds of steps between two looks at the clock
ROUNDS = 9
PAUSE = 0.01  # between windows: a pool that spins while it waits for work must have gone to sleep
SLOW = 2.5  # times our time: a party that takes so long, and long windows, is measured on every third round
BUSY = 0.15  # a spread above this says that the machine was doing something else as well

# ---- Named sets --------------------------------------------------------------------------------------------


class Set(NamedTuple):
    """Problems that belong together, and where their shapes come from."""

    origin: str
    problems: list[Problem]


def _all(cells: str, dtypes: str, options: str, shapes: str) -> list[Problem]:
    """Every combination of words."""
    return [
        Problem.parse(f"{cell}:{shape}:{dtype}:{option}")
        for dtype in dtypes.split()
        for cell in cells.split()
        for option in options.split()
        for shape in shapes.split()
    ]


_SMALL = "T1,N1,I8,H8 T64,N1,I32,H32 T64,N16,I32,H64 T256,N8,I16,H64 T1000,N1,I40,H128"
_LARGE = "T64,N32,I64,H128 T128,N64,I64,H128 T64,N32,I128,H256 T64,N64,I256,H512"
_LARGEST = "T32,N64,I512,H1024"
_GRID = f"{_SMALL} {_LARGE}"
_BATCHES = "T64,N16,I32,H64 T256,N8,I16,H64 " + _LARGE

SETS = {
    "grid": Set(
        "from one step of one sequence to H = 1024; the shapes on which the kernels were designed",
        _all("lstm", "f32", "train nodx infer", f"{_GRID} {_LARGEST}")
        + _all("gru", "f32", "train", f"{_GRID} {_LARGEST}")
        + _all("gru", "f32", "infer", _GRID)
        + _all("lstm", "f32", "call", "T1,N1,I8,H8")
        + _all("rnn_tanh", "f32", "train", f"{_GRID} {_LARGEST}")
        + _all("rnn_relu", "f32", "train", "T64,N16,I32,H64 T64,N32,I128,H256")
        + _all("lstm gru", "f64", "train", _GRID),
    ),
    "half": Set(
        "the grid's batches with unequal lengths that fill half of them",
        _all("lstm gru", "f32", "half", _BATCHES),
    ),
    "stream": Set(
        "one step a call for one sequence: control loops, live audio, bedside monitors",
        _all("lstm gru", "f32", "stream", "T64,N1,I64,H64 T64,N1,I128,H128 T64,N1,I256,H256")
        + _all("rnn_tanh", "f32", "stream", "T64,N1,I64,H64"),
    ),
    "clinical": Set(
        "hourly intensive-care records: 48 hours of 37 variables (PhysioNet/CinC Challenge 2012), this project's study "
        "of the Challenge of 2019 (H = 100, I = 111), two weeks of 76 features (the MIMIC-III benchmark's LSTM)",
        _all("lstm gru", "f32", "train", "T48,N64,I37,H64 T40,N64,I111,H100 T336,N8,I76,H128")
        + _all("lstm", "f32", "half", "T40,N64,I111,H100"),
    ),
    "speech": Set(
        "10 ms frames of 40 or 80 filter banks: a second for keyword spotting (Zhang et al., Hello Edge), five for a "
        "recogniser's encoder of H = 320 (ESPnet's BLSTM), frame by frame alone",
        _all("gru", "f32", "train", "T98,N100,I40,H154")
        + _all("lstm", "f32", "train", "T500,N16,I80,H320")
        + _all("lstm", "f32", "infer", "T500,N1,I80,H320"),
    ),
    "rl": Set(
        "IMPALA (20 steps, 32 actors, H = 256), R2D2 (80 steps, 64 sequences, H = 512), recurrent PPO "
        "(128 steps, 8 environments)",
        _all("lstm", "f32", "train", "T20,N32,I256,H256 T80,N64,I512,H512 T128,N8,I64,H64")
        + _all("gru", "f32", "train", "T128,N8,I64,H64"),
    ),
    "charlm": Set(
        "char-rnn's defaults (50 characters, 50 sequences, 65 letters, H = 128) and its larger models (H = 512), "
        "Penn Treebank's small and medium word models (20 and 35 steps, 20 sequences, H = 200 and 650)",
        _all("lstm", "f32", "train", "T50,N50,I65,H128 T50,N50,I65,H512 T20,N20,I200,H200 T35,N20,I650,H650")
        + _all("rnn_tanh", "f32", "train", "T50,N50,I65,H128"),
    ),
    "forecasting": Set(
        "DeepAR on hourly electricity (192 steps, H = 40), M4-like monthly windows (H = 64), LSTNet's GRU on a week of "
        "hours (H = 100)",
        _all("lstm", "f32", "train", "T192,N64,I8,H40 T36,N128,I2,H64")
        + _all("gru", "f32", "train", "T168,N128,I100,H100"),
    ),
    "benchdnn": Set(
        "oneDNN's tests/benchdnn/inputs/rnn, shapes_training and shapes_inference (t T, mb N, sic I, dhc H; their "
        "single layers up to H = 1024): GNMT, the PyTorch and PaddlePaddle cases, DeepSpeech 2's smaller one",
        _all("lstm", "f32", "train", "T1,N128,I512,H512 T50,N64,I500,H500 T629,N128,I128,H128")
        + _all("lstm", "f32", "infer", "T30,N1,I512,H512 T1,N1,I2048,H1024 T50,N1,I500,H500 T629,N1,I128,H128")
        + _all("gru rnn_tanh", "f32", "infer", "T100,N1,I760,H760"),
    ),
    "odd": Set(
        "H that is no multiple of a register, N that is no multiple of a tile, I larger than H",
        _all("lstm", "f32", "train", "T50,N7,I3,H17 T50,N48,I129,H100 T50,N24,I301,H33")
        + _all("lstm gru rnn_tanh", "f32", "train", "T50,N24,I13,H50 T50,N31,I20,H250"),
    ),
    "powers": Set(
        "I = H = 2^k, where arrays of the same alignment compete for the same places of a cache",
        _all("lstm", "f32", "train", " ".join(f"T32,N32,I{H},H{H}" for H in (32, 64, 128, 256, 512)))
        + _all("gru", "f32", "train", "T32,N32,I64,H64 T32,N32,I256,H256"),
    ),
    "long": Set(
        "up to 10,000 steps: waveforms, logs, genomes",
        _all("lstm", "f32", "train", "T3000,N4,I8,H64 T10000,N1,I8,H64 T10000,N4,I8,H32")
        + _all("gru rnn_tanh", "f32", "train", "T10000,N1,I8,H64"),
    ),
    "features": Set(
        "what leaves other libraries' fast path, beside the plain layer of the same size: options, what the tape "
        "keeps, cells",
        _all("lstm gru", "f32", "half packed reset zoneout mask batch strided states checkpoints", "T64,N32,I64,H128")
        + _all("lstm", "f32", "clip project", "T64,N32,I64,H128")
        + _all("lstm_peephole lstm_coupled lstm_norm gru_reset_before gru_norm indrnn_relu indrnn_tanh", "f32", "train",
               "T64,N32,I64,H128")
        + _all("lstm", "f32", "half reset zoneout states checkpoints", "T64,N16,I32,H64 T64,N32,I128,H256")
        + _all("lstm_norm gru_norm", "f32", "train", "T64,N16,I32,H64 T64,N32,I128,H256")
        + _all("lstm_peephole lstm_norm gru_reset_before", "f32", "stream", "T64,N1,I64,H128"),
    ),
    "stress": Set(
        "numbers that make hardware stumble: subnormal gradients, saturated gates, a NaN",
        _all("lstm gru rnn_tanh", "f32", "subnormal saturated nan", "T64,N16,I32,H64")
        + _all("lstm", "f32", "subnormal", "T64,N32,I64,H128"),
    ),
    "scaling": Set(
        "one size at a time away from T = 64, N = 32, I = 64, H = 128",
        list(dict.fromkeys(
            _all("lstm", "f32", "train", " ".join(f"T{T},N32,I64,H128" for T in (1, 4, 16, 64, 256, 1024)))
            + _all("lstm", "f32", "train", " ".join(f"T64,N{N},I64,H128" for N in (1, 2, 4, 8, 16, 64, 128)))
            + _all("lstm", "f32", "train", " ".join(f"T64,N32,I{I},H128" for I in (1, 8, 32, 128, 256, 512)))
            + _all("lstm", "f32", "train", " ".join(f"T64,N32,I64,H{H}" for H in (8, 16, 32, 64, 256, 512)))
        )),
    ),
}  # fmt: skip


def select(names: Iterable[str], party: str = Ours.name) -> list[tuple[str, Problem]]:
    """The (set, problem) pairs of names of sets and of problem strings; a problem of no set has the set "". Of a set
    those that this party of ours runs; a problem that was named it must run."""
    chosen = []
    for name in names:
        if ":" in name:
            chosen.append(("", problem := Problem.parse(name)))
            if reason := OURS[party].refuses(problem):
                raise ValueError(f"{problem}: {party} runs {reason}")
        elif name in SETS:
            chosen += [(name, problem) for problem in SETS[name].problems if OURS[party].refuses(problem) is None]
        else:
            raise ValueError(f"{name!r} is neither a problem, as lstm:T64,N32,I64,H128:f32:train, nor a set; "
                             f"the sets are {', '.join(SETS)}")  # fmt: skip
    return chosen


# ---- What a problem costs ----------------------------------------------------------------------------------


def flops(problem: Problem, inputs: Inputs) -> float:
    """Multiplications and additions of the products: forward 2 G H (I + R) a row, and 2 R H of a projection; backward
    twice that, less the part that only the gradient of x needs. Neither the cells' own arithmetic nor what is computed
    a second time is counted."""
    rows, I, H, R = _rows(problem, inputs), problem.I, problem.H, problem.R
    of_h: int = GATES[problem.cell] * H * R * _core.cells[problem.cell]["product"] + R * H * (
        "project" in problem.options
    )
    of_x = GATES[problem.cell] * H * I
    passes: int = (3 * of_h + (3 - ("nodx" in problem.options)) * of_x) if problem.trains else of_h + of_x
    return 2.0 * rows * passes


def least_bytes(problem: Problem, inputs: Inputs) -> float:
    """Bytes that must move even with an endless cache: every argument and result once, the tape out and in again;
    when streaming, the weights at every step. Biases and states of a layer are not counted."""
    cell, (T, I, H, R) = _core.cells[problem.cell], (problem.T, problem.I, problem.H, problem.R)
    weights = cell["G"] * H * (I + R * cell["product"]) + cell["U"] * H + R * H * ("project" in problem.options)
    rows = _rows(problem, inputs)
    numbers = rows * (I + R) + weights * (T if "stream" in problem.options else 1)
    if problem.trains:
        few = {"states": cell["has_c"], "checkpoints": 0}
        kept = next((few[save] for save in few if save in problem.options), cell["S"] + cell["has_c"])
        numbers += rows * (I * ("nodx" not in problem.options) + R) + weights
        numbers += 2 * rows * kept * H
    return float(numbers * np.dtype(DTYPES[problem.dtype]).itemsize)


def _rows(problem: Problem, inputs: Inputs) -> int:
    """Steps of all sequences together."""
    if inputs.batch_sizes is not None:
        return int(inputs.batch_sizes.sum())
    return problem.T * problem.N if inputs.lengths is None else int(inputs.lengths.sum())


# ---- Verification ------------------------------------------------------------------------------------------


class WrongAnswer(ValueError):
    """A party's results are not those of the problem."""


@lru_cache(maxsize=2)
def _truth(problem: Problem) -> dict[str, Array]:
    """The results in float64: NumPy's loop, which shares no line with the kernels; the reference for other cells."""
    inputs = draw(problem).astype(np.float64)
    whole = problem if problem.trains else replace(problem, options=problem.options - {"stream", "call"} | {"infer"})
    return (Reference if NumPy.refuses(whole) else NumPy)(whole, inputs, 1).results()


def verify(problem: Problem, party: str, results: dict[str, Array], truth: dict[str, Array] | None = None) -> None:
    """Raise WrongAnswer unless every result is within the bound of `gatewise check` of the float64 computation.

    A bound is relative to the largest of its kind: outputs, gradients by the input and the state, sums over all rows
    (weights and biases), which round once a row more. Gradients also owe an eps to the largest that came in, since
    1 - s of a saturated gate is only known to that, and what underflows on the way is allowed to be 0.
    """
    truth = _truth(problem) if truth is None else truth
    absent = {"y"} if not problem.trains else {"y", *({"dw_ih", "dw_hh"} & truth.keys())}
    if absent := absent - results.keys():
        raise WrongAnswer(f"{problem}: {party} shows no {', '.join(sorted(absent))}")
    dtype, sizes = np.dtype(DTYPES[problem.dtype]).name, (problem.T, problem.N, problem.I, problem.H)
    tiny, rows = float(np.finfo(dtype).tiny), problem.T * problem.N
    largest_in = 4.0 * (1e-36 if "subnormal" in problem.options else 1.0)
    for name, want in truth.items():
        if name not in results:
            continue
        got = results[name]
        if got.shape != want.shape:
            raise WrongAnswer(f"{problem}: {name} of {party} has the shape {got.shape}; expected {want.shape}")
        kind = _kind(name)
        bound = check.bound(problem.cell, dtype, sizes, name)
        scale = max(_largest(a) for other, a in truth.items() if _kind(other) == kind)
        floor = 0.0
        if kind:
            terms = GATES[problem.cell] * problem.H + (rows if kind == "sum" else 0)
            bound *= 1.0 + (sqrt(rows) / 8.0 if kind == "sum" else 0.0)
            floor = np.finfo(dtype).eps * largest_in + 8.0 * tiny * sqrt(terms)
        lost = np.isnan(want)
        if not np.array_equal(np.isnan(got), lost):
            raise WrongAnswer(f"{problem}: {name} of {party} has its NaNs in other places")
        error = float(np.abs(np.where(lost, 0.0, got) - np.where(lost, 0.0, want)).max(initial=0.0))
        if not (error <= bound * scale + floor):
            raise WrongAnswer(
                f"{problem}: {name} of {party} is off by {error:.3g}, more than {bound * scale + floor:.3g}"
            )


def _kind(name: str) -> str:
    """ "" for an output, else which kind of gradient."""
    return "" if not name.startswith("d") else "sum" if name in check.SUMS else "input"


def _largest(array: Array) -> float:
    return float(np.abs(np.where(np.isnan(array), 0.0, array)).max(initial=0.0))


# ---- Measuring ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Ours on one problem against one other party. Times are medians over the rounds, spreads half the distance
    between the quartiles as a share of the median, shares are of the whole time."""

    set: str
    problem: str
    threads: int
    ms: float
    spread: float
    gflops: float
    peak_gflops: float  # of one core, measured between the windows
    peak_share: float  # of all the threads' peaks together
    intensity: float  # flops per byte that has to move
    products: Optional[float]  # shares of the time: in matrix products,
    cells: Optional[float]  # in the cells' functions,
    other: Optional[float]  # in the rest of the kernels,
    call: Optional[float]  # outside of the kernels: Python, allocation
    against: str  # a peer, "functional", "plain", "1 thread"; "" alone
    against_ms: Optional[float]
    against_spread: Optional[float]
    ratio: Optional[float]  # median of (against / ours)
    note: str
    mb: Optional[float] = None  # memory that a step needs besides its arguments and weights: ours,
    against_mb: Optional[float] = None  # theirs


ROW = [field.name for field in fields(Row)]


_FEATURES = ("reset", "reset0", "mask", "zoneout", "expected", "clip", "project", "batch", "packed", "strided")


def _plain(problem: Problem) -> Problem:
    """What a problem's cost is compared with."""
    plain = problem.without("subnormal", "saturated", "nan", "half", "lengths", "states", "checkpoints", *_FEATURES)
    return replace(plain, cell=_plain_cell(problem.cell))


def _plain_cell(cell: str) -> str:
    kind, _, variant = cell.partition("_")
    return f"rnn_{variant}" if kind == "indrnn" else cell if kind == "rnn" else kind


class Timed(Protocol):
    """What can be timed: a step, and what is entered around a run of steps."""

    def step(self) -> Any: ...

    def window(self) -> AbstractContextManager[Any]: ...


def seconds_a_call(party: Timed, calls: int) -> float:
    """From one window of so many calls, after a pause."""
    step = party.step
    time.sleep(PAUSE)
    with party.window():
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(calls):
                step()
            return (time.perf_counter() - start) / calls
        finally:
            if collecting:
                gc.enable()


def calls_of(party: Timed, window: float) -> tuple[int, float]:
    """Calls that fill a window, and seconds a call."""
    calls = 1
    while (taken := calls * seconds_a_call(party, calls)) < window:
        calls = max(calls + 1, int(calls * min(10.0, 1.2 * window / taken)))
    return calls, taken / calls


class Measurement:
    """One problem, ours and the others', ready to be timed round by round: everything built and verified.

    `party` is which of `OURS` is measured: the functional API, or an adapter. Besides `peers` more parties of ours may
    run. Beside the functional API: "plain", the same problem with ordinary numbers, every sequence full, and nothing
    that the plain cell of its kind does not have; "1 thread", where it runs on more. Beside an adapter: "functional",
    the same problem without it.

    Raises:
        WrongAnswer: ours is wrong. A peer that is wrong is left out, and `notes` says so.
        ValueError: there is nothing to measure.
    """

    def __init__(
        self, problem: Problem, peers: Sequence[str] = (), threads: int = 1, window: float = WINDOW,
        party: str = Ours.name,
    ) -> None:  # fmt: skip
        if min(problem.T, problem.N, problem.I, problem.H) < 1:
            raise ValueError(f"{problem}: expected sizes of 1 or more; there is nothing to measure")
        self.problem, self.threads = problem, threads
        self.inputs = draw(problem)
        self.notes: list[str] = []
        self.parties: dict[str, Party] = {"ours": OURS[party](problem, self.inputs, threads)}
        self._verify("ours", problem)
        for name in peers:
            if PEERS[name].refuses(problem) is None:
                self.parties[name] = PEERS[name](problem, self.inputs, threads)
                try:
                    self._verify(name, problem)
                except WrongAnswer as error:
                    self.notes.append(f"left out: {error}")
                    del self.parties[name]
        plain = _plain(problem)
        if party != Ours.name:
            self.parties["functional"] = Ours(problem, self.inputs, threads)
            self._verify("functional", problem)
        elif plain != problem:
            self.parties["plain"] = Ours(plain, draw(plain), threads)
            self._verify("plain", plain)
        if party == Ours.name and threads > 1:
            self.parties["1 thread"] = Ours(problem, self.inputs, 1)
        self.turns = 0
        self.calls, seconds = {}, {}
        for name in self.parties:
            self.calls[name], seconds[name] = calls_of(self.parties[name], window)
        self.slow = {name for name, taken in seconds.items() if taken > max(4 * window, SLOW * seconds["ours"])}

    def _verify(self, name: str, problem: Problem) -> None:
        with self.parties[name].window():
            results = self.parties[name].results()
        verify(problem, self.parties[name].name, results)

    def window(self, name: str) -> float:
        """Seconds a call of one party, from one window, after a pause."""
        return seconds_a_call(self.parties[name], self.calls[name])

    def peak(self) -> float:
        """Multiply-adds of one core in a second, as flops, right now."""
        return _core.fma_rate(_core.choose_arch(), np.dtype(DTYPES[self.problem.dtype]).name, 0.005)

    def round(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Seconds a call of each party (or of these), from one window each, and the peak. A slow party sits out two
        rounds of three."""
        names = [*(self.parties if names is None else names)]
        taking_part = names if self.turns % 3 == 0 else [name for name in names if name not in self.slow]
        self.turns += 1
        return {**{name: self.window(name) for name in taking_part}, "peak": self.peak()}

    def rows(self, rounds: Sequence[dict[str, float]], name: str = "") -> list[Row]:
        """What the rounds say: a row for each other party, or one row alone."""
        column = {party: np.array([r.get(party, np.nan) for r in rounds]) for party in rounds[0]}
        ours = column["ours"]
        work = flops(self.problem, self.inputs)
        seconds = float(np.median(ours))
        spreads = {party: _spread(times) for party, times in column.items()}
        busy = [f"{party} ±{spread:.0%}" for party, spread in spreads.items() if spread > BUSY]
        notes = self.notes + [f"busy: {', '.join(busy)}"] * bool(busy)
        shares = self.phases()
        alone = Row(
            name, str(self.problem), self.threads, 1e3 * seconds, spreads["ours"], work / seconds / 1e9,
            float(np.median(column["peak"])) / 1e9, float(np.median(work / ours / column["peak"])) / self.threads,
            work / least_bytes(self.problem, self.inputs), *shares, "", None, None, None, "; ".join(notes),
        )  # fmt: skip
        return [
            replace(
                alone, against=party, against_ms=1e3 * float(np.nanmedian(times)), against_spread=spreads[party],
                ratio=float(np.nanmedian(times / ours)),
            )
            for party, times in column.items() if party not in ("ours", "peak")
        ] or [alone]  # fmt: skip

    def phases(self) -> tuple[Optional[float], Optional[float], Optional[float], Optional[float]]:
        """Shares of a step's time: products, cells, the rest of the kernels, outside of them. Looking at the clock
        inside a kernel takes time as well, so these are shares of steps of their own."""
        party = self.parties["ours"]
        if not isinstance(party, Ours) or not (rate := _tick_rate()) or party.ticks() is None:
            return None, None, None, None
        shares = []
        for _ in range(min(self.calls["ours"], 9)):
            start = time.perf_counter()
            ticks = party.ticks()
            assert ticks is not None
            shares.append(ticks / rate / (time.perf_counter() - start))
        products, cells, kernels = (float(min(share, 1.0)) for share in np.median(shares, axis=0))
        return products, cells, max(kernels - products - cells, 0.0), 1.0 - kernels


def _spread(times: Array) -> float:
    low, middle, high = np.nanpercentile(times, [25, 50, 75])
    return float((high - low) / 2 / middle)


@cache
def _tick_rate() -> float:
    """Ticks of the kernels' clock in a second, from a call so long that nearly all of it is kernel; 0 without one."""
    problem = Problem.parse("lstm:T256,N32,I64,H128:f32:infer")
    party = Ours(problem, draw(problem), 1)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        ticks = party.ticks()
        assert ticks is not None  # no stream
        rates.append(float(ticks[2]) / (time.perf_counter() - start))
    return max(rates)


def measure(
    problem: Problem, peers: Sequence[str] = (), threads: int = 1, rounds: int = ROUNDS, name: str = "",
    window: float = WINDOW, party: str = Ours.name,
) -> list[Row]:  # fmt: skip
    """Verify, time, and report one problem: a row for each other party, or one row alone."""
    measurement = Measurement(problem, peers, threads, window, party)
    return measurement.rows([measurement.round() for _ in range(rounds)], name)


def with_memory(rows: Sequence[Row], peers: Iterable[str], party: str = Ours.name) -> list[Row]:
    """The rows of one problem, with the memory that a step takes: ours and these peers'."""
    problem = Problem.parse(rows[0].problem)
    ours = memory(problem, party)
    return [
        replace(row, mb=ours, against_mb=memory(problem, row.against) if row.against in peers else None) for row in rows
    ]


# ---- Memory ------------------------------------------------------------------------------------------------


def memory(problem: Problem, party: str) -> float | None:
    """MB that a fresh process grows by, at its highest, over the first step of a problem whose arrays and weights it
    already has; None where the system does not say (Linux does). `party` is a name of `OURS` or of `PEERS`."""
    code = f"from gatewise import bench; print(bench._growth({str(problem)!r}, {party!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise OSError(f"{problem}: measuring the memory of {party} failed: {done.stderr.strip().splitlines()[-1:]}")
    text = done.stdout.split()[-1]
    return None if text == "None" else int(text) / 1e6


def _growth(text: str, name: str) -> int | None:
    import ctypes

    kind = (OURS | PEERS)[name]
    tiny = replace(Problem.parse(text), T=2, N=2, I=3, H=4)
    warm = kind(tiny, draw(tiny), 1)  # what a library loads and allocates once is not the step's
    problem = Problem.parse(text)
    party = kind(problem, draw(problem), 1)
    with warm.window():
        warm.step()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    with party.window():
        kept = party.step()
    growth = _status("VmHWM") - before
    del kept
    return growth


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[field].split()[0]) * 1024


# ---- Context, tables, files --------------------------------------------------------------------------------


def cpu_model() -> str:
    """The processor's own name for itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree that this package runs from, "+" if it was changed; its version elsewhere."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here.parent), *args], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not just any repository around an installed package
        root = git("rev-parse", "--show-toplevel")
        changed = git("-C", root, "status", "--porcelain", "--", "cpp", "src", "python")
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return __version__


def copy_rate(megabytes: int = 128) -> float:
    """GB/s, read and written together, of copying an array that is larger than most caches, on one thread."""
    source = np.ones(megabytes << 17)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * source.nbytes / min(seconds)


def context(peers: Sequence[str], party: str = Ours.name) -> dict[str, Any]:
    """Where and with what rows are measured: the columns that every row of a run shares."""
    held = [
        f"{name}={os.environ[name]}" for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ
    ]
    others = [OURS[party], *(PEERS[name] for name in peers if not name.startswith(("torch-", "numpy")))]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": cpu_model(),
        "cores": available_cores(),
        "copy_gbs": copy_rate(),
        "arch": _core.choose_arch(),
        "compiler": getattr(_core, "compiler", "unknown"),
        "commit": commit(),
        "versions": ", ".join(
            [
                f"gatewise {__version__}", f"numpy {np.__version__}", f"python {platform.python_version()}",
                *dict.fromkeys(other.version() for other in others if other.packages), *held,
            ]
        ),
    }  # fmt: skip


def installed(names: Sequence[str] | None, party: str = Ours.name) -> list[str]:
    """The peers to run: those named, which must be there, or of this party's usual ones those that are.

    Raises:
        ValueError: a name that is no peer's, or no party's. ImportError: a peer, or what the party needs, is missing.
    """
    if party not in OURS:
        raise ValueError(f"party: expected one of {', '.join(OURS)}; got {party!r}")
    if reason := OURS[party].missing():
        raise ImportError(reason)
    if names is None:
        return [name for name in OURS[party].rivals if PEERS[name].missing() is None]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"against: expected some of {', '.join(PEERS)}; got {name!r}")
        if reason := PEERS[name].missing():
            raise ImportError(reason)
    return list(names)


class Table:
    """The rows as text, a line for each problem and number of threads."""

    def __init__(self, peers: Sequence[str], party: str = Ours.name) -> None:
        self.against = [*peers, *(("plain", "1 thread") if party == Ours.name else ("functional",))]

    def header(self) -> str:
        shares = "peak  products cells other call"
        return f"{'problem':<44} thr         ms    ±  GFLOP/s {shares}  " + "  ".join(f"{a:>8}" for a in self.against)

    def line(self, rows: Sequence[Row]) -> str:
        row, ratios = rows[0], {row.against: row.ratio for row in rows}
        shares = [_percent(share) for share in (row.products, row.cells, row.other, row.call)]
        text = f"{row.problem:<44} {row.threads:>3} {row.ms:>10.4f} {row.spread:>4.0%} {row.gflops:>8.1f}"
        text += f" {row.peak_share:>4.0%}  {shares[0]:>8} {shares[1]:>5} {shares[2]:>5} {shares[3]:>4}"
        against = [f"{r:7.2f}x" if (r := ratios.get(name)) else f"{'-':>8}" for name in self.against]
        return "  ".join([text, *against]) + (f"  {row.note}" if row.note else "")

    def summary(self, rows: Sequence[Row]) -> Iterator[str]:
        for name in self.against:
            ratios = [row.ratio for row in rows if row.against == name and row.ratio]
            if ratios:
                mean = exp(sum(map(log, ratios)) / len(ratios))
                yield f"{name} / ours: geometric mean {mean:.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        busy = sum("busy" in row.note for row in rows)
        if busy:
            yield (f"busy machine: {busy} of {len(rows)} rows spread by more than {BUSY:.0%}; "
                   "trust them less, or measure again when nothing else runs")  # fmt: skip


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def write_json(path: str | Path, shared: dict[str, Any], rows: Sequence[Row]) -> None:
    document = {**shared, "rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


class CsvFile:
    """A file that is whole after every problem, so that a run that is cut short has kept what it measured.

    With `keep`, rows that are already there stay, but for those of a problem (in its set, at its arch and threads)
    that is measured again.
    """

    def __init__(self, path: str | Path, shared: dict[str, Any], keep: bool = False) -> None:
        self.path, self.shared = Path(path), shared
        self.rows = read_csv(path) if keep and self.path.exists() else []
        self._save()  # a path that cannot be written to is better known now

    def write(self, rows: Sequence[Row]) -> None:
        new = [{**asdict(row), **self.shared} for row in rows]
        replaced = {_key(row) for row in new}
        self.rows = [row for row in self.rows if _key(row) not in replaced] + new
        self._save()

    def _save(self) -> None:
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            with open(beside, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [*ROW, *self.shared], lineterminator="\n", restval="")
                writer.writeheader()
                for row in self.rows:
                    writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)


def _key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    return row["arch"], row["set"], row["problem"], int(row["threads"])


_TEXTS = ("set", "problem", "against", "note", "date", "machine", "arch", "compiler", "commit", "versions")


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that `CsvFile` wrote: numbers as numbers, None where there is none.

    Raises:
        ValueError: it is another file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if lacking := {*ROW, "arch", "copy_gbs"} - {*(reader.fieldnames or ())}:
            raise ValueError(f"{path}: expected the columns of gatewise bench; it lacks {', '.join(sorted(lacking))}")
        return [{name: _value(name, text) for name, text in row.items()} for row in reader]


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    return int(text) if name in ("threads", "cores") else float(text) if text else None


# ---- Pictures ----------------------------------------------------------------------------------------------

# Okabe and Ito's colours, and a marker each, for eyes and printers that see no colours.
LOOKS: dict[str, tuple[str, str]] = {
    "ours": ("black", "o"), "torch": ("#D55E00", "s"), "torch-generic": ("#E69F00", "D"),
    "torch-cell": ("#CC79A7", "v"), "onnxruntime": ("#0072B2", "^"), "jax": ("#009E73", "P"), "keras": ("#56B4E9", "X"),
    "numpy": ("#777777", "<"), "reference": ("#AAAAAA", ">"),
}  # fmt: skip


def figure(width: float, height: float) -> Any:
    """An empty picture in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the pictures need matplotlib: pip install "gatewise[bench]"') from error
    picture = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def plot(rows: Sequence[dict[str, Any]], folder: str | Path) -> list[Path]:
    """Draw roofline.png and, where there are peers, ratio.png from rows as `read_csv` returns them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"roofline.png": _roofline(rows)}
    if any(row["against"] in PEERS and row["ratio"] for row in rows):
        pictures["ratio.png"] = _ratios(rows)
    for name, picture in pictures.items():
        picture.savefig(folder / name, dpi=120, metadata={"Software": None})
    return [folder / name for name in pictures]


def family(problem: Problem) -> str:
    """What problems have in common that only differ in size: lstm f32 train."""
    return f"{problem.cell} {problem.dtype} {problem.kind}"


def _roofline(rows: Sequence[dict[str, Any]]) -> Any:
    """Flops a second of a core over flops per byte, under the two roofs of each dtype."""
    once = list({(row["arch"], row["problem"], row["threads"]): row for row in rows}.values())
    points: dict[str, list[tuple[float, float]]] = {}
    for row in once:
        place = row["intensity"], row["gflops"] / row["threads"]
        points.setdefault(family(Problem.parse(row["problem"])), []).append(place)
    picture = figure(8, 5.5)
    axes = picture.add_subplot()
    colours = dict(zip(("rnn_tanh", "rnn_relu", "lstm", "gru"), [colour for colour, _ in LOOKS.values()][1:]))
    for name, pairs in sorted(points.items()):
        cell, dtype, kind = name.split()
        marker, colour = {"train": "o", "infer": "^", "call": "v", "stream": "s"}[kind], colours[_plain_cell(cell)]
        inside = colour if dtype == "f32" else "none"
        axes.scatter(*zip(*pairs), s=22, marker=marker, facecolor=inside, edgecolor=colour, label=name, alpha=0.8)
    x = np.geomspace(min(r["intensity"] for r in once) / 2, max(r["intensity"] for r in once) * 2, 200)
    for (arch, dtype), style in zip(
        sorted({(row["arch"], Problem.parse(row["problem"]).dtype) for row in once}), ("-", "--", "-.", ":") * 3
    ):
        group = [r for r in once if (r["arch"], Problem.parse(r["problem"]).dtype) == (arch, dtype)]
        peak, copy = (float(np.median([r[name] for r in group])) for name in ("peak_gflops", "copy_gbs"))
        axes.plot(x, np.minimum(peak, x * copy), style, color="black", linewidth=1,
                  label=f"{arch} {dtype}: FMA peak {peak:.0f} GFLOP/s,\nmemory {copy:.0f} GB/s")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="flops per byte that has to move at least",
             ylabel="GFLOP/s a core", title="Roofline")  # fmt: skip
    axes.grid(alpha=0.3)
    picture.legend(loc="outside right upper", fontsize=7, frameon=False)
    return picture


def _ratios(rows: Sequence[dict[str, Any]]) -> Any:
    """The peers' times over ours, a point a problem, a line for each cell, dtype and kind of work."""
    shown = [row for row in rows if row["against"] in PEERS and row["ratio"]]
    families = sorted({family(Problem.parse(row["problem"])) for row in shown}, reverse=True)
    peers = [name for name in LOOKS if any(row["against"] == name for row in shown)]
    picture = figure(8, 1.4 + 0.45 * len(families))
    axes = picture.add_subplot()
    for k, peer in enumerate(peers):
        mine = [row for row in shown if row["against"] == peer]
        y = [families.index(family(Problem.parse(row["problem"]))) for row in mine]
        offset = 0.6 * ((k + 0.5) / len(peers) - 0.5)
        colour, marker = LOOKS[peer]
        axes.scatter([row["ratio"] for row in mine], np.array(y) - offset, s=16, marker=marker, color=colour,
                     label=peer, alpha=0.75, linewidths=0)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    low, high = (end(row["ratio"] for row in shown) for end in (min, max))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 2.5 < t < 2.5 * high]
    axes.set(xscale="log", xlabel="their time / ours (right of the line: ours is faster)", yticks=range(len(families)),
             yticklabels=families, ylim=(-0.6, len(families) - 0.4))  # fmt: skip
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    picture.legend(loc="outside right upper", fontsize=8, frameon=False)
    return picture
