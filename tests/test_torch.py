"""gatewise.torch against torch.nn: what torch's own tests say of RNN, LSTM, GRU and their cells, and what users of
compile, export, torch.func, checkpoints and pickles rely on."""

import copy
import io
import pickle
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import gatewise as gw
from gatewise import layers

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
F64 = torch.float64


def pair(name, *args, **options):
    """torch.nn's module and ours with the same weights."""
    theirs = getattr(torch.nn, name)(*args, **options)
    ours = getattr(gw.torch, name)(*args, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(out):
    """All tensors of what a module returned."""
    if isinstance(out, PackedSequence):
        return [out.data]
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out for t in flat(part)]


def gradients(module, inputs, run, seed=1):
    """Outputs of run(module) and gradients of a random loss of all of them by inputs and weights."""
    out = flat(run(module))
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=generator, dtype=F64).to(o.dtype) for o in out]
    loss = sum((o * w).sum() for o, w in zip(out, weights))
    return out, torch.autograd.grad(loss, [*inputs, *module.parameters()])


def assert_same(got, expected, atol):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        error = (a - b).abs().max().item() if a.numel() else 0.0
        assert error <= atol, (error, atol)  # NaN fails


@st.composite
def configurations(draw):
    name = draw(st.sampled_from(LAYERS))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    H = draw(st.integers(2, 19))
    if name == "LSTM" and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, H - 1))
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    sizes = {"T": draw(st.integers(1, 9)), "N": draw(st.integers(1, 7)), "I": draw(st.integers(1, 9)), "H": H}
    form = draw(st.sampled_from(["padded", "packed", "unbatched"]))
    return name, options, sizes, form, draw(st.booleans()), draw(st.integers(0, 2**16))


def problem(name, options, sizes, form, with_state, seed, dtype):
    """inputs with gradients, and a function that runs a module on them."""
    T, N, I, H = sizes["T"], sizes["N"], sizes["I"], sizes["H"]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_()

    batch = () if form == "unbatched" else (N,)
    x = draw(T, I) if not batch else draw(N, T, I) if options["batch_first"] else draw(T, N, I)
    inputs, hx = [x], None
    if with_state:
        count = options["num_layers"] * (1 + options["bidirectional"])
        h = draw(count, *batch, options.get("proj_size", 0) or H)
        hx = (h, draw(count, *batch, H)) if name == "LSTM" else h
        inputs += list(hx) if name == "LSTM" else [h]
    lengths = torch.randint(1, T + 1, (N,), generator=generator)

    def run(module):
        if form != "packed":
            return module(x, hx)
        packed = pack_padded_sequence(x, lengths, batch_first=options["batch_first"], enforce_sorted=False)
        return module(packed, hx)

    return inputs, run


@given(configurations())
@settings(max_examples=60, deadline=None)
def test_any_configuration_in_float64(configuration):
    name, options, sizes, *rest = configuration
    theirs, ours = pair(name, sizes["I"], sizes["H"], **options, dtype=F64)
    inputs, run = problem(name, options, sizes, *rest, F64)
    expected, got = gradients(theirs, inputs, run), gradients(ours, inputs, run)
    assert_same(got[0], expected[0], 1e-12)
    assert_same(got[1], expected[1], 1e-10)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # torch's, of its own layer
@given(configurations())
@settings(max_examples=30, deadline=None)
def test_any_configuration_in_float32(configuration):
    """At most twice torch's own error against float64, and a floor of some roundings of the largest number."""
    name, options, sizes, *rest = configuration
    theirs, ours = pair(name, sizes["I"], sizes["H"], **options)
    inputs, run = problem(name, options, sizes, *rest, torch.float32)
    got, theirs_32 = gradients(ours, inputs, run), gradients(theirs, inputs, run)
    exact_inputs, exact_run = problem(name, options, sizes, *rest, F64)
    for exact, given_ in zip(exact_inputs, inputs):
        exact.data.copy_(given_.data)
    exact = gradients(theirs.double(), exact_inputs, exact_run)
    for a, b, e in zip([*got[0], *got[1]], [*theirs_32[0], *theirs_32[1]], [*exact[0], *exact[1]]):
        floor = 1e-5 * (1 + e.abs().max().item())
        assert (a - e).abs().max().item() <= 2 * (b - e).abs().max().item() + floor


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_lengths_are_what_packing_does(name, packed):
    theirs, ours = pair(name, 3, 5, 2, bidirectional=True, dtype=F64)
    lengths = torch.tensor([4, 1, 6, 3])
    x = torch.randn(6, 4, 3, dtype=F64, requires_grad=True)

    def by_packing(module):
        y, state = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return pad_packed_sequence(y)[0], state

    expected = gradients(theirs, [x], by_packing)
    run = by_packing if packed else lambda module: module(x, lengths=lengths)
    assert_same([t for part in gradients(ours, [x], run) for t in part], [t for part in expected for t in part], 1e-10)


