"""PyTorch's recurrent layers on gatewise's kernels: RNN, LSTM, GRU, their cells and IndRNN, as `torch.nn.Module`s.

No mathematics lives here. A (layer, direction) pair is one call of `_layer`, which goes one of two ways to the same
`_forward`: the op `gatewise::forward`, whenever somebody watches what is done to tensors (torch.compile, torch.export,
torch.func, a dispatch mode, a tensor subclass), else an autograd.Function, at a tenth of the op's cost. T time steps, N
batch, I input size, H hidden units, R size of h, L layers, D directions, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, Optional

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError('gatewise.torch needs PyTorch 2.6 or newer: pip install "gatewise[torch]"') from error
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from . import _core, functional, layers
from .backends import choose_num_threads, cuda, find_cuda, unavailable
from .device import Place, loop_of, operands_of, place_of

Maybe = Optional[Tensor]

__all__ = [
    "GRU", "LSTM", "RNN", "Conversion", "GRUCell", "IndRNN", "LSTMCell", "RNNCell", "States", "convert", "revert",
]  # fmt: skip

# What a call is made of: tensors, those with a gradient first and in the order of functional.Gradients, then options.
_TENSORS = (
    "x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_unit", "w_hr",
    "h_mask", "lengths", "batch_sizes", "reset", "seed",
)  # fmt: skip
_GRADIENTS, _ALL = 9, len(_TENSORS)
_NO_MORE = (None,) * (_ALL - _GRADIENTS)
_N_AXIS_0 = ("h0", "c0", "h_mask", "lengths")  # tensors whose first axis is the batch in every layout
_INPUTS = (
    ", ".join(f"Tensor{'' if name in ('x', 'w_ih') else '?'} {name}" for name in _TENSORS)
    + ", str cell, bool reverse, bool batch_first, str reset_to, float zoneout_h, float zoneout_c, float? cell_clip,"
    " str save"
)
_EXCHANGE: Any = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # since PyTorch 2.10: tensors are lent as they are
_to_dlpack: Any = torch._C._to_dlpack  # before: what torch.utils.dlpack.to_dlpack is
_CPU = torch.device("cpu")
_core.share_openmp()  # PyTorch's threads: two pools would be in each other's way
_PLAIN = (torch.Tensor, nn.Parameter)
_16_BIT = (torch.float16, torch.bfloat16)
_NO_BACKEND = "of no backend: there are the CPU's and CUDA's"


class _Options(NamedTuple):
    """The options of a call that are no tensors; see functional.Options."""

    cell: str
    reverse: bool = False
    batch_first: bool = False
    reset_to: str = "initial"
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    cell_clip: float | None = None
    save: str = "all"


def _has_c(cell: str) -> bool:
    return bool(_core.cells[cell]["has_c"])


# -- the kernels on tensors ------------------------------------------------------------------------------------


def _lend(tensor: Maybe) -> Any:
    return tensor if _EXCHANGE or tensor is None else _to_dlpack(tensor.contiguous())


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


def _arguments(tensors: Sequence[Maybe], options: _Options) -> tuple[Any, ...]:
    """Those of _core.Problem after the cell, as tensors."""
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_unit, w_hr, h_mask, lengths, batch_sizes, reset, seed = tensors
    _, reverse, batch_first, reset_to, zoneout_h, zoneout_c, cell_clip, save = options
    extras = (
        w_unit, w_hr, h_mask, reset, reset_to, zoneout_h, zoneout_c, None if seed is None else int(seed) % 2**64,
        cell_clip, batch_sizes, batch_first, save,
    )  # fmt: skip
    return x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, extras


def _lent(arguments: tuple[Any, ...], lend: Callable[[Tensor], Any]) -> tuple[Any, ...]:
    """Each tensor among them as `lend` has it."""
    return tuple(lend(a) if isinstance(a, Tensor) else _lent(a, lend) if isinstance(a, tuple) else a for a in arguments)


def _place(x: Tensor) -> Place | None:
    """Where a call with this x runs: None for the CPU."""
    if x.is_cpu:
        return None
    module, reason = find_cuda() if x.is_cuda else (None, _NO_BACKEND)
    if module is None:
        raise RuntimeError(f"gatewise.torch: x is on {x.device}, whose kernels are {reason}")
    return place_of(x)


def _problem(tensors: Sequence[Maybe], options: _Options, place: Place | None) -> Any:
    arguments = _arguments(tensors, options)
    if _EXCHANGE is None:
        arguments = _lent(arguments, _lend)
    if place is None:
        return _core.Problem(*(options.cell, *arguments, _EXCHANGE))
    return cuda().Problem(options.cell, *arguments, _EXCHANGE, place.handle, operands_of(place), loop_of())


def _num_threads() -> int:
    """PyTorch's number of threads, which its users set; GATEWISE_NUM_THREADS has the last word."""
    if _core.environment("GATEWISE_NUM_THREADS"):
        return choose_num_threads(None)[0]
    return min(torch.get_num_threads(), 1024)


def _forward(
    tensors: Sequence[Maybe],
    options: _Options,
    keep: bool,
    for_op: bool = False,
    packed: _core.PackedWeights | None = None,
) -> tuple[Tensor, Tensor, Maybe, Maybe, Maybe]:
    """y, hn, cn, saved, states: the last three None where there is none. The two that backward needs are as large as
    this batch makes them; those of an op are of `_tape_sizes`, and zeros beyond: it has no numbers by chance."""
    x = tensors[0]
    assert x is not None
    place = _place(x)
    p = _problem(tensors, options, place)
    y = x.new_empty((*x.shape[:-1], p.R))
    hn = x.new_empty((p.N, p.R))
    cn = saved = states = None
    saved_size, states_size = p.sizes[:2]
    if p.has_c:
        cn = x.new_empty((p.N, p.H))
    if keep:
        make = x.new_empty if not for_op else partial(_untouched_zeros, x.dtype) if place is None else x.new_zeros
        sizes = _tape_sizes(tensors, options, p.N) if for_op else (saved_size, states_size)
        if options.save == "all":
            saved = make(sizes[0])
        if p.has_c:
            states = make(sizes[1])
    lent = _lend(y), _lend(hn), _lend(cn), _part(saved, saved_size), _part(states, states_size)
    if place is None:
        _core.forward(p, *lent, None, _num_threads(), None, packed, _EXCHANGE)
    else:
        scratch = x.new_empty(p.sizes[2], dtype=torch.uint8)
        cuda().forward(p, *lent, _lend(scratch), place.handle, _EXCHANGE)
    return y, hn, cn, saved, states


