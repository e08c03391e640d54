"""The definition of the mathematics, in Numba: scalar functions for each cell, and one layer.

A cell maps numbers to numbers for a single hidden unit at a single step; it knows no time, batch or memory.
The layer takes any cell through time. This is the backend "reference", and what every other backend is tested
against: plain loops, no tricks. All arithmetic is float64; float32 arrays are widened on the way in, results
rounded on the way out. With NUMBA_DISABLE_JIT=1 the same lines run as ordinary Python. Nothing is cached on
disk (Numba's cache does not recognise a function that was passed a function): a process compiles for some
seconds per cell, once.

The same lines run on complex numbers a + i b, b so small that b*b vanishes beside a: then b is carried along as
a derivative, exact to rounding (the complex step of Squire & Trapp, SIAM Review 40, 1998). Hence no branch looks
at an imaginary part, and no function is used that is not analytic.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import copysign, floor
from math import tanh as real_tanh
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Optional, TypeVar

import numpy as np
from numpy import uint64
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
Number = Any  # float, or complex with a derivative in its imaginary part
Numbers = Any  # a short sequence of numbers, one per gate or per block of weights: an array's column or a tuple

STEP = 1e-100  # of the complex step: its square is 0 beside anything
VARIANCE_FLOOR = 1e-5  # what standardising adds to the variance, as torch's and Keras' LayerNorm do


class State(NamedTuple):
    """The state of one hidden unit, or its gradient. A cell without c leaves it at 0."""

    h: Number
    c: Number


# ---- Cells -------------------------------------------------------------------------------------------------


@njit
def sigmoid(a: Number) -> Number:
    """1 / (1 + exp(-a)), with an exponential that cannot overflow."""
    if a.real >= 0.0:
        return 1.0 / (1.0 + np.exp(-a))
    e = np.exp(a)
    return e / (1.0 + e)


@njit
def tanh(a: Number) -> Number:
    """tanh of the real part, and its slope times the imaginary part. NumPy's complex tanh cancels, and overflows."""
    t = real_tanh(a.real)
    if abs(a.real) > 20.0:
        return copysign(1.0, t)  # and the slope is less than one rounding of 1
    return t + (a - a.real) * (1.0 - t * t)


@njit
def clipped(c: Number, clip: float) -> Number:
    """c limited to ±clip. NaN stays NaN."""
    return clip if c.real > clip else -clip if c.real < -clip else c


NOTHING = (0.0,)  # the gradient of per-unit weights, or of gates, that there are none of


class Cell:
    """A step of a recurrent network for one hidden unit: values in, values out.

    forward(gx, gh, unit, prev, clip) -> (gates, next)
        gx, gh: one pre-activation per gate: the unit's entries of W_ih x + b_ih and of W_hh h + b_hh; if `normed`,
            of W_ih x and W_hh h, each standardised over all its G·H numbers.
        unit:   the unit's own weights, U of them.
        clip:   the limit of |c|.
        gates:  the activated gates.
    backward(gx, gh, unit, prev, clip, gates, next, dnext) -> (dgx, dgh, dprev, dunit)
        dnext:  gradient with respect to `next`.
        dprev:  gradient with respect to `prev`, except for the path through gh, which the layer adds.

    A cell with a `middle` has a second phase. What its forward gives for next.h is not h yet, but a number `mid`
    that the layer takes through a stage that needs all units: the "product" makes of it the last gate's gh,
    W_hh mid + b_hh; the "norm" standardises it.

    output(gx, gh, unit, prev, gates, mid) -> (gates, h)
    output_backward(gx, gh, unit, prev, gates, mid, dh) -> (dgx, dgh, dprev, dunit, dmid)
        To the first four, the layer adds those of `backward`, whose dnext.h is dmid taken back through the stage.
    """

    G: ClassVar[int]
    U: ClassVar[int] = 0
    has_c: ClassVar[bool] = False
    product: ClassVar[bool] = True
    normed: ClassVar[bool] = False
    middle: ClassVar[str] = "none"
    forward: ClassVar[Callable[..., Any]]
    backward: ClassVar[Callable[..., Any]]
    output: ClassVar[Callable[..., Any]]
    output_backward: ClassVar[Callable[..., Any]]


class RnnTanh(Cell):
    """Elman's network: h = tanh(a)."""

    G = 1

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        h = tanh(gx[0] + gh[0])
        return (h,), State(h, 0.0)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        da = (dnext.h * (1.0 - next.h * next.h),)
        return da, da, State(0.0, 0.0), NOTHING


class RnnRelu(Cell):
    """Elman's network with a rectifier: h = max(a, 0), its slope at 0 is 0. NaN stays NaN, both ways."""

    G = 1

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        a = gx[0] + gh[0]
        h = 0.0 if a.real <= 0.0 else a
        return (h,), State(h, 0.0)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        da = (dnext.h * (0.0 if next.h.real <= 0.0 else 1.0),)
        return da, da, State(0.0, 0.0), NOTHING


