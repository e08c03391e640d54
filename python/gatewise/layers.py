"""Recurrent layers that hold their weights, under torch.nn's names: RNN, LSTM, GRU, IndRNN.

No mathematics of a cell lives here: every (layer, direction) pair is one call of `functional.forward`, and
this file is what lies between those calls - names, stacking, both directions, dropout, files, state, streams. L layers,
D directions, T time steps, N batch, I input size, H hidden units, R size of h (H, or proj_size), G gates.
"""

from __future__ import annotations

import importlib
import inspect
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
_Weights = tuple[Any, Any, Any, Any, Any, Any]  # arrays, as _parameters has them, or None

_PROMISES = itertools.count(1)  # numbers that no two changes of any weights share

# torch's name of a parameter -> the name of its gradient in functional.Gradients. The last but one is ours: the weights
# that each unit has of its own (peepholes, gains and biases of a layer norm, IndRNN's recurrent ones).
_FIELDS = {
    "weight_ih": "dw_ih", "weight_hh": "dw_hh", "bias_ih": "db_ih", "bias_hh": "db_hh",
    "weight_unit": "dw_unit", "weight_hr": "dw_hr",
}  # fmt: skip

_SAVES = ("all", "states", "checkpoints")
_NO_ZONEOUT = (0.0, 0.0)

# What a (layer, direction) draws random bits for, each from a seed of its own
_INPUT, _STATE, _WEIGHT, _ZONEOUT = range(4)


class LayerTape(NamedTuple):
    """What `Layer.forward` keeps for `Layer.backward`; it borrows x, batch_sizes and the weights."""

    runs: list[list[functional.Tape]]  # [layer][direction]
    seed: int | None  # from which every mask of the pass is drawn, now as then; None: nothing was drawn
    batch_sizes: NDArray[np.int64] | None

    @property
    def nbytes(self) -> int:
        """Bytes the kernels kept for the backward pass: the sum of `nbytes` of all runs."""
        return sum(run.nbytes for pair in self.runs for run in pair)


class LayerOptions:
    """The options that torch.nn's layers lack, of this module's layers and of PyTorch's in gatewise.torch."""

    cell: str
    bias: bool
    proj_size: int
    cell_clip: float | None
    input_dropout: float
    recurrent_dropout: float
    weight_dropout: float
    variational: bool
    zoneout: tuple[float, float]
    forget_bias: float | None
    saves: str

    def _set_options(
        self,
        *,
        cell_clip: float | None,
        input_dropout: float,
        recurrent_dropout: float,
        weight_dropout: float,
        variational: bool,
        zoneout: float | tuple[float, float],
        forget_bias: float | None,
        save: str,
    ) -> None:
        """Makes these options (see `Layer`) attributes, `zoneout` as a pair and `save` under the name `saves`: `save`
        writes a file. `cell`, `bias` and `proj_size` are there already.

        Raises:
            ValueError: an option out of its range, or one that the cell has no place for, by name.
        """
        traits = _core.cells[self.cell]
        has_c, normed = traits["has_c"], traits["normed"]
        self.variational = bool(variational)
        self.input_dropout = _probability("input_dropout", input_dropout)
        self.recurrent_dropout = _probability("recurrent_dropout", recurrent_dropout)
        self.weight_dropout = _probability("weight_dropout", weight_dropout)
        pair = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout if has_c else 0.0)
        if len(pair) != 2:
            raise ValueError(f"zoneout: expected a probability or a pair, of h and of c; got {zoneout!r}")
        self.zoneout = _probability("zoneout", pair[0]), _probability("zoneout", pair[1])
        if cell_clip is not None and not (isinstance(cell_clip, (int, float, np.number)) and cell_clip > 0):
            raise ValueError(f"cell_clip: expected a positive number or None; got {cell_clip!r}")
        self.cell_clip = None if cell_clip is None else float(cell_clip)
        self.forget_bias = None if forget_bias is None else float(forget_bias)
        if save not in _SAVES:
            raise ValueError(f"save: expected one of {', '.join(map(repr, _SAVES))}; got {save!r}")
        self.saves = save
        forgets = has_c and traits["G"] == 4  # gates i f g o
        for name, fits, needs in (
            ("bias", self.bias or not normed, "True, for its biases are blocks of weight_unit"),
            ("proj_size", not self.proj_size or (has_c and not normed), "0, for it has no projection"),
            ("cell_clip", self.cell_clip is None or has_c, "None, for it has no cell state c"),
            ("zoneout", not self.zoneout[1] or has_c, "0 for c, for it has no cell state c"),
            ("recurrent_dropout", not self.recurrent_dropout or traits["product"], "0, for h meets no weight_hh"),
            ("weight_dropout", not self.weight_dropout or traits["product"], "0, for it has no weight_hh"),
            ("forget_bias", self.forget_bias is None or forgets, "None, for it has no forget gate of its own"),
            ("forget_bias", self.forget_bias is None or self.bias, "None, for there are no biases"),
        ):
            if not fits:
                raise ValueError(f"{name}: of the cell {self.cell!r} expected {needs}; got {getattr(self, name)!r}")


