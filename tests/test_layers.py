"""Layers against torch.nn in float64: outputs, states, every gradient, packed sequences, names, files."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gatewise as gw
from gatewise import GRU, LSTM, RNN
from gatewise.layers import Layer
from problems import TORCH

torch = pytest.importorskip("torch")

T, N, I, H = 6, 5, 3, 4  # no two equal: a swapped axis cannot pass
LENGTHS = np.array([4, 6, 1, 3, 6])


def pair(cell, L=1, **options):
    """Our layer and torch's with the same weights, float64."""
    kind, extra = TORCH[cell]
    ours = getattr(gw, kind)(I, H, L, dtype=np.float64, random_state=1, **extra, **options)
    theirs = getattr(torch.nn, kind)(I, H, L, dtype=torch.float64, **extra, **options)
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})
    return ours, theirs


def as_tuple(state):
    return state if isinstance(state, tuple) else (state,)


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"batch_first": True}, {"L": 2, "bidirectional": True},
    {"L": 2, "bidirectional": True, "batch_first": True}, {"L": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("cell", TORCH)
def test_forward_and_every_gradient_equal_torch(cell, options, packed):
    ours, theirs = pair(cell, **options)
    D, L = 1 + ours.bidirectional, ours.num_layers
    x = numbers((N, T, I) if ours.batch_first else (T, N, I), 2)
    state = tuple(numbers((L * D, N, H), 3 + k) for k in range(1 + ours.has_c))
    lengths = LENGTHS if packed else None

    y, final, tape = ours.forward(x, state if ours.has_c else state[0], lengths)
    dy, dstate = numbers(y.shape, 5), tuple(numbers(s.shape, 6 + k) for k, s in enumerate(as_tuple(final)))
    gradients = ours.backward(tape, dy, dstate if ours.has_c else dstate[0])

    x_torch = torch.tensor(x, requires_grad=True)
    state_torch = tuple(torch.tensor(s, requires_grad=True) for s in state)
    sequence = x_torch
    if packed:
        sequence = torch.nn.utils.rnn.pack_padded_sequence(x_torch, torch.tensor(LENGTHS), ours.batch_first, False)
    out, last = theirs(sequence, state_torch if ours.has_c else state_torch[0])
    if packed:
        out, _ = torch.nn.utils.rnn.pad_packed_sequence(out, ours.batch_first)
    loss = (out * torch.tensor(dy)).sum()
    loss = loss + sum((s * torch.tensor(d)).sum() for s, d in zip(as_tuple(last), dstate))
    loss.backward()

    close(y, out)
    for mine, other in zip(as_tuple(final), as_tuple(last)):
        close(mine, other)
    assert set(gradients) == {*ours.parameters, "x", "state"}
    close(gradients["x"], x_torch.grad)
    for mine, other in zip(as_tuple(gradients["state"]), state_torch):
        close(mine, other.grad)
    for name, parameter in theirs.named_parameters():
        close(gradients[name], parameter.grad)


@pytest.mark.parametrize("cell", gw.cells())
def test_only_what_is_wanted_is_computed_and_is_the_same(cell):
    ours = Layer(cell, I, H, 2, bidirectional=True, dtype=np.float64, random_state=1)
    y, _, tape = ours.forward(numbers((T, N, I), 2), lengths=LENGTHS)
    dy = numbers(y.shape, 3)
    everything = ours.backward(tape, dy)
    for wanted in (["x"], ["state"], ["weight_hh_l1_reverse"], ["bias_ih_l0", "weight_ih_l1"], []):
        some = ours.backward(tape, dy, wanted=wanted)
        assert set(some) == set(wanted)
        for name in wanted:
            for a, b in zip(as_tuple(some[name]), as_tuple(everything[name])):
                np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"wanted: .*weight_l9"):
        ours.backward(tape, dy, wanted=["weight_l9"])


def test_names_shapes_and_range_of_the_weights_are_torchs():
    for cell in TORCH:
        ours, theirs = pair(cell, L=2, bidirectional=True)
        assert [(n, p.shape) for n, p in ours.parameters.items()] == [
            (n, tuple(p.shape)) for n, p in theirs.named_parameters()
        ]
    big = LSTM(64, 100, random_state=0)
    for weight in big.parameters.values():
        assert 0.09 < np.abs(weight).max() <= 0.1  # U(-1/sqrt(100), 1/sqrt(100))
        assert abs(weight.mean()) < 0.01
    assert (big.parameters["weight_hh_l0"] == LSTM(64, 100, random_state=0).parameters["weight_hh_l0"]).all()
    assert (big.parameters["weight_hh_l0"] != LSTM(64, 100, random_state=1).parameters["weight_hh_l0"]).any()