class IndRnnTanh(Cell):
    """Li et al. (2018, arXiv 1803.04831): each unit sees only itself. h = tanh(gx + b_hh + u h_prev)."""

    G, U, product = 1, 1, False

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        h = tanh(gx[0] + gh[0] + unit[0] * prev.h)
        return (h,), State(h, 0.0)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        da = dnext.h * (1.0 - next.h * next.h)
        return (da,), (da,), State(da * unit[0], 0.0), (da * prev.h,)


class IndRnnRelu(Cell):
    """IndRNN with a rectifier: h = max(gx + b_hh + u h_prev, 0), its slope at 0 is 0."""

    G, U, product = 1, 1, False

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        a = gx[0] + gh[0] + unit[0] * prev.h
        h = 0.0 if a.real <= 0.0 else a
        return (h,), State(h, 0.0)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        da = dnext.h * (0.0 if next.h.real <= 0.0 else 1.0)
        return (da,), (da,), State(da * unit[0], 0.0), (da * prev.h,)


class Lstm(Cell):
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers, Schmidhuber and Cummins (2000).

    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o);  g = tanh(a_g);  c = f c_prev + i g;  h = o tanh(c)
    """

    G, has_c = 4, True

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        i = sigmoid(gx[0] + gh[0])
        f = sigmoid(gx[1] + gh[1])
        g = tanh(gx[2] + gh[2])
        o = sigmoid(gx[3] + gh[3])
        c = clipped(f * prev.c + i * g, clip)
        return (i, f, g, o), State(o * tanh(c), c)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        i, f, g, o = gates[0], gates[1], gates[2], gates[3]
        tanh_c = tanh(next.c)
        do = dnext.h * tanh_c * o * (1.0 - o)
        dc = dnext.c + dnext.h * o * (1.0 - tanh_c * tanh_c)
        dc = 0.0 * dc if abs(next.c.real) >= clip else dc
        di = dc * g * i * (1.0 - i)
        df = dc * prev.c * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        return (di, df, dg, do), (di, df, dg, do), State(0.0, dc * f), NOTHING


class LstmPeephole(Cell):
    """Gers and Schmidhuber (2000): the gates see c. With per-unit weights p_i, p_f, p_o:

    i = sigmoid(a_i + p_i c_prev);  f = sigmoid(a_f + p_f c_prev);  g, c, h as in the LSTM;  o = sigmoid(a_o + p_o c)
    """

    G, U, has_c = 4, 3, True

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        i = sigmoid(gx[0] + gh[0] + unit[0] * prev.c)
        f = sigmoid(gx[1] + gh[1] + unit[1] * prev.c)
        g = tanh(gx[2] + gh[2])
        c = clipped(f * prev.c + i * g, clip)
        o = sigmoid(gx[3] + gh[3] + unit[2] * c)
        return (i, f, g, o), State(o * tanh(c), c)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        i, f, g, o = gates[0], gates[1], gates[2], gates[3]
        tanh_c = tanh(next.c)
        do = dnext.h * tanh_c * o * (1.0 - o)
        dc = dnext.c + dnext.h * o * (1.0 - tanh_c * tanh_c) + do * unit[2]
        dc = 0.0 * dc if abs(next.c.real) >= clip else dc
        di = dc * g * i * (1.0 - i)
        df = dc * prev.c * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        dprev = State(0.0, dc * f + di * unit[0] + df * unit[1])
        return (di, df, dg, do), (di, df, dg, do), dprev, (di * prev.c, df * prev.c, do * next.c)


class LstmCoupled(Cell):
    """Greff et al. (2015), CIFG: what is written is forgotten, f = 1 - i. Gates i g o.

    c = c_prev + i (g - c_prev);  i, g, o, h as in the LSTM
    """

    G, has_c = 3, True

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        i = sigmoid(gx[0] + gh[0])
        g = tanh(gx[1] + gh[1])
        o = sigmoid(gx[2] + gh[2])
        c = clipped(prev.c + i * (g - prev.c), clip)
        return (i, g, o), State(o * tanh(c), c)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        i, g, o = gates[0], gates[1], gates[2]
        tanh_c = tanh(next.c)
        do = dnext.h * tanh_c * o * (1.0 - o)
        dc = dnext.c + dnext.h * o * (1.0 - tanh_c * tanh_c)
        dc = 0.0 * dc if abs(next.c.real) >= clip else dc
        di = dc * (g - prev.c) * i * (1.0 - i)
        dg = dc * i * (1.0 - g * g)
        return (di, dg, do), (di, dg, do), State(0.0, dc * (1.0 - i)), NOTHING


class LstmNorm(Cell):
    """Ba, Kiros and Hinton (2016, arXiv 1607.06450). Per unit: gains of x and h and biases, i f g o each; those of c.

    a_g = gain_x X_g + gain_h H_g + bias, X and H standardised;  i, f, g, o, c as in the LSTM;
    h = o tanh(gain C + bias), C = c standardised over the units
    """

    G, U, has_c, normed, middle = 4, 14, True, True, "norm"

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        i = sigmoid(unit[0] * gx[0] + unit[4] * gh[0] + unit[8])
        f = sigmoid(unit[1] * gx[1] + unit[5] * gh[1] + unit[9])
        g = tanh(unit[2] * gx[2] + unit[6] * gh[2] + unit[10])
        o = sigmoid(unit[3] * gx[3] + unit[7] * gh[3] + unit[11])
        c = clipped(f * prev.c + i * g, clip)
        return (i, f, g, o), State(c, c)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        i, f, g = gates[0], gates[1], gates[2]
        dc = dnext.c + dnext.h
        dc = 0.0 * dc if abs(next.c.real) >= clip else dc
        di = dc * g * i * (1.0 - i)
        df = dc * prev.c * f * (1.0 - f)
        dg = dc * i * (1.0 - g * g)
        no = 0.0 * gates[0]  # of the right type; a gate is never infinite
        dgx = (di * unit[0], df * unit[1], dg * unit[2], no)
        dgh = (di * unit[4], df * unit[5], dg * unit[6], no)
        dunit = (
            di * gx[0], df * gx[1], dg * gx[2], no, di * gh[0], df * gh[1], dg * gh[2], no, di, df, dg, no, no, no,
        )  # fmt: skip
        return dgx, dgh, State(0.0, dc * f), dunit

    @staticmethod
    @njit
    def output(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number) -> Any:
        return (gates[0], gates[1], gates[2], gates[3]), gates[3] * tanh(unit[12] * mid + unit[13])

    @staticmethod
    @njit
    def output_backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number, dh: Number
    ) -> Any:
        o, tanh_c = gates[3], tanh(unit[12] * mid + unit[13])
        do = dh * tanh_c * o * (1.0 - o)
        da = dh * o * (1.0 - tanh_c * tanh_c)
        no = 0.0 * gates[0]  # of the right type; a gate is never infinite
        dgx, dgh = (no, no, no, do * unit[3]), (no, no, no, do * unit[7])
        dunit = (no, no, no, do * gx[3], no, no, no, do * gh[3], no, no, no, do, da * mid, da)
        return dgx, dgh, State(0.0, 0.0), dunit, da * unit[12]


class Gru(Cell):
    """Cho et al. (2014) as in cuDNN and PyTorch: r scales the hidden part of n after the product with W_hh.

    r, z = sigmoid(a_r), sigmoid(a_z);  n = tanh(gx_n + r gh_n);  h = (1 - z) n + z h_prev
    """

    G = 3

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        r = sigmoid(gx[0] + gh[0])
        z = sigmoid(gx[1] + gh[1])
        n = tanh(gx[2] + r * gh[2])
        return (r, z, n), State(n + z * (prev.h - n), 0.0)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        r, z, n = gates[0], gates[1], gates[2]
        dn = dnext.h * (1.0 - z) * (1.0 - n * n)
        dr = dn * gh[2] * r * (1.0 - r)
        dz = dnext.h * (prev.h - n) * z * (1.0 - z)
        return (dr, dz, dn), (dr, dz, dn * r), State(dnext.h * z, 0.0), NOTHING


class GruResetBefore(Cell):
    """Cho et al. (2014, arXiv 1406.1078v3), Keras' reset_after=False: r scales h before the product with W_hh.

    r, z as in the GRU;  n = tanh(gx_n + W_hn (r h_prev) + b_hn);  h = (1 - z) n + z h_prev
    """

    G, middle = 3, "product"

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        r = sigmoid(gx[0] + gh[0])
        return (r,), State(r * prev.h, 0.0)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        r = gates[0]
        dr = (dnext.h * prev.h * r * (1.0 - r),)
        return dr, dr, State(dnext.h * r, 0.0), NOTHING

    @staticmethod
    @njit
    def output(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number) -> Any:
        z = sigmoid(gx[1] + gh[1])
        n = tanh(gx[2] + gh[2])
        return (gates[0], z, n), n + z * (prev.h - n)

    @staticmethod
    @njit
    def output_backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number, dh: Number
    ) -> Any:
        z, n = gates[1], gates[2]
        dn = dh * (1.0 - z) * (1.0 - n * n)
        dz = dh * (prev.h - n) * z * (1.0 - z)
        no = 0.0 * gates[0]  # of the right type; a gate is never infinite
        return (no, dz, dn), (no, dz, dn), State(dh * z, 0.0), NOTHING, no


class GruNorm(Cell):
    """The GRU with layer normalisation. Per unit: gains of x, gains of h and biases, r z n each; the bias of H_n.

    r = sigmoid(u0 X_r + u3 H_r + u6);  z = sigmoid(u1 X_z + u4 H_z + u7);
    n = tanh(u2 X_n + u8 + r (u5 H_n + u9));  h = (1 - z) n + z h_prev, X and H standardised
    """

    G, U, normed = 3, 10, True

    @staticmethod
    @njit
    def forward(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float) -> Any:
        r = sigmoid(unit[0] * gx[0] + unit[3] * gh[0] + unit[6])
        z = sigmoid(unit[1] * gx[1] + unit[4] * gh[1] + unit[7])
        n = tanh(unit[2] * gx[2] + unit[8] + r * (unit[5] * gh[2] + unit[9]))
        return (r, z, n), State(n + z * (prev.h - n), 0.0)

    @staticmethod
    @njit
    def backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, clip: float, gates: Numbers, next: State, dnext: State
    ) -> Any:
        r, z, n = gates[0], gates[1], gates[2]
        dn = dnext.h * (1.0 - z) * (1.0 - n * n)
        dr = dn * (unit[5] * gh[2] + unit[9]) * r * (1.0 - r)
        dz = dnext.h * (prev.h - n) * z * (1.0 - z)
        dgx = (dr * unit[0], dz * unit[1], dn * unit[2])
        dgh = (dr * unit[3], dz * unit[4], dn * r * unit[5])
        dunit = (
            dr * gx[0], dz * gx[1], dn * gx[2], dr * gh[0], dz * gh[1], dn * r * gh[2], dr, dz, dn, dn * r,
        )  # fmt: skip
        return dgx, dgh, State(dnext.h * z, 0.0), dunit


CELLS: dict[str, type[Cell]] = {
    "rnn_tanh": RnnTanh,
    "rnn_relu": RnnRelu,
    "lstm": Lstm,
    "gru": Gru,
    "lstm_peephole": LstmPeephole,
    "lstm_coupled": LstmCoupled,
    "indrnn_relu": IndRnnRelu,
    "indrnn_tanh": IndRnnTanh,
    "gru_reset_before": GruResetBefore,
    "lstm_norm": LstmNorm,
    "gru_norm": GruNorm,
}


# ---- Random bits -------------------------------------------------------------------------------------------
# A function of seed, time, row and unit, so that backward and any other thread find the same ones again. mix64 is
# the finaliser of splitmix64 (Steele, Lea & Flood 2014), mix32 Wellons' lowbias32. 32-bit numbers live in uint64.

LOW = uint64(0xFFFFFFFF)


@njit
def mix64(z: Any) -> Any:
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))


@njit
def mix32(x: Any) -> Any:
    x = ((x ^ (x >> uint64(16))) * uint64(0x7FEB352D)) & LOW
    x = ((x ^ (x >> uint64(15))) * uint64(0x846CA68B)) & LOW
    return x ^ (x >> uint64(16))


@njit
def random_key(seed: Any, t: int, n: int) -> Any:
    """64 bits for step t of row n, from which those of its units follow."""
    z = mix64(seed + uint64(0x9E3779B97F4A7C15) * uint64(t + 1))
    return mix64(z + uint64(0xD1B54A32D192ED03) * uint64(n + 1))


@njit
def random_bits(key: Any, j: int) -> Any:
    """32 bits for unit j."""
    x = ((key & LOW) + uint64(0x9E3779B9) * uint64(j)) & LOW
    return mix32(mix32(x) ^ (key >> uint64(32)))


@njit
def happens(bits: Any, p: float) -> bool:
    """True for a share p of all 32 bits."""
    return float(bits >> uint64(1)) < floor(p * 2147483648.0)


# ---- All units of a layer, one row, one step ---------------------------------------------------------------
# Vectors have one entry per unit, gx, gh, gates one row per gate, `unit` one row per block. These loops are all that
# is compiled for each cell.


@njit
def forward_units(
    cell_forward: Callable[..., Any], gx: Array, gh: Array, unit: Array, h: Array, c: Array, clip: float,
    gates: Array, h_next: Array, c_next: Array,  # out
) -> None:  # fmt: skip
    for j in range(len(c)):
        values, next = cell_forward(gx[:, j], gh[:, j], unit[:, j], State(h[j], c[j]), clip)
        for g in range(len(values)):
            gates[g, j] = values[g]
        h_next[j], c_next[j] = next.h, next.c


@njit
def output_units(
    cell_output: Callable[..., Any], gx: Array, gh: Array, unit: Array, h: Array, c: Array, mid: Array,
    gates: Array, h_next: Array,  # out
) -> None:  # fmt: skip
    for j in range(len(c)):
        values, h_next[j] = cell_output(gx[:, j], gh[:, j], unit[:, j], State(h[j], c[j]), gates[:, j], mid[j])
        for g in range(len(values)):
            gates[g, j] = values[g]


@njit
def add_column(numbers: Numbers, j: int, out: Array) -> None:
    """out[:, j] += numbers"""
    for k in range(min(len(numbers), len(out))):  # NOTHING finds no row to go to
        out[k, j] += numbers[k]


@njit
def output_units_backward(
    cell_output_backward: Callable[..., Any], gx: Array, gh: Array, unit: Array, h: Array, c: Array, mid: Array,
    gates: Array, dh_next: Array,
    dgx: Array, dgh: Array, dunit: Array, dh: Array, dc: Array, dmid: Array,  # added to
) -> None:  # fmt: skip
    for j in range(len(c)):
        prev = State(h[j], c[j])
        da_x, da_h, dprev, du, dm = cell_output_backward(
            gx[:, j], gh[:, j], unit[:, j], prev, gates[:, j], mid[j], dh_next[j]
        )
        add_column(da_x, j, dgx)
        add_column(da_h, j, dgh)
        add_column(du, j, dunit)
        dh[j] += dprev.h
        dc[j] += dprev.c
        dmid[j] += dm


@njit
def backward_units(
    cell_backward: Callable[..., Any], gx: Array, gh: Array, unit: Array, h: Array, c: Array, clip: float,
    gates: Array, h_next: Array, c_next: Array, dh_next: Array, dc_next: Array,
    dgx: Array, dgh: Array, dunit: Array, dh: Array, dc: Array,  # added to
) -> None:  # fmt: skip
    for j in range(len(c)):
        prev, next, dnext = State(h[j], c[j]), State(h_next[j], c_next[j]), State(dh_next[j], dc_next[j])
        da_x, da_h, dprev, du = cell_backward(gx[:, j], gh[:, j], unit[:, j], prev, clip, gates[:, j], next, dnext)
        add_column(da_x, j, dgx)
        add_column(da_h, j, dgh)
        add_column(du, j, dunit)
        dh[j] += dprev.h
        dc[j] += dprev.c


@njit
def zones(seed: Any, t: int, n: int, share_h: float, share_c: float, h: Array, c: Array) -> None:
    """Zoneout's k of next = k prev + (1 - k) new, for every number of h and of c: 1 by chance, else 0."""
    key = random_key(seed, t, n)
    for j in range(len(h)):
        h[j] = happens(random_bits(key, j), share_h)
    for j in range(len(c)):
        c[j] = happens(mix32((random_bits(key, j) + uint64(0x85EBCA6B)) & LOW), share_c)


