"""Recurrent layers that hold their weights, under torch.nn's names: RNN, LSTM, GRU.

No mathematics of a cell lives here: every (layer, direction) pair is one call of `functional.forward`, and
this file is what lies between those calls - names, stacking, both directions, dropout, files, streams. L layers, D
directions, T time steps, N batch, I input size, H hidden size, G gates.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from sys import getrefcount
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar, Union

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _core, functional
from .backends import choose

Array = NDArray[Any]
State = Union[Array, "tuple[Array | None, Array | None]"]
Self = TypeVar("Self", bound="Layer")

_PROMISES = itertools.count(1)  # numbers that no two changes of any weights share

# torch's name of a parameter -> the name of its gradient in functional.Gradients
_FIELDS = {"weight_ih": "dw_ih", "weight_hh": "dw_hh", "bias_ih": "db_ih", "bias_hh": "db_hh"}


class LayerTape(NamedTuple):
    """What `Layer.forward` keeps for `Layer.backward`; it borrows x and the weights."""

    runs: list[list[functional.Tape]]  # [layer][direction]
    masks: list[Array | None]  # what each layer's input was multiplied with; None: nothing dropped


class Layer:
    """L stacked layers of one cell, in one or two directions, with torch.nn's parameters.

    `RNN`, `LSTM` and `GRU` are this class with the cell chosen; `Layer` itself runs any cell of the kernels'
    list.

    Args:
        cell: a key of `gatewise.cells()`.
        input_size, hidden_size, num_layers: I, H, L.
        bias: False leaves out both bias vectors.
        batch_first: x, y and their gradients are [N, T, ·] instead of [T, N, ·]. The kernels are time-major,
            so this costs one copy of x and one of y per pass. States stay [L*D, N, H], as in torch.
        dropout: probability to zero an element of what one layer hands to the next, in training; the others
            are scaled by 1/(1-dropout). With one layer there is nothing to drop.
        bidirectional: a second set of weights reads every sequence from its own end; y is [T, N, 2*H].
        dtype: float32 or float64, of the weights and so of every array that goes in.
        random_state: seed or numpy Generator of the initial weights, U(-1/sqrt(H), 1/sqrt(H)), and of the
            dropout.
        backend, num_threads: as in the functional calls.

    Raises:
        ValueError: an argument out of its range, by name.
    """

    cells: ClassVar[tuple[str, ...]] = ()  # the cells a subclass stands for; none: any

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        dtype: DTypeLike = np.float32,
        random_state: int | np.random.Generator | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        known = _core.cells
        if cell not in known:
            raise ValueError(f"cell: expected one of {', '.join(sorted(known))}; got {cell!r}")
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if not (isinstance(size, (int, np.integer)) and size >= 1):
                raise ValueError(f"{name}: expected an integer of 1 or more; got {size!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1); got {dropout!r}")
        self.dtype = np.dtype(dtype)
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype: expected float32 or float64; got {self.dtype}")
        self.cell = cell
        self.input_size, self.hidden_size, self.num_layers = (
            int(input_size),
            int(hidden_size),
            int(num_layers),
        )
        self.bias, self.batch_first, self.bidirectional = bool(bias), bool(batch_first), bool(bidirectional)
        self.dropout = float(dropout)
        self.backend, self.num_threads = backend, num_threads
        self.random = np.random.default_rng(random_state)
        self._gates, self.has_c = known[cell]["G"], known[cell]["has_c"]
        self._parameters = {name: self._uniform(shape) for name, shape in self._shapes()}
        self._packed = [_core.PackedWeights() for _ in range(self.num_layers * self.directions)]
        self._changed, self._free = next(_PROMISES), 0  # see _promise

    # -- weights -------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> Mapping[str, Array]:
        """The weights themselves, by torch's names, in its order; write into them to change the layer.

        Hold the array that you write into. Whoever keeps nothing but its address (`array.ctypes.data`) and writes
        there later has to ask for `parameters` again after writing.
        """
        self._changed = next(_PROMISES)
        return MappingProxyType(self._parameters)

    def state_dict(self) -> dict[str, Array]:
        """A copy of the weights, by torch's names: weight_ih_l0 [G*H, I], weight_hh_l0 [G*H, H], ..."""
        return {name: value.copy() for name, value in self._parameters.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy weights in, cast to this layer's dtype; takes torch's `state_dict()` (CPU tensors) as it is.

        Raises:
            ValueError: naming every missing, unexpected or misshaped entry; the layer is then unchanged.
        """
        arrays = {name: np.asarray(value) for name, value in state_dict.items()}
        faults = [f"missing {name}" for name in self._parameters if name not in arrays]
        faults += [f"unexpected {name}" for name in arrays if name not in self._parameters]
        faults += [
            f"{name}: expected {own.shape}, got {arrays[name].shape}"
            for name, own in self._parameters.items()
            if name in arrays and arrays[name].shape != own.shape
        ]
        if faults:
            raise ValueError(f"state_dict does not fit {self!r}: " + "; ".join(faults))
        try:
            for name, own in self._parameters.items():
                own[...] = arrays[name]
        finally:
            self._changed = next(_PROMISES)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights and constructor arguments to a safetensors file, which torch's users can read as it
        is. The file appears whole or not at all.
        """
        save, _ = _safetensors()
        write_whole(path, save(self._parameters, {"gatewise": json.dumps(self._arguments())}))

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str], **options: Any) -> Self:
        """The layer that `save` wrote; options (backend, num_threads, random_state ...) go to the
        constructor.

        Raises:
            ValueError: the file holds another cell than this class, or no gatewise layer at all.
        """
        _, safe_open = _safetensors()
        with safe_open(os.fspath(path), framework="numpy") as file:
            text = (file.metadata() or {}).get("gatewise")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if text is None:
            raise ValueError(f"{path}: no constructor arguments inside; build the layer and use load_state_dict")
        arguments = json.loads(text)
        if cls.cells and arguments["cell"] not in cls.cells:
            raise ValueError(f"{path}: expected a layer of {' or '.join(cls.cells)}; got {arguments['cell']}")
        layer = cls.__new__(cls)
        Layer.__init__(layer, **{**arguments, **options})
        layer.load_state_dict(weights)
        return layer

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    def _arguments(self) -> dict[str, Any]:
        sizes = ("cell", "input_size", "hidden_size", "num_layers")
        options = ("bias", "batch_first", "dropout", "bidirectional")
        return {**{name: getattr(self, name) for name in sizes + options}, "dtype": self.dtype.name}

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        rows, hidden = self._gates * self.hidden_size, self.hidden_size
        for layer in range(self.num_layers):
            width = hidden * self.directions if layer else self.input_size
            for direction in range(self.directions):
                yield from (
                    (_name(kind, layer, direction), shape)
                    for kind, shape in zip(_FIELDS, ((rows, width), (rows, hidden), (rows,), (rows,)))
                    if self.bias or len(shape) == 2
                )

    def _uniform(self, shape: tuple[int, ...]) -> Array:
        bound = 1.0 / np.sqrt(self.hidden_size)
        return self.random.uniform(-bound, bound, shape).astype(self.dtype)

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    # -- passes --------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Array,
        state: State | None = None,
        lengths: NDArray[np.int64] | None = None,
        training: bool = True,
    ) -> tuple[Array, State, LayerTape | None]:
        """Run the layers over a batch.

        Args:
            x: [T, N, I] (batch_first: [N, T, I]), C-contiguous, of the layer's dtype.
            state: initial h [L*D, N, H], for a cell with c the pair (h, c); None: zeros.
            lengths: int64 [N], valid steps of each sequence, any order, 0 allowed; None: all T. The backward
                direction starts at each sequence's own end, as with torch's packed sequences.
            training: False drops nothing out and keeps no tape.

        Returns:
            y: [T, N, D*H] (batch_first: [N, T, D*H]), 0 past a sequence's end.
            state: each sequence's own final state, in the form of `state` above.
            tape: for `backward`; None without training.
        """
        h0, c0 = self._split(state, "state")
        sequence = self._swap(self._checked_input(x))
        promise = 0 if training else self._promise()
        runs: list[list[functional.Tape]] = []
        masks: list[Array | None] = []
        for layer in range(self.num_layers):
            masks.append(self._dropout_mask(sequence.shape) if training and layer and self.dropout else None)
            if (mask := masks[layer]) is not None:
                sequence = sequence * mask
            runs.append([
                functional._forward(
                    self.cell, sequence, **self._weights(layer, direction), h0=_pick(h0, k), c0=_pick(c0, k),
                    lengths=lengths, reverse=bool(direction),
                    backend=self.backend, num_threads=self.num_threads, training=training,
                    packed=None if training else self._packed[k],  # in training they change at every step
                    promise=promise,
                )
                for direction, k in enumerate(range(layer * self.directions, (layer + 1) * self.directions))
            ])  # fmt: skip
            outputs = [run.y for run in runs[layer]]
            sequence = outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=2)
        flat = [run for pair in runs for run in pair]
        final = self._join([run.hn for run in flat], [run.cn for run in flat])
        return self._swap(sequence), final, LayerTape(runs, masks) if training else None

    def stream(self, batch_size: int = 1) -> Stream:
        """A session that is fed one step at a time, with the weights as they are now; see `Stream`.

        Args:
            batch_size: N, how many sequences advance side by side.

        Raises:
            ValueError: the layer is bidirectional, or runs on another backend than "cpu".
        """
        if not (isinstance(batch_size, (int, np.integer)) and batch_size >= 1):
            raise ValueError(f"batch_size: expected an integer of 1 or more; got {batch_size!r}")
        if self.bidirectional:
            raise ValueError(
                "stream: expected a layer of one direction; got bidirectional=True, whose second direction would have "
                "to start at the end of a sequence that is still going on"
            )
        if (backend := choose(self.backend)) != "cpu":
            raise ValueError(f"stream: expected the backend 'cpu', whose kernels hold packed weights; got {backend!r}")
        return Stream(self, int(batch_size))

    def backward(
        self,
        tape: LayerTape,
        dy: Array | None = None,
        dstate: State | None = None,
        wanted: Iterable[str] | None = None,
    ) -> dict[str, Any]:
        """Gradients of a loss, from its gradients by what `forward` returned. The tape may be used again.

        Args:
            tape: from `forward`; the weights must still be those it ran with.
            dy: like y, or None: zeros.
            dstate: like the final state, or None: zeros; in a pair either may be None.
            wanted: parameter names, "x", "state"; None: all of them. The rest is not computed.

        Returns:
            What is wanted: the gradients by parameter name, "x" like x, "state" like the initial state.
        """
        names = self._wanted(wanted)
        dh, dc = self._split(dstate, "dstate")
        lowest = min((_layer_of(name) for name in names), default=self.num_layers)
        dsequence = None if dy is None else self._swap(self._checked(dy, tape))
        gradients: dict[str, Any] = {}
        dh0: list[Array | None] = [None] * (self.num_layers * self.directions)
        dc0 = list(dh0)
        for layer in reversed(range(lowest, self.num_layers)):
            pass_on = layer > lowest or "x" in names
            dinput: Array | None = None
            for direction, run in enumerate(tape.runs[layer]):
                own = {kind: _name(kind, layer, direction) for kind in _FIELDS}
                fields = [_FIELDS[kind] for kind in own if own[kind] in names]
                fields += ["dx"] * pass_on + (["dh0"] + ["dc0"] * self.has_c) * ("state" in names)
                if not fields:
                    continue
                k = layer * self.directions + direction
                part = self._part(dsequence, direction)
                got = functional.backward(run, dy=part, dhn=_pick(dh, k), dcn=_pick(dc, k), wanted=fields)
                gradients.update({own[kind]: getattr(got, _FIELDS[kind]) for kind in own if own[kind] in names})
                dh0[k], dc0[k] = got.dh0, got.dc0
                if dinput is None or got.dx is None:
                    dinput = got.dx
                else:
                    dinput += got.dx
            dsequence, mask = dinput, tape.masks[layer]
            if mask is not None and dsequence is not None:
                dsequence *= mask
        if "x" in names and dsequence is not None:
            gradients["x"] = self._swap(dsequence)
        if "state" in names:
            gradients["state"] = self._join(dh0, dc0)
        return gradients

    def __getstate__(self) -> dict[str, Any]:
        self._changed = next(_PROMISES)  # a shallow copy shares the weights
        return self.__dict__

    def _promise(self) -> int:
        """A number that is the same as long as nobody can have changed the weights: nobody asked for them, and when
        somebody last had, nobody was holding on to them. 0: somebody may be writing into them right now."""
        changed = self._changed
        if self._free != changed:
            # One reference is the layer's, one the argument's; a view, a buffer, a tensor of them holds another.
            if getrefcount(self._parameters) > 2:
                return 0
            if any(getrefcount(self._parameters[name]) > 2 for name in self._parameters):
                return 0
            self._free = changed
        return changed

    def _weights(self, layer: int, direction: int) -> dict[str, Any]:
        """The arguments of `functional.forward`: w_ih, w_hh, b_ih, b_hh, the biases None without `bias`."""
        get, end = self._parameters.get, _name("", layer, direction)
        return {
            "w_ih": get("weight_ih" + end), "w_hh": get("weight_hh" + end),
            "b_ih": get("bias_ih" + end), "b_hh": get("bias_hh" + end),
        }  # fmt: skip

    def _swap(self, a: Array) -> Array:
        """From the caller's order of T and N to the kernels', or back, as a fresh array if they differ."""
        return np.ascontiguousarray(a.swapaxes(0, 1)) if self.batch_first else a

    def _part(self, dsequence: Array | None, direction: int) -> Array | None:
        if dsequence is None or not self.bidirectional:
            return dsequence
        H = self.hidden_size
        return np.ascontiguousarray(dsequence[:, :, direction * H : (direction + 1) * H])

    def _dropout_mask(self, shape: tuple[int, ...]) -> Array:
        return dropout_mask(self.random, shape, self.dropout, self.dtype)

    def _checked_input(self, x: Array) -> Array:
        """What the kernels' door would blame on the weights, since there the sizes come from x."""
        if not isinstance(x, np.ndarray) or x.dtype != self.dtype or x.shape[2:] != (self.input_size,):
            axes = "(N, T, I)" if self.batch_first else "(T, N, I)"
            got = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise ValueError(f"x: expected {self.dtype} {axes} with I = {self.input_size}; got {got}")
        return x

    def _checked(self, dy: Array, tape: LayerTape) -> Array:
        T, N, H = tape.runs[-1][0].y.shape
        expected = (N, T, H * self.directions) if self.batch_first else (T, N, H * self.directions)
        if np.shape(dy) != expected:
            raise ValueError(f"dy: expected the shape of y, {expected}; got {np.shape(dy)}")
        return dy

    def _split(self, state: State | None, name: str) -> tuple[Array | None, Array | None]:
        return _split(state, name, self.has_c, self.num_layers * self.directions)

    def _join(self, h: list[Any], c: list[Any]) -> State:
        return (_stack(h), _stack(c)) if self.has_c else _stack(h)

    def _wanted(self, wanted: Iterable[str] | None) -> set[str]:
        known = {*self._parameters, "x", "state"}
        names = known if wanted is None else set(wanted)
        if not names <= known:
            raise ValueError(f"wanted: expected names among {sorted(known)}; got {sorted(names - known)}")
        return names


