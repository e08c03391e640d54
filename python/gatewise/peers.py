"""The parties of a measurement, all with one face: ours, and every other library that runs the same layers.

A peer is the code its own users would write, on the same numbers, with the same gradients wanted. Libraries are
imported when first used. Gate orders and layouts differ from one to the next; that is settled while a peer is built,
outside of what is timed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from importlib import metadata
from typing import Any, Callable, ClassVar

import numpy as np
from numpy.typing import NDArray

from . import functional
from .backends import available_cores
from .problems import CELLS, GATES, OPTIONS, Inputs, Problem, gradients_of, options_of, run

Array = NDArray[Any]
Arrays = dict[str, Array]

Layers = dict[str, tuple[str, dict[str, Any]]]  # by cell: the name of a layer, and its options

TORCH: Layers = {  # PyTorch's, for the cells that it has too
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}


def ours(torch_name: str) -> str:
    """weight_ih_l0 is our w_ih."""
    return torch_name.replace("weight", "w").replace("bias", "b").removesuffix("_l0")


class Party(ABC):
    """One party of a measurement, made for one problem.

    `step()` does the work of the problem once and returns whatever came of it; `results()` does it again and returns
    the answers by our names: y [T, N, H], of a training step also the gradients `gradients_of(problem)`.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()  # what it needs, by import name
    cells: ClassVar[Collection[str]] = TORCH
    rivals: ClassVar[tuple[str, ...]] = ()  # of one of ours, the peers that it usually meets
    options: ClassVar[frozenset[str]] = frozenset({"train", "nodx", "nobias", "saturated", "zeros", "subnormal", "nan"})

    def __init__(self, problem: Problem, inputs: Inputs, threads: int) -> None:
        self.problem, self.inputs, self.threads = problem, inputs, threads

    @abstractmethod
    def step(self) -> Any: ...

    @abstractmethod
    def results(self) -> Arrays: ...

    def window(self) -> AbstractContextManager[Any]:
        """Entered before and left after a run of steps, outside of the time taken: threads, modes."""
        return nullcontext()

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """Why this party cannot run a problem, or None if it can."""
        if cannot := sorted(problem.options - cls.options):
            return f"no {', '.join(cannot)}"
        return None if problem.cell in cls.cells else f"no cell {problem.cell}"

    @classmethod
    def missing(cls) -> str | None:
        """What would have to be installed, as a sentence, or None."""
        lacking = [package for package in cls.packages if importlib.util.find_spec(package) is None]
        extra = 'pip install "gatewise[bench]"'
        return f"{cls.name} needs {' and '.join(lacking)}: {extra}" if lacking else None

    @classmethod
    def version(cls) -> str:
        """The libraries behind this party and their versions."""
        return ", ".join(f"{package} {metadata.version(package)}" for package in cls.packages)


# ---- Ours --------------------------------------------------------------------------------------------------