# ---- The layer ---------------------------------------------------------------------------------------------
# A sequence is walked alone, from its first step to its last (from its last to its first when `reverse`), so
# nothing past its end is ever read. `step` counts along the walk; `t` is where in time that is.


class Inputs(NamedTuple):
    """All that a layer is given, time-major. Zeros, ones or False stand for what the caller left out."""

    cell: type[Cell]
    x: Array  # [T,N,I]
    w_ih: Array  # [G·H,I]
    w_hh: Array | None  # [G·H,R]; None for a cell without the product
    b_ih: Array  # [G·H]
    b_hh: Array  # [G·H]
    h0: Array  # [N,R]
    c0: Array  # [N,H]
    w_unit: Array  # [U,H]
    w_hr: Array | None  # [R,H], the projection
    h_mask: Array  # [N,R]
    lengths: Array  # [N]
    reverse: bool
    reset: Array  # [T,N] bool
    to_initial: bool
    zoneout_h: float
    zoneout_c: float
    seed: Any  # uint64, or None for the expectation of zoneout
    clip: float  # inf for none

    @property
    def rows(self) -> int:
        """How many rows of w_hh meet h; the others meet what a cell of two phases makes of it."""
        return len(self.b_hh) - (self.c0.shape[1] if self.cell.middle == "product" else 0)

    def walk(self, n: int) -> list[int]:
        """The steps of row n in the order in which they are taken."""
        times = range(self.lengths[n])
        return [*times][::-1] if self.reverse else [*times]

    def restarts(self, t: int, n: int) -> bool:
        """Whether the walk comes to step t from another segment, or finds a new one at its very beginning."""
        if self.reverse:
            return t + 1 < self.lengths[n] and bool(self.reset[t + 1, n])
        return bool(self.reset[t, n])

    def zones(self, t: int, n: int) -> tuple[Array, Array]:
        """Zoneout's k of h and of c: 1 or 0 by chance, or what that is on average."""
        R, H = self.h0.shape[1], self.c0.shape[1]
        h, c = np.full(R, self.zoneout_h), np.full(H, self.zoneout_c)
        if self.seed is not None:
            zones(self.seed, t, n, self.zoneout_h, self.zoneout_c, h, c)
        return h, c


