"""ONNX in and out: `load` runs a model with its LSTM, GRU and RNN nodes as gatewise layers, `save` writes a layer.

No operator is written here: the nodes around the recurrent ones run in onnx's own `ReferenceEvaluator`. This file
translates: ONNX's gate orders and attributes to cells and back, its shapes to a layer's. Letters as elsewhere: T time
steps, N batch, I input size, H hidden size, L layers, D directions. https://onnx.ai/onnx/operators/onnx__LSTM.html
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, Union

import numpy as np
from numpy.typing import NDArray

from . import functional
from .layers import Layer, _name, _pick, write_whole

try:
    import onnx
    import onnx.inliner
    from google.protobuf.message import DecodeError
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError('gatewise.onnx needs onnx: pip install "gatewise[onnx]"') from error

Array = NDArray[Any]
Source = Union[str, "os.PathLike[str]", bytes, "onnx.ModelProto"]

# An operator's gates as ONNX orders them, and the activations it means when it names none.
_OPERATORS = {
    "LSTM": ("iofc", ["Sigmoid", "Tanh", "Tanh"]),
    "GRU": ("zrh", ["Sigmoid", "Tanh"]),
    "RNN": ("i", ["Tanh"]),
}
# A cell's operator, its gates in our order by ONNX's letters (c is our g, h our n), the attributes that say which cell.
_CELLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", "i", {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", "i", {"activations": ["Relu"]}),
    "lstm": ("LSTM", "ifco", {}),
    "lstm_peephole": ("LSTM", "ifco", {}),
    "lstm_coupled": ("LSTM", "ico", {"input_forget": 1}),
    "gru": ("GRU", "rzh", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", "rzh", {"linear_before_reset": 0}),
}
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
_WEIGHTS = ("W", "R", "B", "P")
_KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_unit")  # of a layer's parameters: W, R, B twice, P
_ARGUMENTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_unit")  # the same, of a functional call
_PEEPHOLES = ("iof", "ifo")  # ONNX's P, our w_unit
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def load(model: Source, *, backend: str | None = None, num_threads: int | None = None) -> Model:
    """Read an ONNX model whose LSTM, GRU and RNN nodes gatewise runs; see `Model` for how to call it.

    Args:
        model: path of a file, its bytes, or an onnx.ModelProto (which is left as it is).
        backend, num_threads: as in the functional calls, for the recurrent nodes.

    The recurrent nodes may use everything that ONNX defines for them from opset 7 on, in each of its dtypes: both
    layouts, the three directions, B, sequence_lens, initial states, peepholes P, clip, input_forget,
    linear_before_reset; of the activations, sigmoid for the gates and tanh elsewhere, and relu in an RNN. A sequence of
    length 0 keeps its initial state. Every other node runs in onnx.reference, in NumPy. So does a recurrent node with
    clip, a step at a time: the kernels can bound c, but not what enters a gate.

    Raises:
        ValueError: this is no ONNX model, or a recurrent node lacks an input, has one that does not fit, or asks for
            what gatewise does not have; the message names the node and the input or attribute.
        NotImplementedError: raised by onnx.reference, which runs every node that is not recurrent, for an operator
            that it does not know.
    """
    try:
        if isinstance(model, onnx.ModelProto):
            proto = model
        elif isinstance(model, bytes):
            proto = onnx.load_from_string(model)
        else:
            proto = onnx.load(os.fspath(model))
    except DecodeError as error:
        name = "bytes" if isinstance(model, bytes) else os.fspath(model)
        raise ValueError(f"model: expected an ONNX model; got {name}: {error}") from None
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    return Model(proto, backend, num_threads)


class Model:
    """A loaded model: `model(*inputs)` takes the graph's inputs in order and returns its outputs in order.

    Inputs are NumPy arrays of the types that the graph declares. One that has a value in the file may be None, or be
    left out at the end; and giving only those without a value, in their order, will do. A single output comes as it is,
    several as a tuple. Each node that is not recurrent costs a call some 10 us of Python: to feed a model step by step,
    take its `layers`.

    Attributes:
        inputs, outputs: their names.
    """

    def __init__(self, proto: Any, backend: str | None = None, num_threads: int | None = None) -> None:
        graph = proto.graph
        self._nodes: list[_Recurrent] = []
        own = {"op_domain": "", "made": self._nodes, "options": {"backend": backend, "num_threads": num_threads}}
        operators = [type(name, (_Recurrent,), own) for name in _OPERATORS]
        _check_sources(graph)
        self._run = ReferenceEvaluator(proto, new_ops=operators).run
        self._types = {value.name: value.type.tensor_type for value in graph.input}
        initial = {tensor.name for tensor in graph.initializer}
        self.inputs, self.outputs = list(self._types), [value.name for value in graph.output]
        self._required = [name for name in self.inputs if name not in initial]
        constants = _constants(proto)
        for node in self._nodes:
            node.bind_constants(*constants, self._types)

    def __repr__(self) -> str:
        return f"Model({', '.join(self.inputs)}) -> {', '.join(self.outputs)}, layers={self.layers}"

    @property
    def layers(self) -> list[Layer]:
        """The recurrent nodes in graph order, a layer each, with both directions of a bidirectional one.

        A layer of a node with direction="reverse" holds that direction's weights, but cannot itself walk backwards. The
        weights of a node that gets them as inputs are those of the last call, before it zeros; if the file does not
        tell their shapes either, its layer appears with the first call.
        """
        return [node.layer for node in self._nodes if node.layer is not None]

    def __call__(self, *inputs: Any) -> Any:
        names = self._required if len(inputs) == len(self._required) else self.inputs
        if len(inputs) > len(names) or len(inputs) < len(self._required):
            raise ValueError(f"inputs: expected {', '.join(self.inputs)}; got {len(inputs)} of them")
        feeds = {name: np.asarray(value) for name, value in zip(names, inputs) if value is not None}
        if missing := [name for name in self._required if name not in feeds]:
            raise ValueError(f"inputs: expected {', '.join(self.inputs)}; got nothing for {', '.join(missing)}")
        for name, value in feeds.items():
            if (code := self._types[name].elem_type) and value.dtype != helper.tensor_dtype_to_np_dtype(code):
                raise ValueError(f"{name}: expected {helper.tensor_dtype_to_np_dtype(code)}; got {value.dtype}")
        outputs = self._run(None, feeds)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class _Recurrent(OpRun):  # type: ignore[misc]
    """An LSTM, GRU or RNN node in onnx.reference, which makes one of each node: the layer and the way to call it.

    `load` derives a class for each operator, by whose name onnx.reference finds it.
    """

    made: ClassVar[list[_Recurrent]]
    options: ClassVar[dict[str, Any]]
    direction: str
    layout: int
    clip: np.float32 | None
    hidden_size: int | None

    def __init__(self, onnx_node: Any, run_params: dict[str, Any]) -> None:
        super().__init__(onnx_node, run_params)
        operator = onnx_node.op_type
        self.label = _label(onnx_node)
        self.layer: Layer | None = None
        self._fixed = self.coupled = False
        if (opset := run_params["opsets"][""]) < 7:
            raise ValueError(f"{self.label}: expected opset 7 or later; got {opset}")
        if self.direction not in _DIRECTIONS:
            raise ValueError(f"{self.label}: direction: expected {', '.join(_DIRECTIONS)}; got {self.direction!r}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"{self.label}: clip: expected a positive number; got {self.clip}")
        if self.layout not in (0, 1):
            raise ValueError(f"{self.label}: layout: expected 0 or 1; got {self.layout}")
        self.names = dict(zip(_INPUTS, [*onnx_node.input, *[""] * len(_INPUTS)]))
        if missing := [name for name in "XWR" if not self.names[name]]:
            raise ValueError(f"{self.label}: input {missing[0]} is missing")
        self.gates = _OPERATORS[operator][0]
        self.cell = self._choose_cell(operator)
        self.made.append(self)

    def _choose_cell(self, operator: str) -> str:
        attributes = {a.name: helper.get_attribute_value(a) for a in self.onnx_node.attribute}
        default = _OPERATORS[operator][1]
        supported = [default, ["Relu"]] if operator == "RNN" else [default]
        D, some = _DIRECTIONS[self.direction], [a.decode() for a in attributes.get("activations", [])]
        known = {a.lower(): a for a in ("Sigmoid", "Tanh", "Relu")}
        activations = [known.get(a.lower(), a) for a in some] or default * D
        if activations not in [choice * D for choice in supported]:
            expected = " or ".join(str(choice * D) for choice in supported)
            raise ValueError(f"{self.label}: activations: expected {expected} in any case; got {some}")
        if operator == "RNN":
            return f"rnn_{activations[0].lower()}"
        if operator == "GRU":
            return "gru" if attributes.get("linear_before_reset", 0) else "gru_reset_before"
        self.coupled = bool(attributes.get("input_forget", 0))
        if self.names["P"]:  # also where i and f are coupled: see _ours
            return "lstm_peephole"
        return "lstm_coupled" if self.coupled else "lstm"

    @property
    def output(self) -> list[str]:
        """onnx.reference would store an output that the graph leaves out as "", which is its name for no input."""
        return [name or f"output {k} of {self.label}" for k, name in enumerate(self.onnx_node.output)]

    # -- weights -------------------------------------------------------------------------------------------

    def bind_constants(self, constants: dict[str, Array], fixed: set[str], types: dict[str, Any]) -> None:
        """The weights that the file tells; in place of those that come with a call, zeros of the declared shape."""
        names = [self.names[weight] for weight in _WEIGHTS]
        values: list[Any] = [constants.get(name) for name in names]
        for k, name in enumerate(names):
            if values[k] is None and name in types:
                shape = [axis.dim_value for axis in types[name].shape.dim]
                if shape and all(shape):
                    values[k] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(types[name].elem_type))
        if all(value is not None for name, value in zip(names, values) if name):
            self._bind(*values)
            self._fixed = fixed.issuperset(filter(None, names))

    def _bind(self, W: Array, R: Array, B: Array | None, P: Array | None) -> Layer:
        for name, value in (("W", W), ("R", R)):
            if value.ndim != 3:
                raise ValueError(f"{self.label}: input {name}: expected 3 axes; got shape {value.shape}")
        if W.dtype.name not in _DTYPES:
            raise ValueError(f"{self.label}: input W: expected {', '.join(_DTYPES)}; got {W.dtype}")
        D, G, I, H = _DIRECTIONS[self.direction], len(self.gates), W.shape[2], self.hidden_size or R.shape[2]
        self._check("W", W, W.dtype, f"D, {G}*H, I", D, G * H, I)
        self._check("R", R, W.dtype, f"D, {G}*H, H", D, G * H, H)
        self._check("B", B, W.dtype, f"D, {2 * G}*H", D, 2 * G * H)
        self._check("P", P, W.dtype, "D, 3*H", D, 3 * H)
        layer = self.layer
        if layer is None or (layer.input_size, layer.hidden_size, layer.dtype) != (I, H, W.dtype):
            layer = self.layer = Layer(
                self.cell, I, H, bias=B is not None, bidirectional=D == 2, batch_first=bool(self.layout),
                dtype=W.dtype, **self.options,
            )  # fmt: skip
        b_ih, b_hh = (None, None) if B is None else np.split(B, 2, axis=1)
        orders = (self.gates, _CELLS[self.cell][1])
        layer.load_state_dict({
            _name(kind, 0, d): self._ours(value[d], *(_PEEPHOLES if kind == "weight_unit" else orders))
            for kind, value in zip(_KINDS, (W, R, b_ih, b_hh, P)) if value is not None for d in range(D)
        })  # fmt: skip
        return layer

    def _ours(self, array: Array, given: str, wanted: str) -> Array:
        blocks = dict(zip(given, np.split(array, len(given))))
        if self.coupled:  # f = 1 - i, for sigmoid(-a) = 1 - sigmoid(a)
            blocks["f"] = -blocks["i"]
        return np.concatenate([blocks[gate] for gate in wanted])

    def _check(self, name: str, value: Array | None, dtype: Any, letters: str, *shape: int) -> None:
        if value is not None and (value.dtype != dtype or value.shape != shape):
            expected = f"{np.dtype(dtype)} [{letters}] = {[*shape]}"
            raise ValueError(f"{self.label}: input {name}: expected {expected}; got {value.dtype} {[*value.shape]}")

    # -- a call --------------------------------------------------------------------------------------------

    def _run(
        self,
        X: Array,
        W: Array,
        R: Array,
        B: Array | None = None,
        sequence_lens: Array | None = None,
        initial_h: Array | None = None,
        initial_c: Array | None = None,
        P: Array | None = None,
        **attributes: Any,
    ) -> tuple[Array, ...]:
        layer = self.layer if self._fixed and self.layer is not None else self._bind(W, R, B, P)
        x = np.ascontiguousarray(X)
        if x.ndim != 3:
            raise ValueError(f"{self.label}: input X: expected 3 axes; got shape {x.shape}")
        T, N = x.shape[:2] if self.layout == 0 else x.shape[1::-1]
        D, H = layer.directions, layer.hidden_size
        self._check("X", x, layer.dtype, "N, T, I" if self.layout else "T, N, I", *x.shape[:2], layer.input_size)
        self._check("sequence_lens", sequence_lens, np.int32, "N", N)
        state: list[Any] = []
        for name, value in (("initial_h", initial_h), ("initial_c", initial_c)):
            rows = (N, D) if self.layout else (D, N)
            self._check(name, value, layer.dtype, "N, D, H" if self.layout else "D, N, H", *rows, H)
            state.append(None if value is None else np.ascontiguousarray(self._swap(value)))
        lengths = None if sequence_lens is None else sequence_lens.astype(np.int64)
        if lengths is not None and not ((lengths >= 0) & (lengths <= T)).all():
            raise ValueError(f"{self.label}: input sequence_lens: expected 0 to T = {T}; got {lengths}")
        if self.direction == "reverse" or self.clip is not None:
            runs = [self._walk(layer, d, self._swap(x), [_pick(s, d) for s in state], lengths) for d in range(D)]
            y = self._swap(np.concatenate([run[0] for run in runs], axis=2))
            final = [np.stack(s) for s in zip(*(run[1:] for run in runs))]
        else:
            last: Any
            y, last, _ = layer.forward(x, (state[0], state[1]) if layer.has_c else state[0], lengths, training=False)
            final = [*last] if layer.has_c else [last]
        y = y.reshape(*y.shape[:2], D, H)
        return (y if self.layout else y.swapaxes(1, 2), *map(self._swap, final))

    def _walk(self, layer: Layer, d: int, x: Array, state: list[Any], lengths: Array | None) -> list[Array]:
        """What a layer has no name for, in its d-th direction: a first direction that is the reverse, ONNX's clip."""
        own: dict[str, Any] = {name: layer._parameters.get(_name(kind, 0, d)) for name, kind in zip(_ARGUMENTS, _KINDS)}
        reverse = d == 1 or self.direction == "reverse"
        if self.clip is not None:
            return _clipped_forward(self.cell, self.clip, x, **own, state=state, lengths=lengths, reverse=reverse)
        given = {name: value for name, value in own.items() if value is not None}
        tape = functional.forward(
            self.cell, x, **given, h0=state[0], c0=state[1], lengths=lengths, reverse=reverse, training=False,
            **self.options,
        )  # fmt: skip
        return [a for a in (tape.y, tape.hn, tape.cn) if a is not None]

    def _swap(self, array: Array) -> Array:
        """Between the order of this node's layout and ours, of X [N, T, I], of a state [N, D, H]."""
        return array.swapaxes(0, 1) if self.layout else array