class Ours(Party):
    """The functional API on the CPU kernels; for inference a layer, which keeps its weights packed as the other
    libraries' do, and for one step a call its stream."""

    name = "gatewise"
    options = frozenset(OPTIONS)
    cells = GATES
    rivals = ("torch", "onnxruntime")
    backend = "cpu"
    _of_layers: ClassVar[frozenset[str]] = Party.options | {"infer", "stream", "lengths", "half", "empty", "h0"}

    def __init__(self, problem: Problem, inputs: Inputs, threads: int) -> None:
        super().__init__(problem, inputs, threads)
        self.wanted = gradients_of(problem)
        self.forward = partial(
            functional.forward, problem.cell, *inputs[:7], lengths=inputs.lengths,
            reverse="reverse" in problem.options, backend=self.backend, num_threads=threads, training=problem.trains,
            **options_of(problem, inputs),
        )  # fmt: skip
        self.layer: Any = None
        if not problem.trains and self.backend == "cpu" and problem.options <= self._of_layers:
            self.layer = self._layer()
        if "stream" in problem.options:
            self.stream = self.layer.stream(problem.N)

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        if problem.kind == "stream" and (cannot := sorted(problem.options - cls._of_layers)):
            return f"no {', '.join(cannot)} in a stream"
        cannot = sorted(problem.options - cls.options)
        return f"no {', '.join(cannot)}" if cannot else None

    def step(self) -> Any:
        problem, inputs = self.problem, self.inputs
        if "stream" in problem.options:
            step = self.stream.step
            for x in self.inputs.x:
                y = step(x)
            return y
        if self.layer:
            h, c = (None if a is None else a[None] for a in (inputs.h0, inputs.c0))
            state = h if c is None else (h, c)
            return self.layer.forward(inputs.x, state, inputs.lengths, training=False)
        tape = self.forward()
        if not problem.trains:
            return tape
        return tape, functional.backward(
            tape, inputs.dy, inputs.dhn, inputs.dcn, wanted=self.wanted, num_threads=self.threads
        )

    def results(self) -> Arrays:
        if "stream" in self.problem.options:
            self.stream.reset()
            return {"y": np.stack([self.stream.step(x).copy() for x in self.inputs.x])}
        if self.layer:
            y, state, _ = self.step()
            states = state if isinstance(state, tuple) else (state,)
            return {"y": y, **{name: a[0] for name, a in zip(("hn", "cn"), states)}}
        return run(self.problem, self.inputs, self.backend, self.threads, self.wanted)

    def ticks(self) -> Array | None:
        """What the kernels measure of one step, in ticks of the CPU's clock: products, cells, all; None of a stream."""
        problem, inputs = self.problem, self.inputs
        if "stream" in problem.options:
            return None
        ticks = np.zeros(3, np.uint64)
        w_ih, w_hh, b_ih, b_hh = inputs[1:5]
        kept: dict[str, Any] = {}
        if self.layer:
            w_ih, w_hh, b_ih, b_hh = self.layer._weights(0)[:4]
            kept = {"packed": self.layer._packed[0], "promise": self.layer._promise()}
        tape = functional._forward(
            problem.cell, inputs.x, w_ih, w_hh, b_ih, b_hh, h0=inputs.h0, c0=inputs.c0, lengths=inputs.lengths,
            reverse="reverse" in problem.options, backend=self.backend, num_threads=self.threads,
            training=problem.trains, ticks=ticks, extras=functional._extras(options_of(problem, inputs)), **kept,
        )  # fmt: skip
        if problem.trains:
            functional._backward(
                tape, inputs.dy, inputs.dhn, inputs.dcn, wanted=self.wanted, num_threads=self.threads, ticks=ticks
            )
        return ticks

    def _layer(self) -> Any:
        from .layers import Layer

        problem, inputs = self.problem, self.inputs
        layer = Layer(problem.cell, problem.I, problem.H, dtype=inputs.x.dtype, num_threads=self.threads,
                      bias=inputs.b_ih is not None or CELLS[problem.cell]["normed"])  # fmt: skip
        names = {"w_ih": "weight_ih_l0", "w_hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0",
                 "w_unit": "weight_unit_l0"}  # fmt: skip
        layer.load_state_dict({
            theirs: array for name, theirs in names.items() if (array := getattr(inputs, name)) is not None
        })  # fmt: skip
        return layer


class Reference(Ours):
    """Our definition of the mathematics in Numba: float64 whatever comes in, one thread, no tricks."""

    name = "reference"
    packages = ("numba",)
    options = Ours.options - {"stream"}
    backend = "reference"


# ---- NumPy -------------------------------------------------------------------------------------------------


def _sigmoid(a: Array) -> Array:
    half = a.dtype.type(0.5)
    s: Array = half + half * np.tanh(half * a)
    return s


def _rnn(act: Callable[[Array], Array], slope: Callable[[Array], Array]) -> tuple[Any, Any]:
    """Elman's network: h = act(a); `slope` is act' as a function of h."""

    def forward(gx: list[Array], gh: list[Array], h: Array, c: Array) -> Any:
        new = act(gx[0] + gh[0])
        return (new,), new, c

    def backward(saved: tuple[Array, ...], dh: Array, dc: Array) -> Any:
        da = dh * slope(saved[0])
        return [da], [da], np.zeros_like(dh), dc

    return forward, backward


def _lstm_forward(gx: list[Array], gh: list[Array], h: Array, c: Array) -> Any:
    i, f, g, o = (a + b for a, b in zip(gx, gh))
    i, f, g, o = _sigmoid(i), _sigmoid(f), np.tanh(g), _sigmoid(o)
    new = f * c + i * g
    return (i, f, g, o, c, np.tanh(new)), o * np.tanh(new), new