def test_state_dict_goes_both_ways_and_is_a_copy():
    ours, theirs = pair("gru", L=2)
    other = GRU(I, H, 2, dtype=np.float64, random_state=9)
    other.load_state_dict(theirs.state_dict())
    for name, value in ours.parameters.items():
        np.testing.assert_array_equal(other.parameters[name], value)
    ours.state_dict()["weight_ih_l0"][:] = 0
    assert (ours.parameters["weight_ih_l0"] != 0).all()


def test_a_state_dict_that_does_not_fit_names_every_fault_and_changes_nothing():
    ours = LSTM(I, H, random_state=0)
    wrong, before = ours.state_dict(), ours.state_dict()
    wrong["weight_hh_l0"] = wrong["weight_hh_l0"].T
    wrong["weight_ih_l0"] += 1
    wrong["extra"] = wrong.pop("bias_hh_l0")
    fault = r"missing bias_hh_l0; unexpected extra; weight_hh_l0: expected \(16, 4\), got \(4, 16\)"
    with pytest.raises(ValueError, match=fault):
        ours.load_state_dict(wrong)
    for name, value in before.items():
        np.testing.assert_array_equal(ours.parameters[name], value)


def test_saved_layer_comes_back_and_torch_can_read_it(tmp_path):
    safetensors_torch = pytest.importorskip("safetensors.torch")
    path = tmp_path / "layer.safetensors"
    ours, theirs = pair("lstm", L=2, bidirectional=True, batch_first=True, dropout=0.25)
    ours.save(path)
    ours.save(path)  # over an existing file
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]
    for loaded in (LSTM.load(path), Layer.load(path)):
        assert repr(loaded).partition("(")[2] == repr(ours).partition("(")[2]
        x = numbers((N, T, I), 2)
        np.testing.assert_array_equal(loaded.forward(x, training=False)[0], ours.forward(x, training=False)[0])
    theirs.load_state_dict(safetensors_torch.load_file(path))
    with pytest.raises(ValueError, match="expected a layer of gru; got lstm"):
        GRU.load(path)
    safetensors_torch.save_file(theirs.state_dict(), path)
    with pytest.raises(ValueError, match="no constructor arguments"):
        LSTM.load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    LSTM(I, H, random_state=0).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        LSTM(I, H, random_state=1).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_dropout_is_reproducible_keeps_the_mean_and_rests_outside_training():
    x = np.random.default_rng(0).standard_normal((T, 2000, I)).astype(np.float32)
    make = lambda p, seed: RNN(I, H, 2, nonlinearity="relu", dropout=p, random_state=seed)  # noqa: E731
    (a, _, tape), (b, _, _) = make(0.4, 0).forward(x), make(0.4, 0).forward(x)
    np.testing.assert_array_equal(a, b)
    plain = make(0.0, 0).forward(x)[0]
    np.testing.assert_array_equal(make(0.4, 0).forward(x, training=False)[0], plain)
    assert (a != plain).any()
    mask = tape.masks[1]
    assert tape.masks[0] is None
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.6)}
    assert abs(mask.mean() - 1) < 5 * np.sqrt(0.4 / 0.6 / mask.size)  # five standard errors
    layer = make(0.4, 0)
    assert (layer.forward(x)[0] != layer.forward(x)[0]).any()  # a new mask every pass


def test_gradients_with_dropout_are_those_of_the_masked_network():
    ours = LSTM(I, H, 2, dropout=0.5, dtype=np.float64, random_state=0)
    x, dy = numbers((T, N, I), 1), numbers((T, N, H), 2)
    y, _, tape = ours.forward(x)
    gradients = ours.backward(tape, dy)
    lower, upper = LSTM(I, H, dtype=np.float64), LSTM(H, H, dtype=np.float64)
    weights = ours.state_dict()
    lower.load_state_dict({k: v for k, v in weights.items() if k.endswith("_l0")})
    upper.load_state_dict({k.replace("_l1", "_l0"): v for k, v in weights.items() if k.endswith("_l1")})
    between, _, lower_tape = lower.forward(x)
    out, _, upper_tape = upper.forward(between * tape.masks[1])
    np.testing.assert_array_equal(out, y)
    top = upper.backward(upper_tape, dy)
    bottom = lower.backward(lower_tape, top["x"] * tape.masks[1])
    np.testing.assert_array_equal(gradients["x"], bottom["x"])
    np.testing.assert_array_equal(gradients["weight_hh_l1"], top["weight_hh_l0"])
    np.testing.assert_array_equal(gradients["weight_ih_l0"], bottom["weight_ih_l0"])


def test_without_training_there_is_no_tape():
    assert LSTM(I, H).forward(np.zeros((T, N, I), np.float32), training=False)[2] is None