def _clipped_forward(
    cell: str,
    clip: np.floating[Any],
    x: Array,
    w_ih: Array,
    w_hh: Array,
    b_ih: Array | None,
    b_hh: Array | None,
    w_unit: Array | None,
    state: list[Array | None],
    lengths: Array | None,
    reverse: bool,
) -> list[Array]:
    """`functional.forward` in NumPy, with what enters a gate's activation held within clip: after its biases and its
    peephole, for the last gate of a GRU after its reset, as in onnxruntime; c enters its tanh unbounded. The kernels
    have no such bound, only the one of c itself.
    """

    def tanh(a: Array) -> Array:
        bounded: Array = np.tanh(np.clip(a, -clip, clip))
        return bounded

    def sigmoid(a: Array) -> Array:
        return 0.5 + 0.5 * np.tanh(0.5 * np.clip(a, -clip, clip))

    operator, gates, _ = _CELLS[cell]
    (T, N), H = x.shape[:2], w_hh.shape[1]
    real = np.promote_types(x.dtype, np.float32)

    def known(a: Array | None, *shape: int) -> Array:
        return np.zeros(shape, real) if a is None else a.astype(real, copy=False).reshape(shape)

    h, c = known(state[0], N, H), known(state[1], N, H)
    w_ih, w_hh = w_ih.astype(real, copy=False), w_hh.astype(real, copy=False)
    b_ih, b_hh = known(b_ih, len(w_hh)), known(b_hh, len(w_hh))
    p = dict(zip("ifo", known(w_unit, 3, H)))
    y = np.zeros((T, N, H), real)
    for t in reversed(range(T)) if reverse else range(T):
        gx = dict(zip(gates, np.split(x[t].astype(real) @ w_ih.T + b_ih, len(gates), axis=1)))
        gh = dict(zip(gates, np.split(h @ w_hh.T + b_hh, len(gates), axis=1)))
        next_c = c
        if operator == "RNN":
            a = gx["i"] + gh["i"]
            next_h = tanh(a) if cell == "rnn_tanh" else np.clip(a, 0, clip)
        elif operator == "GRU":
            r, z = sigmoid(gx["r"] + gh["r"]), sigmoid(gx["z"] + gh["z"])
            hidden = r * gh["h"] if cell == "gru" else (r * h) @ w_hh[2 * H :].T + b_hh[2 * H :]
            n = tanh(gx["h"] + hidden)
            next_h = n + z * (h - n)
        else:
            i = sigmoid(gx["i"] + gh["i"] + p["i"] * c)
            f = sigmoid(gx["f"] + gh["f"] + p["f"] * c) if "f" in gates else 1 - i
            next_c = f * c + i * tanh(gx["c"] + gh["c"])
            next_h = sigmoid(gx["o"] + gh["o"] + p["o"] * next_c) * np.tanh(next_c)
        live = np.ones((N, 1), bool) if lengths is None else (t < lengths)[:, None]
        y[t] = np.where(live, next_h, 0)
        h, c = np.where(live, next_h, h), np.where(live, next_c, c)
    return [a.astype(x.dtype, copy=False) for a in ((y, h, c) if operator == "LSTM" else (y, h))]