def _lstm_backward(saved: tuple[Array, ...], dh: Array, dc: Array) -> Any:
    i, f, g, o, c, tanh_c = saved
    dc = dc + dh * o * (1 - tanh_c**2)
    da = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)]
    return da, da, np.zeros_like(dh), dc * f


def _gru_forward(gx: list[Array], gh: list[Array], h: Array, c: Array) -> Any:
    r, z = _sigmoid(gx[0] + gh[0]), _sigmoid(gx[1] + gh[1])
    n = np.tanh(gx[2] + r * gh[2])
    return (r, z, n, gh[2], h), (1 - z) * n + z * h, c


def _gru_backward(saved: tuple[Array, ...], dh: Array, dc: Array) -> Any:
    r, z, n, hidden, h = saved
    dn = dh * (1 - z) * (1 - n**2)
    dr, dz = dn * hidden * r * (1 - r), dh * (h - n) * z * (1 - z)
    return [dr, dz, dn], [dr, dz, dn * r], dh * z, dc


class NumPy(Party):
    """A plain NumPy loop with the backward pass written out. In float64 it is what every answer is held to."""

    name = "numpy"
    xp: Any = np  # what makes new arrays, where others are a device's; NumPy's functions take those as well
    packages = ("numpy", "threadpoolctl")  # the second holds NumPy's BLAS to the threads of the measurement
    options = Party.options | {"infer", "call", "lengths", "half", "empty", "reverse", "h0"}
    cells: ClassVar[dict[str, tuple[Any, Any]]] = {
        "rnn_tanh": _rnn(np.tanh, lambda h: 1 - h**2),
        # a NaN's gradient is not hidden: PyTorch's choice, and ours
        "rnn_relu": _rnn(lambda a: np.maximum(a, 0), lambda h: (~(h <= 0)).astype(h.dtype)),
        "lstm": (_lstm_forward, _lstm_backward),
        "gru": (_gru_forward, _gru_backward),
    }

    def step(self) -> Arrays:
        problem, (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, dy, dhn, dcn) = self.problem, self.inputs[:11]
        assert w_hh is not None
        G, dtype, shape = GATES[problem.cell], x.dtype, (problem.N, problem.H)
        forward, backward = self.cells[problem.cell]
        order = range(problem.T)[:: -1 if "reverse" in problem.options else 1]
        h = self.xp.zeros(shape, dtype) if h0 is None else h0
        c = self.xp.zeros(shape, dtype) if c0 is None else c0
        y, before, saved = self.xp.zeros((problem.T, *shape), dtype), self.xp.zeros((problem.T, *shape), dtype), {}
        gx = x @ w_ih.T + (0 if b_ih is None else b_ih)
        bias = self.xp.zeros(1, dtype) if b_hh is None else b_hh
        for t in order:
            before[t] = h
            saved[t], new_h, new_c = forward(np.split(gx[t], G, axis=1), np.split(h @ w_hh.T + bias, G, axis=1), h, c)
            if lengths is None:
                h, c, y[t] = new_h, new_c, new_h
            else:
                runs = (t < lengths)[:, None]
                h, c, y[t] = np.where(runs, new_h, h), np.where(runs, new_c, c), np.where(runs, new_h, 0)
        out = {"y": y, "hn": h} | ({"cn": c} if problem.cell == "lstm" else {})
        if not problem.trains:
            return out

        dh = self.xp.zeros(shape, dtype) if dhn is None else dhn
        dc = self.xp.zeros(shape, dtype) if dcn is None else dcn
        dgx = self.xp.zeros((problem.T, problem.N, G * problem.H), dtype)
        dgh = np.zeros_like(dgx)
        for t in reversed(order):
            into_h = dh + dy[t]
            da, db, through_h, into_c = backward(saved[t], into_h, dc)
            da, db = np.concatenate(da, axis=1), np.concatenate(db, axis=1)
            if lengths is None:
                dgx[t], dgh[t], dh, dc = da, db, db @ w_hh + through_h, into_c
            else:
                runs = (t < lengths)[:, None]
                dgx[t], dgh[t] = np.where(runs, da, 0), np.where(runs, db, 0)
                dh, dc = np.where(runs, db @ w_hh + through_h, dh), np.where(runs, into_c, dc)
        rows = (-1, G * problem.H)
        grads: dict[str, Callable[[], Array]] = {
            "dx": lambda: dgx @ w_ih, "dh0": lambda: dh, "dc0": lambda: dc,
            "dw_ih": lambda: dgx.reshape(rows).T @ x.reshape(-1, problem.I),
            "dw_hh": lambda: dgh.reshape(rows).T @ before.reshape(-1, problem.H),
            "db_ih": lambda: dgx.reshape(rows).sum(0), "db_hh": lambda: dgh.reshape(rows).sum(0),
        }  # fmt: skip
        return out | {name: grads[name]() for name in gradients_of(problem)}

    def results(self) -> Arrays:
        return self.step()

    def window(self) -> AbstractContextManager[Any]:
        limits: AbstractContextManager[Any] = importlib.import_module("threadpoolctl").threadpool_limits(self.threads)
        return limits