def test_a_sequence_of_length_zero_keeps_its_initial_state():
    layer = gw.torch.LSTM(3, 4)
    h, c = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    y, (hn, cn) = layer(torch.randn(5, 2, 3), (h, c), lengths=[0, 5])
    assert torch.equal(hn[:, 0], h[:, 0]) and torch.equal(cn[:, 0], c[:, 0]) and not y[:, 0].any()


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_reset_cuts_state_and_gradient(batch_first):
    layer = gw.torch.GRU(3, 4, batch_first=batch_first, dtype=F64)
    x = torch.randn(7, 2, 3, dtype=F64)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[4] = True
    x, reset = (x.transpose(0, 1), reset.T.contiguous()) if batch_first else (x, reset)
    x = x.contiguous().requires_grad_()
    y, _ = layer(x, reset=reset, reset_to="zero")
    time = 1 if batch_first else 0
    again, _ = layer(x.narrow(time, 4, 3).contiguous())
    assert torch.equal(y.narrow(time, 4, 3), again)
    (dx,) = torch.autograd.grad(y.narrow(time, 4, 3).sum(), x)
    assert not dx.narrow(time, 0, 4).any() and dx.narrow(time, 4, 3).all()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (6,)])
@pytest.mark.parametrize("with_state", [False, True])
def test_cells(name, bias, batch, with_state):
    theirs, ours = pair(name, 3, 5, bias=bias, dtype=F64)
    x = torch.randn(*batch, 3, dtype=F64, requires_grad=True)
    h = torch.randn(*batch, 5, dtype=F64, requires_grad=True)
    c = torch.randn(*batch, 5, dtype=F64, requires_grad=True)
    hx = None if not with_state else (h, c) if name == "LSTMCell" else h
    inputs = [x] if not with_state else [x, h, c] if name == "LSTMCell" else [x, h]
    expected, got = (gradients(m, inputs, lambda m: m(x, hx)) for m in (theirs, ours))
    assert_same(got[0] + list(got[1]), expected[0] + list(expected[1]), 1e-10)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_gradcheck_and_gradgradcheck(name, options):
    layer = getattr(gw.torch, name)(2, 3, **options, dtype=F64)
    names = [n for n, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    lengths = torch.tensor([3, 2])

    def run(x, *weights):
        return tuple(flat(torch.func.functional_call(layer, dict(zip(names, weights)), (x,), {"lengths": lengths})))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
    if not options:
        assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()))


def test_double_backward_of_two_layers_is_torchs():
    theirs, ours = pair("LSTM", 3, 4, 2, proj_size=2, dtype=F64)
    x = torch.randn(4, 2, 3, dtype=F64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        y, _ = module(x)
        (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((dx**2).sum(), list(module.parameters())))
    assert_same(results[1], results[0], 1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_only_what_needs_a_gradient_gets_one(name):
    layer = getattr(gw.torch, name)(3, 4)
    layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(5, 2, 3)
    y, _ = layer(x)
    asked = []
    backward = gw.torch._backward
    gw.torch._backward = lambda *args: asked.append(list(args[-1])) or backward(*args)
    try:
        y.sum().backward()
    finally:
        gw.torch._backward = backward
    #                                 x      h0     c0     w_ih  w_hh   b_ih  b_hh
    assert asked == [[False, False, False, True, False, True, True, False, False]]
    assert layer.weight_hh_l0.grad is None and layer.weight_ih_l0.grad is not None


@pytest.mark.skipif(gw.torch._EXCHANGE is None, reason="this PyTorch has capsules only")
def test_tensors_and_capsules_of_them_are_the_same_arrays(monkeypatch):
    """Newer PyTorch lends a tensor as it is, older a DLPack capsule of it: both with strides, views and no rows."""
    layer = gw.torch.LSTM(3, 4, proj_size=2, bidirectional=True, zoneout=0.1)
    weights = list(layer.parameters())
    results = []
    for exchange in (gw.torch._EXCHANGE, None):
        monkeypatch.setattr(gw.torch, "_EXCHANGE", exchange)
        torch.manual_seed(0)
        for x in (torch.randn(5, 3, 2).mT, torch.randn(5, 2, 6)[..., 1:4], torch.randn(5, 2, 6)[..., ::2]):
            x.requires_grad_()
            y, _ = layer(x, lengths=torch.tensor([5, 3, 1, 0])[::2])
            results.append((y, *torch.autograd.grad(y, [x, *weights], torch.randn(4, 2, 5).permute(2, 1, 0))))
    for a, b in zip(results[:3], results[3:]):
        assert_same(a, b, 0)


def test_functions_on_arrays_refuse_tensors_that_track_gradients():
    """They would be lost without a word."""
    weights = list(gw.torch.GRU(3, 4).parameters())
    gw.torch.GRU(3, 4)(torch.randn(5, 2, 3))  # its adapter has lent some meanwhile
    with pytest.raises(ValueError, match=r"w_hh: expected .*; got Parameter"):
        gw.gru(np.zeros((5, 2, 3), np.float32), *weights)


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_seed_starts_and_drops_the_same(name):
    made = []
    for library in (torch.nn, gw.torch):
        torch.manual_seed(3)
        layer = getattr(library, name)(4, 5, 3, dropout=0.4, dtype=F64)
        made.append((layer, layer(torch.ones(6, 2, 4, dtype=F64))[0]))
    (theirs, expected), (ours, got) = made
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters()))
    assert (got - expected).abs().max() < 1e-12
    ours.eval(), theirs.eval()
    x = torch.randn(6, 2, 4, dtype=F64)
    assert (ours(x)[0] - theirs(x)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"proj_size": 2, "num_layers": 2}, {"bias": False, "bidirectional": True}])