class Layer(LayerOptions):
    """L stacked layers of one cell, in one or two directions, with torch.nn's parameters.

    `RNN`, `LSTM`, `GRU` and `IndRNN` are this class with the cell chosen; `Layer` itself runs any cell of the kernels'
    list.

    Parameters are weight_ih_l0 [G*H, I], weight_hh_l0 [G*H, R], bias_ih_l0 and bias_hh_l0 [G*H], and where there are
    any: weight_unit_l0 [U*H], the blocks of weights that each unit has of its own (see `gatewise.cells()`), and
    weight_hr_l0 [R, H], the projection. A cell without a product with h has no weight_hh, a layer-normalised one no
    bias_ih and bias_hh: its biases are blocks of weight_unit.

    They start as torch's do, U(-1/sqrt(H), 1/sqrt(H)), peepholes too; gains of a layer norm at 1 and its biases at 0;
    IndRNN's recurrent weights at U(0, 1), the range in which its paper (arXiv 1803.04831) lets a unit keep what it has
    seen for any length of time.

    Every random mask is a function of a seed, the step, the row and the unit. One 64-bit number is drawn from
    `random_state` for each training pass that needs any; backward draws the same masks again instead of keeping them.
    Outside of training nothing is dropped, and zoneout is its expectation.

    Args:
        cell: a key of `gatewise.cells()`.
        input_size, hidden_size, num_layers: I, H, L.
        bias: False leaves out both bias vectors; for a layer-normalised cell it has to be left True.
        batch_first: x, y and their gradients are [N, T, ·] instead of [T, N, ·], read and written in place by the
            kernels. States stay [L*D, N, ·], as in torch.
        dropout: probability to zero an element of what one layer hands to the next, in training; the others
            are scaled by 1/(1-dropout). With one layer there is nothing to drop.
        bidirectional: a second set of weights reads every sequence from its own end; y is [T, N, 2*R].
        proj_size: R up to H, of the projection h = weight_hr (o tanh(c)) of a cell with c, as in torch; 0: none,
            and R = H.
        cell_clip: largest |c|, for a cell with c; None: any.
        input_dropout: the same as dropout, of x on its way into the lowest layer.
        recurrent_dropout: probability to zero a unit of h where it meets weight_hh, one mask for all steps of a call
            (Gal and Ghahramani, arXiv 1512.05287; Keras' argument of this name). Elsewhere the cell sees all of h.
        weight_dropout: probability to zero an element of weight_hh for a pass (DropConnect: Wan et al. 2013; Merity et
            al., arXiv 1708.02182), scaled as above. 0 for a cell without a product with h.
        variational: `dropout` and `input_dropout` drop the same elements of a row at every step.
        zoneout: probability with which a unit of the state keeps its value of the step before (Krueger et al., arXiv
            1606.01305), one number or a pair for h and c. Of one number, a cell without c takes that of h.
        forget_bias: what the bias of a forget gate starts as, for a cell with gates i f g o: bias_hh's part is set to
            it and bias_ih's to 0, in a layer-normalised cell its block of weight_unit. None: as every other bias.
        save: what a training pass keeps: "all", "states" (less memory: backward computes the gates again) or
            "checkpoints" (memory of about sqrt(T) steps: it computes whole stretches again). Gradients are the same,
            to the bit with "states".
        dtype: float32 or float64, of the weights and so of every array that goes in; or float16 or bfloat16 (needs
            ml_dtypes), in which arrays are kept while the arithmetic is float32.
        random_state: seed or numpy Generator of the initial weights and of every mask.
        backend, num_threads: as in the functional calls.

    Raises:
        ValueError: an argument out of its range, or one that the cell has no place for, by name.
    """

    cells: ClassVar[tuple[str, ...]] = ()  # the cells a subclass stands for; none: any
    has_c: bool

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
        proj_size: int = 0,
        cell_clip: float | None = None,
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        variational: bool = False,
        zoneout: float | tuple[float, float] = (0.0, 0.0),
        forget_bias: float | None = None,
        save: str = "all",
        dtype: DTypeLike = np.float32,
        random_state: int | np.random.Generator | None = None,
        backend: str | None = None,
        num_threads: int | None = None,
    ) -> None:
        known = _core.cells
        if cell not in known:
            raise ValueError(f"cell: expected one of {', '.join(sorted(known))}; got {cell!r}")
        self.cell, self._traits = cell, known[cell]
        self.has_c = self._traits["has_c"]
        self.input_size = _size("input_size", input_size)
        self.hidden_size = _size("hidden_size", hidden_size)
        self.num_layers = _size("num_layers", num_layers)
        self.proj_size = _size("proj_size", proj_size, least=0)
        if self.proj_size > self.hidden_size:
            raise ValueError(f"proj_size: expected at most hidden_size = {hidden_size}; got {proj_size!r}")
        self.bias, self.batch_first, self.bidirectional = bool(bias), bool(batch_first), bool(bidirectional)
        self.dropout = _probability("dropout", dropout)
        self._set_options(
            cell_clip=cell_clip, input_dropout=input_dropout, recurrent_dropout=recurrent_dropout,
            weight_dropout=weight_dropout, variational=variational, zoneout=zoneout, forget_bias=forget_bias, save=save,
        )  # fmt: skip
        self.dtype = _dtype(dtype)
        self.backend, self.num_threads = backend, num_threads
        self.random = np.random.default_rng(random_state)
        pairs = list(np.ndindex(self.num_layers, self.directions))
        self._parameters = {
            _name(kind, layer, direction): self._initial(kind, shape)
            for layer, direction in pairs for kind, shape in self._shapes(layer)
        }  # fmt: skip
        self._names = [[_name(kind, *pair) for kind in _FIELDS] for pair in pairs]  # also of those that it has not
        self._packed = [_core.PackedWeights() for _ in self._names]
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
        plain = inspect.signature(Layer.__init__).parameters
        told = {name: value for name, value in self._arguments().items() if value != plain[name].default}
        arguments = ", ".join(f"{name}={value!r}" for name, value in told.items())
        return f"{type(self).__name__}({arguments})"

    def _arguments(self) -> dict[str, Any]:
        """Of the constructor, all that belongs to the layer and not to the machine that it runs on."""
        machine = ("self", "random_state", "backend", "num_threads")
        names = [name for name in inspect.signature(Layer.__init__).parameters if name not in machine]
        return {name: getattr(self, name) for name in names} | {"save": self.saves, "dtype": self.dtype.name}

    def _shapes(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(kind, shape) of the parameters of one direction, in torch's order."""
        G, U, H, R = self._traits["G"], self._traits["U"], self.hidden_size, self.proj_size or self.hidden_size
        yield "weight_ih", (G * H, self.output_size if layer else self.input_size)
        if self._traits["product"]:
            yield "weight_hh", (G * H, R)
        if self.bias and not self._traits["normed"]:
            yield "bias_ih", (G * H,)
            yield "bias_hh", (G * H,)
        if U:
            yield "weight_unit", (U * H,)
        if self.proj_size:
            yield "weight_hr", (R, H)

    def _initial(self, kind: str, shape: tuple[int, ...]) -> Array:
        G, H, normed = self._traits["G"], self.hidden_size, self._traits["normed"]
        bound = 1.0 / np.sqrt(H)
        value = self.random.uniform(-bound, bound, shape)
        if kind == "weight_unit" and normed:
            value = np.repeat(norm_start(self._traits), H)
        elif kind == "weight_unit" and not self._traits["product"]:
            value = self.random.uniform(0.0, 1.0, shape)
        if self.forget_bias is not None and kind in ("bias_ih", "bias_hh", *["weight_unit"] * normed):
            forget = 2 * G + 1 if kind == "weight_unit" else 1
            value[forget * H : (forget + 1) * H] = 0.0 if kind == "bias_ih" else self.forget_bias
        return value.astype(self.dtype)

    @property
    def directions(self) -> int:
        """D: 1 or 2."""
        return 1 + self.bidirectional

    @property
    def output_size(self) -> int:
        """D*R: the last axis of y."""
        return self.directions * (self.proj_size or self.hidden_size)

    # -- passes --------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Array,
        state: State | None = None,
        lengths: NDArray[np.int64] | None = None,
        training: bool = True,
        *,
        reset: NDArray[np.bool_] | None = None,
        reset_to: str = "initial",
        batch_sizes: NDArray[np.int64] | None = None,
    ) -> tuple[Array, State, LayerTape | None]:
        """Run the layers over a batch.

        A returned state is a plain array, cut off from the pass that made it: given to the next chunk of the same
        sequences it makes that chunk go on, and the backward pass of a chunk ends at the chunk's first step (truncated
        back-propagation; what other libraries call detaching the state has nothing to do here). Where gradients are to
        reach into the chunk before, ask `backward` for "state" and give it to that chunk's `backward` as `dstate`.

        Args:
            x: [T, N, I] (batch_first: [N, T, I]; with batch_sizes: [rows, I]), of the layer's dtype. Any strides will
                do, such as those of x[::2], as long as the last axis is contiguous.
            state: initial h [L*D, N, R], for a cell with c the pair (h, c), c [L*D, N, H]; None: zeros.
            lengths: int64 [N], valid steps of each sequence, any order, 0 allowed; None: all T. The backward
                direction starts at each sequence's own end, as with torch's packed sequences.
            training: False drops nothing out and keeps no tape.
            reset: bool [T, N] (batch_first: [N, T]; with batch_sizes: [rows]), true at the first step of a new
                segment: no state and no gradient crosses from the step before it, in either direction.
            reset_to: what a segment starts from: "initial" (`state`) or "zero".
            batch_sizes: int64 [T], how many sequences have a step t: x holds them packed, as torch's PackedSequence
                does, step by step, the longest sequence first. Not together with lengths.

        Returns:
            y: [T, N, D*R] (batch_first: [N, T, D*R]; packed: [rows, D*R]), 0 past a sequence's end.
            state: each sequence's own final state, in the form of `state` above.
            tape: for `backward`; None without training.

        Raises:
            ValueError: an argument does not fit, by name.
        """
        h0, c0 = self._split(state, "state")
        sequence = self._checked_input(x, batch_sizes is not None)
        promise = 0 if training else self._promise()
        seed = draw_seed(self.random) if training and self._draws() else None
        runs: list[list[functional.Tape]] = []
        for layer in range(self.num_layers):
            sequence = self._dropped(sequence, layer, seed, batch_sizes)
            pair = []
            for direction, k in enumerate(range(layer * self.directions, (layer + 1) * self.directions)):
                weights = self._weights(k, seed)
                pair.append(functional._forward(
                    self.cell, sequence, *weights[:4], _pick(h0, k), _pick(c0, k), lengths, bool(direction),
                    self.backend, self.num_threads, training, None,
                    None if training else self._packed[k],  # in training they change at every step
                    promise, self._extras(k, weights, sequence, seed, reset, reset_to, batch_sizes),
                ))  # fmt: skip
            runs.append(pair)
            sequence = pair[0].y if len(pair) == 1 else np.concatenate([run.y for run in pair], axis=-1)
        flat = [run for pair in runs for run in pair]
        final = self._join([run.hn for run in flat], [run.cn for run in flat])
        return sequence, final, LayerTape(runs, seed, batch_sizes) if training else None

    def stream(self, batch_size: int = 1) -> Stream:
        """A session that is fed one step at a time, with the weights as they are now; see `Stream`.

        Args:
            batch_size: N, how many sequences advance side by side.

        Raises:
            ValueError: the layer is bidirectional, of 16 bits, or runs on another backend than "cpu".
        """
        batch_size = _size("batch_size", batch_size)
        _must_go_forward(self, "stream")
        if self.dtype.itemsize < 4:
            raise ValueError(f"stream: expected a layer of float32 or float64; got {self.dtype}")
        if (backend := choose(self.backend)) != "cpu":
            raise ValueError(f"stream: expected the backend 'cpu', whose kernels hold packed weights; got {backend!r}")
        return Stream(self, batch_size)

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

        Raises:
            ValueError: the tape is not of a training pass of a layer like this one; a gradient of another shape, or a
                name that there is not.
        """
        self._must_be_own(tape)
        names = self._wanted(wanted)
        dh, dc = self._split(dstate, "dstate")
        lowest = min((_layer_of(name) for name in names), default=self.num_layers)
        dsequence = None if dy is None else self._checked(dy, tape)
        gradients: dict[str, Any] = {}
        dh0: list[Array | None] = [None] * len(self._names)
        dc0 = list(dh0)
        for layer in reversed(range(lowest, self.num_layers)):
            pass_on = layer > lowest or "x" in names
            dinput: Array | None = None
            for direction, run in enumerate(tape.runs[layer]):
                k = layer * self.directions + direction
                own = [(field, name) for field, name in zip(_FIELDS.values(), self._names[k]) if name in names]
                fields = [field for field, _ in own]
                fields += ["dx"] * pass_on + (["dh0"] + ["dc0"] * self.has_c) * ("state" in names)
                if not fields:
                    continue
                part = self._part(dsequence, direction)
                got = functional.backward(
                    run, dy=part, dhn=_pick(dh, k), dcn=_pick(dc, k), wanted=fields, num_threads=self.num_threads
                )
                for field, name in own:
                    gradient = getattr(got, field)
                    gradients[name] = self._dropped_weight(gradient, k, tape.seed) if field == "dw_hh" else gradient
                dh0[k], dc0[k] = got.dh0, got.dc0
                if dinput is None or got.dx is None:
                    dinput = got.dx
                else:
                    dinput += got.dx
            dsequence = None if dinput is None else self._dropped(dinput, layer, tape.seed, tape.batch_sizes)
        if "x" in names and dsequence is not None:
            gradients["x"] = dsequence
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

    def _weights(self, k: int, seed: int | None = None) -> _Weights:
        """w_ih, w_hh, b_ih, b_hh, w_unit, w_hr of the k-th (layer, direction), None where there is none."""
        w_ih, w_hh, b_ih, b_hh, w_unit, w_hr = map(self._parameters.get, self._names[k])
        return w_ih, self._dropped_weight(w_hh, k, seed), b_ih, b_hh, w_unit, w_hr

    def _extras(
        self,
        k: int,
        weights: _Weights,
        x: Array,
        seed: int | None = None,
        reset: NDArray[np.bool_] | None = None,
        reset_to: str = "initial",
        batch_sizes: NDArray[np.int64] | None = None,
    ) -> tuple[Any, ...] | None:
        """The options of the k-th call in the order of _core.pyi; None for a call that has none of them."""
        w_unit, w_hr = weights[4:]
        zoned, masked = self.zoneout != _NO_ZONEOUT, seed is not None and self.recurrent_dropout
        if not (
            zoned or masked or self.batch_first or self.cell_clip or self.saves != "all"
            or w_unit is not None or w_hr is not None or batch_sizes is not None
            or reset is not None or reset_to != "initial"
        ):  # fmt: skip
            return None
        h_mask = None
        if seed is not None and self.recurrent_dropout:
            N = x.shape[0 if self.batch_first else 1] if batch_sizes is None else int(np.max(batch_sizes, initial=0))
            h_mask = self._row_mask(N, self.output_size // self.directions, self.recurrent_dropout, k, _STATE, seed)
        return (
            w_unit, w_hr, h_mask, reset, reset_to, *self.zoneout,
            _seed_of(seed, k, _ZONEOUT) if zoned and seed is not None else None,
            self.cell_clip, batch_sizes, self.batch_first and batch_sizes is None, self.saves,
        )  # fmt: skip

    # -- random masks, each drawn from the seed of the pass, in backward as in forward ----------------------

    def _draws(self) -> bool:
        """Whether a training pass has anything random."""
        between = self.num_layers > 1 and self.dropout
        others = self.input_dropout or self.recurrent_dropout or self.weight_dropout
        return bool(between or others or self.zoneout != _NO_ZONEOUT)

    def _dropped(self, sequence: Array, layer: int, seed: int | None, batch_sizes: NDArray[np.int64] | None) -> Array:
        """What a layer reads of its input in training, or the gradient of that: the same linear map."""
        p = self.dropout if layer else self.input_dropout
        if seed is None or not p:
            return sequence
        seed, by_batch = _seed_of(seed, layer * self.directions, _INPUT), self.batch_first and batch_sizes is None
        return drop(sequence, p, seed, self.variational, by_batch, batch_sizes)

    def _row_mask(self, N: int, K: int, p: float, k: int, use: int, seed: int) -> Array:
        """[N, K], one for all steps: 0 with probability p, else 1/(1-p)."""
        ones = np.ones((1, N, K), np.float64 if self.dtype == np.float64 else np.float32)
        mask: Array = drop(ones, p, _seed_of(seed, k, use))[0]
        return mask

    def _dropped_weight(self, w_hh: Any, k: int, seed: int | None) -> Any:
        """DropConnect of w_hh, or of its gradient."""
        if seed is None or not self.weight_dropout:
            return w_hh
        return drop(w_hh[None], self.weight_dropout, _seed_of(seed, k, _WEIGHT))[0]

    # -- forms of arguments --------------------------------------------------------------------------------

    def _part(self, dsequence: Array | None, direction: int) -> Array | None:
        if dsequence is None or not self.bidirectional:
            return dsequence
        R = self.output_size // 2
        return np.ascontiguousarray(dsequence[..., direction * R : (direction + 1) * R])

    def _checked_input(self, x: Array, packed: bool) -> Array:
        """What the kernels' door would blame on the weights, since there the sizes come from x."""
        if not isinstance(x, np.ndarray) or x.dtype != self.dtype or x.shape[2 - packed :] != (self.input_size,):
            axes = "(rows, I)" if packed else "(N, T, I)" if self.batch_first else "(T, N, I)"
            got = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
            raise ValueError(f"x: expected {self.dtype} {axes} with I = {self.input_size}; got {got}")
        return x

    def _must_be_own(self, tape: Any) -> None:
        if not isinstance(tape, LayerTape):
            raise ValueError(f"tape: expected what forward returned, with training=True; got {type(tape).__name__}")
        last = tape.runs[-1][-1]
        own = self.num_layers, self.directions, self.cell, self.output_size // self.directions
        got = len(tape.runs), len(tape.runs[-1]), last.cell, last.hn.shape[-1]
        if got != own:
            raise ValueError(
                "tape: expected one of this layer's forward, (layers, directions, cell, size of h) "
                f"{own}; got one of {got}"
            )

    def _checked(self, dy: Array, tape: LayerTape) -> Array:
        expected = (*tape.runs[-1][0].y.shape[:-1], self.output_size)
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
    """Long short-term memory with a forget gate, gates i f g o as in torch; options as for `Layer`.

    Args:
        peephole: gates i and f see c of the step before, o the new one (Gers and Schmidhuber 2000).
        coupled: the forget gate is 1 - i, and the gates are i g o (Greff et al., arXiv 1503.04069: CIFG).
        layer_norm: both products and c are standardised over their units (Ba, Kiros, Hinton, arXiv 1607.06450).

    Raises:
        ValueError: more than one of the three: there is no such cell; or as in `Layer`.
    """

    cells = ("lstm", "lstm_peephole", "lstm_coupled", "lstm_norm")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        peephole: bool = False,
        coupled: bool = False,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        cell = _variant(self.cells, {"peephole": peephole, "coupled": coupled, "layer_norm": layer_norm})
        super().__init__(cell, input_size, hidden_size, num_layers, **options)