def without_memory(layer, x, lengths=None):
    """The layer's outputs, computed by one that has never run before."""
    fresh = Layer(layer.cell, I, H, layer.num_layers, bias=layer.bias, bidirectional=layer.bidirectional,
                  dtype=layer.dtype)  # fmt: skip
    fresh.load_state_dict(layer.state_dict())
    return fresh.forward(x, lengths=lengths, training=False)


def times_packed(layer):
    return [packed.count for packed in layer._packed]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cell", gw.cells())
def test_packed_weights_are_kept_but_never_stale(cell, dtype, arch, monkeypatch):
    """Whatever is done to whichever weight in whatever way, the next call sees it; without it, nothing is packed."""
    layer = Layer(cell, I, H, 2, bidirectional=True, dtype=dtype, random_state=0)
    x = numbers((T, N, I), 1).astype(dtype)
    expected = [1, 1, 1, 1]

    def check(changed=()):
        for k in changed:
            expected[k] += 1
        for _ in range(2):
            (y, state, _), (other_y, other_state, _) = layer.forward(x, training=False), without_memory(layer, x)
            np.testing.assert_array_equal(y, other_y)
            for mine, other in zip(as_tuple(state), as_tuple(other_state)):
                np.testing.assert_array_equal(mine, other)
        assert times_packed(layer) == expected

    check()
    for name, weight in layer.parameters.items():
        k = 2 * ("_l1" in name) + name.endswith("_reverse")
        weight.reshape(-1)[-1] += 1  # one element, through a view
        check([k])
        weight[...] = weight  # the same numbers
        check()
        weight[(0,) * weight.ndim] = 0.0
        check([k])
        weight[(0,) * weight.ndim] = -0.0  # another number than 0.0, if equal
        check([k])
    kept = layer.state_dict()
    layer.load_state_dict({name: 2 * value for name, value in kept.items()})
    check(range(4))
    layer.load_state_dict(kept)
    check(range(4))
    for _ in range(2):
        with monkeypatch.context() as patch:  # another arch has another layout
            patch.setenv("GATEWISE_ARCH", "generic")
            check(range(4) if arch != "generic" else [])
        check(range(4) if arch != "generic" else [])
    layer.forward(x)  # training keeps nothing
    check()
    layer.parameters["weight_ih_l0"][0, 0] = np.nan
    check([0])


HOLDERS = {
    "array": lambda layer: layer.parameters["weight_hh_l0"],
    "view": lambda layer: layer.parameters["weight_hh_l0"][1:],
    "mapping": lambda layer: layer.parameters,
    "copied mapping": lambda layer: dict(layer.parameters),
    "iterator": lambda layer: iter(layer.parameters.values()),
    "buffer": lambda layer: memoryview(layer.parameters["weight_hh_l0"]),
    "tensor": lambda layer: torch.from_numpy(layer.parameters["weight_hh_l0"]),
    "tape": lambda layer: layer.forward(np.zeros((T, N, I), np.float32))[2],
    "shallow copy": copy.copy,
}


def first_weight(holder):
    """The array that somebody holds in whatever way, to write into."""
    if isinstance(holder, gw.layers.LayerTape):
        return None
    if isinstance(holder, Layer):
        return holder.parameters["weight_hh_l0"]
    if not isinstance(holder, (np.ndarray, memoryview, torch.Tensor)):
        holder = next(iter(holder.values() if hasattr(holder, "values") else holder))
    return np.asarray(holder)


@pytest.mark.parametrize("holder", HOLDERS)
def test_whoever_holds_the_weights_may_change_them_between_calls(holder):
    """While somebody does, nothing is taken on trust; when nobody does any more, the weights are not even read."""
    layer, x = LSTM(I, H, random_state=0), numbers((T, N, I), 1).astype(np.float32)
    layer.forward(x, training=False)
    promise = layer._promise()
    assert promise and promise == layer._promise()
    held = HOLDERS[holder](layer)
    for _ in range(3):
        layer.forward(x, training=False)
        if (array := first_weight(held)) is not None:
            array.reshape(-1)[0] += 1
        del array
        np.testing.assert_array_equal(layer.forward(x, training=False)[0], without_memory(layer, x)[0])
    assert holder == "tape" or layer._promise() == 0
    del held
    layer.forward(x, training=False)
    assert layer._promise() and layer._promise() == layer._promise()


def test_weights_written_and_let_go_between_calls_are_noticed():
    layer, x = LSTM(I, H, random_state=0), numbers((T, N, I), 1).astype(np.float32)
    for k in range(5):
        before = layer.forward(x, training=False)[0]
        if k % 2:
            layer.parameters["weight_hh_l0"][0, 0] += 1
        else:
            layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})
        y = layer.forward(x, training=False)[0]
        assert not np.array_equal(y, before)
        np.testing.assert_array_equal(y, without_memory(layer, x)[0])