class Steps(NamedTuple):
    """What forward finds out, at every step."""

    y: Array  # [T,N,R] h after the step
    c: Array  # [T,N,H] c after the step
    hn: Array  # [N,R]
    cn: Array  # [N,H]
    h_prev: Array  # [T,N,R] h before the step
    c_prev: Array  # [T,N,H] c before the step
    gx: Array  # [T,N,G,H] as the cell got it
    gh: Array  # [T,N,G,H]
    gates: Array  # [T,N,G,H]
    mid: Array  # [T,N,H] what the second phase got; of a cell that has none, its h
    h_new: Array  # [T,N,H] the cell's own h
    c_new: Array  # [T,N,H] the cell's own c
    scales: Array  # [T,N,3] what gx, gh and mid were multiplied by when standardised


def standardise(v: Array) -> Number:
    """v = (v - mean) scale, where scale, which is returned, is one over the root of the (biased) variance."""
    v -= v.mean()
    scale = 1.0 / np.sqrt((v * v).mean() + VARIANCE_FLOOR)
    v *= scale
    return scale


def standardise_backward(v: Array, scale: Number, d: Array) -> Array:
    """The gradient with respect to what v was, from d, that with respect to the standardised v."""
    dv: Array = scale * (d - d.mean() - v * (v * d).mean())
    return dv