def _untouched_zeros(dtype: torch.dtype, size: int) -> Tensor:
    """Zeros that the system provides when they are touched, as NumPy asks for them and torch.zeros does not."""
    return torch.from_numpy(np.zeros(size, np.float64 if dtype == torch.float64 else np.float32))


def _part(buffer: Maybe, size: int) -> Any:
    """The first numbers of a buffer, all that the kernels know of."""
    if buffer is None:
        return None
    return _lend(buffer if buffer.numel() == size else buffer[:size])


def _backward(
    tensors: Sequence[Maybe],
    options: _Options,
    y: Tensor,
    saved: Maybe,
    states: Maybe,
    incoming: Sequence[Maybe],
    wanted: Sequence[bool],
) -> list[Maybe]:
    """The wanted gradients of the first `_GRADIENTS` tensors, None for the others."""
    place = _place(y)
    p = _problem(tensors, options, place)
    out: list[Maybe] = [None] * _GRADIENTS
    for i, is_wanted in enumerate(wanted):
        tensor = tensors[i]
        if is_wanted and tensor is not None:  # the weights' are added to
            make = torch.empty_like if i < 3 else torch.zeros_like
            out[i] = make(tensor, memory_format=torch.contiguous_format)
    own, (dy, dhn, dcn) = p.sizes, incoming
    if options.save != "all":  # an op's are empty tensors
        saved = None
    if not p.has_c:
        states = None
    lent = _lend(y), _part(saved, own[0]), _part(states, own[1]), _lend(dy), _lend(dhn), _lend(dcn)
    if place is None:
        _core.backward(p, *lent, tuple(map(_lend, out)), None, _num_threads(), None, _EXCHANGE)
    else:
        scratch = _lend(y.new_empty(own[3], dtype=torch.uint8))
        cuda().backward(p, *lent, tuple(map(_lend, out)), scratch, place.handle, False, _EXCHANGE)
    return out


# -- ops: what the compiler, the exporter and torch.func see ----------------------------------------------------


@lru_cache(maxsize=256)
def _row_sizes(cell: str, float64: bool, T: int, H: int, R: int, save: str, arch: str) -> tuple[int, int]:
    """Elements of `saved` and `states` for one sequence of T steps, asked of the kernels."""
    if arch == "cuda":
        sizes: tuple[int, int] = cuda().sequence_sizes(cell, float64, T, H, R, save)
        return sizes
    traits = _core.cells[cell]
    dtype = np.float64 if float64 else np.float32
    rows = traits["G"] * H
    unit = np.zeros(traits["U"] * H, dtype) if traits["U"] else None
    w_hr = np.zeros((R, H), dtype) if R != H else None
    extras = (unit, w_hr, None, None, None, None, None, None, None, None, None, save)
    x, w_hh = np.zeros((T, 1, 1), dtype), np.zeros((rows, R), dtype) if traits["product"] else None
    p = _core.Problem(cell, x, np.zeros((rows, 1), dtype), w_hh, None, None, None, None, None, False, extras)
    return p.sizes[:2]


def _tape_sizes(tensors: Sequence[Maybe], options: _Options, N: Any) -> tuple[Any, Any]:
    """Elements of `saved` and `states` of an op's call: what a batch without padding needs. So they are known from
    shapes alone; what padding leaves over is memory that nobody touches, which the system does not provide."""
    x, batch_sizes = tensors[0], tensors[11]
    assert x is not None
    H, R = map(int, _hidden(tensors, options))  # a compiled call is one of these
    if batch_sizes is None:
        T, rows = x.shape[int(options.batch_first)], x.shape[0] * x.shape[1]
    else:
        T, rows = batch_sizes.shape[0], x.shape[0]
    how, arch = (options.cell, x.dtype == torch.float64), "cuda" if x.is_cuda else _core.choose_arch()
    if options.save == "checkpoints":  # every few steps, by T: a compiled call is one of this T
        return 0, _row_sizes(*how, int(T), H, R, options.save, arch)[1] * N
    saved, states = _row_sizes(*how, 1, H, R, options.save, arch)
    if x.is_cuda:
        return saved * rows, states * rows
    return saved * rows, states // 2 * (rows + N)  # a state before the first step, and one after each


def _split(args: Sequence[Any]) -> tuple[Sequence[Maybe], _Options]:
    return args[:_ALL], _Options(*args[_ALL : _ALL + len(_Options._fields)])


def _present(tensor: Maybe, like: Tensor) -> Tensor:
    """Ops return tensors: an empty one for what there is not."""
    return like.new_empty(0) if tensor is None else tensor


def _op(name: str, schema: str) -> Callable[[Any], Any]:
    return torch.library.custom_op(f"gatewise::{name}", mutates_args=(), schema=schema)


@_op("forward", f"({_INPUTS}, bool keep) -> (Tensor y, Tensor hn, Tensor cn, Tensor saved, Tensor states)")
def _forward_op(*args: Any) -> tuple[Tensor, ...]:
    tensors, options = _split(args)
    x = tensors[0]
    assert x is not None
    return tuple(_present(out, x) for out in _forward(tensors, options, args[-1], for_op=True))


def _batch(tensors: Sequence[Maybe], options: _Options) -> Any:
    """N from shapes alone."""
    x, h0, c0, batch_sizes = tensors[0], tensors[1], tensors[2], tensors[11]
    assert x is not None
    if batch_sizes is None:
        return x.shape[int(not options.batch_first)]
    for state in (h0, c0):
        if state is not None:
            return state.shape[0]
    return torch.library.get_ctx().new_dynamic_size()


def _hidden(tensors: Sequence[Maybe], options: _Options) -> tuple[Any, Any]:
    """H and R from shapes alone."""
    w_ih, w_hr = tensors[3], tensors[8]
    assert w_ih is not None
    H = w_ih.shape[0] // _core.cells[options.cell]["G"] if w_hr is None else w_hr.shape[1]
    return H, H if w_hr is None else w_hr.shape[0]


def _shaped_like(tensors: Sequence[Maybe], wanted: Sequence[bool], x: Tensor) -> tuple[Tensor, ...]:
    """Gradients from shapes alone: what is not wanted is empty."""
    return tuple(x.new_empty(t.shape if w and t is not None else 0) for t, w in zip(tensors, wanted))