def _label(node: Any) -> str:
    return f"{node.op_type} node {node.name or ', '.join(filter(None, node.output))!r}"


def _check_sources(graph: Any) -> None:
    known = {"", *(tensor.name for tensor in graph.initializer), *(value.name for value in graph.input)}
    for node in graph.node:
        inputs = _INPUTS if node.op_type in _OPERATORS else range(len(node.input))
        for which, name in zip(inputs, node.input):
            if name not in known:
                raise ValueError(f"{_label(node)}: input {which}: nothing in the graph provides {name!r}")
        known.update(node.output)
    if missing := [value.name for value in graph.output if value.name not in known]:
        raise ValueError(f"model: nothing in the graph provides its output {', '.join(missing)}")


def _constants(proto: Any) -> tuple[dict[str, Array], set[str]]:
    """The initializers and what depends on them alone, by name; and the names of those that no call can change."""
    graph = proto.graph
    known = {tensor.name for tensor in graph.initializer}
    fixed = known - {value.name for value in graph.input}
    nodes = []
    for node in graph.node:
        inner = any(attribute.HasField("g") for attribute in node.attribute)
        if node.op_type not in _OPERATORS and not inner and known.issuperset(filter(None, node.input)):
            nodes.append(node)
            known.update(node.output)
            if fixed.issuperset(filter(None, node.input)):
                fixed.update(node.output)
    part = helper.make_graph(nodes, "constants", [], [], graph.initializer)
    names = sorted(known - {""})
    run = ReferenceEvaluator(helper.make_model(part, opset_imports=proto.opset_import)).run
    return dict(zip(names, run(names, {}))), fixed