class GRU(Layer):
    """Gated recurrent unit, gates r z n; options as for `Layer`.

    Args:
        reset_after: r acts on the product of n with h, as in torch and cuDNN; False: on h before the product (Cho et
            al., arXiv 1406.1078; the default of ONNX).
        layer_norm: both products are standardised over their units (Ba, Kiros, Hinton, arXiv 1607.06450).

    Raises:
        ValueError: layer_norm without reset_after: there is no such cell; or as in `Layer`.
    """

    cells = ("gru", "gru_reset_before", "gru_norm")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        **options: Any,
    ) -> None:
        cell = _variant(self.cells, {"reset_after=False": not reset_after, "layer_norm": layer_norm})
        super().__init__(cell, input_size, hidden_size, num_layers, **options)


class IndRNN(Layer):
    """Independently recurrent network, h = relu(W_ih x + b_ih + b_hh + u h) with one recurrent weight u per unit (Li et
    al., arXiv 1803.04831), or with tanh; options as for `Layer`."""

    cells = ("indrnn_relu", "indrnn_tanh")

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, nonlinearity: str = "relu", **options: Any
    ) -> None:
        super().__init__(f"ind{functional.rnn_cell(nonlinearity)}", input_size, hidden_size, num_layers, **options)


class Stateful:
    """A layer that goes on where the call before it ended, row by row (Keras' `stateful=True`).

    Each call's batch holds the next steps of the same N sequences in the same rows; the first one starts from zeros.
    Gradients do not cross from call to call: `layer.backward(tape, ...)` ends at the call's first step, see
    `Layer.forward`.

    Raises:
        ValueError: the layer is bidirectional.
    """

    def __init__(self, layer: Layer) -> None:
        _must_go_forward(layer, "Stateful")
        self.layer = layer
        self._state: State | None = None

    def forward(
        self,
        x: Array,
        lengths: NDArray[np.int64] | None = None,
        training: bool = True,
        reset: NDArray[np.bool_] | None = None,
    ) -> tuple[Array, State, LayerTape | None]:
        """`Layer.forward` from the state of the call before. A row of length 0 keeps its state.

        `reset`, as there, marks the first steps of new segments; they start from zeros.
        """
        y, self._state, tape = self.layer.forward(x, self._state, lengths, training, reset=reset, reset_to="zero")
        return y, self._state, tape

    def reset(self, rows: Any = None) -> None:
        """Let the next call start from zeros.

        Args:
            rows: only these, a boolean mask [N] or indices; None: all of them, and N may be another one from now on.

        Raises:
            ValueError: there are no such rows.
        """
        if rows is None:
            self._state = None
        elif self._state is not None:
            h, c = self.layer._split(self._state, "state")
            h, c = _with_zeros(h, rows), _with_zeros(c, rows)
            self._state = (h, c) if self.layer.has_c else h

    @property
    def state(self) -> State | None:
        """The state after the last call, in the form that `Layer.forward` returns; None: zeros. Assign to set it."""
        return self._state

    @state.setter
    def state(self, state: State | None) -> None:
        self.layer._split(state, "state")
        self._state = state