def test_checkpoints_go_both_ways(options):
    theirs, ours = torch.nn.LSTM(3, 4, **options), gw.torch.LSTM(3, 4, **options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file))
    back = torch.nn.LSTM(3, 4, **options)
    back.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), back.state_dict().values()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(
    "make",
    [
        lambda: gw.torch.LSTM(3, 4, 2, peephole=True, zoneout=0.1),
        lambda: gw.torch.GRU(3, 4, layer_norm=True),
        lambda: gw.torch.IndRNN(3, 4),
        lambda: gw.torch.RNNCell(3, 4),
    ],
)
def test_copies_are_whole_and_apart(make, copied):
    module = make().eval()
    twin = copied(module)
    x = torch.randn(*([5] if not isinstance(module, torch.nn.RNNCell) else []), 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(flat(module(x)), flat(twin(x))))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert not torch.equal(flat(module(x))[0], flat(twin(x))[0])
    assert repr(module) == repr(twin)


def test_repr_is_torchs_with_what_torch_lacks():
    theirs, ours = pair("LSTM", 3, 4, 2, dropout=0.1, batch_first=True)
    assert repr(theirs) == repr(ours)
    assert (
        repr(gw.torch.GRU(3, 4, reset_after=False, zoneout=0.1))
        == "GRU(3, 4, cell=gru_reset_before, zoneout=(0.1, 0.0))"
    )


@pytest.mark.parametrize("cell", sorted(gw.cells()))
def test_every_cell_is_the_functional_one(cell):
    """The layer of each cell, its options on, against gatewise.forward and backward on arrays."""
    base = cell.split("_")[0]
    options = {
        "lstm_peephole": {"peephole": True}, "lstm_coupled": {"coupled": True}, "lstm_norm": {"layer_norm": True},
        "gru_reset_before": {"reset_after": False}, "gru_norm": {"layer_norm": True},
        "rnn_relu": {"nonlinearity": "relu"}, "indrnn_tanh": {"nonlinearity": "tanh"},
    }.get(cell, {})  # fmt: skip
    layer = {"lstm": gw.torch.LSTM, "gru": gw.torch.GRU, "rnn": gw.torch.RNN, "indrnn": gw.torch.IndRNN}[base](
        3, 4, **options, zoneout=0.2, dtype=F64
    ).eval()
    assert layer.cell == cell
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    x = torch.randn(5, 2, 3, dtype=F64, requires_grad=True)
    y, _, states = layer(x, return_states=True)
    weights = {k.rpartition("_l")[0]: v.detach().numpy() for k, v in layer.state_dict().items()}
    tape = gw.forward(
        cell, x.detach().numpy(), weights["weight_ih"], weights.get("weight_hh"), weights.get("bias_ih"),
        weights.get("bias_hh"), w_unit=weights.get("weight_unit"), zoneout_h=0.2, zoneout_c=0.2 * (base == "lstm"),
    )  # fmt: skip
    assert np.array_equal(tape.y, y.detach().numpy())
    assert np.array_equal(tape.gates, states[0].gates.numpy())
    assert (tape.c is None) == (states[0].c is None)
    assert tape.c is None or np.array_equal(tape.c, states[0].c.numpy())
    expected = gw.backward(tape, dy=np.ones_like(tape.y))
    y.sum().backward()
    assert np.array_equal(expected.dx, x.grad.numpy())
    for kind, field in (("weight_ih", "dw_ih"), ("weight_hh", "dw_hh"), ("weight_unit", "dw_unit")):
        if kind in weights:
            assert np.array_equal(getattr(expected, field), getattr(layer, f"{kind}_l0").grad.numpy())


