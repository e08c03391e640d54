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

    @staticmethod
    @njit
    def output(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number) -> Any:
        return (gates[0],), mid

    @staticmethod
    @njit
    def output_backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number, dh: Number
    ) -> Any:
        return NOTHING, NOTHING, State(0.0, 0.0), NOTHING, dh


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
        no = 0.0 * dc
        dgx = (di * unit[0], df * unit[1], dg * unit[2], no)
        dgh = (di * unit[4], df * unit[5], dg * unit[6], no)
        dunit = (
            di * gx[0], df * gx[1], dg * gx[2], no, di * gh[0], df * gh[1], dg * gh[2], no, di, df, dg, no, no, no,
        )  # fmt: skip
        return dgx, dgh, State(0.0, dc * f), dunit

    @staticmethod
    @njit
    def output(gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number) -> Any:
        return (gates[0],), gates[3] * tanh(unit[12] * mid + unit[13])

    @staticmethod
    @njit
    def output_backward(
        gx: Numbers, gh: Numbers, unit: Numbers, prev: State, gates: Numbers, mid: Number, dh: Number
    ) -> Any:
        o, tanh_c = gates[3], tanh(unit[12] * mid + unit[13])
        do = dh * tanh_c * o * (1.0 - o)
        da = dh * o * (1.0 - tanh_c * tanh_c)
        no = 0.0 * dh
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
        return (0.0 * dn, dz, dn), (0.0 * dn, dz, dn), State(dh * z, 0.0), NOTHING, 0.0 * dh


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


# ---- The layer ---------------------------------------------------------------------------------------------
# A sequence is walked alone, from its first step to its last (from its last to its first when `reverse`), so
# nothing past its end is ever read. `step` counts along the walk; `t` is where in time that is.


class Inputs(NamedTuple):
    """All that a layer is given, time-major. Zeros, ones or False stand for what the caller left out."""

    x: Array  # [T,N,I]
    w_ih: Array  # [G·H,I]
    w_hh: Array  # [G·H,R]; no columns for a cell without the product
    b_ih: Array  # [G·H]
    b_hh: Array  # [G·H]
    h0: Array  # [N,R]
    c0: Array  # [N,H]
    w_unit: Array  # [U,H]
    w_hr: Array  # [R,H]; no rows without a projection
    h_mask: Array  # [N,R]
    lengths: Array  # [N]
    reverse: bool
    reset: Array  # [T,N] bool
    to_initial: bool
    zoneout_h: float
    zoneout_c: float
    random: bool  # zoneout by `seed`; else its expectation
    seed: Any  # uint64
    clip: float  # inf for none
    normed: bool  # the cell's traits
    product_middle: bool
    norm_middle: bool


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
    c_new: Array  # [T,N,H] the cell's own c
    mid: Array  # [T,N,H] what the cell's second phase got, or the h of a cell that has none
    out: Array  # [T,N,H] the cell's own h
    scales: Array  # [T,N,3] what gx, gh and mid were multiplied by when standardised


@njit
def affine(w: Array, v: Array, b: Array, out: Array) -> None:
    """out = W v + b, with w [R,K], v [K], b and out [R]."""
    for row in range(len(out)):
        total = b[row]
        for k in range(w.shape[1]):
            total += w[row, k] * v[k]
        out[row] = total


@njit
def add_transposed(w: Array, d: Array, out: Array) -> None:
    """out += Wᵀ d, with w [R,K], d [R], out [K]."""
    for row in range(len(d)):
        for k in range(w.shape[1]):
            out[k] += d[row] * w[row, k]


@njit
def add_outer(d: Array, v: Array, out: Array) -> None:
    """out += d vᵀ, with d [R], v [K], out [R,K]."""
    for row in range(len(d)):
        for k in range(out.shape[1]):
            out[row, k] += d[row] * v[k]


@njit
def add_column(numbers: Numbers, j: int, out: Array) -> None:
    """out[:, j] += numbers, as many as there are."""
    for k in range(min(len(numbers), len(out))):
        out[k, j] += numbers[k]


