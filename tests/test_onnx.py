"""ONNX models in and out, against onnxruntime, torch's exporter, and where these have nothing onnx.reference."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gatewise as gw
from gatewise.layers import Layer

ml_dtypes = pytest.importorskip("ml_dtypes")  # onnx brings it
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
CELLS = ["rnn_tanh", "rnn_relu", "lstm", "lstm_peephole", "lstm_coupled", "gru", "gru_reset_before"]
NAMES = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
# onnxruntime's tanh and logistic are off by a few 1e-7, its sums of the products' 20 terms by the same, and 7 steps of
# weights that neither grow nor shrink the state add them up; whatever is wired wrongly is off by 1e-2.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def arrays(operator, T=6, N=4, I=3, H=5, D=1, lengths=None, seed=0, dtype=np.float32):
    """Every input of a node in layout 0, by ONNX's names; weights as torch initialises them, states N(0, 1)."""
    random, G = np.random.default_rng(seed), GATES[operator]
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H), "P": (D, 3 * H)}
    values = {name: random.uniform(-1, 1, shape) / np.sqrt(H) for name, shape in shapes.items()}
    states = {"X": (T, N, I), "initial_h": (D, N, H), "initial_c": (D, N, H)}
    values |= {name: random.standard_normal(shape) for name, shape in states.items()}
    values = {name: value.astype(dtype) for name, value in values.items()}
    values["sequence_lens"] = np.array(random.integers(1, T + 1, N) if lengths is None else lengths, np.int32)
    return values if operator == "LSTM" else {k: v for k, v in values.items() if k not in ("initial_c", "P")}


def single(operator, values, fed=("X",), constants=(), outputs=None, opset=14, **attributes):
    """A model of one node whose inputs are `values`, as graph inputs if `fed`, else Constant nodes or initializers."""
    names = [name if name in values else "" for name in NAMES]
    while not names[-1]:
        names.pop()
    if outputs is None:
        outputs = ["Y", "Y_h", "Y_c"][: 2 + (operator == "LSTM")]
    before = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values[name])) for name in constants
    ]
    attributes.setdefault("hidden_size", values["R"].shape[2])
    return model(
        [*before, helper.make_node(operator, names, outputs, name="the node", **attributes)],
        {name: values[name] for name in fed},
        {name: value for name, value in values.items() if name not in fed and name not in constants},
        [name for name in outputs if name],
        opset,
    )


