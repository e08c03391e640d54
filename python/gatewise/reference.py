"""The definition of the mathematics, in Numba: one pair of scalar functions per cell, and one layer.

A cell maps numbers to numbers for a single hidden unit at a single step; it knows no time, batch or memory.
The layer takes any cell through time. This is the backend "reference", and what every other backend is tested
against: plain loops, no tricks. All arithmetic is float64; float32 arrays are widened on the way in, results
rounded on the way out. With NUMBA_DISABLE_JIT=1 the same lines run as ordinary Python. Nothing is cached on
disk (Numba's cache does not recognise a function that was passed a function): a process compiles for a second
or two per cell, once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import exp, tanh
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    Function = TypeVar("Function", bound=Callable[..., Any])

    def njit(function: Function) -> Function: ...

else:
    try:
        from numba import njit
    except ImportError as error:
        raise ImportError('the reference backend needs Numba: pip install "gatewise[reference]"') from error

Array = NDArray[Any]
Maybe = Optional[Array]
Numbers = Any  # a short sequence of numbers, one per gate or per saved block: an array's column or a tuple


class State(NamedTuple):
    """The state of one hidden unit, or its gradient. A cell without c leaves it at 0."""

    h: float
    c: float


# ---- Cells -------------------------------------------------------------------------------------------------


@njit
def sigmoid(a: float) -> float:
    """1 / (1 + exp(-a)), with an exponential that cannot overflow."""
    e = exp(-abs(a))
    return 1.0 / (1.0 + e) if a >= 0.0 else e / (1.0 + e)


class Cell:
    """A step of a recurrent network for one hidden unit: values in, values out.

    forward(gx, gh, prev) -> (saved, next)
        gx, gh: one pre-activation per gate: the unit's entries of W_ih x + b_ih and of W_hh h + b_hh.
        saved:  what backward needs: the G activated gates in gate order, then S - G further numbers.
    backward(saved, prev, next, dnext) -> (dgx, dgh, dprev)
        dnext:  gradient with respect to `next`.
        dprev:  gradient with respect to `prev`, except for the path through gh, which the layer adds.
    """

    G: ClassVar[int]
    S: ClassVar[int]
    has_c: ClassVar[bool]
    forward: ClassVar[Callable[..., Any]]
    backward: ClassVar[Callable[..., Any]]


class RnnTanh(Cell):
    """Elman's network: h = tanh(a)."""

    G, S, has_c = 1, 1, False

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, prev: State) -> Any:
        h = tanh(gx[0] + gh[0])
        return (h,), State(h, 0.0)

    @staticmethod
    @njit
    def backward(saved: Numbers, prev: State, next: State, dnext: State) -> Any:
        h = saved[0]
        da = (dnext.h * (1.0 - h * h),)
        return da, da, State(0.0, 0.0)


class RnnRelu(Cell):
    """Elman's network with a rectifier: h = max(a, 0), its slope at 0 is 0. NaN stays NaN, both ways."""

    G, S, has_c = 1, 1, False

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, prev: State) -> Any:
        a = gx[0] + gh[0]
        h = 0.0 if a <= 0.0 else a
        return (h,), State(h, 0.0)

    @staticmethod
    @njit
    def backward(saved: Numbers, prev: State, next: State, dnext: State) -> Any:
        slope = 0.0 if saved[0] <= 0.0 else 1.0
        da = (dnext.h * slope,)
        return da, da, State(0.0, 0.0)


