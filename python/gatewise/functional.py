"""Recurrent layers as functions on arrays: one call is one direction of one layer, forward or backward.

Time-major NumPy arrays in, NumPy arrays out, nothing copied and nothing cast. Shapes use the project's letters:
T time steps, N batch, I input size, H hidden size, G gates of the cell (lstm i f g o · gru r z n · rnn h).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Optional

import numpy as np
from numpy.typing import NDArray

from . import _core
from .backends import choose, choose_num_threads

Array = NDArray[Any]
Lengths = Optional[NDArray[np.int64]]


class Gradients(NamedTuple):
    """Gradients by the name of what they belong to, each with its shape; what was not wanted is None."""

    dx: Array | None = None
    dh0: Array | None = None
    dc0: Array | None = None
    dw_ih: Array | None = None
    dw_hh: Array | None = None
    db_ih: Array | None = None
    db_hh: Array | None = None


class Tape:
    """What a forward pass returns, and what its backward pass needs.

    The tape borrows the arrays it was made from (x, the weights, the initial state): change them before
    `backward` and the gradients belong to neither value. Backward reads the tape and leaves it whole.

    Attributes:
        cell: name of the cell, a key of `gatewise.cells()`.
        backend: the backend that ran ("cpu" or "reference").
        y: [T, N, H] the hidden state after each step, in time order; 0 past a sequence's end.
        hn, cn: [N, H] the state at the end of each sequence; `cn` is None for a cell without c.
    """

    __slots__ = ("_inputs", "_problem", "_saved", "_states", "backend", "cell", "cn", "hn", "y")

    def __init__(
        self,
        cell: str,
        backend: str,
        inputs: dict[str, Any],
        problem: _core.Problem,
        y: Array,
        hn: Array,
        cn: Array | None,
        saved: Array | None,
        states: Array | None,
    ) -> None:
        self._problem = problem
        self._inputs = inputs  # for the reference; the problem holds them for the kernels
        self.cell, self.backend = cell, backend
        self.y, self.hn, self.cn = y, hn, cn
        self._saved, self._states = saved, states

    def __repr__(self) -> str:
        p = self._problem
        return f"Tape({self.cell}:T{p.T},N{p.N},I{p.I},H{p.H}, backend={self.backend!r}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes kept for the backward pass beyond the inputs and y."""
        return sum(a.nbytes for a in (self._saved, self._states) if a is not None)

    @property
    def gates(self) -> Array:
        """[T, N, G, H] the activated gates of every step (a copy); 0 past a sequence's end."""
        saved, p = self._need_saved(), self._problem
        if self.backend == "cpu":
            saved = self._unpack(saved, p.S, 0)
        gates: Array = saved[:, :, : p.G].copy()
        return gates

    @property
    def c(self) -> Array | None:
        """[T, N, H] the cell state after every step, aligned with y (a copy); None for a cell without c."""
        self._need_saved()
        if self._states is None:
            return None
        states = self._states
        if self.backend == "cpu":
            states = self._unpack(states, 1, self._problem.N)[:, :, 0]
        return np.array(states)

    def _unpack(self, buffer: Array, blocks: int, skip: int) -> Array:
        """[panel][skip + packed row][block][lane], the kernels' layout (cpp/cpu/layer.hpp) -> [T, N, blocks, H]"""
        p = self._problem
        rows = np.empty(p.rows, np.int64)
        p.write_rows(rows)
        panels = -(-p.H // p.lanes)
        out = np.zeros((p.T * p.N, blocks, panels * p.lanes), p.dtype)
        packed = buffer.reshape(panels, skip + p.rows, blocks, p.lanes)[:, skip:]
        out[rows] = packed.transpose(1, 2, 0, 3).reshape(p.rows, blocks, panels * p.lanes)
        unpacked: Array = out.reshape(p.T, p.N, blocks, panels * p.lanes)[..., : p.H]
        return unpacked

    def _need_saved(self) -> Array:
        if self._saved is None:
            raise ValueError(
                "tape: this forward pass kept nothing for backward (training=False); run it with training=True"
            )
        return self._saved


def forward(
    cell: str,
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
    training: bool = True,
) -> Tape:
    """Runs a layer of any cell over a batch of sequences; `rnn`, `lstm` and `gru` are this with the cell named.

    Args:
        cell: a key of `gatewise.cells()`.
        x: [T, N, I] float32 or float64, C-contiguous. Every other array has its dtype, none is cast or copied.
        w_ih, w_hh: [G*H, I], [G*H, H] weights, gates in PyTorch's order.
        b_ih, b_hh: [G*H] biases, each may be None for zeros.
        h0, c0: [N, H] initial state, each may be None for zeros; `c0` only for a cell with c.
        lengths: int64 [N], the valid steps of each sequence, 0 to T in any order; None means T for all. Outputs
            past a sequence's end are 0, its final state is the one at its own end, and nothing past the end
            influences anything.
        reverse: walk each sequence from its own last step to step 0. y stays in time order; hn is the state
            after step 0.
        backend: "cpu" or "reference"; None asks GATEWISE_BACKEND, else takes "cpu".
        num_threads: at most that many threads; None asks GATEWISE_NUM_THREADS, OMP_NUM_THREADS, the machine.
        training: keep what `backward` needs.

    Subnormal numbers count as zero inside the compiled kernels; the caller's floating-point mode is restored.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
        MemoryError: the outputs, or what is kept for backward, do not fit into memory.
    """
    return _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, backend, num_threads, training,
    )  # fmt: skip