def test_a_bias_is_part_of_what_is_packed():
    """With and without, on the same packed weights: what a subclass may do with a layer's own parameters."""
    layer, x = GRU(I, H, dtype=np.float64, random_state=0), numbers((T, N, I), 1)
    whole = layer.forward(x, training=False)[0]
    kept = {name: layer._parameters.pop(name) for name in ("bias_ih_l0", "bias_hh_l0")}
    plain = GRU(I, H, bias=False, dtype=np.float64)
    plain.load_state_dict(layer._parameters)
    np.testing.assert_array_equal(layer.forward(x, training=False)[0], plain.forward(x, training=False)[0])
    layer._parameters.update(kept)
    np.testing.assert_array_equal(layer.forward(x, training=False)[0], whole)


def test_packed_weights_of_a_layer_that_several_threads_use_and_one_changes():
    """Every result is that of weights which the layer had; an old one never comes after the change."""
    layer, x = LSTM(I, 64, random_state=0), numbers((T, N, I), 1).astype(np.float32)
    values = [1.0, 2.0, 3.0]
    bias, results = layer.parameters["bias_ih_l0"], []
    for value in values:
        bias[7] = value
        results.append(layer.forward(x, training=False)[0].tobytes())
    with ThreadPoolExecutor(4) as pool:
        for value, result in zip(values * 20, results * 20):
            bias[7] = value
            others = [pool.submit(lambda: layer.forward(x, training=False)[0].tobytes()) for _ in range(6)]
            assert {other.result() for other in others} == {result}
        others = [pool.submit(lambda: layer.forward(x, training=False)[0].tobytes()) for _ in range(300)]
        for value in values * 50:
            bias[7] = value
        assert {other.result() for other in others} <= set(results)


@pytest.mark.parametrize("copy", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_runs_on_its_own_weights(copy):
    layer, x = LSTM(I, H, dtype=np.float64, random_state=0), numbers((T, N, I), 1)
    before = layer.forward(x, training=False)[0]
    other = copy(layer)
    np.testing.assert_array_equal(other.forward(x, training=False)[0], before)
    other._parameters = {name: 2 * value for name, value in other.parameters.items()}
    np.testing.assert_array_equal(other.forward(x, training=False)[0], without_memory(other, x)[0])
    np.testing.assert_array_equal(layer.forward(x, training=False)[0], before)


@pytest.mark.parametrize("arguments, sentence", [
    ({"hidden_size": 0}, "hidden_size: expected an integer of 1 or more; got 0"),
    ({"input_size": 2.5}, "input_size: expected an integer"),
    ({"num_layers": -1}, "num_layers: expected"),
    ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\)"),
    ({"dtype": np.float16}, "dtype: expected float32 or float64; got float16"),
    ({"cell": "lsmt"}, "cell: expected one of .*lstm.*; got 'lsmt'"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Layer(**{"cell": "lstm", "input_size": I, "hidden_size": H, **arguments})


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("x", [
    np.zeros((T, N, I + 1), np.float32), np.zeros((T, N, I)), np.zeros((T, I), np.float32), [[[1.0] * I]],
])  # fmt: skip
def test_bad_input_is_named(x, batch_first):
    axes = r"\(N, T, I\)" if batch_first else r"\(T, N, I\)"
    with pytest.raises(ValueError, match=rf"x: expected float32 {axes} with I = 3; got (float|list)"):
        GRU(I, H, batch_first=batch_first).forward(x)


def test_bad_states_and_gradients_are_named():
    x = np.zeros((T, N, I), np.float32)
    h = np.zeros((2, N, H), np.float32)
    lstm, gru = LSTM(I, H, 2), GRU(I, H, 2)
    with pytest.raises(ValueError, match=r"state: expected a pair \(h, c\)"):
        lstm.forward(x, h)
    with pytest.raises(ValueError, match="state: expected one array h"):
        gru.forward(x, (h, h))
    with pytest.raises(ValueError, match=r"state: expected c of shape \(L\*D, N, H\) with L\*D = 2; got \(3, 5, 4\)"):
        lstm.forward(x, (h, np.zeros((3, N, H), np.float32)))
    with pytest.raises(ValueError):
        lstm.forward(x, (h[:, :3].copy(), h[:, :3].copy()))  # N, told by the kernels' own door
    _, _, tape = gru.forward(x)
    with pytest.raises(ValueError, match=r"dy: expected the shape of y, \(6, 5, 4\); got \(6, 5, 8\)"):
        gru.backward(tape, np.zeros((T, N, 2 * H), np.float32))