# ---- PyTorch -----------------------------------------------------------------------------------------------


class Torch(Party):
    """torch.nn's layer; unequal lengths packed and unpacked in the step, as its users do."""

    name = "torch"
    packages = ("torch",)
    options = Party.options | {"infer", "stream", "half", "h0", "project", "batch", "packed"}
    cells: ClassVar[Layers] = TORCH
    module: ClassVar[str] = "torch.nn"

    def __init__(self, problem: Problem, inputs: Inputs, threads: int) -> None:
        super().__init__(problem, inputs, threads)
        self.torch = torch = importlib.import_module("torch")
        self.x, self.dy = torch.from_numpy(inputs.x), torch.from_numpy(inputs.dy)
        self.x.requires_grad_("dx" in gradients_of(problem) and problem.trains)
        self.layer = self._layer()
        for name, parameter in self.layer.named_parameters():
            parameter.data = torch.from_numpy(getattr(inputs, ours(name)).copy())
        given = [torch.from_numpy(a.copy())[None] for a in (inputs.h0, inputs.c0) if a is not None]
        self.given = [a.requires_grad_(problem.trains) for a in given]
        self.dstate = [torch.from_numpy(a)[None] for a in (inputs.dhn, inputs.dcn) if a is not None]
        self.lengths = None if inputs.lengths is None else torch.from_numpy(inputs.lengths)
        self.batch_sizes = None if inputs.batch_sizes is None else torch.from_numpy(inputs.batch_sizes)
        self.mode = nullcontext if problem.trains else torch.inference_mode
        self.words: dict[str, Any] = {}  # what else a call of the layer is given

    def _layer(self) -> Any:
        kind, extra = self.cells[self.problem.cell]
        bias = self.inputs.b_ih is not None or CELLS[self.problem.cell]["normed"]
        extra = {**extra, "bias": bias, "batch_first": "batch" in self.problem.options}
        if self.problem.R != self.problem.H:
            extra["proj_size"] = self.problem.R
        return self._make(kind, **extra)

    def _make(self, kind: str, **options: Any) -> Any:
        make = getattr(importlib.import_module(self.module), kind)
        return make(self.problem.I, self.problem.H, dtype=self.x.dtype, **options)

    def step(self) -> Any:
        with self.mode():
            if "stream" in self.problem.options:
                return deque(self.steps(), maxlen=1)[0]
            y, state = self.forward()
            if self.problem.trains:
                self.layer.zero_grad(set_to_none=True)
                self.x.grad = None
                for a in self.given:
                    a.grad = None
                states = state if isinstance(state, tuple) else (state,)
                self.torch.autograd.backward([y, *states[: len(self.dstate)]], [self.dy, *self.dstate])
            return y, state

    def steps(self) -> Iterator[Any]:
        """y [1, N, H] of one step after the other."""
        state = None
        for t in range(self.problem.T):
            y, state = self.layer(self.x[t : t + 1], state)
            yield y

    def forward(self) -> Any:
        state, rnn = self._state(), self.torch.nn.utils.rnn
        if self.batch_sizes is not None:
            y, state = self.layer(rnn.PackedSequence(self.x, self.batch_sizes), state, **self.words)
            return y.data, state
        if self.lengths is None:
            return self.layer(self.x, state, **self.words)
        batch_first = self.layer.batch_first
        packed = rnn.pack_padded_sequence(self.x, self.lengths, batch_first, enforce_sorted=False)
        y, state = self.layer(packed, state)
        return rnn.pad_packed_sequence(y, batch_first, total_length=self.problem.T)[0], state

    def _state(self) -> Any:
        """The initial state as a layer takes it: None, h, or (h, c)."""
        return None if not self.given else tuple(self.given) if len(self.given) > 1 else self.given[0]

    def results(self) -> Arrays:
        if "stream" in self.problem.options:
            with self.mode():
                return {"y": self.torch.cat([*self.steps()]).numpy()}
        y, state = self.step()
        states = state if isinstance(state, tuple) else (state,)
        out = {"y": y} | {name: a[0] for name, a in zip(("hn", "cn"), states)}
        if self.problem.trains:
            out |= {"d" + ours(name): parameter.grad for name, parameter in self.layer.named_parameters()}
            out |= {name: a.grad[0] for name, a in zip(("dh0", "dc0"), self.given)}
            out |= {"dx": self.x.grad} if self.x.requires_grad else {}
        return {name: tensor.detach().cpu().numpy() for name, tensor in out.items()}

    @contextmanager
    def window(self) -> Iterator[None]:
        kept = self.torch.get_num_threads()
        self.torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            self.torch.set_num_threads(kept)