@_forward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    tensors, options = _split(args)
    x = tensors[0]
    assert x is not None
    has_c, N, (H, R) = _has_c(options.cell), _batch(tensors, options), _hidden(tensors, options)
    saved, states = _tape_sizes(tensors, options, N) if args[-1] else (0, 0)
    return (
        x.new_empty((*x.shape[:-1], R)),
        x.new_empty((N, R)),
        x.new_empty((N, H) if has_c else 0),
        x.new_empty(saved if options.save == "all" else 0),
        x.new_empty(states if has_c else 0),
    )


_INCOMING = "Tensor? dy, Tensor? dhn, Tensor? dcn"
_TAPE = "Tensor y, Tensor saved, Tensor states"
_NINE = ", ".join("Tensor" for _ in range(_GRADIENTS))


@_op("backward", f"({_INCOMING}, {_INPUTS}, {_TAPE}, bool[] wanted) -> ({_NINE})")
def _backward_op(*args: Any) -> tuple[Tensor, ...]:
    tensors, options = _split(args[3:])
    y, saved, states, wanted = args[-4:]
    return tuple(_present(d, y) for d in _backward(tensors, options, y, saved, states, args[:3], wanted))


@_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    tensors, _ = _split(args[3:])
    return _shaped_like(tensors, args[-1], args[-4])


_DIRECTION = ", ".join(f"Tensor? dd{name}" for name in _TENSORS[:_GRADIENTS])
_TWELVE = ", ".join("Tensor" for _ in range(3 + _GRADIENTS))


@_op("double_backward", f"({_DIRECTION}, {_INCOMING}, {_INPUTS}, bool[] wanted) -> ({_TWELVE})")
def _double_backward_op(*args: Any) -> tuple[Tensor, ...]:
    """See functional.double_backward: the reference's complex step, in Numba."""
    direction, incoming, rest = args[:_GRADIENTS], args[_GRADIENTS : _GRADIENTS + 3], args[_GRADIENTS + 3 :]
    tensors, options = _split(rest)
    from . import reference

    arrays = _lent(_arguments(tensors, options), _array)
    dy, dhn, dcn = (None if t is None else _array(t) for t in incoming)
    _core.Problem(options.cell, *arrays).check_incoming(dy, dhn, dcn)
    along = {
        f"d{name}": _array(v) for name, v, t in zip(_TENSORS, direction, tensors)
        if t is not None and v is not None and v.shape == t.shape  # else of a gradient that was not wanted: empty
    }  # fmt: skip
    got = reference.double_backward(options.cell, arrays, dy, dhn, dcn, along)
    names = ["ddy", "ddhn", "ddcn", *(f"d{name}" for name in _TENSORS[:_GRADIENTS])]
    x = tensors[0]
    assert x is not None
    return tuple(
        torch.from_numpy(np.ascontiguousarray(got[name])).to(x.device) if is_wanted and name in got else x.new_empty(0)
        for name, is_wanted in zip(names, args[-1])
    )


@_double_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    like = args[_GRADIENTS : _GRADIENTS + 3 + _GRADIENTS]  # incoming, then the tensors
    return _shaped_like(like, args[-1], args[_GRADIENTS + 3])


@_op("unpack", f"({_INPUTS}, {_TAPE}) -> (Tensor gates, Tensor c)")
def _unpack_op(*args: Any) -> tuple[Tensor, ...]:
    """Gates [..., G, H] and c [..., H] of every step from a tape that keeps all; leading axes as in y."""
    tensors, options = _split(args)
    x = tensors[0]
    assert x is not None
    place = _place(x)
    if place is not None:
        return _unpack_on_device(_problem(tensors, options, place), *args[-3:])
    y, saved, states = map(_array, args[-3:])
    arrays = _lent(_arguments(tensors, options), _array)
    p = _core.Problem(options.cell, *arrays)
    tape = functional.Tape(options.cell, "cpu", True, arrays, p, y, y, None, saved, states)
    return torch.from_numpy(tape.gates), _present(None if tape.c is None else torch.from_numpy(tape.c), x)


