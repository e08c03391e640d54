"""Recurrent layers as functions on arrays: one call is one direction of one layer, forward or backward.

Time-major NumPy arrays in, NumPy arrays out, nothing copied and nothing cast (but 16-bit numbers: see `forward`); or
arrays of CuPy, Numba or PyTorch on a CUDA device, in and out (see `forward`; no GPU has run this yet).
Shapes use the project's letters: T time steps, N batch, I input size, H hidden size, R size of h (H, or that of its
projection), G gates of the cell (lstm i f g o · gru r z n · rnn h), U blocks of per-unit weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Optional, TypedDict

import numpy as np
from numpy.typing import NDArray

from . import _core
from .backends import check_is_cuda, choose, choose_num_threads, cuda
from .device import Place, loop_of, operands_of, place_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = NDArray[Any]
Lengths = Optional[NDArray[np.int64]]


class Options(TypedDict, total=False):
    """Further options of a forward pass, beside lengths, reverse, backend and num_threads: each may be left out.

    Which steps there are:
        batch_sizes: int64 [T], positive, not increasing: x is packed as in torch's PackedSequence, [rows, I] with
            batch_sizes[t] rows of step t after those of step t - 1, the longest sequence first. y, dy, dx and reset
            are packed alike, N = batch_sizes[0]; the states stay [N, ·] in the order of those rows.
        batch_first: x, y, dy, dx are [N, T, ·] and reset is [N, T]. The states stay [N, ·].
        reset: bool [T, N], true at the first step of a new segment: no state passes from step t - 1 to t, or back,
            nor does a gradient.
        reset_to: the state in which a segment starts: "initial" (h0 and c0, which then sum the gradients of all
            their segments) or "zero".

    Weights that only some layers have:
        w_unit: [U*H] the per-unit weights of a cell that has any, block after block (see `gatewise.cells`).
        w_hr: [R, H] makes h = W_hr (o tanh(c)), torch's `proj_size`; for cells with c.

    Regularisers:
        h_mask: [N, R] multiplies h wherever it meets w_hh: recurrent dropout with one mask for all steps
            (Gal & Ghahramani, arXiv 1512.05287, as Keras does it).
        zoneout_h, zoneout_c: in [0, 1), the probability for a number of h or c to stay what it was (Krueger et al.,
            arXiv 1606.01305).
        seed: 0 to 2**64 - 1, which numbers stay: a function of seed, step, row and unit alone. None: the expectation
            over all seeds, as at inference.
        cell_clip: c is limited to ±cell_clip before h is made of it.

    Memory:
        save: what the tape keeps for backward: "all"; "states", h and c, from which backward recomputes the gates to
            the same bits; "checkpoints", those of every few steps, about √T of them. The reference recomputes always.
    """

    batch_sizes: Lengths
    batch_first: bool
    reset: NDArray[np.bool_] | None
    reset_to: Literal["initial", "zero"]
    w_unit: Array | None
    w_hr: Array | None
    h_mask: Array | None
    zoneout_h: float
    zoneout_c: float
    seed: int | None
    cell_clip: float | None
    save: Literal["all", "states", "checkpoints"]


_INPUTS = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0", "lengths", "reverse", "extras")  # of _core.Problem
# `Options` and their defaults, in the order of the tuple `extras` of _core.pyi
_EXTRAS: dict[str, Any] = {
    "w_unit": None, "w_hr": None, "h_mask": None, "reset": None, "reset_to": "initial", "zoneout_h": 0.0,
    "zoneout_c": 0.0, "seed": None, "cell_clip": None, "batch_sizes": None, "batch_first": False, "save": "all",
}  # fmt: skip


class Gradients(NamedTuple):
    """Gradients by the name of what they belong to, each with its shape; None: not wanted, or not there."""

    dx: Array | None = None
    dh0: Array | None = None
    dc0: Array | None = None
    dw_ih: Array | None = None
    dw_hh: Array | None = None
    db_ih: Array | None = None
    db_hh: Array | None = None
    dw_unit: Array | None = None
    dw_hr: Array | None = None


class SecondGradients(NamedTuple):
    """What `double_backward` returns: gradients by the incoming gradients, then by the inputs of the layer."""

    ddy: Array | None = None
    ddhn: Array | None = None
    ddcn: Array | None = None
    dx: Array | None = None
    dh0: Array | None = None
    dc0: Array | None = None
    dw_ih: Array | None = None
    dw_hh: Array | None = None
    db_ih: Array | None = None
    db_hh: Array | None = None
    dw_unit: Array | None = None
    dw_hr: Array | None = None


class Tape:
    """What a forward pass returns, and what its backward pass needs.

    The tape borrows the arrays it was made from (x, the weights, the initial state): change them before
    `backward` and the gradients belong to neither value. Backward reads the tape and leaves it whole.

    Attributes:
        cell: name of the cell, a key of `gatewise.cells()`.
        backend: the backend that ran ("cpu", "reference" or "cuda").
        y: [T, N, R] the hidden state after each step, in time order; 0 past a sequence's end. [N, T, R] with
            batch_first, [rows, R] for packed input; so are the leading axes of `gates` and `c`.
        hn: [N, R] the state at the end of each sequence.
        cn: [N, H] the same of c; None for a cell without c.
    """

    __slots__ = (
        "_inputs", "_problem", "_saved", "_states", "_stream", "_training", "_wide", "backend", "cell", "cn", "hn", "y",
    )  # fmt: skip

    def __init__(
        self,
        cell: str,
        backend: str,
        training: bool,
        inputs: tuple[Any, ...],
        problem: _core.Problem,
        y: Array,
        hn: Array,
        cn: Array | None,
        saved: Array | None,
        states: Array | None,
        wide: Tape | None = None,
        stream: Any = None,
    ) -> None:
        self._training, self._problem = training, problem
        self._inputs = inputs  # those of _core.Problem after the cell
        self.cell, self.backend = cell, backend
        self.y, self.hn, self.cn = y, hn, cn
        self._saved, self._states = saved, states
        self._wide = wide  # of 16-bit arrays: the tape of the float32 pass that did the work
        self._stream = stream  # on a CUDA device: of the forward pass, which backward waits for

    def __repr__(self) -> str:
        p = self._problem
        return f"Tape({self.cell}:T{p.T},N{p.N},I{p.I},H{p.H}, backend={self.backend!r}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes kept for the backward pass beyond the inputs and y. Of 16-bit arrays, all that was widened counts."""
        kept = [self._saved, self._states]
        if self._wide is not None and self._training:
            mine = {id(array) for array in _arrays(self._inputs)}
            kept += [self._wide.y, *(array for array in _arrays(self._wide._inputs) if id(array) not in mine)]
        return sum(a.nbytes for a in kept if a is not None)

    @property
    def gates(self) -> Array:
        """[T, N, G, H] the activated gates of every step (a copy); 0 past a sequence's end.

        Raises:
            ValueError: the forward pass did not keep them.
        """
        saved, p = self._kept(self._saved, "the gates", "all"), self._problem
        if self.backend == "cuda":
            return self._unpack_on_device(saved, p.S, (p.G, p.H))
        if self.backend == "cpu":
            saved = self._unpack(saved, p.S, 0)
        gates: Array = saved[..., : p.G, :].copy()
        return gates

    @property
    def c(self) -> Array | None:
        """[T, N, H] the cell state after every step, aligned with y (a copy); None for a cell without c.

        Raises:
            ValueError: the forward pass did not keep them.
        """
        self._need_training()
        if not self._problem.has_c:
            return None
        states = self._kept(self._states, "every c", "all", "states")
        if self.backend == "cuda":
            return self._unpack_on_device(states, 1, (self._problem.H,))
        if self.backend == "cpu":
            states = self._unpack(states, 1, self._problem.N)[..., 0, :]
        return np.array(states)

    def _unpack(self, buffer: Array, blocks: int, skip: int) -> Array:
        """[panel][skip + packed row][block][lane], the kernels' layout (cpp/cpu/forward.hpp) -> [T, N, blocks, H]"""
        p = self._problem
        rows, leading = np.empty(p.rows, np.int64), self.y.shape[:-1]
        p.write_rows(rows)
        panels = -(-p.H // p.lanes)
        out = np.zeros((int(np.prod(leading)), blocks, panels * p.lanes), p.dtype)
        size = panels * (skip + p.rows) * blocks * p.lanes  # some cells keep more behind it
        packed = buffer[:size].reshape(panels, skip + p.rows, blocks, p.lanes)[:, skip:]
        out[rows] = packed.transpose(1, 2, 0, 3).reshape(p.rows, blocks, panels * p.lanes)
        unpacked: Array = out.reshape(*leading, blocks, panels * p.lanes)[..., : p.H]
        return unpacked

    def _unpack_on_device(self, buffer: Array, blocks: int, tail: tuple[int, ...]) -> Array:
        """[packed row][block][H], the CUDA kernels' layout (cpp/cuda/layer.hpp) -> [T, N, *tail], by way of the CPU"""
        p, kernels, place, leading = self._problem, cuda(), place_of(self.y), tuple(self.y.shape[:-1])
        assert place is not None
        rows, packed = np.empty(p.rows, np.int64), np.empty((p.rows, blocks * p.H), p.dtype)
        p.write_rows(rows)
        kernels.read(p, buffer, packed, place.handle)
        out = np.zeros((int(np.prod(leading)), int(np.prod(tail))), p.dtype)
        out[rows] = packed[:, : out.shape[1]]
        unpacked: Array = place.empty((*leading, *tail), p.dtype)
        kernels.write(p, out, unpacked, place.handle)
        return unpacked

    def _kept(self, array: Array | None, what: str, *saves: str) -> Array:
        """`array`, which a forward pass keeps if its option `save` is one of `saves`."""
        self._need_training()
        save = _save_of(self._inputs)
        if array is None or save not in saves:
            raise ValueError(f"tape: {what} were not kept: save={save!r}; run the forward pass with save={saves[-1]!r}")
        return array

    def _need_training(self) -> None:
        if not self._training:
            raise ValueError(
                "tape: this forward pass kept nothing for backward (training=False); run it with training=True"
            )


def _arrays(values: Iterable[Any]) -> list[Array]:
    """The float32 arrays among the inputs of a tape, whose last entry holds the further ones."""
    *placed, extras = values
    return [a for a in (*placed, *(extras or ())) if isinstance(a, np.ndarray) and a.dtype == np.float32]


def forward(
    cell: str,
    x: Array,
    w_ih: Array,
    w_hh: Array | None,
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
    **options: Unpack[Options],
) -> Tape:
    """Runs a layer of any cell over a batch of sequences; `rnn`, `lstm` and `gru` are this with the cell named.

    Args:
        cell: a key of `gatewise.cells()`.
        x: [T, N, I] (batch_first: [N, T, I], packed: [rows, I]) float32 or float64: any view whose last axis is
            contiguous. Every other array is C-contiguous and has its dtype; none is cast or copied.
        w_ih, w_hh: [G*H, I], [G*H, R] weights, gates in PyTorch's order; `w_hh` is None for a cell without that
            product.
        b_ih, b_hh: [G*H] biases, each may be None for zeros, and is None for a normalised cell.
        h0, c0: [N, R], [N, H] initial state, each may be None for zeros; `c0` only for a cell with c.
        lengths: int64 [N], the valid steps of each sequence, 0 to T in any order; None means T for all. Outputs
            past a sequence's end are 0, its final state is the one at its own end, and nothing past the end
            influences anything.
        reverse: walk each sequence from its own last step to step 0. y stays in time order; hn is the state
            after step 0.
        backend: "cpu" or "reference"; None asks GATEWISE_BACKEND, else takes "cpu". Arrays on a CUDA device have "cuda"
            alone, or None.
        num_threads: at most that many threads; None asks GATEWISE_NUM_THREADS, OMP_NUM_THREADS, the machine.
        training: keep what `backward` needs.
        options: see `Options`.

    16-bit arrays: if x is float16, or bfloat16 as `ml_dtypes` or PyTorch defines it, each other array may be of x's
    dtype or float32. The arithmetic is float32's, on widened copies; y, hn and cn are rounded to x's dtype, every
    gradient to the dtype of what it belongs to.

    Arrays on a CUDA device: where x is an array of CuPy, Numba or PyTorch there, so is every other one but lengths and
    batch_sizes, and the results are that library's. The work is put on the library's current stream, after what the
    arrays' own streams have to do; the host does not wait. So do not change an array on another stream before that.
    float32 and float64. GATEWISE_CUDA_OPERANDS=tf32 or bf16 lets tensor cores round the operands of
    float32 products; of PyTorch's tensors torch.set_float32_matmul_precision says it.

    Subnormal numbers count as zero inside the CPU's kernels; the caller's floating-point mode is restored.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
        RuntimeError: a call of CUDA's failed; the message tells which, the error, and where.
        TypeError: an option that is none of `Options`.
        MemoryError: the outputs, or what is kept for backward, do not fit into memory.
    """
    extras = _extras(options) if options else None
    return _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, backend, num_threads, training, extras=extras
    )