class Stream(_core.Stream):
    """A layer fed one step at a time: `y_t = stream.step(x_t)` computes, to the bit, what `Layer.forward` computes
    of one more step, for a fraction of the cost of a call. `Layer.stream` makes it.

    It is a snapshot: weights are packed when it is made, on the arch and with the threads of that moment, and what
    is done to the layer afterwards does not reach it; make another stream. Nothing is dropped out, and zoneout is its
    expectation. A step allocates nothing: it takes x [N, I], C-contiguous and of the layer's dtype, and returns y
    [N, R] of the top layer in an array that is the same for every step, and that the next step overwrites. It may be
    given to that step as its x.

    The state starts at zero. One thread at a time may use a stream.
    """

    def __init__(self, layer: Layer, batch_size: int) -> None:
        self._has_c, self._layers = layer.has_c, layer.num_layers
        problems = []
        for k in range(layer.num_layers):
            weights = layer._weights(k)
            one_step = (batch_size, 1) if layer.batch_first else (1, batch_size)
            x = np.zeros((*one_step, layer.output_size if k else layer.input_size), layer.dtype)
            extras = layer._extras(k, weights, x)
            problems.append(_core.Problem(layer.cell, x, *weights[:4], None, None, None, False, extras))
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


def norm_start(traits: Mapping[str, Any]) -> list[float]:
    """What each block of weight_unit starts as in a layer-normalised cell: gains of both products at 1, biases at 0;
    of a cell with c then its gain and its bias."""
    G, U, has_c = traits["G"], traits["U"], traits["has_c"]
    return [1.0 if block < 2 * G or (has_c and block == 3 * G) else 0.0 for block in range(U)]