def _unpack_on_device(p: Any, y: Tensor, saved: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """The CUDA kernels' tape: [packed row][block][H] (cpp/cuda/layer.hpp)."""
    order = np.empty(p.rows, np.int64)
    p.write_rows(order)
    rows, leading = torch.from_numpy(order).to(y.device), y.shape[:-1]

    def unpacked(buffer: Tensor, blocks: int, kept: int) -> Tensor:
        out = y.new_zeros(leading.numel(), kept, p.H)
        out[rows] = buffer[: p.rows * blocks * p.H].view(p.rows, blocks, p.H)[:, :kept]
        return out.view(*leading, kept, p.H)

    gates = unpacked(saved, p.S, p.G)
    return gates, unpacked(states, 1, 1).squeeze(-2) if p.has_c else y.new_empty(0)


@_unpack_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    tensors, options = _split(args)
    y, (H, _) = args[-3], _hidden(tensors, options)
    leading, G = y.shape[:-1], _core.cells[options.cell]["G"]
    return y.new_empty((*leading, G, H)), y.new_empty((*leading, H) if _has_c(options.cell) else 0)


# -- autograd: the same two maps for the ops and for the Function ------------------------------------------------


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = _split(inputs)
    y, _, _, saved, states = output
    ctx.save_for_backward(*tensors, y, saved, states)
    ctx.mark_non_differentiable(saved, states)
    ctx.set_materialize_grads(False)


def _op_gradients(ctx: Any, dy: Maybe, dhn: Maybe, dcn: Maybe, *_: Any) -> tuple[Maybe, ...]:
    incoming = dy, dhn, dcn if _has_c(ctx.options.cell) else None
    got = _gradients(ctx.options, ctx.saved_tensors, incoming, ctx.needs_input_grad[:_GRADIENTS])
    return (*got, *_NO_MORE, *[None] * (len(_Options._fields) + 1))


def _gradients(
    options: _Options, kept: Sequence[Maybe], incoming: tuple[Maybe, Maybe, Maybe], wanted: Sequence[bool]
) -> list[Maybe]:
    """Of the first `_GRADIENTS` tensors of a call, from those of y, hn and cn. kept: all tensors, y, saved, states."""
    dy, dhn, dcn = incoming
    if dy is None and dhn is None and dcn is None:
        return [None] * _GRADIENTS
    *tensors, y, saved, states = kept
    if torch.is_grad_enabled() or _is_watched((dy, dhn, dcn, y, *tensors)):  # the op can be differentiated once more
        x = tensors[0]
        assert x is not None
        tape = y, _present(saved, x), _present(states, x)
        wanted = [bool(w) for w in wanted]
        got = _call("backward", *incoming, *tensors, *options, *tape, wanted)
        return [d if is_wanted else None for d, is_wanted in zip(got, wanted)]
    assert y is not None
    return _backward(tensors, options, y, saved, states, incoming, wanted)


class _Run(torch.autograd.Function):
    """The op `gatewise::forward` at less cost, for tensors that nobody watches."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Maybe) -> Any:
        y, hn, cn, saved, states = _forward(tensors, options, True)
        ctx.options = options
        ctx.save_for_backward(*tensors, y, saved, states)
        ctx.set_materialize_grads(False)
        return y, hn, cn

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dhn: Maybe, dcn: Maybe) -> Any:
        wanted = ctx.needs_input_grad[1 : 1 + _GRADIENTS]
        return (None, *_gradients(ctx.options, ctx.saved_tensors, (dy, dhn, dcn), wanted), *_NO_MORE)


class _RunStep(torch.autograd.Function):
    """The same of one step, of the tensors before w_unit. Its y is hn; autograd's time is a matter of how many tensors
    it has to look after, and here there is little else."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Maybe) -> Any:
        _, hn, cn, saved, states = _forward(_of_step(tensors), options, True)
        ctx.options = options
        ctx.save_for_backward(*tensors, hn, saved, states)
        ctx.set_materialize_grads(False)
        return hn if cn is None else (hn, cn)

    @staticmethod
    def backward(ctx: Any, dhn: Maybe, dcn: Maybe = None) -> Any:
        *tensors, hn, saved, states = ctx.saved_tensors
        kept = *_of_step(tensors), hn, saved, states
        wanted = *ctx.needs_input_grad[1:], False, False
        return (None, *_gradients(ctx.options, kept, (None, dhn, dcn), wanted)[: len(tensors)])


@lru_cache(maxsize=64)
def _one_step(N: int) -> Tensor:
    return torch.tensor([N] * (N > 0), dtype=torch.int64)


def _of_step(tensors: Sequence[Maybe]) -> tuple[Maybe, ...]:
    """All tensors of a call, from those before w_unit of one step: a packed batch."""
    x = tensors[0]
    assert x is not None
    return (*tensors, None, None, None, None, _one_step(x.shape[0]), None, None)


def _keep_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.options = _split(inputs[3:])
    ctx.save_for_backward(*inputs[:3], *tensors)
    ctx.set_materialize_grads(False)


def _second_gradients(ctx: Any, *direction: Maybe) -> tuple[Maybe, ...]:
    """y, saved and states count as constants: what depends on them is in the derivatives by x and the weights."""
    saved = ctx.saved_tensors
    wanted = [bool(w) for w in ctx.needs_input_grad[: 3 + _GRADIENTS]]
    rest: list[Maybe] = [None] * (_ALL - _GRADIENTS + len(_Options._fields) + 4)
    if all(d is None for d in direction):
        return (*[None] * len(wanted), *rest)
    got = _call("double_backward", *direction, *saved, *ctx.options, wanted)
    return (*(d if is_wanted else None for d, is_wanted in zip(got, wanted)), *rest)


_forward_op.register_autograd(_op_gradients, setup_context=_keep_for_backward)
_backward_op.register_autograd(_second_gradients, setup_context=_keep_for_double_backward)


# -- torch.func.vmap: a batch of calls is a call of a larger batch, where the calls share their weights ------------


def _axis(name: str, options: _Options, packed: bool) -> int:
    """Where N is, in a tensor of the call."""
    return 0 if packed or name in _N_AXIS_0 or options.batch_first else 1


def _folded(tensor: Maybe, dim: int | None, axis: int, size: int) -> Maybe:
    """The mapped axis beside N, as one with it: rows of one sequence are rows n * size + b."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(axis + 1).expand(*tensor.shape[: axis + 1], size, *tensor.shape[axis + 1 :])
    else:
        tensor = tensor.movedim(dim, axis + 1)
    return tensor.flatten(axis, axis + 1)


def _unfolded(tensor: Tensor, axis: int, size: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:axis], tensor.shape[axis] // size, size, *tensor.shape[axis + 1 :])


def _fold_inputs(tensors: Sequence[Maybe], dims: Sequence[Any], options: _Options, size: int) -> list[Maybe]:
    folded = list(tensors)
    packed = tensors[11] is not None
    for i, name in enumerate(_TENSORS):
        if name in ("x", "reset", *_N_AXIS_0):
            folded[i] = _folded(tensors[i], dims[i], _axis(name, options, packed), size)
    folded[11] = None if tensors[11] is None else tensors[11] * size
    return folded


def _one_by_one(call: Callable[..., Any], size: int, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    def at(b: int) -> Iterator[Any]:
        for arg, dim in zip(args, dims):
            yield arg.select(dim, b) if isinstance(arg, Tensor) and dim is not None else arg

    results = [call(*at(b)) for b in range(size)]
    stacked = tuple(torch.stack(parts) for parts in zip(*results))
    return stacked, (0,) * len(stacked)


def _vmap_forward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    tensors, options = _split(args)
    size = info.batch_size
    shared = all(dims[i] is None for i in (*range(3, _GRADIENTS), 11)) and tensors[13] is None
    if not shared:
        return _one_by_one(partial(_call, "forward"), size, dims, args)
    y, hn, cn, saved, states = _call("forward", *_fold_inputs(tensors, dims, options, size), *options, args[-1])
    axis = _axis("x", options, tensors[11] is not None)
    # the tape of all calls together: `_vmap_backward` knows it by y, which is mapped while they are not
    unfolded = _unfolded(y, axis, size), _unfolded(hn, 0, size), _unfolded(cn, 0, size)
    return (*unfolded, saved, states), (axis + 1, 1, 1, None, None)


def _vmap_backward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    tensors, options = _split(args[3:])
    y, saved, states, wanted = args[-4:]
    y_dim, saved_dim, states_dim = dims[-4:-1]
    if y_dim is None or saved_dim is not None or states_dim is not None:
        return _one_by_one(partial(_call, "backward"), size, dims, args)
    if any(wanted[3:]):  # each call's own gradients of the weights: from a tape of its own, made again

        def again(*one: Any) -> Any:
            tape = _call("forward", *one[3:-4], True)
            return _call("backward", *one[:-4], tape[0], tape[3], tape[4], one[-1])

        return _one_by_one(again, size, dims, args)
    axes = _axis("x", options, tensors[11] is not None), 0, 0
    incoming = [_folded(t, d, a, size) for t, d, a in zip(args[:3], dims[:3], axes)]
    folded = _fold_inputs(tensors, dims[3 : 3 + _ALL], options, size)
    got = _call("backward", *incoming, *folded, *options, _folded(y, y_dim, axes[0], size), saved, states, wanted)
    first = [_unfolded(d, a, size) if w else d for d, a, w in zip(got, axes, wanted)]
    out_dims = [a + 1 if w else None for a, w in zip(axes, wanted)]
    return (*first, *got[3:]), (*out_dims, *[None] * (_GRADIENTS - 3))


def _vmap_double_backward(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
    return _one_by_one(partial(_call, "double_backward"), info.batch_size, dims, args)


_forward_op.register_vmap(_vmap_forward)
_backward_op.register_vmap(_vmap_backward)
_double_backward_op.register_vmap(_vmap_double_backward)


class _Forward(torch.autograd.Function):
    """`gatewise::forward` for torch.func, which does not see through the autograd of an op."""

    forward = staticmethod(lambda *args: torch.ops.gatewise.forward(*args))
    setup_context = staticmethod(_keep_for_backward)
    backward = staticmethod(_op_gradients)
    vmap = staticmethod(_vmap_forward)


class _Backward(torch.autograd.Function):
    forward = staticmethod(lambda *args: torch.ops.gatewise.backward(*args))
    setup_context = staticmethod(_keep_for_double_backward)
    backward = staticmethod(_second_gradients)
    vmap = staticmethod(_vmap_backward)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.gatewise.double_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("gatewise.torch: third derivatives are not available")

    vmap = staticmethod(_vmap_double_backward)


_FUNCTIONS = {"forward": _Forward, "backward": _Backward, "double_backward": _DoubleBackward}


def _call(name: str, *args: Any) -> Any:
    """An op, by the way that whoever watches can follow."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name].apply(*args)  # type: ignore[no-untyped-call]
    return getattr(torch.ops.gatewise, name)(*args)


# -- one layer in one direction ----------------------------------------------------------------------------------


def _is_watched(tensors: Sequence[Maybe]) -> bool:
    """Whether somebody watches what is done to these tensors, or they are not simply numbers somewhere."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._is_tracing():
        return True
    for tensor in tensors:  # any() over a generator takes four times as long
        if tensor is not None and (type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda)):
            return True
    return False


def _layer(
    tensors: Sequence[Maybe], options: _Options, packed: _core.PackedWeights | None = None
) -> tuple[Tensor, Tensor, Maybe]:
    """y, hn, cn (None for a cell without c)."""
    if _is_watched(tensors):
        y, hn, cn, *_ = _call("forward", *tensors, *options, torch.is_grad_enabled())
        return y, hn, cn if _has_c(options.cell) else None
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                # not Function's own, which first looks for torch.func: nobody watches
                return super(torch.autograd.Function, _Run).apply(options, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    return _forward(tensors, options, False, packed=packed)[:3]


def _layer_step(tensors: tuple[Maybe, ...], options: _Options) -> tuple[Tensor, Maybe]:
    """hn, cn (None for a cell without c) of one step, of the tensors before w_unit, x [N, I]."""
    if _is_watched(tensors):
        x, *rest = tensors
        assert x is not None
        return _layer((x.unsqueeze(0), *rest, *(None,) * (_ALL - len(tensors))), options)[1:]
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                got = super(torch.autograd.Function, _RunStep).apply(options, *tensors)  # type: ignore[no-untyped-call]
                return got if isinstance(got, tuple) else (got, None)
    return _forward(_of_step(tensors), options, False)[1:3]


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu")


def _wide(tensor: Maybe) -> Maybe:
    """16-bit numbers as float32, in which the kernels compute."""
    return tensor.float() if tensor is not None and tensor.dtype in _16_BIT else tensor


def _weights(module: nn.Module, names: Sequence[str | None]) -> list[Maybe]:
    """A module's weights, None for None. Most are in its dict of parameters, where they are found in a fifth of
    getattr's time; not those that are computed (torch.nn.utils.parametrize)."""
    parameters = module._parameters if not torch.compiler.is_compiling() else {}
    weights: list[Maybe] = []
    for name in names:
        weight = None if name is None else parameters.get(name)
        if weight is None and name is not None:
            weight = getattr(module, name)
        weights.append(_wide(weight))
    return weights


# -- modules -----------------------------------------------------------------------------------------------------


class States(NamedTuple):
    """What a (layer, direction) went through, axes before the last as in the output. Copies, without gradients."""

    gates: Tensor  # [T, N, G, H] activated, in PyTorch's order
    c: Maybe  # [T, N, H]; None for a cell without c


_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_unit", "weight_hr")  # in the order of _TENSORS
_CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
_NO_OPTIONS: dict[str, Any] = {
    "cell_clip": None, "input_dropout": 0.0, "recurrent_dropout": 0.0, "weight_dropout": 0.0, "variational": False,
    "zoneout": 0.0, "forget_bias": None, "save": "all",
}  # fmt: skip


class _Layers(nn.RNNBase, layers.LayerOptions):
    """What RNN, LSTM, GRU and IndRNN share. torch.nn.RNNBase brings the constructor's checks, the parameters, the
    state_dict, pickling and most of the messages; torch.nn.LSTM itself is no base, for Dynamo refuses to trace what
    is derived from it."""

    def __init__(self, mode: str, cell: str, *args: Any, options: dict[str, Any], **kwargs: Any) -> None:
        self.cell = cell
        if unknown := [name for name in options if name not in _NO_OPTIONS]:
            raise TypeError(f"{unknown[0]}: no such option; further options are {', '.join(_NO_OPTIONS)}")
        super().__init__(mode, *args, **kwargs)
        self._set_options(**{**_NO_OPTIONS, **options})
        traits = _core.cells[cell]
        others = traits["U"] > 0 or traits["G"] * self.hidden_size != len(self.get_parameter("weight_ih_l0"))
        if others:
            self._make_weights_of(traits)
        self._adopt()
        if others or self.forget_bias is not None:
            self.reset_parameters()

    def _make_weights_of(self, traits: dict[str, Any]) -> None:
        """The parameters of a cell that torch.nn does not have."""
        G, U, H = traits["G"], traits["U"], self.hidden_size
        like: dict[str, Any] = {"device": self.weight_ih_l0.device, "dtype": self.weight_ih_l0.dtype}
        for names in self._all_weights:
            suffix = names[0][len("weight_ih") :]
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (G * H, getattr(self, names[0]).shape[1])}
            if traits["product"]:
                shapes["weight_hh"] = (G * H, self.proj_size or H)
            if self.bias and not traits["normed"]:
                shapes.update(bias_ih=(G * H,), bias_hh=(G * H,))
            if U:
                shapes["weight_unit"] = (U * H,)
            if self.proj_size:
                shapes["weight_hr"] = (self.proj_size, H)
            for name in names:
                delattr(self, name)
            names[:] = [kind + suffix for kind in shapes]
            for name, shape in zip(names, shapes.values()):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **like)))
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()

    def _adopt(self) -> None:
        """What a module has beside torch.nn's attributes: those of a module that has only torch.nn's."""
        if "cell" not in self.__dict__:
            self.cell = _CELLS[self.mode]
            self._set_options(**_NO_OPTIONS)
        self._names = []
        for names in self._all_weights:
            own = {name.rpartition("_l")[0]: name for name in names}
            self._names.append([own.get(kind) for kind in _KINDS])
        self._packed = [_core.PackedWeights() for _ in self._names]

    def flatten_parameters(self) -> None:
        """torch.nn's, which lays weights out for cuDNN. These kernels take each where it is."""

    def reset_parameters(self) -> None:
        """U(-1/sqrt(H), 1/sqrt(H)), drawn as torch.nn draws; for the rest see gatewise.layers.Layer."""
        super().reset_parameters()
        if "forget_bias" not in self.__dict__:  # within torch.nn's constructor
            return
        traits, H = _core.cells[self.cell], self.hidden_size
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                kind = name.rpartition("_l")[0]
                if kind == "weight_unit" and traits["normed"]:
                    start = parameter.new_tensor(layers.norm_start(traits))
                    parameter.copy_(start.repeat_interleave(H))
                elif kind == "weight_unit" and not traits["product"]:
                    parameter.uniform_(0.0, 1.0)
                if self.forget_bias is not None and kind in ("bias_ih", "bias_hh", *["weight_unit"] * traits["normed"]):
                    block = 2 * traits["G"] + 1 if kind == "weight_unit" else 1
                    value = 0.0 if kind == "bias_ih" else self.forget_bias
                    parameter[block * H : (block + 1) * H] = value

    def extra_repr(self) -> str:
        told = [super().extra_repr()]
        if self.cell != _CELLS[self.mode]:
            told.append(f"cell={self.cell}")
        for name, default in _NO_OPTIONS.items():
            value = getattr(self, "saves" if name == "save" else name)
            if value != default and value != (default, default):
                told.append(f"{name}={value}")
        return ", ".join(told)

    # -- a pass --

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Any = None,
        reset: Maybe = None,
        reset_to: str = "initial",
        return_states: bool = False,
    ) -> Any:
        """As torch.nn's forward, and more.

        Args:
            input: [T, N, I], batch_first: [N, T, I], unbatched: [T, I], or a PackedSequence.
            hx: initial h [L*D, N, R], for a cell with c the pair (h, c), c [L*D, N, H] (unbatched without N); None:
                zeros.
            lengths: int64 [N], or a list: valid steps of each sequence in any order, 0 allowed. Output past a
                sequence's end is 0, its final state that of its own end, and the direction backwards starts there:
                what packing does, without sorting, packing or unpacking.
            reset: bool like input without its last axis, true at the first step of a new segment: no state and no
                gradient crosses from the step before.
            reset_to: what a segment starts from, "initial" (`hx`) or "zero".
            return_states: also return a list of `States`, one for each (layer, direction).

        Returns:
            output [T, N, D*R] (in the form of input), hx in the form of the initial one, and states if asked for.

        16-bit numbers are computed with in float32 and returned rounded; under autocast (bfloat16 or float16 on the
        CPU) anything that comes in is, and what goes out has autocast's type. Masks are drawn from torch's generator.
        """
        packed = isinstance(input, PackedSequence)
        batch_sizes = order = back = None
        x: Tensor = input
        if packed:
            x, batch_sizes, order, back = input
            if lengths is not None:
                raise ValueError("lengths: expected None, for a PackedSequence tells them; got lengths too")
        elif x.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {x.dim()}D instead")
        unbatched = not packed and x.dim() == 2
        batch_dim = 0 if self.batch_first else 1
        h, c = self._initial_state(hx, unbatched)
        if unbatched:
            x = x.unsqueeze(batch_dim)
            if lengths is not None:
                raise ValueError("lengths: expected None for unbatched input, all of whose steps are valid")
            reset = None if reset is None else reset.unsqueeze(batch_dim)
        self.check_input(x, batch_sizes)
        if order is not None:
            h, c = (None if s is None else s.index_select(1, order) for s in (h, c))
        if h is not None or c is not None:
            self._check_state(h, c, x, batch_sizes)
        elif order is not None and torch.compiler.is_compiling():  # so that N is known from a shape
            h = x.new_zeros(len(self._names), len(order), self.proj_size or self.hidden_size)
        if lengths is not None:
            lengths = torch.as_tensor(lengths, dtype=torch.int64, device=_CPU if x.is_cuda else x.device)
        y, hs, cs, states = self._run(x, h, c, (lengths, batch_sizes, reset), reset_to, return_states)
        hn = hs[0].unsqueeze(0) if len(hs) == 1 else torch.stack(hs)
        cn = None
        if cs[0] is not None:
            cn = cs[0].unsqueeze(0) if len(cs) == 1 else torch.stack(cs)  # type: ignore[arg-type]
        if back is not None:
            hn, cn = (None if s is None else s.index_select(1, back) for s in (hn, cn))  # type: ignore[assignment]
        if unbatched:
            y, hn, cn = y.squeeze(batch_dim), hn.squeeze(1), None if cn is None else cn.squeeze(1)
        output = PackedSequence(y, batch_sizes, order, back) if packed else y
        state = hn if cn is None else (hn, cn)
        return (output, state, states) if return_states else (output, state)

    def _initial_state(self, hx: Any, unbatched: bool) -> tuple[Maybe, Maybe]:
        if hx is None:
            return None, None
        has_c = _has_c(self.cell)
        if has_c != isinstance(hx, (tuple, list)) or (has_c and len(hx) != 2):
            form = "a pair (h_0, c_0)" if has_c else "one tensor h_0"
            raise RuntimeError(f"hx: expected {form}; got {type(hx).__name__}")
        h, c = hx if has_c else (hx, None)
        assert h is not None
        dim = 2 if unbatched else 3
        dims = [state.dim() for state in (h, c) if state is not None]
        if dims != [dim] * len(dims):
            kind = "unbatched 2-D" if unbatched else "batched 3-D"
            names = "hx and cx" if has_c else "hx"
            got = f"({dims[0]}-D, {dims[1]}-D) tensors" if has_c else f"{dims[0]}-D tensor"
            raise RuntimeError(f"For {kind} input, {names} should also be {dim}-D but got {got}")
        return (h.unsqueeze(1), None if c is None else c.unsqueeze(1)) if unbatched else (h, c)

    def _check_state(self, h: Maybe, c: Maybe, x: Tensor, batch_sizes: Maybe) -> None:
        expected = self.get_expected_hidden_size(x, batch_sizes)
        assert h is not None
        if c is None:
            self.check_hidden_size(h, expected)
        else:
            self.check_hidden_size(h, expected, "Expected hidden[0] size {}, got {}")
            self.check_hidden_size(c, (*expected[:2], self.hidden_size), "Expected hidden[1] size {}, got {}")

    def _run(
        self, x: Tensor, h: Maybe, c: Maybe, steps: tuple[Any, ...], reset_to: str, with_states: bool
    ) -> tuple[Tensor, list[Tensor], list[Maybe], list[States]]:
        dtype, autocast = x.dtype, _is_autocast(x)
        if autocast:
            dtype = torch.get_autocast_dtype("cuda" if x.is_cuda else "cpu")
        lengths, batch_sizes, reset = steps
        batch_first = self.batch_first and batch_sizes is None
        directions = 2 if self.bidirectional else 1
        hs: list[Tensor] = []
        cs: list[Maybe] = []
        states = []
        sequence = _wide(x)
        assert sequence is not None
        wide = sequence.dtype
        for k, names in enumerate(self._names):
            direction = k % directions
            if direction == 0:
                p = self.dropout if k else self.input_dropout
                source = self._dropped(sequence, p, batch_first, batch_sizes) if p and self.training else sequence
                outputs = []
            w_ih, w_hh, b_ih, b_hh, w_unit, w_hr = _weights(self, names)
            h_mask = seed = None
            if self.training:
                if self.weight_dropout and w_hh is not None:
                    w_hh = dropout(w_hh, self.weight_dropout)
                if self.recurrent_dropout:
                    N = int(batch_sizes[0]) if batch_sizes is not None else x.shape[0 if batch_first else 1]
                    h_mask = dropout(source.new_ones(N, self.proj_size or self.hidden_size), self.recurrent_dropout)
                if self.zoneout != (0.0, 0.0):
                    seed = torch.randint(-(2**63), 2**63 - 1, (), device=_CPU)
            options = _Options(
                self.cell, direction == 1, batch_first, reset_to, *self.zoneout, self.cell_clip,
                "all" if with_states else self.saves,
            )  # fmt: skip
            h0, c0 = (None if s is None else _wide(s.select(0, k)) for s in (h, c))
            if autocast and wide != torch.float64:
                h0, c0 = (None if s is None else s.float() for s in (h0, c0))
            tensors = (
                source, h0, c0, w_ih, w_hh, b_ih, b_hh, w_unit, w_hr, h_mask, lengths, batch_sizes, reset, seed
            )  # fmt: skip
            if with_states:
                y, hn, cn, saved, kept = _call("forward", *tensors, *options, True)
                with torch.no_grad():
                    gates, c_all = torch.ops.gatewise.unpack(*tensors, *options, y, saved, kept)
                has_c = _has_c(self.cell)
                states.append(States(gates.to(dtype), c_all.to(dtype) if has_c else None))
                cn = cn if has_c else None
            else:
                y, hn, cn = _layer(tensors, options, self._packed[k])
            outputs.append(y)
            hs.append(hn if hn.dtype is dtype else hn.to(dtype))
            cs.append(cn if cn is None or cn.dtype is dtype else cn.to(dtype))
            if direction == directions - 1:
                sequence = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        return sequence if sequence.dtype is dtype else sequence.to(dtype), hs, cs, states

    def _dropped(self, x: Tensor, p: float, batch_first: bool, batch_sizes: Maybe) -> Tensor:
        if not self.variational:
            return dropout(x, p)
        if batch_sizes is None:
            return x * dropout(x.new_ones(x[:, :1].shape if batch_first else x[:1].shape), p)
        mask = dropout(x.new_ones(int(batch_sizes[0]), x.shape[-1]), p)
        return x * mask[torch.cat([torch.arange(int(size)) for size in batch_sizes])]