def _extras(options: Options) -> tuple[Any, ...] | None:
    """The tuple of _core.pyi that holds these options; None if every one is at its default."""
    if unknown := [name for name in options if name not in _EXTRAS]:
        raise TypeError(f"{', '.join(unknown)}: no such option; further options are {', '.join(_EXTRAS)}")
    extras: dict[str, Any] = {**_EXTRAS, **options}
    return None if all(extras[name] is default for name, default in _EXTRAS.items()) else tuple(extras.values())


def _forward(
    cell: str,
    x: Array,
    w_ih: Array,
    w_hh: Array | None,
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
    extras: tuple[Any, ...] | None = None,
) -> Tape:
    """`forward`, its options in their places or in `extras` (see `_extras`). For benchmarks there is `ticks`: uint64
    [3], to which the compiled kernels add; `packed` and `promise` are how a layer keeps its weights packed (see
    _core.pyi)."""
    place = None if type(x) is np.ndarray else place_of(x)
    if place is not None:
        check_is_cuda(backend)
        choose_num_threads(num_threads)  # no use for it there, but it must be one
    may_be_half = place is not None or (isinstance(x, np.ndarray) and x.itemsize == 2)
    if may_be_half and _name(x.dtype) in _HALVES:
        half = x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras
        return _forward_16_bit(cell, half, backend=backend, num_threads=num_threads, training=training)
    if place is not None:
        inputs = x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras
        return _forward_on_device(cell, place, inputs, training)
    name = choose(backend)
    if name == "cpu":
        run = _core.run_forward(
            cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, num_threads, training, ticks, packed, promise,
            extras,
        )  # fmt: skip
        return Tape(cell, name, training, (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras), *run)
    from . import reference

    choose_num_threads(num_threads)  # no use for it here, but it must be one
    p = _core.Problem(cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras)
    lengths = None if lengths is None else lengths.copy()  # they steer addresses, and the caller may change its array
    inputs = x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras
    out = reference.forward(cell, inputs)
    return Tape(cell, name, training, inputs, p, *out[:3], *(out[3:] if training else (None, None)))