def draw_seed(random: np.random.Generator) -> int:
    """64 random bits: the seed of every mask of one pass."""
    return int(random.integers(2**64, dtype=np.uint64))


def drop(
    x: Array,
    p: float,
    seed: int,
    same_at_every_step: bool = False,
    batch_first: bool = False,
    batch_sizes: NDArray[np.int64] | None = None,
) -> Array:
    """x [T, N, K] with each element 0 with probability p, else divided by 1-p, so that its expectation is x.

    The same for the same seed: given a gradient it drops what it dropped of x. [N, T, K] with batch_first, [rows, K]
    with batch_sizes; each element is dropped where it is in [T, N, K].
    """
    wide = x.astype(np.float32) if x.itemsize == 2 else x
    dropped: Array = _core.dropout(wide, p, seed, same_at_every_step, batch_first, batch_sizes)
    return dropped.astype(x.dtype, copy=False)


def _seed_of(seed: int, k: int, use: int) -> int:
    """The seed of what the k-th (layer, direction) draws for one use: a number of splitmix64, begun at the pass's."""
    return _core.mix64((seed + 0x9E3779B97F4A7C15 * (4 * k + use + 1)) % 2**64)


def _with_zeros(state: Array | None, rows: Any) -> Array | None:
    """A copy of a state [L, N, ·] with zeros in these rows; the state itself may be a tape's."""
    if state is None:
        return None
    state = state.copy()
    try:
        state[:, rows] = 0
    except IndexError as error:
        got = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else repr(rows)
        raise ValueError(f"rows: expected a mask or indices of {state.shape[1]} rows; got {got}") from error
    return state


