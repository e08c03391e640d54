"""The persistent CUDA kernels without a GPU: a layer's whole loop in one launch of several blocks, which gives what the
stepwise kernels are held to (test_cuda_kernels.py).
"""

from __future__ import annotations

import ctypes

import pytest

import problems
from plans import KB, MB, DeviceLimits
from plans import device as device_of
from test_cuda_kernels import OPTIONS, check, fitting, library

CELLS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_peephole", "lstm_coupled", "gru"]  # one product a step, and nothing else
PERSISTENT = 1  # Loop of kernels.hpp
__all__ = ["library"]


def card(multiprocessors: int) -> DeviceLimits:
    """A device so small that a small layer takes all of it: each block owns several units."""
    limits = device_of(multiprocessors, 4 * MB, "8.0")
    limits.shared_per_block = 99 * KB
    return limits


# Weights in registers alone, and from the driver's 16 registers on in shared memory too; one tile of rows to a warp, up
# to four, and several groups of them; a batch of several tiles.
SHAPES = [("T4,N3,I7,H17", 3), ("T3,N1,I1,H5", 5), ("T4,N33,I3,H33", 4), ("T2,N2,I2,H24", 1)]
SOME = [*((shape, "h0", blocks) for shape, blocks in SHAPES)]
SOME += [("T5,N4,I3,H9", options, 3) for options in OPTIONS if "project" not in options]


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_problem(library: ctypes.CDLL, cell: str, dtype: str) -> None:
    """In float32, which is the same source, some of them."""
    for shape, options, multiprocessors in SOME if dtype == "f64" else SOME[::3]:
        check(library, fitting(cell, dtype, shape, options), loop=PERSISTENT, device=card(multiprocessors))