def test_start_of_weights_torch_does_not_have():
    norm = gw.torch.LSTM(3, 4, layer_norm=True, forget_bias=1.0)
    blocks = norm.weight_unit_l0.detach().reshape(-1, 4)
    assert (blocks[:8] == 1).all() and (blocks[9] == 1).all() and (blocks[12] == 1).all()
    assert (blocks[[8, 10, 11, 13]] == 0).all()
    plain = gw.torch.LSTM(3, 4, forget_bias=2.0)
    assert (
        (plain.bias_hh_l0[4:8] == 2).all() and (plain.bias_ih_l0[4:8] == 0).all() and (plain.bias_hh_l0[:4] != 2).all()
    )
    unit = gw.torch.IndRNN(3, 400).weight_unit_l0
    assert unit.min() >= 0 and unit.max() > 0.9


@pytest.mark.parametrize("batch_first", [False, True])
def test_regularisers_act_in_training_and_only_there(batch_first):
    x = torch.randn(6, 6, 3)
    for option in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}, {"weight_dropout": 0.5}, {"input_dropout": 0.5}):
        layer = gw.torch.LSTM(3, 8, batch_first=batch_first, **option)
        torch.manual_seed(0)
        first, second = layer(x)[0], layer(x)[0]
        torch.manual_seed(0)
        assert not torch.equal(first, second) and torch.equal(first, layer(x)[0]), option
        layer.eval()
        assert torch.equal(layer(x)[0], layer(x)[0]), option
    varied = gw.torch.RNN(3, 8, input_dropout=0.5, variational=True, batch_first=batch_first)
    ones = torch.ones(6, 6, 3)
    dropped = varied._dropped(ones, 0.5, batch_first, None)
    time = 1 if batch_first else 0
    assert (dropped == dropped.narrow(time, 0, 1)).all() and 0 < (dropped == 0).float().mean() < 1


VARIANTS = {
    "LSTM": ({}, {"peephole": True}, {"coupled": True}, {"layer_norm": True}),
    "GRU": ({}, {"reset_after": False}, {"layer_norm": True}),
    "RNN": ({"nonlinearity": "tanh"}, {"nonlinearity": "relu"}),
    "IndRNN": ({"nonlinearity": "tanh"}, {"nonlinearity": "relu"}),
}
PROBABILITIES = st.sampled_from([0.0, 0.4])


@st.composite
def layers_with_options(draw):
    """A layer's name, its options, and H."""
    name, H = draw(st.sampled_from([*VARIANTS])), draw(st.integers(2, 9))
    variant = draw(st.sampled_from(VARIANTS[name]))
    normed = "layer_norm" in variant
    options = {
        **variant,
        "num_layers": draw(st.integers(1, 3)),
        "bias": normed or draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "input_dropout": draw(PROBABILITIES),
        "variational": draw(st.booleans()),
        "zoneout": draw(PROBABILITIES),
        "save": draw(st.sampled_from(["all", "states", "checkpoints"])),
    }
    if options["num_layers"] > 1:
        options["dropout"] = draw(PROBABILITIES)
    if name != "IndRNN":
        options.update(recurrent_dropout=draw(PROBABILITIES), weight_dropout=draw(PROBABILITIES))
    if name == "LSTM":
        options.update(cell_clip=draw(st.sampled_from([None, 0.2])), zoneout=(draw(PROBABILITIES), draw(PROBABILITIES)))
        if not normed and draw(st.booleans()):
            options["proj_size"] = draw(st.integers(1, H - 1))
    return name, options, H


@contextmanager
def drawing_as(layer, seed, batch_sizes):
    """torch's dropout and seeds of zoneout are those of a pass of a NumPy layer with this seed."""
    D = layer.directions
    draws = [
        (k, use)
        for k in range(layer.num_layers * D)
        for use, is_on in (
            (layers._INPUT, k % D == 0 and (layer.dropout if k else layer.input_dropout)),
            (layers._WEIGHT, layer.weight_dropout),
            (layers._STATE, layer.recurrent_dropout),
            (layers._ZONEOUT, any(layer.zoneout)),
        )
        if is_on
    ]

    def dropped(x, p):
        k, use = draws.pop(0)
        sizes = batch_sizes if use == layers._INPUT and not layer.variational else None
        is_one_step = x.dim() == 2 and sizes is None
        ones, by_batch = np.ones((1, *x.shape) if is_one_step else x.shape), layer.batch_first and x.dim() == 3
        mask = layers.drop(ones, p, layers._seed_of(seed, k, use), False, by_batch, sizes)
        return x * torch.from_numpy(mask.reshape(x.shape))

    def seeded(*_, **__):
        k, use = draws.pop(0)
        assert use == layers._ZONEOUT
        return torch.from_numpy(np.array(layers._seed_of(seed, k, use), np.uint64).view(np.int64))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gw.torch, "dropout", dropped)
        patch.setattr(torch, "randint", seeded)
        yield
    assert not draws