def layer_forward(p: Inputs) -> Steps:
    cell, (T, N, _), (R, H) = p.cell, p.x.shape, (p.h0.shape[1], p.c0.shape[1])
    of_h, of_c, of_gates = (T, N, R), (T, N, H), (T, N, cell.G, H)
    shapes = of_h, of_c, (N, R), (N, H), of_h, of_c, of_gates, of_gates, of_gates, of_c, of_c, of_c, (T, N, 3)
    out = Steps(*(np.zeros(shape, p.x.dtype) for shape in shapes))
    for n in range(N):
        h, c = p.h0[n], p.c0[n]
        for t in p.walk(n):
            if p.restarts(t, n):
                h, c = (p.h0[n], p.c0[n]) if p.to_initial else (np.zeros_like(h), np.zeros_like(c))
            out.h_prev[t, n], out.c_prev[t, n] = h, c

            gx, gh, gates, mid, h_new, c_new, scales = (a[t, n] for a in out[6:])
            gx.flat = p.w_ih @ p.x[t, n] + p.b_ih
            gh.flat[: p.rows] = p.b_hh[: p.rows]
            if p.w_hh is not None:
                gh.flat[: p.rows] += p.w_hh[: p.rows] @ (p.h_mask[n] * h)
            if cell.normed:
                scales[:2] = standardise(gx), standardise(gh)
            own = h if p.w_hr is None else np.zeros_like(c)  # no cell that may be projected looks at h itself
            forward_units(cell.forward, gx, gh, p.w_unit, own, c, p.clip, gates, mid, c_new)
            if p.w_hh is not None and cell.middle == "product":
                gh[-1] = p.w_hh[p.rows :] @ (p.h_mask[n] * mid) + p.b_hh[p.rows :]
            elif cell.middle == "norm":
                scales[2] = standardise(mid)
            if cell.middle == "none":
                h_new[:] = mid
            else:
                output_units(cell.output, gx, gh, p.w_unit, own, c, mid, gates, h_new)

            h_before, c_before = h, c
            h, c = h_new.copy() if p.w_hr is None else p.w_hr @ h_new, c_new.copy()
            if p.zoneout_h or p.zoneout_c:  # a state that is not kept must not matter, even if it is infinite
                k_h, k_c = p.zones(t, n)
                h, c = k_h * h_before + (1.0 - k_h) * h, k_c * c_before + (1.0 - k_c) * c
            out.y[t, n], out.c[t, n] = h, c
        out.hn[n], out.cn[n] = h, c
    return out