class RNN(Layer):
    """Elman network, h = tanh(W_ih x + b_ih + W_hh h + b_hh), or with relu; options as for `Layer`."""

    cells = ("rnn_tanh", "rnn_relu")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        **options: Any,
    ) -> None:
        super().__init__(functional.rnn_cell(nonlinearity), input_size, hidden_size, num_layers, **options)


class LSTM(Layer):
    """Long short-term memory with a forget gate, gates i f g o as in torch; options as for `Layer`."""

    cells = ("lstm",)

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> None:
        super().__init__("lstm", input_size, hidden_size, num_layers, **options)


class GRU(Layer):
    """Gated recurrent unit, gates r z n, r after the product as in torch and cuDNN; options: `Layer`."""

    cells = ("gru",)

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, **options: Any) -> None:
        super().__init__("gru", input_size, hidden_size, num_layers, **options)


class Stream(_core.Stream):
    """A layer fed one step at a time: `y_t = stream.step(x_t)` computes, to the bit, what `Layer.forward` computes
    of one more step, for a fraction of the cost of a call. `Layer.stream` makes it.

    It is a snapshot: weights are packed when it is made, on the arch and with the threads of that moment, and what
    is done to the layer afterwards does not reach it; make another stream. Nothing is dropped out. A step allocates
    nothing: it takes x [N, I], C-contiguous and of the layer's dtype, and returns y [N, H] of the top layer in an
    array that is the same for every step, and that the next step overwrites. It may be given to that step as its x.

    The state starts at zero. One thread at a time may use a stream.
    """

    def __init__(self, layer: Layer, batch_size: int) -> None:
        self._has_c, self._layers = layer.has_c, layer.num_layers
        problems = []
        for k in range(layer.num_layers):
            weights = layer._weights(k, 0)
            x = np.zeros((1, batch_size, weights["w_ih"].shape[1]), layer.dtype)
            problems.append(_core.Problem(layer.cell, x, **weights, h0=None, c0=None, lengths=None, reverse=False))
        super().__init__(problems, layer.num_threads)

    @property
    def state(self) -> State:
        """A copy of the state after the last step: h [L, N, H], for a cell with c the pair (h, c). Assign to set it."""
        h, c = self.copy_state()
        return (h, c) if self._has_c else h

    @state.setter
    def state(self, state: State) -> None:
        self.reset(state)

    def reset(self, state: State | None = None) -> None:
        """Start from this state, in the form of `state`, or from zeros."""
        self.set_state(*_split(state, "state", self._has_c, self._layers))