def save(layer: Layer, path: str | os.PathLike[str]) -> None:
    """Write a layer to a self-contained ONNX model (opset 14) of what `layer.forward` computes without training.

    The inputs are X, shaped as the layer's x, and three that a caller may leave out, being initializers with a default:
    sequence_lens int32 [N] (default: all T steps), initial_h and for a cell with c initial_c, [L*D, N, H] (zeros). The
    outputs are Y as the layer's y, Y_h and for a cell with c Y_c, as its state. The file appears whole or not at all.
    onnxruntime's CPU kernels are for float32; models of float64 and float16 layers run in `load` and onnx.reference.

    Raises:
        ValueError: ONNX has no equivalent of the layer's cell, of one of its options, or (in opset 14) of bfloat16.
    """
    if not isinstance(layer, Layer):
        raise ValueError(f"layer: expected a gatewise layer; got {type(layer).__name__}")
    if layer.cell not in _CELLS:
        raise ValueError(f"layer: expected a cell that ONNX has ({', '.join(_CELLS)}); got {layer.cell}")
    if layer.dtype.name == "bfloat16":
        raise ValueError("layer: expected float32, float64 or float16, for ONNX's opset 14 has no other; got bfloat16")
    for option, none in (("proj_size", 0), ("cell_clip", None), ("zoneout", (0.0, 0.0))):
        if (value := getattr(layer, option, none)) != none:
            raise ValueError(f"layer: expected {option}={none!r}, for ONNX has no equivalent; got {value!r}")
    write_whole(path, _model(layer).SerializeToString())