def _variant(cells: tuple[str, ...], asked: Mapping[str, bool]) -> str:
    """The one of the cells that was asked for, the first if nothing was; `asked` has the others in their order."""
    names = [name for name, wanted in asked.items() if wanted]
    if len(names) > 1:
        raise ValueError(f"{cells[0]}: expected at most one of {', '.join(asked)}; got {' and '.join(names)}")
    return cells[1 + [*asked].index(names[0])] if names else cells[0]


def _must_go_forward(layer: Layer, who: str) -> None:
    if layer.bidirectional:
        raise ValueError(
            f"{who}: expected a layer of one direction; got bidirectional=True, whose second direction would have "
            "to start at the end of a sequence that is still going on"
        )


def _size(name: str, value: Any, least: int = 1) -> int:
    if not (isinstance(value, (int, np.integer)) and value >= least):
        raise ValueError(f"{name}: expected an integer of {least} or more; got {value!r}")
    return int(value)


def _probability(name: str, value: Any) -> float:
    if not (isinstance(value, (int, float, np.number)) and 0.0 <= value < 1.0):
        raise ValueError(f"{name}: expected a probability in [0, 1); got {value!r}")
    return float(value)


def _dtype(dtype: DTypeLike) -> np.dtype[Any]:
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            importlib.import_module("ml_dtypes")  # it teaches NumPy the name
        except ImportError as error:
            raise ImportError("dtype: bfloat16 needs ml_dtypes: pip install ml_dtypes") from error
    known = np.dtype(dtype)
    if known.name not in ("float32", "float64", "float16", "bfloat16"):
        raise ValueError(f"dtype: expected float32, float64, float16 or bfloat16; got {known}")
    return known


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