@given(
    layers_with_options(),
    st.sampled_from(["padded", "lengths", "packed"]),
    st.sampled_from([None, "initial", "zero"]),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=400, deadline=None)
def test_options_do_what_they_do_in_numpy_layers(layer, form, reset_to, with_state, seed):
    """In training, from the same masks: outputs, final states and all gradients are the NumPy layer's, to the bit."""
    name, options, H = layer
    random = np.random.default_rng(seed)
    T, N, I = random.integers(1, 7, 3)
    ours = getattr(gw.torch, name)(int(I), H, **options, dtype=F64)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.from_numpy(random.uniform(-1, 1, parameter.shape)))
    numpys = getattr(gw, name)(I, H, **options, dtype=np.float64, random_state=seed)
    numpys.load_state_dict(ours.state_dict())

    x, reset, sizes = random.standard_normal((T, N, I)), random.random((T, N)) < 0.3, None
    lengths = random.integers(form == "packed", T + 1, N)
    if form == "packed":
        valid = np.arange(T)[:, None] < np.sort(lengths)[::-1]
        x, reset, sizes = x[valid], reset[valid], valid[: lengths.max()].sum(1)
    elif options["batch_first"]:
        x, reset = np.ascontiguousarray(x.swapaxes(0, 1)), np.ascontiguousarray(reset.T)
    how = {"lengths": lengths} if form == "lengths" else {}
    if reset_to:
        how.update(reset=reset, reset_to=reset_to)
    count, R = options["num_layers"] * numpys.directions, options.get("proj_size", H)
    state = [random.standard_normal((count, N, size)) for size in ([R, H] if name == "LSTM" else [R])]

    def form_of(state):
        return tuple(state) if len(state) > 1 else state[0]

    y, final, tape = numpys.forward(x, form_of(state) if with_state else None, **how, batch_sizes=sizes)
    final = final if name == "LSTM" else [final]
    incoming = [random.standard_normal(out.shape) for out in (y, *final)]
    backward = numpys.backward(tape, incoming[0], form_of(incoming[1:]))
    initial = backward["state"] if name == "LSTM" else [backward["state"]]
    expected = [y, *final, backward["x"], *initial, *(backward[name] for name in ours.state_dict())]

    xt, *hx = (torch.from_numpy(a).requires_grad_() for a in (x, *state))
    how = {key: torch.from_numpy(value) if key != "reset_to" else value for key, value in how.items()}
    given_ = xt if sizes is None else PackedSequence(xt, torch.from_numpy(sizes))
    with drawing_as(numpys, tape.seed, sizes):
        out = flat(ours(given_, form_of(hx) if with_state else None, **how))
    inputs = [xt, *hx, *ours.parameters()]
    got = torch.autograd.grad(out, inputs, list(map(torch.from_numpy, incoming)), allow_unused=True)
    assert len(out) + len(got) == len(expected)
    for a, b in zip([*out, *got], expected):
        assert (a is None and not with_state) or np.array_equal(a.detach().numpy(), b)


@pytest.mark.parametrize("save", ["states", "checkpoints"])
def test_save_keeps_as_little_as_in_numpy_layers(save):
    options = {"num_layers": 2, "bidirectional": True}
    x = torch.randn(40, 2, 3)
    kept = {}
    for how in ("all", save):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            gw.torch.LSTM(3, 4, **options, save=how)(x)
        kept[how] = sum(sizes), gw.LSTM(3, 4, **options, save=how).forward(x.numpy())[2].nbytes
    (all_, numpys_all), (less, numpys_less) = kept["all"], kept[save]
    assert all_ - less == numpys_all - numpys_less > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_modules_compute_in_float32(dtype):
    layer = gw.torch.LSTM(3, 4).to(dtype)
    x = torch.randn(5, 2, 3).to(dtype).requires_grad_()
    y, (hn, cn) = layer(x)
    wide = copy.deepcopy(layer).float()
    expected, _ = wide(x.float())
    assert y.dtype == hn.dtype == cn.dtype == dtype and torch.equal(y, expected.to(dtype))
    y.sum().backward()
    expected.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(layer.weight_hh_l0.grad, wide.weight_hh_l0.grad.to(dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_gives_its_type_and_float32_gradients(name):
    layer, linear = getattr(gw.torch, name)(3, 4), torch.nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = layer(linear(torch.randn(5, 2, 3)))
    assert {t.dtype for t in [y, *flat(state)]} == {torch.bfloat16}
    y.float().sum().backward()
    assert layer.weight_ih_l0.grad.dtype == torch.float32 and linear.weight.grad.any()


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "args",
    [(torch.zeros(2, 3, 4, 5),), (torch.zeros(2, 3, 9),), (torch.zeros(2, 3, 4, dtype=F64),), (torch.zeros(7),)],
)
def test_bad_input_is_refused_as_torch_does(name, args):
    theirs, ours = pair(name, 4, 5)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        theirs(*args)
    with pytest.raises(type(expected.value)) as got:
        ours(*args)
    assert str(got.value).split("Expected")[-1] == str(expected.value).split("Expected")[-1].replace(" tensor", "")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(1, 3, 9), (2, 3, 5), (1, 2, 5), (3, 5)])