def layer_backward(p: Inputs, out: Steps, dy: Array, dhn: Array, dcn: Array) -> dict[str, Array]:
    """The gradients of all that is in `p` and continuous, by name, from those of y, hn and cn."""
    cell = p.cell
    names = "x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0", "w_unit", "w_hr"
    d = {name: np.zeros_like(getattr(p, name)) for name in names if getattr(p, name) is not None}
    for n in range(len(dhn)):
        dh, dc = dhn[n], dcn[n]
        for t in reversed(p.walk(n)):
            h, c, gx, gh, gates, mid, h_new, c_new, scales = (a[t, n] for a in out[4:])
            own = h if p.w_hr is None else np.zeros_like(c)

            # From the gradient of what comes after the step to that of what comes before it
            dh_new, dc_new = dh + dy[t, n], dc
            dh, dc = np.zeros_like(dh), np.zeros_like(dc)
            if p.zoneout_h or p.zoneout_c:
                k_h, k_c = p.zones(t, n)
                dh, dh_new = k_h * dh_new, (1.0 - k_h) * dh_new
                dc, dc_new = k_c * dc_new, (1.0 - k_c) * dc_new
            if p.w_hr is not None:
                d["w_hr"] += np.outer(dh_new, h_new)
                dh_new = p.w_hr.T @ dh_new
            dgx, dgh, down = np.zeros_like(gx), np.zeros_like(gh), np.zeros_like(own)
            dmid = dh_new
            if cell.middle != "none":
                dmid = np.zeros_like(mid)
                output_units_backward(
                    cell.output_backward, gx, gh, p.w_unit, own, c, mid, gates, dh_new,
                    dgx, dgh, d["w_unit"], down, dc, dmid,
                )  # fmt: skip
            if p.w_hh is not None and cell.middle == "product":
                d["w_hh"][p.rows :] += np.outer(dgh[-1], p.h_mask[n] * mid)
                dmid = dmid + p.h_mask[n] * (p.w_hh[p.rows :].T @ dgh[-1])
            elif cell.middle == "norm":
                dmid = standardise_backward(mid, scales[2], dmid)
            backward_units(
                cell.backward, gx, gh, p.w_unit, own, c, p.clip, gates, mid, c_new, dmid, dc_new,
                dgx, dgh, d["w_unit"], down, dc,
            )  # fmt: skip
            if cell.normed:
                dgx, dgh = standardise_backward(gx, scales[0], dgx), standardise_backward(gh, scales[1], dgh)

            if p.w_hr is None:
                dh = dh + down
            if p.w_hh is not None:
                d["w_hh"][: p.rows] += np.outer(dgh.ravel()[: p.rows], p.h_mask[n] * h)
                dh = dh + p.h_mask[n] * (p.w_hh[: p.rows].T @ dgh.ravel()[: p.rows])
            d["x"][t, n] = p.w_ih.T @ dgx.ravel()
            d["w_ih"] += np.outer(dgx, p.x[t, n])
            d["b_ih"] += dgx.ravel()
            d["b_hh"] += dgh.ravel()
            if p.restarts(t, n):
                if p.to_initial:
                    d["h0"][n] += dh
                    d["c0"][n] += dc
                dh, dc = np.zeros_like(dh), np.zeros_like(dc)
        d["h0"][n] += dh
        d["c0"][n] += dc
    return d