def _forward(
    cell: str,
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
    training: bool = True,
    ticks: NDArray[np.uint64] | None = None,
    packed: _core.PackedWeights | None = None,
    promise: int = 0,
) -> Tape:
    """`forward`, and for benchmarks `ticks`: uint64 [3], to which the compiled kernels add; `packed` and `promise` are
    how a layer keeps its weights packed (see _core.pyi)."""
    name = choose(backend)
    if name == "cpu":
        run = _core.run_forward(
            cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, num_threads, training, ticks, packed, promise
        )
        return Tape(cell, name, {}, *run)
    from . import reference

    choose_num_threads(num_threads)  # no use for it here, but it must be one
    p = _core.Problem(cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)
    inputs: dict[str, Any] = {
        "x": x, "w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "h0": h0, "c0": c0,
        "lengths": None if lengths is None else lengths.copy(), "reverse": reverse,
    }  # fmt: skip
    out = reference.forward(cell, **inputs)
    return Tape(cell, name, inputs, p, *out[:3], *(out[3:] if training else (None, None)))


def backward(
    tape: Tape,
    dy: Array | None = None,
    dhn: Array | None = None,
    dcn: Array | None = None,
    *,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Back-propagates through the sequences of `tape`, which it leaves as it was.

    Args:
        tape: from `forward` or one of its named forms.
        dy: [T, N, H] gradient of y; None for zeros. What stands past a sequence's end is not read.
        dhn, dcn: [N, H] gradients of the final state; None for zeros; `dcn` only for a cell with c.
        wanted: names of `Gradients`' fields; the others are None and not computed. None: all that the cell has.
        num_threads: as in `forward`.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
    """
    return _backward(tape, dy, dhn, dcn, wanted, num_threads)


def _backward(
    tape: Tape,
    dy: Array | None = None,
    dhn: Array | None = None,
    dcn: Array | None = None,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
    ticks: NDArray[np.uint64] | None = None,
) -> Gradients:
    """`backward`, and for benchmarks `ticks`, as in `_forward`."""
    if not isinstance(tape, Tape):
        raise ValueError(f"tape: expected what a forward pass returned; got {type(tape).__name__}")
    saved = tape._need_saved()
    p = tape._problem
    names = None if wanted is None else _wanted(wanted, p.has_c)
    if tape.backend == "cpu":
        return Gradients(*_core.run_backward(p, tape.y, saved, tape._states, dy, dhn, dcn, names, num_threads, ticks))
    from . import reference

    choose_num_threads(num_threads)
    p.check_incoming(dy, dhn, dcn)
    given: dict[str, Any] = {"y": tape.y, "saved": saved, "states": tape._states, "dy": dy, "dhn": dhn, "dcn": dcn}
    every = names if names is not None else _wanted(Gradients._fields, True) - ({"dc0"} if not p.has_c else set())
    return Gradients(**reference.backward(p.cell, **tape._inputs, **given, wanted=every))


def _wanted(wanted: Iterable[str] | None, has_c: bool) -> frozenset[str]:
    known = frozenset(name for name in Gradients._fields if has_c or name != "dc0")
    if wanted is None:
        return known
    names = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    # compared one by one: what came may not be hashable
    if unknown := [repr(name) for name in names if name not in [*known]]:
        fields = ", ".join(name for name in Gradients._fields if name in known)
        raise ValueError(f"wanted: expected names among {fields}; got {', '.join(unknown)}")
    return frozenset(names)


def lstm_forward(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
) -> Tape:
    """Forward pass of an LSTM, kept for `lstm_backward`. Arguments as in `forward`; 4*H weight rows, gates i f g o."""
    return _forward("lstm", x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, backend, num_threads)


def gru_forward(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    *,
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
) -> Tape:
    """Forward pass of a GRU, kept for `gru_backward`. Arguments as in `forward`; 3*H weight rows, gates r z n."""
    return _forward("gru", x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads)


def rnn_forward(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    *,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
) -> Tape:
    """Forward pass of a plain RNN, kept for `rnn_backward`. Arguments as in `forward`; H weight rows."""
    return _forward(rnn_cell(nonlinearity), x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads)


def rnn_cell(nonlinearity: str) -> str:
    """The cell's name for a plain RNN's nonlinearity."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu'; got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"


def lstm_backward(
    tape: Tape,
    dy: Array | None = None,
    dhn: Array | None = None,
    dcn: Array | None = None,
    *,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `lstm_forward`; arguments as in `backward`."""
    return _backward(_tape_of(tape, "lstm"), dy, dhn, dcn, wanted, num_threads)


def gru_backward(
    tape: Tape,
    dy: Array | None = None,
    dhn: Array | None = None,
    *,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `gru_forward`; arguments as in `backward`."""
    return _backward(_tape_of(tape, "gru"), dy, dhn, None, wanted, num_threads)


def rnn_backward(
    tape: Tape,
    dy: Array | None = None,
    dhn: Array | None = None,
    *,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """Gradients of `rnn_forward`; arguments as in `backward`."""
    return _backward(_tape_of(tape, "rnn"), dy, dhn, None, wanted, num_threads)


def _tape_of(tape: Tape, layer: str) -> Tape:
    if isinstance(tape, Tape) and tape.cell != layer and tape.cell.split("_")[0] != layer:
        raise ValueError(f"tape: expected the tape of a {layer} forward pass; got that of cell {tape.cell!r}")
    return tape


def lstm(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """An LSTM without a tape: y [T, N, H], (hn, cn) [N, H] each. Arguments as in `forward`; gates i f g o."""
    tape = _forward("lstm", x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, backend, num_threads, False)
    assert tape.cn is not None
    return tape.y, (tape.hn, tape.cn)


def gru(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    *,
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """A GRU without a tape: y [T, N, H], hn [N, H]. Arguments as in `forward`; gates r z n."""
    tape = _forward("gru", x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads, False)
    return tape.y, tape.hn


def rnn(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    *,
    nonlinearity: Literal["tanh", "relu"] = "tanh",
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Array]:
    """A plain RNN without a tape: y [T, N, H], hn [N, H]. Arguments as in `forward`."""
    tape = _forward(
        rnn_cell(nonlinearity), x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads, False
    )
    return tape.y, tape.hn