def test_bad_states_are_refused_as_torch_does(name, shape):
    theirs, ours = pair(name, 4, 5)
    state = torch.zeros(shape)
    hx = (state, state) if name == "LSTM" else state
    with pytest.raises(RuntimeError) as expected:
        theirs(torch.zeros(2, 3, 4), hx)
    with pytest.raises(RuntimeError) as got:
        ours(torch.zeros(2, 3, 4), hx)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("name", CELLS)
def test_bad_input_of_cells_is_refused_as_torch_does(name):
    for x, h in ((torch.zeros(3, 9), torch.zeros(3, 5)), (torch.zeros(3, 4), torch.zeros(2, 5)),
                 (torch.zeros(3, 4), torch.zeros(3, 7)), (torch.zeros(1, 1, 4), torch.zeros(1, 5))):  # fmt: skip
        hx = (h, h) if name == "LSTMCell" else h
        for module in pair(name, 4, 5):
            with pytest.raises((RuntimeError, ValueError)):
                module(x, hx)


def test_arguments_that_do_not_fit_are_named():
    layer, x = gw.torch.LSTM(3, 4), torch.zeros(5, 2, 3)
    for name, call in (
        ("lengths", lambda: layer(x, lengths=[6, 1])),
        ("lengths", lambda: layer(x, lengths=[1, 2, 3])),
        ("lengths", lambda: layer(x[:, 0], lengths=[1])),
        ("lengths", lambda: layer(pack_sequence([x[:, 0]]), lengths=[1])),
        ("reset", lambda: layer(x, reset=torch.zeros(2, 5, dtype=torch.bool))),
        ("reset", lambda: layer(x, reset=torch.zeros(5, 2))),
        ("reset_to", lambda: layer(x, reset_to="one")),
        ("hx", lambda: layer(x, torch.zeros(1, 2, 4))),
        ("zoneout", lambda: gw.torch.LSTM(3, 4, zoneout=1.5)),
        ("cell_clip", lambda: gw.torch.GRU(3, 4, cell_clip=1.0)),
        ("save", lambda: gw.torch.GRU(3, 4, save="some")),
        ("proj_size", lambda: gw.torch.GRU(3, 4, proj_size=2)),
        ("zonout", lambda: gw.torch.GRU(3, 4, zonout=0.1)),
    ):
        with pytest.raises((ValueError, RuntimeError, TypeError), match=name):
            call()


def test_another_device_is_refused_with_what_is_missing():
    with pytest.raises(RuntimeError, match="is on meta, whose kernels are of no backend"):
        gw.torch._place(torch.zeros(2, 1, 3, device="meta"))


def test_meta_modules_know_their_shapes():
    layer = gw.torch.LSTM(3, 4, 2, bidirectional=True, device="meta")
    y, (hn, cn) = layer(torch.zeros(5, 2, 3, device="meta"))
    assert y.shape == (5, 2, 8) and hn.shape == cn.shape == (4, 2, 4) and y.is_meta


# -- compile, export, torch.func -------------------------------------------------------------------------------


def op_arguments(lengths=None, save="all", dtype=F64):
    layer = gw.torch.LSTM(3, 4, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    tensors = [x, None, None, *weights, *[None] * 7]
    tensors[10] = lengths
    return (*tensors, "lstm", False, False, "initial", 0.0, 0.0, None, save)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch 2.14's opcheck
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 5])])
@pytest.mark.parametrize("save", ["all", "states", "checkpoints"])
def test_opcheck(lengths, save):
    ops = torch.ops.gatewise
    inputs = op_arguments(lengths, save)
    torch.library.opcheck(ops.forward.default, (*inputs, True))
    y, hn, cn, saved, states = (t.detach() for t in ops.forward(*inputs, True))
    wanted = [True, False, False, True, True, True, True, False, False]
    incoming = torch.randn_like(y), torch.randn_like(hn), torch.randn_like(cn)
    torch.library.opcheck(ops.backward.default, (*incoming, *inputs, y, saved, states, wanted))
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    direction = [torch.randn_like(t) if w else None for t, w in zip(plain, wanted)]
    torch.library.opcheck(ops.double_backward.default, (*direction, *incoming, *plain, [True] * 3 + wanted))
    if save == "all":
        torch.library.opcheck(ops.unpack.default, (*plain, y, saved, states))