@njit
def standardise(v: Array) -> Number:
    """v = (v - mean) scale, where scale, which is returned, is one over the root of the (biased) variance."""
    mean = v.sum() / len(v)
    v -= mean
    scale = 1.0 / np.sqrt((v * v).sum() / len(v) + VARIANCE_FLOOR)
    v *= scale
    return scale


@njit
def standardise_backward(v: Array, scale: Number, d: Array) -> None:
    """From the gradient with respect to the standardised v to that with respect to v as it was, in place."""
    along = (v * d).sum() / len(v)
    mean = d.sum() / len(v)
    for k in range(len(v)):
        d[k] = scale * (d[k] - mean - v[k] * along)


@njit
def time_of(step: int, length: int, reverse: bool) -> int:
    return length - 1 - step if reverse else step


@njit
def restarts(p: Inputs, n: int, step: int, t: int) -> bool:
    """Whether the walk comes into step t from another segment, or finds a new one at its beginning."""
    return step > 0 and p.reset[t + 1, n] if p.reverse else p.reset[t, n]


@njit
def zone(p: Inputs, share: float, bits: Any) -> float:
    """Zoneout's k of next = k prev + (1 - k) new: 1 or 0 by chance, or what that is on average."""
    if p.random:
        return 1.0 if happens(bits, share) else 0.0
    return share


@njit
def zone_h(p: Inputs, t: int, n: int, j: int) -> float:
    return zone(p, p.zoneout_h, random_bits(random_key(p.seed, t, n), j))


@njit
def zone_c(p: Inputs, t: int, n: int, j: int) -> float:
    return zone(p, p.zoneout_c, mix32((random_bits(random_key(p.seed, t, n), j) + uint64(0x85EBCA6B)) & LOW))


@njit
def layer_forward(cell_forward: Callable[..., Any], cell_output: Callable[..., Any], p: Inputs, out: Steps) -> None:
    """Fills `out`, whose arrays come as zeros."""
    (R, H), projects = (p.h0.shape[1], p.c0.shape[1]), len(p.w_hr) > 0
    rows = len(p.w_hh) - H if p.product_middle else len(p.w_hh)  # those that meet h before the cell
    for n in range(len(p.h0)):
        h, c = out.hn[n], out.cn[n]  # the state as it goes along
        h[:], c[:] = p.h0[n], p.c0[n]
        for step in range(p.lengths[n]):
            t = time_of(step, p.lengths[n], p.reverse)
            if restarts(p, n, step, t):
                if p.to_initial:
                    h[:], c[:] = p.h0[n], p.c0[n]
                else:
                    h[:], c[:] = 0.0, 0.0
            out.h_prev[t, n], out.c_prev[t, n] = h, c

            gx, gh, gates, mid = out.gx[t, n], out.gh[t, n], out.gates[t, n], out.mid[t, n]
            affine(p.w_ih, p.x[t, n], p.b_ih, gx.ravel())
            affine(p.w_hh[:rows], p.h_mask[n] * h, p.b_hh, gh.ravel()[:rows])
            if p.normed:
                out.scales[t, n, 0], out.scales[t, n, 1] = standardise(gx.ravel()), standardise(gh.ravel())

            for j in range(H):
                prev = State(0.0 if projects else h[j], c[j])
                first, next = cell_forward(gx[:, j], gh[:, j], p.w_unit[:, j], prev, p.clip)
                add_column(first, j, gates)
                mid[j], out.c_new[t, n, j] = next.h, next.c
            if p.product_middle:
                affine(p.w_hh[rows:], p.h_mask[n] * mid, p.b_hh[rows:], gh[-1])
            if p.norm_middle:
                out.scales[t, n, 2] = standardise(mid)
            for j in range(H):
                prev = State(0.0 if projects else h[j], c[j])
                second, out.out[t, n, j] = cell_output(gx[:, j], gh[:, j], p.w_unit[:, j], prev, gates[:, j], mid[j])
                for g in range(len(second)):
                    gates[g, j] = second[g]

            if projects:
                affine(p.w_hr, out.out[t, n], np.zeros(R), out.y[t, n])
            else:
                out.y[t, n] = out.out[t, n]
            for j in range(R):
                k = zone_h(p, t, n, j)
                out.y[t, n, j] = h[j] = k * h[j] + (1.0 - k) * out.y[t, n, j]
            for j in range(H):
                k = zone_c(p, t, n, j)
                out.c[t, n, j] = c[j] = k * c[j] + (1.0 - k) * out.c_new[t, n, j]