class Lstm(Cell):
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers, Schmidhuber and Cummins (2000).

    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g);  c = f c_prev + i g;  h = o tanh(c)
    """

    G, S, has_c = 4, 4, True

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, prev: State) -> Any:
        i = sigmoid(gx[0] + gh[0])
        f = sigmoid(gx[1] + gh[1])
        g = tanh(gx[2] + gh[2])
        o = sigmoid(gx[3] + gh[3])
        c = f * prev.c + i * g
        return (i, f, g, o), State(o * tanh(c), c)

    @staticmethod
    @njit
    def backward(saved: Numbers, prev: State, next: State, dnext: State) -> Any:
        i, f, g, o = saved[0], saved[1], saved[2], saved[3]
        tanh_c = tanh(next.c)
        dc = dnext.c + dnext.h * o * (1.0 - tanh_c * tanh_c)
        di = dc * g * i * (1.0 - i)
        df = dc * prev.c * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        do = dnext.h * tanh_c * o * (1.0 - o)
        return (di, df, dg, do), (di, df, dg, do), State(0.0, dc * f)


class Gru(Cell):
    """Cho et al. (2014) as in cuDNN and PyTorch: r scales the hidden part of n after the product with W_hh.

    r, z = sigmoid(a_r), sigmoid(a_z);  n = tanh(gx_n + r gh_n);  h = (1 - z) n + z h_prev
    """

    G, S, has_c = 3, 4, False

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, prev: State) -> Any:
        r = sigmoid(gx[0] + gh[0])
        z = sigmoid(gx[1] + gh[1])
        n = tanh(gx[2] + r * gh[2])
        return (r, z, n, gh[2]), State(n + z * (prev.h - n), 0.0)

    @staticmethod
    @njit
    def backward(saved: Numbers, prev: State, next: State, dnext: State) -> Any:
        r, z, n, gh_n = saved[0], saved[1], saved[2], saved[3]
        dn = dnext.h * (1.0 - z) * (1.0 - n * n)
        dr = dn * gh_n * r * (1.0 - r)
        dz = dnext.h * (prev.h - n) * z * (1.0 - z)
        return (dr, dz, dn), (dr, dz, dn * r), State(dnext.h * z, 0.0)


CELLS: dict[str, type[Cell]] = {"rnn_tanh": RnnTanh, "rnn_relu": RnnRelu, "lstm": Lstm, "gru": Gru}


# ---- The layer ---------------------------------------------------------------------------------------------
# A sequence is walked alone, from its first step to its last (from its last to its first when `reverse`), so
# nothing past its end is ever read. `step` counts along the walk; `t` is where in time that is.


@njit
def affine(w: Array, v: Array, b: Array, out: Array) -> None:
    """out = W v + b, with w [R,K], v [K], b and out [R]."""
    for row in range(len(out)):
        total = b[row]
        for k in range(len(v)):
            total += w[row, k] * v[k]
        out[row] = total


@njit
def add_transposed(w: Array, d: Array, out: Array) -> None:
    """out += Wᵀ d, with w [R,K], d [R], out [K]. An `out` of length 0 asks for nothing."""
    if len(out) > 0:
        for row in range(len(d)):
            for k in range(len(out)):
                out[k] += d[row] * w[row, k]


@njit
def add_outer(d: Array, v: Array, out: Array) -> None:
    """out += d vᵀ, with d [R], v [K], out [R,K]. An `out` of no rows asks for nothing."""
    for row in range(len(out)):
        for k in range(len(v)):
            out[row, k] += d[row] * v[k]


@njit
def time_of(step: int, length: int, reverse: bool) -> int:
    return length - 1 - step if reverse else step


@njit
def layer_forward(
    cell_forward: Callable[..., Any],
    x: Array,  # [T,N,I]
    w_ih: Array,  # [G·H,I]
    w_hh: Array,  # [G·H,H]
    b_ih: Array,  # [G·H]
    b_hh: Array,  # [G·H]
    lengths: Array,  # [N]
    reverse: bool,
    h: Array,  # [N,H] in: h0, out: hn
    c: Array,  # [N,H] in: c0, out: cn
    y: Array,  # [T,N,H] out: every h
    states: Array,  # [T,N,H] out: every c
    saved: Array,  # [T,N,S,H] out
) -> None:
    N, S, H = saved.shape[1:]
    gx, gh = np.empty(len(b_ih)), np.empty(len(b_hh))
    for n in range(N):
        for step in range(lengths[n]):
            t = time_of(step, lengths[n], reverse)
            affine(w_ih, x[t, n], b_ih, gx)
            affine(w_hh, h[n], b_hh, gh)
            for j in range(H):  # gate g of unit j is entry g·H + j, hence the slices [j::H]
                blocks, next = cell_forward(gx[j::H], gh[j::H], State(h[n, j], c[n, j]))
                for s in range(S):
                    saved[t, n, s, j] = blocks[s]
                y[t, n, j] = h[n, j] = next.h
                states[t, n, j] = c[n, j] = next.c


@njit
def layer_backward(
    cell_backward: Callable[..., Any],
    x: Array,  # [T,N,I]
    w_ih: Array,  # [G·H,I]
    w_hh: Array,  # [G·H,H]
    h0: Array,  # [N,H]
    c0: Array,  # [N,H]
    lengths: Array,  # [N]
    reverse: bool,
    y: Array,  # [T,N,H]
    states: Array,  # [T,N,H]
    saved: Array,  # [T,N,S,H]
    dy: Array,  # [T,N,H]
    dh: Array,  # [N,H] in: dhn, out: dh0
    dc: Array,  # [N,H] in: dcn, out: dc0
    dx: Array,  # [T,N,I] out, added to; last axis 0 if not wanted
    dw_ih: Array,  # [G·H,I] out, added to, as are the next three; no rows if not wanted
    dw_hh: Array,  # [G·H,H]
    db_ih: Array,  # [G·H]
    db_hh: Array,  # [G·H]
) -> None:
    N, H = h0.shape
    dgx, dgh = np.empty(len(w_hh)), np.empty(len(w_hh))
    for n in range(N):
        for step in range(lengths[n] - 1, -1, -1):
            t = time_of(step, lengths[n], reverse)
            t_prev = time_of(step - 1, lengths[n], reverse)
            h_prev = y[t_prev, n] if step > 0 else h0[n]
            c_prev = states[t_prev, n] if step > 0 else c0[n]
            for j in range(H):
                prev, next = State(h_prev[j], c_prev[j]), State(y[t, n, j], states[t, n, j])
                dnext = State(dy[t, n, j] + dh[n, j], dc[n, j])
                da_x, da_h, dprev = cell_backward(saved[t, n, :, j], prev, next, dnext)
                for g in range(len(da_x)):
                    dgx[g * H + j], dgh[g * H + j] = da_x[g], da_h[g]
                dh[n, j], dc[n, j] = dprev.h, dprev.c
            add_transposed(w_hh, dgh, dh[n])
            add_transposed(w_ih, dgx, dx[t, n])
            add_outer(dgx, x[t, n], dw_ih)
            add_outer(dgh, h_prev, dw_hh)
            for row in range(len(db_ih)):
                db_ih[row] += dgx[row]
            for row in range(len(db_hh)):
                db_hh[row] += dgh[row]


# ---- The backend: what gatewise.functional calls, with arguments it has checked ----------------------------


def widened(array: Maybe, *shape: int) -> Array:
    """A float64 copy the loops may write to; zeros of `shape` for what was not given."""
    return np.zeros(shape) if array is None else np.array(array, np.float64)


def forward(
    cell: str,
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    c0: Maybe,
    lengths: Maybe,
    reverse: bool,
) -> tuple[Array, Array, Maybe, Array, Maybe]:
    """One layer forward: y [T,N,H], hn and cn [N,H], saved [T,N,S,H] and every c [T,N,H], in x's dtype.

    cn and the c's are None for a cell without c. Past a sequence's end everything is 0.
    """
    maths, (T, N, _), (rows, H) = CELLS[cell], x.shape, w_hh.shape
    h, c = widened(h0, N, H), widened(c0, N, H)
    y, states, saved = np.zeros((T, N, H)), np.zeros((T, N, H)), np.zeros((T, N, maths.S, H))
    layer_forward(
        maths.forward, widened(x), widened(w_ih), widened(w_hh), widened(b_ih, rows), widened(b_hh, rows),
        np.full(N, T, np.int64) if lengths is None else lengths, reverse,
        h, c, y, states, saved,
    )  # fmt: skip
    y, h, c, saved, states = (a.astype(x.dtype, copy=False) for a in (y, h, c, saved, states))
    return (y, h, c, saved, states) if maths.has_c else (y, h, None, saved, None)


def backward(
    cell: str,
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Maybe,
    b_hh: Maybe,
    h0: Maybe,
    c0: Maybe,
    lengths: Maybe,
    reverse: bool,
    y: Array,
    saved: Array,
    states: Maybe,
    dy: Maybe,
    dhn: Maybe,
    dcn: Maybe,
    wanted: frozenset[str],
) -> dict[str, Array]:
    """The gradients named in `wanted`, out of dx dh0 dc0 dw_ih dw_hh db_ih db_hh, in x's dtype.

    y, saved and states are what forward returned; dy [T,N,H], dhn and dcn [N,H] are the gradients coming in.
    """
    (T, N, I), (rows, H) = x.shape, w_hh.shape
    grads = {
        "dx": np.zeros((T, N, I if "dx" in wanted else 0)),
        "dh0": widened(dhn, N, H),
        "dc0": widened(dcn, N, H),
        "dw_ih": np.zeros((rows if "dw_ih" in wanted else 0, I)),
        "dw_hh": np.zeros((rows if "dw_hh" in wanted else 0, H)),
        "db_ih": np.zeros(rows if "db_ih" in wanted else 0),
        "db_hh": np.zeros(rows if "db_hh" in wanted else 0),
    }
    layer_backward(
        CELLS[cell].backward, widened(x), widened(w_ih), widened(w_hh), widened(h0, N, H), widened(c0, N, H),
        np.full(N, T, np.int64) if lengths is None else lengths, reverse,
        widened(y), widened(states, T, N, H), widened(saved), widened(dy, T, N, H),
        grads["dh0"], grads["dc0"], *(grads[name] for name in ("dx", "dw_ih", "dw_hh", "db_ih", "db_hh")),
    )  # fmt: skip
    return {name: grads[name].astype(x.dtype, copy=False) for name in wanted}


def __getattr__(name: str) -> Any:
    """The functional API on this backend: reference.lstm(...) is gatewise.lstm(..., backend="reference")."""
    cell, _, part = name.partition("_")
    if cell not in ("rnn", "lstm", "gru") or part not in ("", "forward", "backward"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import functional

    function = getattr(functional, name)
    return function if part == "backward" else partial(function, backend="reference")