# ---- The backend: what gatewise.functional calls, with arguments it has checked ----------------------------


class Layout(NamedTuple):
    """How the caller's arrays of one entry a step lie in memory."""

    T: int
    N: int
    batch_first: bool
    packed: Array | None  # bool [T,N], true where packed input has a row

    def to_time_major(self, array: Array) -> Array:
        if self.packed is not None:
            padded = np.zeros((self.T, self.N, *array.shape[1:]), array.dtype)
            padded[self.packed] = array
            return padded
        return array.swapaxes(0, 1) if self.batch_first else array

    def from_time_major(self, array: Array) -> Array:
        if self.packed is not None:
            return array[self.packed]
        return np.ascontiguousarray(array.swapaxes(0, 1)) if self.batch_first else array


def prepare(
    cell: str,
    inputs: tuple[Any, ...],  # those of _core.Problem after the cell
    direction: dict[str, Maybe] | None = None,  # by the gradients' names: x + i STEP direction["dx"], and so on
) -> tuple[Inputs, Layout]:
    """The caller's arguments as float64 copies that are complete, or as complex ones with a direction."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras = inputs
    w_unit, w_hr, h_mask, reset, reset_to, zoneout_h, zoneout_c, seed, clip, batch_sizes, batch_first, _ = (
        extras or 12 * (None,)
    )
    maths, rows = CELLS[cell], len(w_ih)
    H = rows // maths.G
    R = H if w_hr is None else len(w_hr)
    if batch_sizes is None:
        T, N = x.shape[1::-1] if batch_first else x.shape[:2]
        layout, lengths = Layout(T, N, bool(batch_first), None), np.full(N, T) if lengths is None else lengths
    else:
        T, N = len(batch_sizes), int(max(batch_sizes, default=0))
        packed = np.arange(N) < np.asarray(batch_sizes)[:, None]
        layout, lengths = Layout(T, N, False, packed), packed.sum(axis=0)

    def widened(name: str, array: Maybe, *shape: int) -> Array:
        real = np.zeros(shape) if array is None else np.asarray(array, np.float64)
        if direction is None:
            return real
        along = direction.get("d" + name)
        if along is None:
            return real.astype(np.complex128)
        if np.shape(along) != real.shape or np.asarray(along).dtype.kind != "f":
            got = f"{along.dtype} {along.shape}" if isinstance(along, np.ndarray) else type(along).__name__
            raise ValueError(f"dd{name}: expected floating-point numbers {real.shape}; got {got}")
        return real + 1j * STEP * np.asarray(along, np.float64)

    return Inputs(
        cell=maths,
        x=layout.to_time_major(widened("x", x)),
        w_ih=widened("w_ih", w_ih),
        w_hh=None if w_hh is None else widened("w_hh", w_hh),
        b_ih=widened("b_ih", b_ih, rows),
        b_hh=widened("b_hh", b_hh, rows),
        h0=widened("h0", h0, N, R),
        c0=widened("c0", c0, N, H),
        w_unit=widened("w_unit", w_unit, maths.U * H).reshape(maths.U, H),
        w_hr=None if w_hr is None else widened("w_hr", w_hr),
        h_mask=np.ones((N, R)) if h_mask is None else np.asarray(h_mask, np.float64),
        lengths=np.asarray(lengths),
        reverse=reverse,
        reset=np.zeros((T, N), bool) if reset is None else layout.to_time_major(reset),
        to_initial=reset_to != "zero",
        zoneout_h=float(zoneout_h or 0.0),
        zoneout_c=float(zoneout_c or 0.0),
        seed=None if seed is None else uint64(seed),
        clip=np.inf if clip is None else float(clip),
    ), layout


def run_backward(p: Inputs, layout: Layout, out: Steps, dy: Maybe, dhn: Maybe, dcn: Maybe) -> dict[str, Array]:
    """The gradients that the layer has, by name, in the caller's shapes, from those of y, hn and cn."""
    dy, dhn, dcn = (
        np.zeros_like(end) if given is None else given.astype(end.dtype)
        for given, end in ((None if dy is None else layout.to_time_major(dy), out.y), (dhn, out.hn), (dcn, out.cn))
    )
    grads, cell = layer_backward(p, out, dy, dhn, dcn), p.cell
    grads["x"], grads["w_unit"] = layout.from_time_major(grads["x"]), grads["w_unit"].ravel()
    there = {
        "c0": cell.has_c, "b_ih": not cell.normed, "b_hh": not cell.normed, "w_unit": cell.U > 0,
    }  # fmt: skip
    return {"d" + name: grad for name, grad in grads.items() if there.get(name, True)}