class RNN(_Layers):
    """torch.nn.RNN on gatewise's kernels; keyword options as for `gatewise.layers.Layer`, names as in torch.nn."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}", f"rnn_{nonlinearity}", input_size, hidden_size, num_layers, bias,
            batch_first, dropout, bidirectional, device=device, dtype=dtype, options=options,
        )  # fmt: skip


class LSTM(_Layers):
    """torch.nn.LSTM on gatewise's kernels; keyword options as for `gatewise.LSTM`, names as in torch.nn.

    Args:
        peephole, coupled, layer_norm: at most one of them, see `gatewise.LSTM`. Their weights are weight_unit_l0 [U*H].
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        cell = layers._variant(layers.LSTM.cells, {"peephole": peephole, "coupled": coupled, "layer_norm": layer_norm})
        super().__init__(
            "LSTM", cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device=device, dtype=dtype, options=options,
        )  # fmt: skip


class GRU(_Layers):
    """torch.nn.GRU on gatewise's kernels; keyword options as for `gatewise.GRU`, names as in torch.nn.

    Args:
        reset_after, layer_norm: see `gatewise.GRU`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        cell = layers._variant(layers.GRU.cells, {"reset_after=False": not reset_after, "layer_norm": layer_norm})
        super().__init__(
            "GRU", cell, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            device=device, dtype=dtype, options=options,
        )  # fmt: skip


class IndRNN(_Layers):
    """`gatewise.IndRNN` as a module, arguments in the order of torch.nn.RNN."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        cell = f"ind{functional.rnn_cell(nonlinearity)}"
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}", cell, input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, device=device, dtype=dtype, options=options,
        )  # fmt: skip