class Model(torch.nn.Module):
    def __init__(self, name="LSTM", **options):
        super().__init__()
        self.recurrent = getattr(gw.torch, name)(3, 4, 2, batch_first=True, bidirectional=True, **options)
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x, lengths=None):
        return self.head(self.recurrent(x, lengths=lengths)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_compile_breaks_nothing_and_compiles_once_for_all_shapes(name):
    torch._dynamo.reset()
    model = Model(name)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for N, T in ((2, 5), (3, 6), (4, 7), (5, 9), (6, 4)):
        x, lengths = torch.randn(N, T, 3), torch.randint(0, T + 1, (N,))
        results = []
        for run in (model, compiled):
            model.zero_grad()
            y = run(x, lengths)
            y.sum().backward()
            results.append([y.detach(), *(p.grad for p in model.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results))
    assert counter.frame_count <= 2  # once for the first shape, once for any


def test_export_with_dynamic_batch_and_time():
    model = Model()
    n, t = torch.export.Dim("n", min=2), torch.export.Dim("t", min=2)
    program = torch.export.export(model, (torch.randn(2, 5, 3),), dynamic_shapes=({0: n, 1: t},), strict=False)
    x = torch.randn(4, 7, 3)
    assert torch.equal(program.module()(x), model(x))


def test_activation_checkpointing_and_anomaly_mode():
    layer = gw.torch.GRU(3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x)[0].sum(), x)
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        (got,) = torch.autograd.grad(checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).sum(), x)
    assert torch.equal(expected, got)