@njit
def layer_backward(
    cell_backward: Callable[..., Any],
    output_backward: Callable[..., Any],
    p: Inputs,
    out: Steps,
    dy: Array,  # [T,N,R]
    dhn: Array,  # [N,R]
    dcn: Array,  # [N,H]
    d: Inputs,  # the gradients, which are added to
) -> None:
    (R, H), projects = (p.h0.shape[1], p.c0.shape[1]), len(p.w_hr) > 0
    rows = len(p.w_hh) - H if p.product_middle else len(p.w_hh)
    for n in range(len(p.h0)):
        dh, dc = dhn[n].copy(), dcn[n].copy()
        for step in range(p.lengths[n] - 1, -1, -1):
            t = time_of(step, p.lengths[n], p.reverse)
            h, c, mid = out.h_prev[t, n], out.c_prev[t, n], out.mid[t, n]
            gx, gh, gates = out.gx[t, n], out.gh[t, n], out.gates[t, n]

            # dh, dc: from what comes after the step to what comes before it, dnew_*: what goes through the cell
            dnew_h, dnew_c = np.zeros_like(dh), np.zeros_like(dc)
            for j in range(R):
                k, total = zone_h(p, t, n, j), dh[j] + dy[t, n, j]
                dh[j], dnew_h[j] = k * total, (1.0 - k) * total
            for j in range(H):
                k, total = zone_c(p, t, n, j), dc[j]
                dc[j], dnew_c[j] = k * total, (1.0 - k) * total
            dout = dnew_h
            if projects:
                dout = np.zeros_like(dc)
                add_transposed(p.w_hr, dnew_h, dout)
                add_outer(dnew_h, out.out[t, n], d.w_hr)

            dgx, dgh, dmid = np.zeros_like(gx), np.zeros_like(gh), np.zeros_like(dc)
            for j in range(H):
                prev = State(0.0 if projects else h[j], c[j])
                da_x, da_h, dprev, dunit, dmid[j] = output_backward(
                    gx[:, j], gh[:, j], p.w_unit[:, j], prev, gates[:, j], mid[j], dout[j]
                )
                add_column(da_x, j, dgx)
                add_column(da_h, j, dgh)
                add_column(dunit, j, d.w_unit)
                if not projects:
                    dh[j] += dprev.h
            if p.product_middle:
                dmasked = np.zeros_like(dmid)
                add_transposed(p.w_hh[rows:], dgh[-1], dmasked)
                dmid += p.h_mask[n] * dmasked
                add_outer(dgh[-1], p.h_mask[n] * mid, d.w_hh[rows:])
            if p.norm_middle:
                standardise_backward(mid, out.scales[t, n, 2], dmid)
            for j in range(H):
                prev, next = State(0.0 if projects else h[j], c[j]), State(mid[j], out.c_new[t, n, j])
                da_x, da_h, dprev, dunit = cell_backward(
                    gx[:, j], gh[:, j], p.w_unit[:, j], prev, p.clip, gates[:, j], next, State(dmid[j], dnew_c[j])
                )
                add_column(da_x, j, dgx)
                add_column(da_h, j, dgh)
                add_column(dunit, j, d.w_unit)
                dc[j] += dprev.c
                if not projects:
                    dh[j] += dprev.h

            if p.normed:
                standardise_backward(gx.ravel(), out.scales[t, n, 0], dgx.ravel())
                standardise_backward(gh.ravel(), out.scales[t, n, 1], dgh.ravel())
            dmasked = np.zeros_like(dh)
            add_transposed(p.w_hh[:rows], dgh.ravel()[:rows], dmasked)
            dh += p.h_mask[n] * dmasked
            add_outer(dgh.ravel()[:rows], p.h_mask[n] * h, d.w_hh)
            add_transposed(p.w_ih, dgx.ravel(), d.x[t, n])
            add_outer(dgx.ravel(), p.x[t, n], d.w_ih)
            for row in range(len(d.b_ih)):
                d.b_ih[row] += dgx.ravel()[row]
                d.b_hh[row] += dgh.ravel()[row]
            if restarts(p, n, step, t):
                if p.to_initial:
                    d.h0[n] += dh
                    d.c0[n] += dc
                dh[:], dc[:] = 0.0, 0.0
        d.h0[n] += dh
        d.c0[n] += dc