def model(nodes, inputs, initializers, outputs, opset=14):
    """Of inputs the types are declared, not the sizes."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype) for name, value in inputs.items()}
    real = kinds.get("X", TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info(name, kinds[name], [None] * np.ndim(inputs[name])) for name in inputs],
        [helper.make_tensor_value_info(name, real, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def session(proto):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def onnxruntime_runs(proto, inputs):
    return session(proto).run(None, {name: value for name, value in inputs.items() if value is not None})


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def agree(ours, theirs, **bound):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, **bound)


# -- load: one node, against onnxruntime -------------------------------------------------------------------


@st.composite
def problems(draw):
    operator = draw(st.sampled_from([*GATES]))
    direction = draw(st.sampled_from([*DIRECTIONS]))
    D = DIRECTIONS[direction]
    sizes = {name: draw(st.integers(1, most)) for name, most in (("T", 7), ("N", 5), ("I", 5), ("H", 9))}
    values = arrays(operator, **sizes, D=D, seed=draw(st.integers(0, 99)))
    for name in NAMES[3:]:
        if name in values and draw(st.booleans()):
            del values[name]
    attributes = {"direction": direction}
    if draw(st.booleans()):
        attributes["clip"] = draw(st.sampled_from([0.1, 0.5, 2.0, 1e3]))
    choices = {
        "LSTM": {"input_forget": [0, 1], "activations": [["Sigmoid", "Tanh", "Tanh"], ["sigmoid", "tanh", "TANH"]]},
        "GRU": {"linear_before_reset": [0, 1], "activations": [["Sigmoid", "Tanh"], ["sigmoid", "tanh"]]},
        "RNN": {"activations": [["Tanh"], ["Relu"]]},
    }[operator]
    for name, some in choices.items():
        if (choice := draw(st.sampled_from([None, *some]))) is not None:
            attributes[name] = choice * D if name == "activations" else choice
    fed = ["X", *draw(st.sets(st.sampled_from([name for name in values if name != "X"])))]
    fed = [name for name in NAMES if name in fed]
    constants = draw(st.sets(st.sampled_from([name for name in values if name not in fed] or [""]))) - {""}
    outputs = ["Y", "Y_h", "Y_c"][: 2 + (operator == "LSTM")]
    kept = [name if draw(st.booleans()) else "" for name in outputs]
    outputs = kept if any(kept) else outputs
    return operator, values, fed, sorted(constants), outputs, attributes


def turned(name, value):
    """From layout 0 to layout 1, or of the outputs back."""
    return value.transpose(2, 0, 1, 3) if name == "Y" else value.swapaxes(0, 1)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_a_node_with_any_attributes_computes_what_onnxruntime_computes(problem):
    operator, values, fed, constants, outputs, attributes = problem
    proto = single(operator, values, fed, constants, outputs, **attributes)
    inputs = {name: values[name] for name in fed}
    loaded = gw.onnx.load(proto)
    ours = as_tuple(loaded(*inputs.values()))
    agree(ours, onnxruntime_runs(proto, inputs), **NEAR)
    (layer,) = loaded.layers
    assert layer.bidirectional == (attributes["direction"] == "bidirectional") and layer.bias == ("B" in values)

    # the other layout says the same, but onnxruntime has none of it
    other = {k: turned(k, v) if k in ("X", "initial_h", "initial_c") else v for k, v in values.items()}
    proto = single(operator, other, fed, constants, outputs, layout=1, **attributes)
    with pytest.raises(Exception, match="layout"):
        session(proto)
    again = as_tuple(gw.onnx.load(proto)(*(other[name] for name in fed)))
    agree(again, [turned(name, y) for name, y in zip(filter(None, outputs), ours)], rtol=0, atol=0)


@pytest.mark.parametrize("clip", [0.2, 1.0])
@pytest.mark.parametrize("operator, attributes", [
    ("LSTM", {}), ("LSTM", {"input_forget": 1}), ("GRU", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {}),
    ("RNN", {"activations": ["Relu"] * 2}),
], ids=str)  # fmt: skip
def test_clip_bounds_what_enters_an_activation_after_biases_peepholes_and_reset(operator, attributes, clip):
    values = arrays(operator, T=7, N=5, H=17, D=2, seed=1)
    for name in {"W", "R", "B", "P"} & {*values}:
        values[name] = values[name] * np.float32(3)  # so that many a bound is met
    kept, free = (
        single(operator, values, direction="bidirectional", **attributes, **more) for more in ({"clip": clip}, {})
    )
    ours, other = (gw.onnx.load(proto)(values["X"]) for proto in (kept, free))
    assert abs(ours[0] - other[0]).max() > 0.1
    agree(ours, onnxruntime_runs(kept, {"X": values["X"]}), **NEAR)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("operator", GATES)
def test_an_empty_sequence_keeps_its_initial_state(operator, direction):
    """onnxruntime gives zeros for an LSTM and a GRU; the standard is silent."""
    D = DIRECTIONS[direction]
    values = arrays(operator, D=D, lengths=[0, 6, 0, 2])
    for clip in ({}, {"clip": 1.0}):
        proto = single(operator, values, direction=direction, **clip)
        y, *final = gw.onnx.load(proto)(values["X"])
        assert not y[:, :, [0, 2]][2:].any() and y[:, :, 1].all()
        for name, state in zip(("initial_h", "initial_c"), final):
            np.testing.assert_array_equal(state[:, [0, 2]], values[name][:, [0, 2]])


def test_float64_is_computed_in_float64():
    for operator, attributes in (("LSTM", {}), ("GRU", {"linear_before_reset": 1}), ("RNN", {"activations": ["Tanh"]})):
        values = arrays(operator, dtype=np.float64)
        del values["sequence_lens"]  # onnx.reference does not look at it
        proto = single(operator, values, **attributes)
        ours = gw.onnx.load(proto)(values["X"])
        assert ours[0].dtype == np.float64
        agree(ours, ReferenceEvaluator(proto).run(None, {"X": values["X"]}), rtol=0, atol=1e-13)
        with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|does not support double"):
            onnxruntime_runs(proto, {"X": values["X"]})


@pytest.mark.parametrize("attributes", [{}, {"direction": "reverse"}, {"clip": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("operator", GATES)
def test_a_16_bit_model_is_computed_in_float32_and_rounded(operator, dtype, attributes):
    eps, values = ml_dtypes.finfo(dtype).eps, arrays(operator)
    del values["sequence_lens"]
    narrow = {name: value.astype(eps.dtype) for name, value in values.items()}
    exact = {name: value.astype(np.float32) for name, value in narrow.items()}
    ours = gw.onnx.load(single(operator, narrow, **attributes, opset=22))(narrow["X"])
    for a, b in zip(ours, gw.onnx.load(single(operator, exact, **attributes))(exact["X"])):
        assert a.dtype == dtype
        # what leaves is rounded, by half of eps for what is below 1, and so is, in the kernels, the h of each step
        np.testing.assert_allclose(a.astype(np.float32), b, rtol=float(eps), atol=float(eps))


# -- load: whole graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 3, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind, more", [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})])
@pytest.mark.parametrize("with_state", [False, True])
def test_what_torch_exports_computes_what_torch_computes(kind, more, options, with_state):
    module = getattr(torch.nn, kind)(3, 5, **more, **options).eval()
    layers = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    x, *state = (torch.randn(shape) for shape in [(4, 6, 3)] + [(layers, 6 if not module.batch_first else 4, 5)] * 2)
    state = state[: 1 + (kind == "LSTM")]
    arguments = (x, tuple(state) if kind == "LSTM" else state[0]) if with_state else (x,)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and warns of batch sizes: see dynamic_axes
        torch.onnx.export(
            module, arguments, file, opset_version=17, dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "a", 1: "b"}},
        )  # fmt: skip
    loaded = gw.onnx.load(file.getvalue())
    assert len(loaded.layers) == module.num_layers
    assert [layer.bidirectional for layer in loaded.layers] == [module.bidirectional] * module.num_layers
    for name, weight in module.named_parameters():  # each layer of ours is the 0th of its own
        kind_of, rest = name.split("_l")
        layer = loaded.layers[int(rest[0])]
        np.testing.assert_array_equal(layer.parameters[f"{kind_of}_l0{rest[1:]}"], weight.detach().numpy())

    with torch.no_grad():
        y, final = module(*arguments)
    ours = loaded(x.numpy(), *(s.numpy() for s in state if with_state))
    agree(ours, [a.numpy() for a in (y, *as_tuple(final))], **NEAR)


def test_weights_may_come_with_the_call_and_have_another_size_the_next_time():
    fed = ("X", "W", "R", "B")
    proto = single("GRU", arrays("GRU"), fed, linear_before_reset=1)
    attributes = proto.graph.node[0].attribute  # hidden_size among them, which onnxruntime insists on
    attributes.remove(*(one for one in attributes if one.name == "hidden_size"))
    for name in ("sequence_lens", "initial_h"):
        proto.graph.node[0].input[NAMES.index(name)] = ""
    loaded = gw.onnx.load(proto)
    assert loaded.layers == []  # the file does not tell their size
    for H, seed in ((5, 1), (5, 2), (8, 3)):
        values = {name: value for name, value in arrays("GRU", H=H, seed=seed).items() if name in fed}
        want = onnxruntime_runs(single("GRU", values, linear_before_reset=1), {"X": values["X"]})
        agree(loaded(*(values[name] for name in fed)), want, **NEAR)
        assert loaded.layers[0].hidden_size == H

    for name in fed[1:]:  # with the sizes declared there is a layer at once
        (info,) = [info for info in proto.graph.input if info.name == name]
        info.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, values[name].shape))
    (layer,) = gw.onnx.load(proto).layers
    assert layer.hidden_size == 8 and not any(weight.any() for weight in layer.parameters.values())


def test_an_initializer_that_is_an_input_as_well_may_be_left_out_or_replaced():
    values = arrays("LSTM")
    proto = single("LSTM", values)
    for name in ("W", "initial_h"):  # before X in the graph's order, and behind it
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, values[name].shape)
        proto.graph.input.insert(0 if name == "W" else len(proto.graph.input), info)
    loaded, plain = gw.onnx.load(proto), gw.onnx.load(single("LSTM", values))
    assert loaded.inputs == ["W", "X", "initial_h"]
    for name, weight in plain.layers[0].parameters.items():
        np.testing.assert_array_equal(loaded.layers[0].parameters[name], weight)
    other = {name: value[..., ::-1].copy() for name, value in values.items() if name in ("W", "initial_h")}
    for W, h in ((None, None), (other["W"], None), (None, other["initial_h"]), (other["W"], other["initial_h"])):
        changed = values | {name: value for name, value in (("W", W), ("initial_h", h)) if value is not None}
        want = gw.onnx.load(single("LSTM", changed))(values["X"])
        agree(loaded(W, values["X"], h), want, rtol=0, atol=0)
    agree(loaded(values["X"]), plain(values["X"]), rtol=0, atol=0)
    agree(loaded(None, values["X"]), plain(values["X"]), rtol=0, atol=0)


def test_weights_that_nodes_make_of_initializers_are_in_the_layer_at_once():
    """As tf2onnx leaves them: transposed and concatenated in the graph."""
    values = arrays("RNN")
    proto = single("RNN", values)
    turned_W = values["W"].swapaxes(1, 2)
    for tensor in proto.graph.initializer:
        if tensor.name == "W":
            tensor.CopyFrom(numpy_helper.from_array(turned_W, "turned W"))
    proto.graph.node.insert(0, helper.make_node("Transpose", ["turned W"], ["W"], perm=[0, 2, 1]))
    loaded = gw.onnx.load(proto)
    np.testing.assert_array_equal(loaded.layers[0].parameters["weight_ih_l0"], values["W"][0])
    agree(loaded(values["X"]), onnxruntime_runs(proto, {"X": values["X"]}), **NEAR)


def test_an_output_left_out_does_not_become_an_input_left_out():
    values = arrays("RNN", I=5)
    del values["B"], values["sequence_lens"], values["initial_h"]
    nodes = [
        helper.make_node("RNN", ["X", "W", "R"], ["", "h"], hidden_size=5),
        helper.make_node("RNN", ["X", "W", "R", "", "", "h"], ["", "again"], hidden_size=5),
    ]
    proto = model(nodes, {"X": values["X"]}, {"W": values["W"], "R": values["R"]}, ["again"])
    loaded = gw.onnx.load(proto)
    assert len(loaded.layers) == 2
    y = loaded(values["X"])
    assert isinstance(y, np.ndarray)  # one output comes as it is
    agree([y], onnxruntime_runs(proto, {"X": values["X"]}), **NEAR)


def test_recurrent_nodes_inside_functions_and_branches_are_ours():
    """onnx.reference's own operators do not know sequence_lens."""
    values = arrays("GRU", lengths=[2, 6, 1, 3])
    node = single("GRU", values, linear_before_reset=1).graph.node[0]
    names = [*node.input]
    function = helper.make_function("here", "Walk", names, ["Y"], [node], [helper.make_opsetid("", 14)])
    call = helper.make_node("Walk", names, ["Y"], domain="here")
    proto = model([call], {"X": values["X"]}, {k: v for k, v in values.items() if k != "X"}, ["Y"])
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("here", 1))
    want = onnxruntime_runs(single("GRU", values, outputs=["Y"], linear_before_reset=1), {"X": values["X"]})
    loaded = gw.onnx.load(proto)
    agree([loaded(values["X"])], want, **NEAR)
    assert [layer.cell for layer in loaded.layers] == ["gru"]

    info = helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)
    branches = [
        helper.make_graph([node], "walk", [], [info]),
        helper.make_graph([helper.make_node("Identity", ["X"], ["Y"])], "stay", [], [info]),
    ]
    choose = helper.make_node("If", ["yes"], ["out"], then_branch=branches[0], else_branch=branches[1])
    known = {k: v for k, v in values.items() if k != "X"} | {"yes": np.array(True)}
    loaded = gw.onnx.load(model([choose], {"X": values["X"]}, known, ["out"]))
    agree([loaded(values["X"])], want, **NEAR)
    assert [layer.cell for layer in loaded.layers] == ["gru"]