class TorchGeneric(Torch):
    """torch.nn without oneDNN: the path it takes for every layer but a float32 LSTM of equal lengths."""

    name = "torch-generic"
    options = Torch.options - {"half", "packed"}

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        only = None if (problem.cell, problem.dtype) == ("lstm", "f32") else "the only path there is: see torch"
        return super().refuses(problem) or only

    @contextmanager
    def window(self) -> Iterator[None]:
        mkldnn = self.torch.backends.mkldnn  # its context manager sets TF32 as well, which warns
        kept, *_ = mkldnn.set_flags(False)
        try:
            with super().window():
                yield
        finally:
            mkldnn.set_flags(kept)


class TorchCell(Torch):
    """torch.nn.LSTMCell and its like: one step a call."""

    name = "torch-cell"
    options = Party.options | {"stream"}

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        return super().refuses(problem) or (None if "stream" in problem.options else "only streams")

    def _layer(self) -> Any:
        kind, extra = self.cells[self.problem.cell]
        return self._make(kind + "Cell", bias=self.inputs.b_ih is not None, **extra)

    def steps(self) -> Iterator[Any]:
        state = None
        for t in range(self.problem.T):
            state = self.layer(self.x[t], state)
            yield (state[0] if isinstance(state, tuple) else state)[None]


class OursInTorch(Torch):
    """gatewise.torch's layer where torch.nn's was: a tensor of lengths where torch packs, and what torch lacks."""

    name = "gatewise.torch"
    rivals = ("torch",)
    options = Torch.options | {"lengths", "empty", "reset", "reset0", "clip", "states", "checkpoints"}
    module = "gatewise.torch"
    cells = TORCH | {
        "lstm_peephole": ("LSTM", {"peephole": True}),
        "lstm_coupled": ("LSTM", {"coupled": True}),
        "lstm_norm": ("LSTM", {"layer_norm": True}),
        "gru_reset_before": ("GRU", {"reset_after": False}),
        "gru_norm": ("GRU", {"layer_norm": True}),
        "indrnn_relu": ("IndRNN", {"nonlinearity": "relu"}),
        "indrnn_tanh": ("IndRNN", {"nonlinearity": "tanh"}),
    }

    def __init__(self, problem: Problem, inputs: Inputs, threads: int) -> None:
        self.given_options: dict[str, Any] = {**options_of(problem, inputs)}
        super().__init__(problem, inputs, threads)
        if inputs.reset is not None:
            self.words["reset"] = self.torch.from_numpy(inputs.reset)
            self.words |= {"reset_to": "zero"} if "reset0" in problem.options else {}
        if self.lengths is not None:
            self.words["lengths"], self.lengths = self.lengths, None

    @classmethod
    def missing(cls) -> str | None:
        if reason := super().missing():
            return reason
        return None if importlib.util.find_spec(cls.module) else f"this gatewise has no {cls.module}"

    def _make(self, kind: str, **options: Any) -> Any:
        own = {name: self.given_options[name] for name in ("cell_clip", "save") if name in self.given_options}
        return super()._make(kind, **options, **own)


OURS: dict[str, type[Party]] = {Ours.name: Ours, OursInTorch.name: OursInTorch}


# ---- ONNX Runtime ------------------------------------------------------------------------------------------