@np.errstate(all="ignore")
def forward(cell: str, inputs: tuple[Any, ...]) -> tuple[Array, Array, Maybe, Array, Maybe]:
    """One layer forward: y [T,N,R], hn [N,R], cn [N,H], gates [T,N,G,H] and every c [T,N,H], in x's dtype.

    cn and the c's are None for a cell without c. Past a sequence's end everything is 0. What has an entry a step
    lies as x does: batch-major or packed.
    """
    p, layout = prepare(cell, inputs)
    out = layer_forward(p)
    y, gates, c = (layout.from_time_major(a) for a in (out.y, out.gates, out.c))
    y, hn, cn, gates, c = (a.astype(inputs[0].dtype, copy=False) for a in (y, out.hn, out.cn, gates, c))
    return (y, hn, cn, gates, c) if p.cell.has_c else (y, hn, None, gates, None)


@np.errstate(all="ignore")
def backward(cell: str, inputs: tuple[Any, ...], dy: Maybe, dhn: Maybe, dcn: Maybe) -> dict[str, Array]:
    """The gradients of all that the layer has, in x's dtype, after a forward pass over the same inputs."""
    p, layout = prepare(cell, inputs)
    grads = run_backward(p, layout, layer_forward(p), dy, dhn, dcn)
    return {name: grad.astype(inputs[0].dtype, copy=False) for name, grad in grads.items()}


@np.errstate(all="ignore")
def double_backward(
    cell: str, inputs: tuple[Any, ...], dy: Maybe, dhn: Maybe, dcn: Maybe, direction: dict[str, Maybe]
) -> dict[str, Array]:
    """The derivatives along `direction`, which is by the gradients' names, of forward's results and of backward's.

    Raises:
        ValueError: a direction is not like the gradient it belongs to.
    """
    p, layout = prepare(cell, inputs, direction)
    out = layer_forward(p)
    grads = run_backward(p, layout, out, dy, dhn, dcn)
    if unknown := [name for name, along in direction.items() if along is not None and name not in grads]:
        raise ValueError(f"d{unknown[0]}: expected None, for the layer has no {unknown[0][1:]}; got an array")
    results = {"ddy": layout.from_time_major(out.y), "ddhn": out.hn, **grads}
    if p.cell.has_c:
        results["ddcn"] = out.cn
    return {name: (a.imag / STEP).astype(inputs[0].dtype) for name, a in results.items()}


def __getattr__(name: str) -> Any:
    """The functional API on this backend: reference.lstm(...) is gatewise.lstm(..., backend="reference")."""
    cell, _, part = name.partition("_")
    if cell not in ("rnn", "lstm", "gru") or part not in ("", "forward", "backward"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import functional

    function = getattr(functional, name)
    return function if part == "backward" else partial(function, backend="reference")