def _save_of(inputs: tuple[Any, ...]) -> str:
    """The option `save` of a call's arguments, of which the last are its extras."""
    extras = inputs[-1]
    save: str = (None if extras is None else extras[-1]) or "all"
    return save


def _forward_on_device(cell: str, place: Place, inputs: tuple[Any, ...], training: bool) -> Tape:
    """`_forward` on arrays of a CUDA device, on their library's stream."""
    kernels = cuda()
    p = kernels.Problem(cell, *inputs, None, place.handle, operands_of(place), loop_of())
    saved_size, states_size, scratch_size, _ = p.sizes
    y, hn = place.empty((*inputs[0].shape[:-1], p.R), p.dtype), place.empty((p.N, p.R), p.dtype)
    cn = place.empty((p.N, p.H), p.dtype) if p.has_c else None
    saved = place.empty((saved_size,), p.dtype) if training and _save_of(inputs) == "all" else None
    states = place.empty((states_size,), p.dtype) if training and p.has_c else None
    kernels.forward(p, y, hn, cn, saved, states, place.empty((scratch_size,), "uint8"), place.handle)
    return Tape(cell, "cuda", training, inputs, p, y, hn, cn, saved, states, stream=place.stream)


def _backward_on_device(tape: Tape, incoming: tuple[Any, ...], names: frozenset[str] | None) -> Gradients:
    """`_backward` of a tape on a CUDA device, on its library's current stream."""
    p, place = tape._problem, place_of(tape.y)
    assert place is not None
    rows, own, traits = p.G * p.H, p.U * p.H, _core.cells[p.cell]
    shapes: dict[str, tuple[int, ...] | None] = {
        "dx": tape._inputs[0].shape, "dh0": (p.N, p.R), "dc0": (p.N, p.H) if p.has_c else None,
        "dw_ih": (rows, p.I), "dw_hh": (rows, p.R) if traits["product"] else None,
        "db_ih": None if traits["normed"] else (rows,), "db_hh": None if traits["normed"] else (rows,),
        "dw_unit": (own,) if own else None, "dw_hr": (p.R, p.H) if p.projects else None,
    }  # fmt: skip
    grads = Gradients(**{
        name: place.empty(shape, p.dtype) for name, shape in shapes.items()
        if shape is not None and (names is None or name in names)
    })  # fmt: skip
    scratch = place.empty((p.sizes[3],), "uint8")
    cuda().backward(p, tape.y, tape._saved, tape._states, *incoming, tuple(grads), scratch, place.handle, fresh=True)
    return grads