# -- cells -------------------------------------------------------------------------------------------------------


_STEPS = {cell: _Options(cell) for cell in _core.cells}
_STEP_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_STEP_WEIGHTS_ALONE = (*_STEP_WEIGHTS[:2], None, None)  # without biases


def _step(module: Any, cell: str, input: Tensor, h: Maybe, c: Maybe) -> tuple[Tensor, Maybe]:
    """h and c after one step; input [N, I] or [I]."""
    states = [s for s in (h, c) if s is not None]
    for tensor in (input, *states):
        if tensor.dim() not in (1, 2):
            name, what = type(module).__name__, "input" if tensor is input else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")
    if input.dim() == 1:
        input, h, c = input.unsqueeze(0), *(None if s is None else s.unsqueeze(0) for s in (h, c))
        hn, cn = _step(module, cell, input, h, c)
        return hn.squeeze(0), None if cn is None else cn.squeeze(0)
    N, I = input.shape
    if module.input_size != I:
        raise RuntimeError(f"input has inconsistent input_size: got {I} expected {module.input_size}")
    for i, state in enumerate(states):
        if state.shape[0] != N:
            raise RuntimeError(f"Input batch size {N} doesn't match hidden{i} batch size {state.shape[0]}")
        if state.shape[1] != module.hidden_size:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {state.shape[1]}, expected {module.hidden_size}"
            )
    w_ih, w_hh, b_ih, b_hh = _weights(module, _STEP_WEIGHTS if module.bias else _STEP_WEIGHTS_ALONE)
    x, h, c = _wide(input), _wide(h), _wide(c)
    assert x is not None
    autocast = _is_autocast(x)
    if autocast:
        h, c = (None if s is None else s.to(x.dtype) for s in (h, c))
    hn, cn = _layer_step((x, h, c, w_ih, w_hh, b_ih, b_hh), _STEPS[cell])
    dtype = torch.float32 if autocast and input.dtype in _16_BIT else input.dtype
    if hn.dtype is not dtype:
        hn, cn = hn.to(dtype), None if cn is None else cn.to(dtype)
    return hn, cn