# ---- The backend: what gatewise.functional calls, with arguments it has checked ----------------------------


class Layout(NamedTuple):
    """How the caller's arrays of one entry a step lie in memory."""

    T: int
    N: int
    batch_first: bool
    packed: Maybe  # bool [T,N], true where packed input has a row

    def to_time_major(self, array: Array) -> Array:
        if self.packed is not None:
            padded = np.zeros((self.T, self.N, *array.shape[1:]), array.dtype)
            padded[self.packed] = array
            return padded
        return np.ascontiguousarray(array.swapaxes(0, 1)) if self.batch_first else array

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
    w_unit, w_hr, h_mask, reset, reset_to, zoneout_h, zoneout_c, seed, clip, batch_sizes, batch_first, _ = extras or (
        None,
        None,
        None,
        None,
        "initial",
        0.0,
        0.0,
        None,
        None,
        None,
        False,
        "all",
    )
    maths, rows = CELLS[cell], len(w_ih)
    H = rows // maths.G
    R = H if w_hr is None else len(w_hr)
    if batch_sizes is not None:
        T, N = len(batch_sizes), int(max(batch_sizes, default=0))
        packed = np.arange(N) < np.asarray(batch_sizes)[:, None]
        layout, lengths = Layout(T, N, False, packed), packed.sum(axis=0)
    else:
        T, N = x.shape[1::-1] if batch_first else x.shape[:2]
        layout = Layout(T, N, batch_first, None)

    def widened(name: str, array: Maybe, *shape: int) -> Array:
        real = np.zeros(shape) if array is None else np.array(array, np.float64)
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
        x=layout.to_time_major(widened("x", x)),
        w_ih=widened("w_ih", w_ih),
        w_hh=widened("w_hh", w_hh, rows, R if maths.product else 0),
        b_ih=widened("b_ih", b_ih, rows),
        b_hh=widened("b_hh", b_hh, rows),
        h0=widened("h0", h0, N, R),
        c0=widened("c0", c0, N, H),
        w_unit=widened("w_unit", w_unit, maths.U * H).reshape(maths.U, H),
        w_hr=widened("w_hr", w_hr, 0, H),
        h_mask=np.ones((N, R)) if h_mask is None else np.array(h_mask, np.float64),
        lengths=np.full(N, T, np.int64) if lengths is None else np.array(lengths, np.int64),
        reverse=reverse,
        reset=np.zeros((T, N), bool) if reset is None else np.array(layout.to_time_major(reset), bool),
        to_initial=reset_to == "initial",
        zoneout_h=float(zoneout_h),
        zoneout_c=float(zoneout_c),
        random=seed is not None,
        seed=uint64(seed or 0),
        clip=np.inf if clip is None else float(clip),
        normed=maths.normed,
        product_middle=maths.middle == "product",
        norm_middle=maths.middle == "norm",
    ), layout