def test_saved_tensors_go_through_hooks():
    """What a pass keeps is what hooks see, so it can be offloaded; nothing hides in the graph."""
    layer, x = gw.torch.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t.clone(), lambda t: t):
        y, _ = layer(x)
    tape = gw.lstm_forward(x.detach().numpy(), *(p.detach().numpy() for p in layer.parameters()))
    assert (tape._saved.size,) in seen and (tape._states.size,) in seen and x.shape in seen
    (got,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(layer(x)[0].sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_vmap_over_inputs_and_over_weights(name, batch_first):
    layer = getattr(gw.torch, name)(3, 4, batch_first=batch_first, dtype=F64)
    weights = dict(layer.named_parameters())
    xs = torch.randn(4, 5, 2, 3, dtype=F64)

    def loss(weights, x):
        y, state = torch.func.functional_call(layer, weights, (x,))
        return y.sin().sum() + flat(state)[-1].sum()

    expected = torch.stack([loss(weights, x) for x in xs])
    assert torch.allclose(torch.func.vmap(loss, in_dims=(None, 0))(weights, xs), expected, atol=1e-12, rtol=0)
    grads = [torch.func.grad(loss, argnums=(0, 1))(weights, x) for x in xs]
    dw, dx = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(weights, xs)
    assert torch.allclose(dx, torch.stack([g[1] for g in grads]), atol=1e-12, rtol=0)
    for key in weights:
        assert torch.allclose(dw[key], torch.stack([g[0][key] for g in grads]), atol=1e-12, rtol=0)
    (only_dx) = torch.func.vmap(torch.func.grad(lambda x: loss(weights, x)))(xs)
    assert torch.allclose(only_dx, dx, atol=1e-12, rtol=0)
    stacked = {k: torch.stack([v, 2 * v]) for k, v in weights.items()}
    ensemble = torch.func.vmap(loss, in_dims=(0, None))(stacked, xs[0])
    assert torch.allclose(ensemble[0], expected[0], atol=1e-12, rtol=0) and ensemble[1] != ensemble[0]


def test_jacobians_are_torchs():
    theirs, ours = pair("GRU", 2, 3, dtype=F64)
    x = torch.randn(3, 2, 2, dtype=F64)
    expected = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    assert torch.allclose(torch.func.jacrev(lambda x: ours(x)[0])(x), expected, atol=1e-12, rtol=0)
    hessian = torch.autograd.functional.hessian(lambda x: theirs(x)[0].sum(), x)
    assert torch.allclose(torch.autograd.functional.hessian(lambda x: ours(x)[0].sum(), x), hessian, atol=1e-11, rtol=0)


def test_parametrized_weights_are_read_anew():
    layer = torch.nn.utils.parametrizations.weight_norm(gw.torch.LSTM(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    before = layer(x)[0]
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
        assert not torch.equal(layer(x)[0], before)
    layer(x)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad.any()


@pytest.mark.parametrize("grad", [False, True])
def test_weights_changed_in_any_way_are_seen(grad):
    layer, x = gw.torch.LSTM(3, 4), torch.randn(1, 1, 3)
    with torch.set_grad_enabled(grad):
        first = layer(x)[0]
        layer.weight_ih_l0.data.mul_(2)  # no version counter sees it
        assert not torch.equal(layer(x)[0], first)


def test_threads_are_pytorchs_and_change_no_bit(monkeypatch):
    layer, x = gw.torch.LSTM(16, 64), torch.randn(20, 32, 16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert gw.torch._num_threads() == threads
            results.append(layer(x)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)
    monkeypatch.setenv("GATEWISE_NUM_THREADS", "5")
    assert gw.torch._num_threads() == 5


# -- convert ---------------------------------------------------------------------------------------------------


def test_convert_and_revert_keep_every_object():
    class Own(torch.nn.LSTM):
        pass

    model = torch.nn.ModuleDict(
        {
            "a": torch.nn.LSTM(3, 4, 2, dropout=0.1),
            "b": torch.nn.GRUCell(3, 4),
            "c": Own(3, 4),
            "d": torch.nn.Linear(3, 4),
        }
    ).eval()
    x = torch.randn(5, 2, 3)
    parameters, expected = list(model.parameters()), model["a"](x)[0]
    calls = []
    model["a"].register_forward_hook(lambda *_: calls.append(1))
    done = gw.torch.convert(model)
    assert done.swapped == {"a": "gatewise.torch.LSTM", "b": "gatewise.torch.GRUCell"}
    assert list(done.left) == ["c"] and "Own" in done.left["c"]
    assert type(model["a"]) is gw.torch.LSTM and all(p is q for p, q in zip(parameters, model.parameters()))
    assert (model["a"](x)[0] - expected).abs().max() < 1e-6 and calls == [1]
    assert type(pickle.loads(pickle.dumps(model["b"]))) is gw.torch.GRUCell
    back = gw.torch.revert(model)
    assert back.swapped == {"a": "torch.nn.modules.rnn.LSTM", "b": "torch.nn.modules.rnn.GRUCell"}
    assert torch.equal(model["a"](x)[0], expected) and repr(model["a"]) == repr(torch.nn.LSTM(3, 4, 2, dropout=0.1))
    assert set(model["a"].__dict__) == set(torch.nn.LSTM(3, 4).__dict__)


def test_revert_leaves_what_torch_cannot_do():
    model = torch.nn.ModuleList([gw.torch.LSTM(3, 4, peephole=True), gw.torch.GRU(3, 4, zoneout=0.1)])
    left = gw.torch.revert(model).left
    assert "lstm_peephole" in left["0"] and "zoneout" in left["1"]


# -- memory ----------------------------------------------------------------------------------------------------

STEP = """
import re, sys
import torch
import gatewise as gw
library, name, *sizes = sys.argv[1:]
T, N, I, H = map(int, sizes)
torch.set_num_threads(1)
layer = getattr(torch.nn if library == "torch" else gw.torch, name)(I, H)

def step(T):
    y, _ = layer(torch.randn(T, N, I, requires_grad=True))
    y.backward(torch.ones_like(y))
    layer.zero_grad()

def peak():  # not getrusage's, which a child takes over from its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

step(2)  # what is only made once
before = peak()
step(T)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read as Linux counts it, in KiB")
@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_needs_no_more_memory_than_torchs(name):
    sizes = ["128", "64", "64", "128"]
    peak = {
        library: int(subprocess.check_output([sys.executable, "-c", STEP, library, name, *sizes], timeout=120))
        for library in ("torch", "gatewise")
    }
    assert 0 < peak["gatewise"] <= peak["torch"]


# PyTorch's threads are the layers' too. What a child that was forked when they were there does is in its exit code.
THREADS = """
import os, signal, sys, torch
import gatewise as gw
torch.set_num_threads(2)
layer, x = gw.torch.LSTM(64, 256), torch.randn(20, 32, 64)

def run(num_threads):
    torch.set_num_threads(num_threads)
    with torch.no_grad():
        return layer(x)[0]

def threads():
    return len(os.listdir("/proc/self/task"))

torch.randn(1 << 20).exp_()
before = threads()
assert before > 1
y = run(2)
assert threads() == before, (before, threads())
assert torch.equal(y, run(1))
arrays = [a.detach().numpy() for a in (x, *layer.parameters())]
h = gw.lstm(*arrays, num_threads=2)[0]
if (child := os.fork()) == 0:  # without PyTorch, which would wait for threads that are no more
    signal.alarm(20)
    os._exit(0 if (gw.lstm(*arrays, num_threads=2)[0] == h).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux lists them")
def test_threads_are_pytorchs_and_a_forked_childs_are_its_own():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