def test_a_model_may_be_a_path_bytes_or_a_proto_which_is_left_as_it_is(tmp_path):
    values = arrays("RNN")
    proto = single("RNN", values, ("X", "sequence_lens"))
    before = proto.SerializeToString()
    (tmp_path / "model.onnx").write_bytes(before)
    inputs = values["X"], values["sequence_lens"]
    want = onnxruntime_runs(proto, dict(zip(("X", "sequence_lens"), inputs)))
    for source in (proto, before, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        loaded = gw.onnx.load(source, backend="cpu", num_threads=1)
        agree(loaded(*inputs), want, **NEAR)
        assert (loaded.inputs, loaded.outputs) == (["X", "sequence_lens"], ["Y", "Y_h"])
        assert loaded.layers[0].num_threads == 1 and "rnn_tanh" in repr(loaded)
    assert proto.SerializeToString() == before


# -- load: what is wrong with a model ----------------------------------------------------------------------


def without(name):
    def change(proto):
        node = proto.graph.node[0]
        node.input[NAMES.index(name)] = ""

    return change


def lost(name):
    def change(proto):
        (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
        proto.graph.initializer.remove(tensor)

    return change


def shaped(name, *shape, dtype=np.float32):
    def change(proto):
        (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
        tensor.CopyFrom(numpy_helper.from_array(np.zeros(shape, dtype), name))

    return change


def attribute(name, value):
    def change(proto):
        node = proto.graph.node[0]
        for old in [old for old in node.attribute if old.name == name]:
            node.attribute.remove(old)
        node.attribute.append(helper.make_attribute(name, value))

    return change


def old_opset(proto):
    proto.opset_import[0].version = 6


BAD = [
    (without("W"), "input W is missing"),
    (lost("R"), "input R: nothing in the graph provides 'R'"),
    (lost("sequence_lens"), "input sequence_lens: nothing in the graph provides"),
    (shaped("W", 1, 20), "input W: expected 3 axes; got shape (1, 20)"),
    (shaped("W", 1, 15, 3), "input W: expected float32 [D, 4*H, I] = [1, 20, 3]; got float32 [1, 15, 3]"),
    (shaped("W", 2, 20, 3), "input W: expected float32 [D, 4*H, I] = [1, 20, 3]; got float32 [2, 20, 3]"),
    (shaped("R", 1, 20, 4), "input R: expected float32 [D, 4*H, H] = [1, 20, 5]; got float32 [1, 20, 4]"),
    (shaped("R", 1, 20, 5, dtype=np.float64), "input R: expected float32 [D, 4*H, H] = [1, 20, 5]; got float64"),
    (shaped("W", 1, 20, 3, dtype=np.int32), "input W: expected float32, float64, float16, bfloat16; got int32"),
    (shaped("B", 1, 20), "input B: expected float32 [D, 8*H] = [1, 40]; got float32 [1, 20]"),
    (shaped("P", 1, 20), "input P: expected float32 [D, 3*H] = [1, 15]; got float32 [1, 20]"),
    (attribute("hidden_size", 4), "input W: expected float32 [D, 4*H, I] = [1, 16, 3]"),
    (attribute("direction", "sideways"), "direction: expected forward, reverse, bidirectional; got 'sideways'"),
    (attribute("layout", 2), "layout: expected 0 or 1; got 2"),
    (attribute("clip", -1.0), "clip: expected a positive number; got -1.0"),
    (attribute("activations", ["Sigmoid", "Tanh", "Relu"]), "activations: expected ['Sigmoid', 'Tanh', 'Tanh']"),
    (attribute("activations", ["Sigmoid", "Tanh"]), "activations: expected ['Sigmoid', 'Tanh', 'Tanh']"),
    (old_opset, "expected opset 7 or later; got 6"),
]  # fmt: skip
BAD_AT_A_CALL = [
    (shaped("initial_h", 1, 4, 4), "input initial_h: expected float32 [D, N, H] = [1, 4, 5]; got float32 [1, 4, 4]"),
    (shaped("initial_c", 2, 4, 5), "input initial_c: expected float32 [D, N, H] = [1, 4, 5]; got float32 [2, 4, 5]"),
    (shaped("sequence_lens", 3, dtype=np.int32), "input sequence_lens: expected int32 [N] = [4]; got int32 [3]"),
    (shaped("sequence_lens", 4, dtype=np.int64), "input sequence_lens: expected int32 [N] = [4]; got int64 [4]"),
]  # fmt: skip


@pytest.mark.parametrize("change, said", BAD, ids=[said for _, said in BAD])
def test_a_model_that_cannot_run_is_refused_by_the_name_of_node_and_input(change, said):
    proto = single("LSTM", arrays("LSTM"))
    change(proto)
    with pytest.raises(ValueError) as caught:
        gw.onnx.load(proto)
    assert f"LSTM node 'the node': {said}" in str(caught.value)


@pytest.mark.parametrize("change, said", BAD_AT_A_CALL, ids=[said for _, said in BAD_AT_A_CALL])
def test_an_input_that_does_not_fit_is_refused_by_name(change, said):
    values = arrays("LSTM")
    del values["P"]
    proto = single("LSTM", values)
    change(proto)
    with pytest.raises(ValueError) as caught:
        gw.onnx.load(proto)(values["X"])
    assert f"LSTM node 'the node': {said}" in str(caught.value)


def test_bad_inputs_of_the_model_are_refused_by_name():
    values = arrays("RNN", T=6, I=3)
    loaded = gw.onnx.load(single("RNN", values, ("X", "sequence_lens")))
    X, lengths = values["X"], values["sequence_lens"]
    for inputs, said in (
        ((X,), "inputs: expected X, sequence_lens; got 1 of them"),
        ((X, lengths, X), "inputs: expected X, sequence_lens; got 3 of them"),
        ((X, None), "inputs: expected X, sequence_lens; got nothing for sequence_lens"),
        ((X.astype(np.float64), lengths), "X: expected float32; got float64"),
        ((X, lengths.astype(np.int64)), "sequence_lens: expected int32; got int64"),
        ((X[0], lengths), "RNN node 'the node': input X: expected 3 axes; got shape (4, 3)"),
        ((X[:, :, :2], lengths), "RNN node 'the node': input X: expected float32 [T, N, I] = [6, 4, 3]"),
        ((X, lengths + 6), "RNN node 'the node': input sequence_lens: expected 0 to T = 6"),
        ((X, -lengths), "RNN node 'the node': input sequence_lens: expected 0 to T = 6"),
    ):
        with pytest.raises(ValueError) as caught:
            loaded(*inputs)
        assert said in str(caught.value)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("this is no protocol buffer")
    with pytest.raises(ValueError, match=r"expected an ONNX model; got .*text\.onnx"):
        gw.onnx.load(tmp_path / "text.onnx")
    with pytest.raises(ValueError, match="expected an ONNX model; got bytes"):
        gw.onnx.load(b"nor is this")
    with pytest.raises(FileNotFoundError):
        gw.onnx.load(tmp_path / "nothing.onnx")
    mixed = single("RNN", arrays("RNN", D=2), direction="bidirectional", activations=["Tanh", "Relu"])
    with pytest.raises(ValueError, match=r"activations: expected .*'Tanh', 'Tanh'.* or .*'Relu', 'Relu'.*got"):
        gw.onnx.load(mixed)


# -- save --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"batch_first": True}, {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cell", CELLS)
def test_a_saved_layer_computes_the_same_bits_here_and_the_same_numbers_elsewhere(cell, options, dtype, tmp_path):
    path = tmp_path / "layer.onnx"
    layer = Layer(cell, 3, 5, dtype=dtype, dropout=0.5 if "num_layers" in options else 0.0, random_state=1, **options)
    gw.onnx.save(layer, path)
    onnx.checker.check_model(str(path), full_check=True)
    loaded = gw.onnx.load(path)
    assert loaded.inputs == ["X", "sequence_lens", "initial_h", "initial_c"][: 3 + layer.has_c]
    assert loaded.outputs == ["Y", "Y_h", "Y_c"][: 2 + layer.has_c]
    assert [one.cell for one in loaded.layers] == [cell] * layer.num_layers
    runs = session(str(path)) if dtype == np.float32 else None
    # onnx.reference knows no relu in an RNN, and passes over input_forget and sequence_lens
    known = dtype == np.float64 and cell not in ("rnn_relu", "lstm_coupled")
    reference = ReferenceEvaluator(str(path)) if known else None
    for T, N in ((6, 4), (2, 1)):
        x = np.random.default_rng(2).standard_normal((N, T, 3) if layer.batch_first else (T, N, 3)).astype(dtype)
        state = np.random.default_rng(3).standard_normal((2, layer.num_layers * layer.directions, N, 5)).astype(dtype)
        for lengths in (None, np.array([T, 1, T - 1, 2], np.int32)[:N]):
            for start in ([], [*state[: 1 + layer.has_c]]):
                ours = (tuple(start) if layer.has_c else start[0]) if start else None
                as_int64 = None if lengths is None else lengths.astype(np.int64)
                y, final, _ = layer.forward(x, ours, as_int64, training=False)
                expected = (y, *as_tuple(final))
                agree(loaded(x, lengths, *start), expected, rtol=0, atol=0)
                inputs = zip(loaded.inputs, (x, lengths, *start))
                inputs = {name: value for name, value in inputs if value is not None}
                if runs is not None:
                    agree(expected, runs.run(None, inputs), **NEAR)
                if reference is not None and lengths is None:
                    agree(expected, reference.run(None, inputs), rtol=0, atol=1e-13)


def test_a_layer_that_onnx_cannot_express_is_refused_and_writes_nothing(tmp_path):
    refused = [
        (Layer("indrnn_tanh", 3, 5), "expected a cell that ONNX has"),
        ("layer.onnx", "expected a gatewise layer; got str"),
        (gw.LSTM(3, 5, proj_size=2), "proj_size"),
        (gw.LSTM(3, 5, cell_clip=1.0), "cell_clip"),
        (gw.GRU(3, 5, zoneout=0.1), "zoneout"),
        (gw.GRU(3, 5, dtype="bfloat16"), "bfloat16"),
    ]
    for layer, said in refused:
        with pytest.raises(ValueError, match=said):
            gw.onnx.save(layer, tmp_path / "layer.onnx")
    with pytest.raises(FileNotFoundError):
        gw.onnx.save(gw.GRU(3, 5), tmp_path / "no such folder" / "layer.onnx")
    assert not [*tmp_path.iterdir()]