_HALVES = ("float16", "bfloat16")


def _name(dtype: Any) -> str:
    """Of any library's dtype, as NumPy has it; PyTorch writes torch.float16."""
    return str(dtype).rpartition(".")[2]


def _forward_16_bit(cell: str, inputs: tuple[Any, ...], *, training: bool, **how: Any) -> Tape:
    """`_forward` on float32 copies of the arrays that have x's dtype, its outputs rounded to that."""
    dtype = inputs[0].dtype
    given = {name: _widened(value, dtype, name) for name, value in zip(_INPUTS, inputs)}
    if given["extras"] is not None:
        given["extras"] = tuple(_widened(value, dtype, name) for name, value in zip(_EXTRAS, given["extras"]))
    tape = _forward(cell, **given, training=training, **how)
    y, hn, cn = (_rounded(a, dtype) for a in (tape.y, tape.hn, tape.cn))
    assert y is not None and hn is not None
    return Tape(
        cell, tape.backend, training, inputs, tape._problem, y, hn, cn, tape._saved, tape._states, tape, tape._stream
    )


def _widened(value: Any, dtype: Any, name: str) -> Any:
    """An array of that dtype in float32, anything else as it is. name: the argument's."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype == dtype else value
    return _converted(value, "float32", name) if getattr(value, "dtype", None) == dtype else value


def _rounded(array: Array | None, dtype: Any) -> Array | None:
    """`array` in `dtype`; what exceeds its range becomes infinite without a word, as it does on any processor."""
    if array is None or array.dtype == dtype:
        return array
    if not isinstance(array, np.ndarray):
        return _converted(array, _name(dtype), "numbers")
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _converted(array: Any, dtype: str, name: str) -> Any:
    """An array of a CUDA device made float32, or float32 made 16-bit numbers."""
    place = place_of(array)
    if place is None:
        return array  # the call itself says what is wrong with it
    converted = place.empty(tuple(array.shape), dtype)
    cuda().convert(name, array, converted, place.handle)
    return converted


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
        dy: gradient of y, of its shape; None for zeros. What stands past a sequence's end is not read.
        dhn, dcn: [N, R], [N, H] gradients of the final state; None for zeros; `dcn` only for a cell with c.
        wanted: names of `Gradients`' fields; the others are None and not computed. None: all that the layer has.
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
    if not tape._training:
        tape._need_training()
    if tape._wide is not None:
        dy, dhn, dcn = _incoming_widened(tape, dy, dhn, dcn)
        return Gradients(**_rounded_like_inputs(tape, _backward(tape._wide, dy, dhn, dcn, wanted, num_threads, ticks)))
    p = tape._problem
    names = None if wanted is None else _wanted(wanted, p.has_c)
    if tape.backend == "cpu":
        return Gradients(
            *_core.run_backward(p, tape.y, tape._saved, tape._states, dy, dhn, dcn, names, num_threads, ticks)
        )
    choose_num_threads(num_threads)
    if tape.backend == "cuda":
        return _backward_on_device(tape, (dy, dhn, dcn), names)
    from . import reference

    p.check_incoming(dy, dhn, dcn)
    grads = reference.backward(p.cell, tape._inputs, dy, dhn, dcn)
    return Gradients(**{name: grads[name] for name in grads if names is None or name in names})


def _incoming_widened(tape: Tape, *gradients: Array | None) -> Iterator[Array | None]:
    return (_widened(a, tape.y.dtype, name) for a, name in zip(gradients, ("dy", "dhn", "dcn")))


def _rounded_like_inputs(tape: Tape, grads: Any) -> dict[str, Array | None]:
    """`grads`, each in the dtype of the array it belongs to, or in that of y where none was given."""
    given = dict(zip(_INPUTS, tape._inputs))
    given.update(zip(_EXTRAS, given["extras"] or ()))
    dtypes = {"d" + name: value.dtype for name, value in given.items() if hasattr(value, "dtype")}
    return {name: _rounded(grad, dtypes.get(name, tape.y.dtype)) for name, grad in grads._asdict().items()}


def _wanted(wanted: Iterable[str], has_c: bool) -> frozenset[str]:
    known = [name for name in Gradients._fields if has_c or name != "dc0"]
    names = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    # compared one by one: what came may not be hashable
    if unknown := [repr(name) for name in names if name not in known]:
        raise ValueError(f"wanted: expected names among {', '.join(known)}; got {', '.join(unknown)}")
    return frozenset(names)


def double_backward(
    tape: Tape,
    dy: Array | None = None,
    dhn: Array | None = None,
    dcn: Array | None = None,
    *,
    ddx: Array | None = None,
    ddh0: Array | None = None,
    ddc0: Array | None = None,
    ddw_ih: Array | None = None,
    ddw_hh: Array | None = None,
    ddb_ih: Array | None = None,
    ddb_hh: Array | None = None,
    ddw_unit: Array | None = None,
    ddw_hr: Array | None = None,
) -> SecondGradients:
    """Back-propagates through `backward(tape, dy, dhn, dcn)`: gradients of sum(ddx * dx) + sum(ddh0 * dh0) + ...

    With dd* a direction v in the space of inputs and weights, and the loss L = sum(y dy) + sum(hn dhn) + sum(cn dcn),
    the fields dx, dh0, ... are the product of L's Hessian with v, and ddy, ddhn, ddcn are the derivatives of y, hn, cn
    along v. The tape may be of any backend; what computes is the reference, in float64, once forward and backward over
    complex numbers whose imaginary part carries the derivative along v (the complex step of Squire & Trapp, SIAM
    Review 40, 1998): exact to rounding, in some 1.3 times the time of the reference's `backward`, a
    hundred times that of the kernels'.

    Args:
        tape, dy, dhn, dcn: as they went into `backward`.
        ddx, ...: gradients of what `backward` returned, of its shapes; None for zeros. Floating-point arrays.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.
        ImportError: Numba is not installed.
    """
    direction = {
        "dx": ddx, "dh0": ddh0, "dc0": ddc0, "dw_ih": ddw_ih, "dw_hh": ddw_hh, "db_ih": ddb_ih, "db_hh": ddb_hh,
        "dw_unit": ddw_unit, "dw_hr": ddw_hr,
    }  # fmt: skip
    return _double_backward(tape, dy, dhn, dcn, direction)


def _double_backward(
    tape: Tape, dy: Array | None, dhn: Array | None, dcn: Array | None, direction: dict[str, Array | None]
) -> SecondGradients:
    """`double_backward` with the direction by the names of the gradients that it belongs to."""
    if not isinstance(tape, Tape):
        raise ValueError(f"tape: expected what a forward pass returned; got {type(tape).__name__}")
    if tape._wide is not None:
        dy, dhn, dcn = _incoming_widened(tape, dy, dhn, dcn)
        direction = {name: _widened(a, tape.y.dtype, "d" + name) for name, a in direction.items()}
        return SecondGradients(**_rounded_like_inputs(tape, _double_backward(tape._wide, dy, dhn, dcn, direction)))
    if tape.backend == "cuda":
        raise ValueError(
            "tape: expected one of arrays on the CPU, where the reference makes second derivatives; got one of a CUDA "
            "device's"
        )
    from . import reference

    # Validated again: whoever changed `lengths` since then must not steer the loops out of the arrays.
    _core.Problem(tape.cell, *tape._inputs).check_incoming(dy, dhn, dcn)
    return SecondGradients(**reference.double_backward(tape.cell, tape._inputs, dy, dhn, dcn, direction))


def lstm_forward(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    c0: Array | None = None,
    *,
    cell: str = "lstm",
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> Tape:
    """Forward pass of an LSTM, or of its kin `cell`="lstm_*", kept for `lstm_backward`. Arguments as in `forward`."""
    cell = cell if cell == "lstm" else _cell_of(cell, "lstm")
    extras = _extras(options) if options else None
    return _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, backend, num_threads, True, extras=extras
    )


def gru_forward(
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    h0: Array | None = None,
    *,
    cell: str = "gru",
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> Tape:
    """Forward pass of a GRU, or of its kin `cell`="gru_*", kept for `gru_backward`. Arguments as in `forward`."""
    cell = cell if cell == "gru" else _cell_of(cell, "gru")
    extras = _extras(options) if options else None
    return _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads, True, extras=extras
    )


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
    **options: Unpack[Options],
) -> Tape:
    """Forward pass of a plain RNN, kept for `rnn_backward`. Arguments as in `forward`; H weight rows."""
    cell = rnn_cell(nonlinearity)
    extras = _extras(options) if options else None
    return _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads, True, extras=extras
    )


def rnn_cell(nonlinearity: str) -> str:
    """The cell's name for a plain RNN's nonlinearity."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity: expected 'tanh' or 'relu'; got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"