class OnnxRuntime(Party):
    """onnxruntime on a graph of one node; inference in float32 only."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")
    options = Party.options - {"nodx"} | {"infer", "stream", "lengths", "half", "reverse", "h0"}
    # ONNX has the gates i o f c and z r h where ours are i f g o and r z n.
    nodes: ClassVar[dict[str, tuple[str, list[int], dict[str, Any]]]] = {
        "rnn_tanh": ("RNN", [0], {"activations": ["Tanh"]}),
        "rnn_relu": ("RNN", [0], {"activations": ["Relu"]}),
        "lstm": ("LSTM", [0, 3, 1, 2], {}),
        "gru": ("GRU", [1, 0, 2], {"linear_before_reset": 1}),
    }

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        if problem.trains:
            return "inference only"
        return super().refuses(problem) or (None if problem.dtype == "f32" else "float32 only")

    def __init__(self, problem: Problem, inputs: Inputs, threads: int) -> None:
        super().__init__(problem, inputs, threads)
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        model = self._model().SerializeToString()
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        zeros = np.zeros((1, problem.N, problem.H), np.float32)
        self.feed = {
            "x": inputs.x,
            "h0": zeros if inputs.h0 is None else inputs.h0[None],
            "c0": zeros if inputs.c0 is None else inputs.c0[None],
            "lengths": None if inputs.lengths is None else inputs.lengths.astype(np.int32),
        }
        self.feed = {i.name: self.feed[i.name] for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def _model(self) -> Any:
        onnx = importlib.import_module("onnx")
        problem, inputs, h = self.problem, self.inputs, onnx.helper
        kind, order, attributes = self.nodes[problem.cell]
        T, N, I, H = 1 if "stream" in problem.options else problem.T, problem.N, problem.I, problem.H
        has_c = kind == "LSTM"

        def gates(array: Array | None) -> Array:
            array = np.zeros(len(order) * H, np.float32) if array is None else array
            return np.concatenate([np.split(array, len(order))[k] for k in order])

        weights = {
            "w": gates(inputs.w_ih)[None],
            "r": gates(inputs.w_hh)[None],
            "b": np.concatenate([gates(inputs.b_ih), gates(inputs.b_hh)])[None],
        }
        if "reverse" in problem.options:
            attributes = {**attributes, "direction": "reverse"}
        lengths = "" if inputs.lengths is None else "lengths"
        states, finals = ["h0", "c0"][: 1 + has_c], ["hn", "cn"][: 1 + has_c]
        node = h.make_node(kind, ["x", "w", "r", "b", lengths, *states], ["y", *finals], hidden_size=H, **attributes)
        float32, int32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
        value = h.make_tensor_value_info
        graph = h.make_graph(
            [node], "layer",
            [value("x", float32, [T, N, I]), *(value(s, float32, [1, N, H]) for s in states)]
            + [value("lengths", int32, [N])] * bool(lengths),
            [value("y", float32, [T, 1, N, H]), *(value(s, float32, [1, N, H]) for s in finals)],
            [onnx.numpy_helper.from_array(a, name) for name, a in weights.items()],
        )  # fmt: skip
        return h.make_model(graph, opset_imports=[h.make_opsetid("", 14)], ir_version=8)

    def step(self) -> Any:
        if "stream" in self.problem.options:
            return self._steps()[-1]
        return self.session.run(self.outputs, self.feed)

    def _steps(self) -> list[Array]:
        feed, run, ys = dict(self.feed), self.session.run, []
        for t in range(self.problem.T):
            feed["x"] = self.inputs.x[t : t + 1]
            y, *state = run(self.outputs, feed)
            feed.update(zip(("h0", "c0"), state))
            ys.append(y)
        return ys

    def results(self) -> Arrays:
        if "stream" in self.problem.options:
            return {"y": np.concatenate(self._steps())[:, 0]}
        return {name: a[:, 0] if name == "y" else a[0] for name, a in zip(self.outputs, self.step())}


# ---- JAX and Keras -----------------------------------------------------------------------------------------


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """Every thread of this process on the first cores only: XLA's pool cannot be made smaller once it runs."""
    if not hasattr(os, "sched_setaffinity") or threads >= available_cores():
        yield
        return
    everywhere, kept = os.sched_getaffinity(0), {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(OSError):  # it has ended
            kept[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, sorted(everywhere)[:threads])
    try:
        yield
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):  # those that were born meanwhile are pinned as well
            with suppress(OSError):
                os.sched_setaffinity(thread, kept.get(thread, everywhere))