class RNNCell(nn.RNNCell):
    """torch.nn.RNNCell on gatewise's kernels."""

    def forward(self, input: Tensor, hx: Maybe = None) -> Tensor:
        return _step(self, functional.rnn_cell(self.nonlinearity), input, hx, None)[0]


class GRUCell(nn.GRUCell):
    """torch.nn.GRUCell on gatewise's kernels."""

    def forward(self, input: Tensor, hx: Maybe = None) -> Tensor:
        return _step(self, "gru", input, hx, None)[0]


class LSTMCell(nn.LSTMCell):
    """torch.nn.LSTMCell on gatewise's kernels."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = (None, None) if hx is None else hx
        hn, cn = _step(self, "lstm", input, h, c)
        assert cn is not None
        return hn, cn


# -- models that have torch.nn's modules -------------------------------------------------------------------------

_SWAPS: dict[type, type] = {
    nn.RNN: RNN, nn.LSTM: LSTM, nn.GRU: GRU, nn.RNNCell: RNNCell, nn.LSTMCell: LSTMCell, nn.GRUCell: GRUCell,
}  # fmt: skip


class Conversion(NamedTuple):
    """What `convert` or `revert` did: the new class of each module by its name in the model ("" is the model itself),
    and of each recurrent module that was left alone, why."""

    swapped: dict[str, str]
    left: dict[str, str]


def convert(model: nn.Module) -> Conversion:
    """Turns every torch.nn.RNN, LSTM, GRU and cell in a model into gatewise's, in place.

    The modules stay the same objects, with the same Parameters, hooks and state_dict: only their class changes. So
    optimizers, checkpoints and references to them stay good.
    """
    return _swap(model, _SWAPS, _why_not_here)


def revert(model: nn.Module) -> Conversion:
    """Turns gatewise's modules in a model back into torch.nn's, in place, where torch.nn has what they do."""
    return _swap(model, {ours: theirs for theirs, ours in _SWAPS.items()}, _why_not_there)


def _swap(model: nn.Module, swaps: dict[type, type], why_not: Callable[[nn.Module], str | None]) -> Conversion:
    swapped, left = {}, {}
    known = {*swaps, *swaps.values()}
    for name, module in model.named_modules():
        new = swaps.get(type(module))
        if new is None:
            ancestors = {base.__name__ for base in type(module).__mro__}
            if type(module) not in known and ancestors & {"RNNBase", "RNNCellBase"}:
                left[name] = f"{type(module).__name__} is a class of its own"
            continue
        if reason := why_not(module):
            left[name] = reason
            continue
        module.__class__ = new
        if isinstance(module, _Layers):
            module._adopt()
        elif isinstance(module, nn.RNNBase):
            for attribute in ("cell", "_names", "_packed", "zoneout", "saves", *_NO_OPTIONS):
                module.__dict__.pop(attribute, None)
        swapped[name] = f"{new.__module__}.{new.__qualname__}"
    return Conversion(swapped, left)


def _why_not_here(module: nn.Module) -> str | None:
    for parameter in module.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            reason = unavailable("cuda") if parameter.is_cuda else _NO_BACKEND
            if reason is not None:
                return f"its weights are on {parameter.device}, whose kernels are {reason}"
        if not parameter.is_floating_point():
            return f"its weights are {parameter.dtype}"
    return None


def _why_not_there(module: nn.Module) -> str | None:
    if not isinstance(module, _Layers):
        return None
    if module.cell != _CELLS[module.mode]:
        return f"torch.nn has no cell {module.cell}"
    for name, default in _NO_OPTIONS.items():
        value = getattr(module, "saves" if name == "save" else name)
        if name not in ("save", "forget_bias") and value != default and value != (default, default):
            return f"torch.nn has no {name}"
    return None
