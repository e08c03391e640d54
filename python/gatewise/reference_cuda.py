"""The step kernels of each cell, in Numba's CUDA: one thread takes one hidden unit of one sequence through one step.

The cells are those of `reference.py`, the same scalar functions. What is added here is what a GPU adds: which thread
owns which numbers, what it reads into registers and what it writes. Products and the loop over time are the caller's.

    step = kernels(Lstm)
    step.forward[launch(N, H)](gx, gh, unit, h, c, clip, gates, h_next, c_next)

No thread writes what another one reads or writes, so there are no barriers and no atomics, and the results do not
depend on how the threads are dealt out. All arithmetic is float64, arrays may be narrower. On a machine without a GPU
the kernels run in Numba's simulator: set NUMBA_ENABLE_CUDASIM=1 before Numba is imported.

Shapes: N sequences, H units, G gates, U weights of a unit's own.
    gx, gh, gates [N,G,H]    unit [U,H]    h, c, h_next, c_next, mid [N,H]
A gradient has its array's shape, except dunit: [N,U,H], for each sequence its own, to be summed over N afterwards.
"""

# mypy: disable-error-code="attr-defined, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float64
from numba.extending import overload

from gatewise.reference import Cell, State


class Kernels(NamedTuple):
    """The kernels of a cell; the last two are for cells with a second phase (reference.Cell), and else None.

    What a backward kernel makes, dgx, dgh, dunit, dh, dc and dmid, it adds to what is there: zeros, or what
    output_backward left.
    """

    forward: Any  # (gx, gh, unit, h, c, clip) -> (gates, h_next, c_next), or mid in place of h_next
    backward: Any  # (gx, gh, unit, h, c, clip, gates, h_next, c_next, dh_next, dc_next) -> (dgx, dgh, dunit, dh, dc)
    output: Any  # (gx, gh, unit, h, c, mid) -> (gates, h_next)
    output_backward: Any  # (gx, gh, unit, h, c, mid, gates, dh_next) -> (dgx, dgh, dunit, dh, dc, dmid)


def launch(N: int, H: int, threads: tuple[int, int] = (32, 4)) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block. x runs over units, as memory does: the 32 lanes of a warp read neighbours."""
    return (-(-H // threads[0]), -(-N // threads[1])), threads


@overload(np.exp, target="cuda")
def exp(a):
    """The reference calls NumPy's exp, for complex numbers; Numba has none for a GPU, and there are no complex ones."""
    return lambda a: math.exp(a)


@cuda.jit(device=True)
def load(gx, gh, unit, h, c, n, j, x, y, w):
    """x, y, w = gx[n, :, j], gh[n, :, j], unit[:, j], in registers. Returns the state before the step."""
    for g in range(gx.shape[1]):
        x[g], y[g] = gx[n, g, j], gh[n, g, j]
    for u in range(unit.shape[0]):
        w[u] = unit[u, j]
    return State(float64(h[n, j]), float64(c[n, j]))


@cuda.jit(device=True)
def load_gates(gates, n, j, a):
    """a = gates[n, :, j], in registers"""
    for g in range(gates.shape[1]):
        a[g] = gates[n, g, j]


@cuda.jit(device=True)
def store_gates(values, n, j, gates):
    """gates[n, :, j] = values, of which the first phase of a step may have fewer"""
    for g in range(len(values)):
        gates[n, g, j] = values[g]


@cuda.jit(device=True)
def add(numbers, n, j, out):
    """out[n, :, j] += numbers"""
    for k in range(len(numbers)):
        if k < out.shape[1]:  # NOTHING finds no place to go to
            out[n, k, j] += numbers[k]


@cache
def kernels(cell: type[Cell]) -> Kernels:
    """Compiled when they are first launched. A kernel takes no function as an argument, so each cell has its own."""
    cell_forward, cell_backward = cell.forward, cell.backward
    G, U = cell.G, max(cell.U, 1)  # an array has at least one number

    @cuda.jit
    def forward(gx, gh, unit, h, c, clip, gates, h_next, c_next):
        j, n = cuda.grid(2)
        if j < h.shape[1] and n < h.shape[0]:
            x, y, w = cuda.local.array(G, float64), cuda.local.array(G, float64), cuda.local.array(U, float64)
            prev = load(gx, gh, unit, h, c, n, j, x, y, w)
            values, next = cell_forward(x, y, w, prev, clip)
            store_gates(values, n, j, gates)
            h_next[n, j] = next.h
            c_next[n, j] = next.c

    @cuda.jit
    def backward(gx, gh, unit, h, c, clip, gates, h_next, c_next, dh_next, dc_next, dgx, dgh, dunit, dh, dc):
        j, n = cuda.grid(2)
        if j < h.shape[1] and n < h.shape[0]:
            x, y, w = cuda.local.array(G, float64), cuda.local.array(G, float64), cuda.local.array(U, float64)
            a = cuda.local.array(G, float64)
            prev = load(gx, gh, unit, h, c, n, j, x, y, w)
            load_gates(gates, n, j, a)
            next = State(float64(h_next[n, j]), float64(c_next[n, j]))
            dnext = State(float64(dh_next[n, j]), float64(dc_next[n, j]))
            da_x, da_h, dprev, du = cell_backward(x, y, w, prev, clip, a, next, dnext)
            add(da_x, n, j, dgx)
            add(da_h, n, j, dgh)
            add(du, n, j, dunit)
            dh[n, j] += dprev.h
            dc[n, j] += dprev.c

    if cell.middle == "none":
        return Kernels(forward, backward, None, None)
    cell_output, cell_output_backward = cell.output, cell.output_backward

    @cuda.jit
    def output(gx, gh, unit, h, c, mid, gates, h_next):
        j, n = cuda.grid(2)
        if j < h.shape[1] and n < h.shape[0]:
            x, y, w = cuda.local.array(G, float64), cuda.local.array(G, float64), cuda.local.array(U, float64)
            a = cuda.local.array(G, float64)
            prev = load(gx, gh, unit, h, c, n, j, x, y, w)
            load_gates(gates, n, j, a)
            values, h_new = cell_output(x, y, w, prev, a, float64(mid[n, j]))
            store_gates(values, n, j, gates)
            h_next[n, j] = h_new

    @cuda.jit
    def output_backward(gx, gh, unit, h, c, mid, gates, dh_next, dgx, dgh, dunit, dh, dc, dmid):
        j, n = cuda.grid(2)
        if j < h.shape[1] and n < h.shape[0]:
            x, y, w = cuda.local.array(G, float64), cuda.local.array(G, float64), cuda.local.array(U, float64)
            a = cuda.local.array(G, float64)
            prev = load(gx, gh, unit, h, c, n, j, x, y, w)
            load_gates(gates, n, j, a)
            da_x, da_h, dprev, du, dm = cell_output_backward(
                x, y, w, prev, a, float64(mid[n, j]), float64(dh_next[n, j])
            )
            add(da_x, n, j, dgx)
            add(da_h, n, j, dgh)
            add(du, n, j, dunit)
            dh[n, j] += dprev.h
            dc[n, j] += dprev.c
            dmid[n, j] += dm

    return Kernels(forward, backward, output, output_backward)