def run_forward(cell: str, p: Inputs) -> Steps:
    maths, (T, N, _), (R, H), dtype = CELLS[cell], p.x.shape, (p.h0.shape[1], p.c0.shape[1]), p.x.dtype
    of_h, of_c, of_gates = (T, N, R), (T, N, H), (T, N, maths.G, H)
    shapes = of_h, of_c, (N, R), (N, H), of_h, of_c, of_gates, of_gates, of_gates, of_c, of_c, of_c, (T, N, 3)
    out = Steps(*(np.zeros(shape, dtype) for shape in shapes))
    with np.errstate(over="ignore"):  # without Numba: of the random bits, which wrap around
        layer_forward(maths.forward, maths.output, p, out)
    return out


def run_backward(cell: str, p: Inputs, layout: Layout, out: Steps, *incoming: Maybe) -> dict[str, Array]:
    """The gradients that the layer has, by name, in the caller's shapes, from those of y, hn and cn."""
    maths = CELLS[cell]
    dy, dhn, dcn = incoming
    dy = np.zeros_like(out.y) if dy is None else layout.to_time_major(dy).astype(out.y.dtype)
    dhn, dcn = (
        np.zeros_like(end) if given is None else given.astype(end.dtype)
        for given, end in ((dhn, out.hn), (dcn, out.cn))
    )
    weights = p._asdict()
    arrays = {name: weights[name] for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_unit", "w_hr")}
    d = p._replace(**{name: np.zeros_like(array) for name, array in arrays.items()})
    with np.errstate(over="ignore"):
        layer_backward(maths.backward, maths.output_backward, p, out, dy, dhn, dcn, d)
    absent = {
        "c0": not maths.has_c,
        "w_hh": not maths.product,
        "b_ih": maths.normed,
        "b_hh": maths.normed,
        "w_unit": maths.U == 0,
        "w_hr": len(p.w_hr) == 0,
    }
    grads = {"d" + name: getattr(d, name) for name in arrays if not absent.get(name, False)}
    grads["dx"] = layout.from_time_major(grads["dx"])
    if maths.U:
        grads["dw_unit"] = grads["dw_unit"].ravel()
    return grads


def forward(cell: str, inputs: tuple[Any, ...]) -> tuple[Array, Array, Maybe, Array, Maybe]:
    """One layer forward: y [T,N,R], hn [N,R], cn [N,H], gates [T,N,G,H] and every c [T,N,H], in x's dtype.

    cn and the c's are None for a cell without c. Past a sequence's end everything is 0. What has an entry a step
    lies as x does: batch-major or packed.
    """
    p, layout = prepare(cell, inputs)
    out = run_forward(cell, p)
    y, gates, c = (layout.from_time_major(a) for a in (out.y, out.gates, out.c))
    y, hn, cn, gates, c = (a.astype(inputs[0].dtype, copy=False) for a in (y, out.hn, out.cn, gates, c))
    return (y, hn, cn, gates, c) if CELLS[cell].has_c else (y, hn, None, gates, None)


def backward(cell: str, inputs: tuple[Any, ...], dy: Maybe, dhn: Maybe, dcn: Maybe) -> dict[str, Array]:
    """The gradients of all that the layer has, in x's dtype, after a forward pass over the same inputs."""
    p, layout = prepare(cell, inputs)
    grads = run_backward(cell, p, layout, run_forward(cell, p), dy, dhn, dcn)
    return {name: grad.astype(inputs[0].dtype, copy=False) for name, grad in grads.items()}


def double_backward(
    cell: str, inputs: tuple[Any, ...], dy: Maybe, dhn: Maybe, dcn: Maybe, direction: dict[str, Maybe]
) -> dict[str, Maybe]:
    """The derivatives along `direction`, which is by the gradients' names, of forward's results and of backward's.

    Raises:
        ValueError: a direction is not like the gradient it belongs to.
    """
    p, layout = prepare(cell, inputs, direction)
    out = run_forward(cell, p)
    grads = run_backward(cell, p, layout, out, dy, dhn, dcn)
    if unknown := [name for name, along in direction.items() if along is not None and name not in grads]:
        raise ValueError(f"d{unknown[0]}: expected None, for the layer has no {unknown[0][1:]}; got an array")
    results = {"ddy": layout.from_time_major(out.y), "ddhn": out.hn, **grads}
    if CELLS[cell].has_c:
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