def _model(layer: Layer) -> Any:
    operator, gates, attributes = _CELLS[layer.cell]
    theirs, _ = _OPERATORS[operator]
    L, D, H, batch_first = layer.num_layers, layer.directions, layer.hidden_size, layer.batch_first
    attributes = {name: value * D if name == "activations" else value for name, value in attributes.items()}
    attributes["direction"] = "bidirectional" if layer.bidirectional else "forward"
    states = ["h", "c"][: 1 + layer.has_c]
    nodes: list[Any] = []
    initializers = {
        "sequence_lens": np.array([-1], np.int32),  # below 0: all T steps
        **{f"initial_{s}": np.zeros((L * D, 1, H), layer.dtype) for s in states},
    }

    def constant(name: str, value: Any) -> str:
        initializers[name] = np.asarray(value)
        return name

    def node(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    # What may be left out grows from its default of one row to N rows.
    time, batch = (1, 0) if batch_first else (0, 1)
    shape = node("Shape", ["X"], "shape")
    T = node("Cast", [node("Gather", [shape, constant("axis_T", time)], "T_int64")], "T", to=TensorProto.INT32)
    N = node("Gather", [shape, constant("axis_N", [batch])], "N")
    negative = node("Less", ["sequence_lens", constant("0", np.int32(0))], "no_length")
    lengths = node("Expand", [node("Where", [negative, T, "sequence_lens"], "lengths_or_T"), N], "lengths")
    rows = node("Concat", [constant("L*D", [L * D]), N, constant("H", [H])], "state_shape", axis=0)
    parts: dict[str, list[str]] = {}
    for s in states:
        parts[s] = [f"{s}0_{k}" for k in range(L)]
        whole = node("Expand", [f"initial_{s}", rows], f"{s}0")
        node("Split", [whole, constant("D_each", [D] * L)], *parts[s], axis=0)

    def weight(k: int, letter: str, given: str, wanted: str, *kinds: str) -> str:
        rows = [[layer._parameters.get(_name(kind, k, d)) for kind in kinds] for d in range(D)]
        stack = [[_theirs(array, given, wanted) for array in row if array is not None] for row in rows]
        return constant(f"{letter}{k}", np.stack([np.concatenate(row) for row in stack])) if stack[0] else ""

    x = node("Transpose", ["X"], "X_time_major", perm=[1, 0, 2]) if batch_first else "X"
    merged = constant("T_N_D*H", [0, 0, D * H])  # 0: this axis as it was
    for k in range(L):
        W, R = weight(k, "W", gates, theirs, "weight_ih"), weight(k, "R", gates, theirs, "weight_hh")
        B, P = weight(k, "B", gates, theirs, "bias_ih", "bias_hh"), weight(k, "P", *_PEEPHOLES[::-1], "weight_unit")
        inputs = [x, W, R, B, lengths, *(parts[s][k] for s in states), *filter(None, [P])]
        outputs = [f"Y{k}", *(f"{s}n_{k}" for s in states)]
        node(operator, inputs, *outputs, hidden_size=H, **attributes)
        perm = [2, 0, 1, 3] if batch_first and k == L - 1 else [0, 2, 1, 3]
        turned = node("Transpose", outputs[:1], f"Y{k}_turned", perm=perm)
        x = node("Reshape", [turned, merged], "Y" if k == L - 1 else f"X{k + 1}")
    for s in states:
        node("Concat", [f"{s}n_{k}" for k in range(L)], f"Y_{s}", axis=0)

    number = helper.np_dtype_to_tensor_dtype(layer.dtype)
    value, steps = helper.make_tensor_value_info, ["N", "T"] if batch_first else ["T", "N"]
    graph = helper.make_graph(
        nodes, "gatewise",
        [
            value("X", number, [*steps, layer.input_size]), value("sequence_lens", TensorProto.INT32, ["N or 1"]),
            *(value(f"initial_{s}", number, [L * D, "N or 1", H]) for s in states),
        ],
        [value("Y", number, [*steps, D * H]), *(value(f"Y_{s}", number, [L * D, "N", H]) for s in states)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )  # fmt: skip
    return helper.make_model(graph, producer_name="gatewise", opset_imports=[helper.make_opsetid("", 14)], ir_version=7)


def _theirs(array: Array, given: str, wanted: str) -> Array:
    """From our order of the gates to ONNX's; a gate that the cell does without, f of lstm_coupled, is zeros."""
    blocks = dict(zip(given, np.split(array, len(given))))
    return np.concatenate([blocks.get(gate, np.zeros_like(blocks[given[0]])) for gate in wanted])