def dropout_mask(random: np.random.Generator, shape: tuple[int, ...], p: float, dtype: DTypeLike) -> Array:
    """0 with probability p, else 1/(1-p): an array times this mask has the array as its expectation."""
    kept = random.random(shape, dtype=np.float32) >= p
    return np.multiply(kept, 1.0 / (1.0 - p), dtype=dtype)


def _name(kind: str, layer: int, direction: int) -> str:
    return f"{kind}_l{layer}" + "_reverse" * direction


def _layer_of(name: str) -> int:
    """The lowest layer that has to be walked for this gradient."""
    return 0 if name in ("x", "state") else int(name.split("_l")[1].split("_")[0])


def _split(state: State | None, name: str, has_c: bool, count: int) -> tuple[Array | None, Array | None]:
    """A state in torch's form as (h, c), `count` = L*D of each; the kernels' own door checks N, H and dtype."""
    if state is None:
        return None, None
    if has_c != isinstance(state, (tuple, list)) or (has_c and len(state) != 2):
        form = "a pair (h, c)" if has_c else "one array h"
        got = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state).__name__
        raise ValueError(f"{name}: expected {form}, each (L*D, N, H); got {got}")
    h, c = state if isinstance(state, (tuple, list)) else (state, None)
    for part, value in (("h", h), ("c", c)):
        if value is not None and (np.ndim(value) != 3 or len(value) != count):
            expected = f"{part} of shape (L*D, N, H) with L*D = {count}"
            raise ValueError(f"{name}: expected {expected}; got {np.shape(value)}")
    return h, c


def _stack(states: list[Array]) -> Array:
    return states[0][None] if len(states) == 1 else np.stack(states)  # a view costs a tenth, and one is most common


def _pick(states: Array | None, k: int) -> Array | None:
    return None if states is None else states[k]


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """A file that appears whole or not at all: written beside its place and moved there."""
    path = os.fspath(path)
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            file.write(content)
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.remove(beside)
        raise


def _safetensors() -> tuple[Any, Any]:
    try:
        from safetensors import safe_open
        from safetensors.numpy import save
    except ImportError as error:
        raise ImportError('save and load need safetensors: pip install "gatewise[io]"') from error
    return save, safe_open