def _cell_of(cell: str, layer: str) -> str:
    """`cell`, which is `layer` or one of its kin."""
    if cell != layer and not (isinstance(cell, str) and cell.startswith(layer + "_")):
        kin = ", ".join(name for name in _core.cells if name.split("_")[0] == layer)
        raise ValueError(f"cell: expected one of {kin}; got {cell!r}")
    return cell


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
    cell: str = "lstm",
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, tuple[Array, Array]]:
    """An LSTM without a tape: y [T, N, R], hn [N, R] and cn [N, H]. Arguments as in `lstm_forward`; gates i f g o."""
    cell = cell if cell == "lstm" else _cell_of(cell, "lstm")
    extras = _extras(options) if options else None
    tape = _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, backend, num_threads, False, extras=extras
    )
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
    cell: str = "gru",
    lengths: Lengths = None,
    reverse: bool = False,
    backend: str | None = None,
    num_threads: int | None = None,
    **options: Unpack[Options],
) -> tuple[Array, Array]:
    """A GRU without a tape: y [T, N, H], hn [N, H]. Arguments as in `gru_forward`; gates r z n."""
    cell = cell if cell == "gru" else _cell_of(cell, "gru")
    extras = _extras(options) if options else None
    tape = _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads, False, extras=extras
    )
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
    **options: Unpack[Options],
) -> tuple[Array, Array]:
    """A plain RNN without a tape: y [T, N, H], hn [N, H]. Arguments as in `rnn_forward`."""
    cell = rnn_cell(nonlinearity)
    extras = _extras(options) if options else None
    tape = _forward(
        cell, x, w_ih, w_hh, b_ih, b_hh, h0, None, lengths, reverse, backend, num_threads, False, extras=extras
    )
    return tape.y, tape.hn