class Jax(Party):
    """lax.scan over the steps, jitted, its gradient from jax.vjp. Its threads are held to the cores we use."""

    name = "jax"
    packages = ("jax",)
    options = Party.options | {"infer", "h0"}

    def __init__(self, problem: Problem, inputs: Inputs, threads: int) -> None:
        super().__init__(problem, inputs, threads)
        self.jax = importlib.import_module("jax")
        self.jax.devices()  # starts XLA's pool, which is as large as the cores that it sees now
        with self.window():
            arrays = {name: self.jax.device_put(a) for name, a in inputs._asdict().items() if a is not None}
            names = [name[1:] for name in gradients_of(problem)]
            self.leaves = {name: arrays[name] for name in names}
            self.others = {name: a for name, a in arrays.items() if name not in self.leaves}
            self.function = self.jax.jit(self._train if problem.trains else self._forward)

    @contextmanager
    def window(self) -> Iterator[None]:
        # the mode is the whole process's, so it holds for these calls alone
        kept = self.jax.config.jax_enable_x64
        self.jax.config.update("jax_enable_x64", self.problem.dtype == "f64")
        try:
            with _pinned(self.threads):
                yield
        finally:
            self.jax.config.update("jax_enable_x64", kept)

    def _forward(self, leaves: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        jax, jnp, a = self.jax, self.jax.numpy, {**leaves, **others}
        cell, G = self.problem.cell, GATES[self.problem.cell]
        zeros = jnp.zeros((self.problem.N, self.problem.H), a["x"].dtype)
        gx = a["x"] @ a["w_ih"].T + a.get("b_ih", 0)

        def step(state: Any, gx: Any) -> Any:
            h, c = state
            gh = jnp.split(h @ a["w_hh"].T + a.get("b_hh", 0), G, axis=1)
            gx = jnp.split(gx, G, axis=1)
            if cell == "lstm":
                i, f, g, o = (p + q for p, q in zip(gx, gh))
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
            elif cell == "gru":
                r, z = jax.nn.sigmoid(gx[0] + gh[0]), jax.nn.sigmoid(gx[1] + gh[1])
                h = (1 - z) * jnp.tanh(gx[2] + r * gh[2]) + z * h
            else:
                h = (jnp.tanh if cell == "rnn_tanh" else jax.nn.relu)(gx[0] + gh[0])
            return (h, c), h

        (hn, cn), y = jax.lax.scan(step, (a.get("h0", zeros), a.get("c0", zeros)), gx)
        return {"y": y, "hn": hn} | ({"cn": cn} if cell == "lstm" else {})

    def _train(self, leaves: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
        out, pull = self.jax.vjp(lambda leaves: self._forward(leaves, others), leaves)
        into = {name: others.get("d" + name, self.jax.numpy.zeros_like(a)) for name, a in out.items()}
        return {**out, **{"d" + name: a for name, a in pull(into)[0].items()}}

    def step(self) -> Any:
        return self.jax.block_until_ready(self.function(self.leaves, self.others))

    def results(self) -> Arrays:
        return {name: np.asarray(a) for name, a in self.step().items()}


def _keras_backend() -> str:
    """What Keras runs on: JAX, else PyTorch, unless KERAS_BACKEND has decided."""
    return os.environ.get("KERAS_BACKEND") or ("jax" if importlib.util.find_spec("jax") else "torch")


def _keras() -> Any:
    os.environ["KERAS_BACKEND"] = _keras_backend()  # read when Keras is imported, and kept from then on
    return importlib.import_module("keras")


class Keras(Party):
    """Keras' layer: on JAX jitted with jax.vjp, on PyTorch through autograd. Batch first, as it wants it."""

    name = "keras"
    packages = ("keras",)
    options = Party.options - {"nobias"} | {"infer"}
    # Keras has the gates z r h where ours are r z n; its LSTM has ours.
    layers: ClassVar[dict[str, tuple[str, list[int], dict[str, Any]]]] = {
        "rnn_tanh": ("SimpleRNN", [0], {"activation": "tanh"}),
        "rnn_relu": ("SimpleRNN", [0], {"activation": "relu"}),
        "lstm": ("LSTM", [0, 1, 2, 3], {}),
        "gru": ("GRU", [1, 0, 2], {"reset_after": True}),
    }

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        return super().refuses(problem) or (None if problem.dtype == "f32" else "float32 only here")

    @classmethod
    def missing(cls) -> str | None:
        if reason := super().missing():
            return reason
        backend = _keras_backend()
        if backend in ("jax", "torch") and importlib.util.find_spec(backend):
            return None
        return f'keras needs jax or torch as its backend, not {backend}: pip install "gatewise[bench]"'

    @classmethod
    def version(cls) -> str:
        return f"{super().version()} on {_keras_backend()}"

    def __init__(self, problem: Problem, inputs: Inputs, threads: int) -> None:
        super().__init__(problem, inputs, threads)
        keras = _keras()
        kind, self.order, extra = self.layers[problem.cell]
        self.layer = getattr(keras.layers, kind)(problem.H, return_sequences=True, **extra)
        self.layer.build((problem.N, problem.T, problem.I))
        assert inputs.b_ih is not None and inputs.b_hh is not None and inputs.w_hh is not None
        b_ih, b_hh = self._gates(inputs.b_ih), self._gates(inputs.b_hh)
        bias = np.stack([b_ih, b_hh]) if problem.cell == "gru" else b_ih + b_hh
        self.layer.set_weights([self._gates(inputs.w_ih).T, self._gates(inputs.w_hh).T, bias])
        self.on_torch = keras.backend.backend() == "torch"
        self.framework = importlib.import_module("torch" if self.on_torch else "jax")
        self.x = keras.ops.convert_to_tensor(np.ascontiguousarray(inputs.x.swapaxes(0, 1)))
        self.dy = keras.ops.convert_to_tensor(np.ascontiguousarray(inputs.dy.swapaxes(0, 1)))
        self.wants_x = problem.trains and "nodx" not in problem.options
        if self.on_torch:
            self.x.requires_grad_(self.wants_x)
        else:
            self.weights = [v.value for v in self.layer.trainable_variables]
            self.fixed = [v.value for v in self.layer.non_trainable_variables]
            self.function = self.framework.jit(self._train if problem.trains else self._forward)

    def _gates(self, array: Array) -> Array:
        """Our order of gates to Keras', or back: both permutations are their own inverse."""
        parts = np.split(array, len(self.order))
        return np.concatenate([parts[k] for k in self.order])

    def _forward(self, weights: Any, x: Any) -> Any:
        return self.layer.stateless_call(weights, self.fixed, x)[0]

    def _train(self, weights: Any, x: Any) -> Any:
        if self.wants_x:
            y, pull = self.framework.vjp(self._forward, weights, x)
        else:
            y, pull = self.framework.vjp(lambda weights: self._forward(weights, x), weights)
        return y, pull(self.dy)

    def step(self) -> Any:
        if not self.on_torch:
            return self.framework.block_until_ready(self.function(self.weights, self.x))
        if not self.problem.trains:
            with self.framework.inference_mode():
                return self.layer(self.x)
        for variable in self.layer.trainable_variables:
            variable.value.grad = None
        self.x.grad = None
        y = self.layer(self.x)
        y.backward(self.dy)
        grads = [variable.value.grad for variable in self.layer.trainable_variables]
        return y, [grads] + [self.x.grad] * self.wants_x

    def results(self) -> Arrays:
        def plain(tensor: Any) -> Array:
            return np.asarray(tensor.detach() if self.on_torch else tensor)

        if not self.problem.trains:
            return {"y": plain(self.step()).swapaxes(0, 1)}
        y, ((dw_ih, dw_hh, db), *dx) = self.step()
        dw_ih, dw_hh, db = plain(dw_ih).T, plain(dw_hh).T, plain(db)
        db_ih, db_hh = db if self.problem.cell == "gru" else (db, db)
        out = {"dw_ih": dw_ih, "dw_hh": dw_hh, "db_ih": db_ih, "db_hh": db_hh}
        out = {"y": plain(y).swapaxes(0, 1)} | {name: self._gates(a) for name, a in out.items()}
        return out | ({"dx": plain(dx[0]).swapaxes(0, 1)} if dx else {})

    @contextmanager
    def window(self) -> Iterator[None]:
        if not self.on_torch:
            with _pinned(self.threads):
                yield
            return
        kept = self.framework.get_num_threads()
        self.framework.set_num_threads(self.threads)
        try:
            yield
        finally:
            self.framework.set_num_threads(kept)


PEERS: dict[str, type[Party]] = {
    peer.name: peer for peer in (Torch, TorchGeneric, TorchCell, OnnxRuntime, Jax, Keras, NumPy, Reference)
}
