"""Layers against torch.nn in float64: outputs, states, every gradient, packed sequences, names, files; and what torch
has not - masks, cells, resets, chunks - against explicit loops, finite differences, and layers without them."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import gatewise as gw
from gatewise import GRU, LSTM, RNN, IndRNN, Stateful, _core, layers
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


@pytest.fixture(params=["cpu", "reference"])
def backend(request, monkeypatch):
    """Both implementations, chosen by the environment as a user would."""
    if request.param == "reference":
        pytest.importorskip("numba")
    monkeypatch.setenv("GATEWISE_BACKEND", request.param)
    return request.param


STRUCTURES = [
    {}, {"bias": False}, {"batch_first": True}, {"L": 2, "bidirectional": True},
    {"L": 2, "bidirectional": True, "batch_first": True}, {"L": 3},
]  # fmt: skip
PROJECTED = [{"proj_size": 2}, {"proj_size": 3, "L": 2, "bidirectional": True, "batch_first": True}]


@pytest.mark.parametrize("form", ["whole", "lengths", "packed"])
@pytest.mark.parametrize("cell, options", [
    *((cell, options) for cell in TORCH for options in STRUCTURES), *(("lstm", options) for options in PROJECTED),
], ids=str)  # fmt: skip
def test_forward_and_every_gradient_equal_torch(cell, options, form, backend):
    ours, theirs = pair(cell, **options)
    D, L = ours.directions, ours.num_layers
    x = numbers((N, T, I) if ours.batch_first else (T, N, I), 2)
    sizes = (ours.output_size // D, H)[: 1 + ours.has_c]
    state = tuple(numbers((L * D, N, size), 3 + k) for k, size in enumerate(sizes))

    def ours_of(parts):
        return parts if ours.has_c else parts[0]

    def pack(a):
        return torch.nn.utils.rnn.pack_padded_sequence(a, torch.tensor(LENGTHS), ours.batch_first, False)

    x_torch = torch.tensor(x, requires_grad=True)
    state_torch = tuple(torch.tensor(s, requires_grad=True) for s in state)
    sequence = x_torch if form == "whole" else pack(x_torch)
    out, last = theirs(sequence, ours_of(state_torch))
    last = as_tuple(last)

    if form == "packed":  # values and batch sizes as they are, and the states in their order
        order = sequence.sorted_indices.numpy()
        y, final, tape = ours.forward(
            sequence.data.detach().numpy(), ours_of(tuple(np.ascontiguousarray(s[:, order]) for s in state)),
            batch_sizes=sequence.batch_sizes.numpy(),
        )  # fmt: skip
        out, last = out.data, tuple(s[:, order] for s in last)
    else:
        y, final, tape = ours.forward(x, ours_of(state), None if form == "whole" else LENGTHS)
        out = out if form == "whole" else torch.nn.utils.rnn.pad_packed_sequence(out, ours.batch_first)[0]
    dy, dstate = numbers(y.shape, 5), tuple(numbers(s.shape, 6 + k) for k, s in enumerate(as_tuple(final)))
    gradients = ours.backward(tape, dy, ours_of(dstate))
    loss = (out * torch.tensor(dy)).sum()
    loss = loss + sum((s * torch.tensor(d)).sum() for s, d in zip(last, dstate))
    loss.backward()

    close(y, out)
    for mine, other in zip(as_tuple(final), last):
        close(mine, other)
    assert set(gradients) == {*ours.parameters, "x", "state"}
    close(gradients["x"], pack(x_torch.grad).data if form == "packed" else x_torch.grad)
    for mine, other in zip(as_tuple(gradients["state"]), state_torch):
        close(mine, other.grad[:, order] if form == "packed" else other.grad)
    for name, parameter in theirs.named_parameters():
        close(gradients[name], parameter.grad)


@pytest.mark.parametrize("cell", gw.cells())
def test_only_what_is_wanted_is_computed_and_is_the_same(cell):
    ours = Layer(cell, I, H, 2, bidirectional=True, dtype=np.float64, random_state=1)
    y, _, tape = ours.forward(numbers((T, N, I), 2), lengths=LENGTHS)
    dy = numbers(y.shape, 3)
    everything = ours.backward(tape, dy)
    assert set(everything) == {*ours.parameters, "x", "state"}
    for wanted in (["x"], ["state"], *([name] for name in ours.parameters), ["weight_ih_l1", "weight_ih_l0"], []):
        some = ours.backward(tape, dy, wanted=wanted)
        assert set(some) == set(wanted)
        for name in wanted:
            for a, b in zip(as_tuple(some[name]), as_tuple(everything[name])):
                np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"wanted: .*weight_l9"):
        ours.backward(tape, dy, wanted=["weight_l9"])


def test_names_shapes_and_range_of_the_weights_are_torchs():
    for cell, options in (*((cell, {}) for cell in TORCH), ("lstm", {"proj_size": 3})):
        ours, theirs = pair(cell, L=2, bidirectional=True, **options)
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
    ours, theirs = pair("lstm", L=2, bidirectional=True, batch_first=True, dropout=0.25, proj_size=3)
    ours.save(path)
    ours.save(path)  # over an existing file
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]
    for loaded in (LSTM.load(path), Layer.load(path)):
        assert repr(loaded).partition("(")[2] == repr(ours).partition("(")[2]
        x = numbers((N, T, I), 2)
        np.testing.assert_array_equal(loaded.forward(x, training=False)[0], ours.forward(x, training=False)[0])
    theirs.load_state_dict(safetensors_torch.load_file(path))
    with pytest.raises(ValueError, match=r"expected a layer of gru or .*; got lstm"):
        GRU.load(path)
    safetensors_torch.save_file(theirs.state_dict(), path)
    with pytest.raises(ValueError, match="no constructor arguments"):
        LSTM.load(path)


def test_a_file_keeps_every_argument(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "layer.safetensors"
    odd = {
        "num_layers": 2, "bias": True, "batch_first": True, "dropout": 0.1, "bidirectional": True, "proj_size": 2,
        "cell_clip": 3.5, "input_dropout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.4, "variational": True,
        "zoneout": (0.15, 0.25), "forget_bias": 1.0, "save": "states", "dtype": np.float64,
    }  # fmt: skip
    ours = LSTM(I, H, peephole=True, random_state=0, **odd)
    arguments = ours._arguments()
    assert arguments == {"cell": "lstm_peephole", "input_size": I, "hidden_size": H, **odd, "dtype": "float64"}
    ours.save(path)
    loaded = LSTM.load(path, random_state=0)
    assert loaded._arguments() == arguments
    ours.random, loaded.random = np.random.default_rng(1), np.random.default_rng(1)
    x = numbers((N, T, I), 1)
    np.testing.assert_array_equal(loaded.forward(x)[0], ours.forward(x)[0])
    assert repr(GRU(I, H)) == "GRU(cell='gru', input_size=3, hidden_size=4, dtype='float32')"  # what is not as usual


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "layer.safetensors"
    LSTM(I, H, random_state=0).save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        LSTM(I, H, random_state=1).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def plain_copy(layer, **changed):
    """The same weights in a layer of the same sizes and cell, without anything random unless it is given."""
    off = {"dropout": 0.0, "input_dropout": 0.0, "recurrent_dropout": 0.0, "weight_dropout": 0.0, "zoneout": 0.0}
    other = Layer(**{**layer._arguments(), **off, **changed})
    other.load_state_dict({name: value for name, value in layer.state_dict().items() if name in other.parameters})
    return other


def mask_of(tape, k, use, p, shape, same=True):
    """What the documented generator gives for a use of the k-th (layer, direction) of a pass: 0 or 1/(1-p)."""
    return kept(layers._seed_of(tape.seed, k, use), shape, p, same) / (1 - p)


def kept(seed, shape, p, same):
    """The counter-based generator in Python's integers: which of [T, N, K] are kept."""

    def mix64(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def mix32(z):
        z = (z ^ (z >> 16)) * 0x7FEB352D % 2**32
        z = (z ^ (z >> 15)) * 0x846CA68B % 2**32
        return z ^ (z >> 16)

    def element(t, n, k):
        step = mix64((seed + 0x9E3779B97F4A7C15 * ((0 if same else t) + 1)) % 2**64)
        key = mix64((step + 0xD1B54A32D192ED03 * (n + 1)) % 2**64)
        bits = mix32(mix32((key + 0x9E3779B9 * k) % 2**32) ^ (key >> 32))
        return bits >> 1 >= int(p * 2**31)

    return np.array([element(*at) for at in np.ndindex(*shape)], bool).reshape(shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("same", [False, True])
def test_dropout_is_the_documented_function_of_seed_step_row_and_unit(same, dtype):
    x, seed = numbers((7, 5, 21), 0).astype(dtype), 2**64 - 59
    mask = kept(seed, x.shape, 0.3, same)
    assert 0.6 < mask.mean() < 0.8 and (same == (mask == mask[0]).all())
    dropped = layers.drop(x, 0.3, seed, same)
    assert dropped.dtype == dtype
    np.testing.assert_array_equal(dropped != 0, mask)
    np.testing.assert_allclose(dropped, x * mask / 0.7, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(layers.drop(x[:, :, ::2][:, :, :1], 0.3, seed, same) != 0, mask[:, :, :1])


def test_the_seeds_of_a_pass_are_all_different():
    seeds = {layers._seed_of(seed, k, use) for seed in range(50) for k in range(50) for use in range(4)}
    assert len(seeds) == 50 * 50 * 4
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert layers._seed_of(0, 0, 0) == 0xE220A8397B1DCDAF  # the first number of splitmix64 seeded with 0


def test_dropout_is_reproducible_keeps_the_mean_and_rests_outside_training(backend):
    x = np.random.default_rng(0).standard_normal((T, 500, I)).astype(np.float32)
    make = lambda p, seed: RNN(I, H, 2, nonlinearity="relu", dropout=p, random_state=seed)  # noqa: E731
    (a, _, tape), (b, _, _) = make(0.4, 0).forward(x), make(0.4, 0).forward(x)
    np.testing.assert_array_equal(a, b)
    plain = make(0.0, 0).forward(x)[0]
    np.testing.assert_array_equal(make(0.4, 0).forward(x, training=False)[0], plain)
    assert (a != plain).any()
    share = (layers.drop(np.ones((50, 100, 20)), 0.4, tape.seed) == 0).mean()
    assert abs(share - 0.4) < 5 * np.sqrt(0.4 * 0.6 / 100_000)  # five standard errors
    layer = make(0.4, 0)
    assert (layer.forward(x)[0] != layer.forward(x)[0]).any()  # new masks every pass
    assert make(0.0, 0).forward(x)[2].seed is None and RNN(I, H, dropout=0.5).forward(x)[2].seed is None


@pytest.mark.parametrize("form", ["time", "batch", "packed"])
@pytest.mark.parametrize("variational", [False, True])
def test_what_is_dropped_between_layers_and_of_x(variational, form, backend):
    """Outputs and gradients are those of two layers by themselves, with the masks between them."""
    options = {"dropout": 0.5, "input_dropout": 0.3, "variational": variational, "batch_first": form == "batch"}
    ours = LSTM(I, H, 2, bidirectional=True, **options, dtype=np.float64, random_state=0)
    lower, upper = (
        Layer("lstm", width, H, bidirectional=True, batch_first=form == "batch", dtype=np.float64)
        for width in (I, 2 * H)
    )
    for k, part in enumerate((lower, upper)):
        part.load_state_dict({
            name.replace(f"_l{k}", "_l0"): value for name, value in ours.state_dict().items() if f"_l{k}" in name
        })  # fmt: skip
    sizes = np.array([5, 4, 4, 2, 1, 1]) if form == "packed" else None
    x = numbers({"time": (T, N, I), "batch": (N, T, I), "packed": (17, I)}[form], 1)
    y, _, tape = ours.forward(x, batch_sizes=sizes)
    dy = numbers(y.shape, 2)
    gradients = ours.backward(tape, dy)

    def mask(k, p, K):
        if form == "time":
            return mask_of(tape, k, layers._INPUT, p, (T, N, K), variational)
        if form == "batch":
            return mask_of(tape, k, layers._INPUT, p, (T, N, K), variational).swapaxes(0, 1)
        whole = mask_of(tape, k, layers._INPUT, p, (T, N, K), variational)
        return np.concatenate([step[:size] for step, size in zip(whole, sizes)])

    of_x, between = mask(0, 0.3, I), mask(2, 0.5, 2 * H)
    below, _, lower_tape = lower.forward(x * of_x, batch_sizes=sizes)
    out, _, upper_tape = upper.forward(np.ascontiguousarray(below * between), batch_sizes=sizes)
    np.testing.assert_allclose(y, out, rtol=1e-13)
    top = upper.backward(upper_tape, dy)
    bottom = lower.backward(lower_tape, np.ascontiguousarray(top["x"] * between))
    np.testing.assert_allclose(gradients["x"], bottom["x"] * of_x, rtol=1e-12, atol=1e-15)
    for k, part in enumerate((bottom, top)):
        for name, gradient in part.items():
            if name not in ("x", "state"):
                own = gradients[name.replace("_l0", f"_l{k}")]
                np.testing.assert_allclose(own, gradient, rtol=1e-12, atol=1e-15, err_msg=name)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def keras_step(cell, w, gx, h, c, mask):
    """One step with h masked where it meets the recurrent weights, and nowhere else: as in Keras' cells."""
    wh, bh = w["weight_hh_l0"], w["bias_hh_l0"]
    if cell == "gru_reset_before":
        r, z, n = np.split(gx, 3, axis=1)
        (wr, wz, wn), (br, bz, bn) = np.split(wh, 3), np.split(bh, 3)
        masked = h * mask
        r, z = sigmoid(r + masked @ wr.T + br), sigmoid(z + masked @ wz.T + bz)
        return z * h + (1 - z) * np.tanh(n + (r * masked) @ wn.T + bn), c
    gh = (h * mask) @ wh.T + bh
    if cell == "lstm":
        i, f, g, o = np.split(gx + gh, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    if cell == "gru":
        (xr, xz, xn), (hr, hz, hn) = np.split(gx, 3, axis=1), np.split(gh, 3, axis=1)
        z = sigmoid(xz + hz)
        return z * h + (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn), c
    return np.tanh(gx + gh), c


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_recurrent_dropout_is_one_mask_on_h_on_its_way_into_the_product(cell, batch_first, backend):
    options = {"recurrent_dropout": 0.4, "batch_first": batch_first, "dtype": np.float64}
    ours = Layer(cell, I, H, **options, random_state=0)
    x, w = numbers((T, N, I), 1), ours.state_dict()
    y, _, tape = ours.forward(x.swapaxes(0, 1) if batch_first else x)
    mask = mask_of(tape, 0, layers._STATE, 0.4, (1, N, H))[0]
    assert (mask == 0).any() and (mask != 0).any()
    h, c, expected = np.zeros((N, H)), np.zeros((N, H)), []
    for gx in x @ w["weight_ih_l0"].T + w["bias_ih_l0"]:
        h, c = keras_step(cell, w, gx, h, c, mask)
        expected.append(h)
    np.testing.assert_allclose(y.swapaxes(0, 1) if batch_first else y, expected, rtol=1e-12, atol=1e-14)


def test_weight_dropout_is_a_layer_with_some_recurrent_weights_less(backend):
    ours = GRU(I, H, 2, bidirectional=True, weight_dropout=0.5, dtype=np.float64, random_state=0)
    x = numbers((T, N, I), 1)
    y, _, tape = ours.forward(x)
    dy = numbers(y.shape, 2)
    other = plain_copy(ours)
    np.testing.assert_array_equal(ours.forward(x, training=False)[0], other.forward(x, training=False)[0])
    names = [name for name in ours.parameters if name.startswith("weight_hh")]
    masks = {name: mask_of(tape, k, layers._WEIGHT, 0.5, (1, 3 * H, H))[0] for k, name in enumerate(names)}
    for name, mask in masks.items():
        other.parameters[name][...] *= mask
    out, _, other_tape = other.forward(x)
    np.testing.assert_array_equal(y, out)
    gradients, expected = ours.backward(tape, dy), other.backward(other_tape, dy)
    for name in ours.parameters:
        np.testing.assert_array_equal(gradients[name], expected[name] * masks.get(name, 1), err_msg=name)
    assert all((mask == 0).any() for mask in masks.values()) and not np.array_equal(*list(masks.values())[:2])


def parts_of(state, k):
    return [part[k] for part in as_tuple(state)]


@pytest.mark.parametrize("cell", gw.cells())
def test_zoneout_is_its_expectation_outside_training_and_a_choice_within(cell, backend):
    rates = (0.3, 0.2)[: 1 + _core.cells[cell]["has_c"]]
    ours = Layer(cell, I, H, zoneout=rates if len(rates) == 2 else 0.3, dtype=np.float64, random_state=0)
    one = plain_copy(ours)
    state = tuple(numbers((1, N, H), 2 + k) for k in range(len(rates)))
    start = state if ours.has_c else state[0]
    x = numbers((T, N, I), 1)
    y, final, _ = ours.forward(x, start, training=False)
    expected, previous = [], state
    for step in x:
        _, new, _ = one.forward(step[None], previous if ours.has_c else previous[0], training=False)
        previous = tuple(p * old + (1 - p) * own for p, old, own in zip(rates, previous, as_tuple(new)))
        expected.append(previous[0][0])
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    for mine, other in zip(as_tuple(final), previous):
        np.testing.assert_allclose(mine, other, rtol=1e-12)

    many = 500
    state = tuple(np.repeat(part[:, :1], many, axis=1) for part in state)
    start = state if ours.has_c else state[0]
    x = np.repeat(x[:1, :1], many, axis=1)
    _, new, _ = one.forward(x, start)
    _, final, _ = ours.forward(x, start)
    for p, mine, old, own in zip(rates, as_tuple(final), state, as_tuple(new)):
        was_kept = mine == old
        np.testing.assert_array_equal(mine, np.where(was_kept, old, own))
        assert abs(was_kept.mean() - p) < 5 * np.sqrt(p * (1 - p) / (many * H))


class Seeded(Layer):
    """A layer whose every pass draws the same masks: one function, which finite differences can follow."""

    sizes = None

    def forward(self, x, state=None, lengths=None, training=True):
        self.random = np.random.default_rng(5)
        return super().forward(x, state, lengths, training, batch_sizes=self.sizes)


RANDOM = {"dropout": 0.4, "input_dropout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.3, "zoneout": (0.2, 0.1)}


def all_random(cell):
    """What a cell has a place for of all that is random."""
    traits = _core.cells[cell]
    needs = {"recurrent_dropout": traits["product"], "weight_dropout": traits["product"]}
    zoneout = RANDOM["zoneout"] if traits["has_c"] else RANDOM["zoneout"][0]
    return {**{name: p for name, p in RANDOM.items() if needs.get(name, True)}, "zoneout": zoneout}


@pytest.mark.parametrize("form", ["lengths", "batch_first", "packed", "variational"])
@pytest.mark.parametrize("cell", gw.cells())
def test_gradients_with_everything_random_by_finite_differences(cell, form):
    options = {
        **all_random(cell),
        "batch_first": form == "batch_first",
        "variational": form in ("packed", "variational"),
    }
    if _core.cells[cell]["has_c"]:
        options |= {"cell_clip": 0.2, "proj_size": 0 if _core.cells[cell]["normed"] else 2}
    layer = Seeded(cell, 2, 3, 2, bidirectional=True, **options, dtype=np.float64, random_state=1)
    Seeded.sizes = np.array([3, 2, 2]) if form == "packed" else None
    x = numbers((7, 2) if form == "packed" else (3, 3, 2), 2)
    state = [numbers((4, 3, size), 3) for size in (options.get("proj_size") or 3, 3)[: 1 + layer.has_c]]
    gw.check.gradients(
        layer, x, state=tuple(state) if layer.has_c else state[0], strict=True,
        lengths=np.array([2, 0, 3]) if form == "lengths" else None,
    )  # fmt: skip


@pytest.mark.parametrize("cell", gw.cells())
def test_masks_are_the_same_for_any_threads_layout_and_backend(cell):
    lengths = np.repeat(np.arange(9, 2, -1), 10)  # as packed: the longest first
    rows = np.arange(9)[:, None] < lengths
    x, dy = numbers((9, 70, I), 1) * rows[:, :, None], numbers((9, 70, 40), 2) * rows[:, :, None]

    def run(form, threads, backend):
        options = {**all_random(cell), "batch_first": form == "batch", "num_threads": threads, "backend": backend}
        layer = Layer(cell, I, 20, 2, bidirectional=True, **options, dtype=np.float64, random_state=3)
        if form == "packed":
            y, state, tape = layer.forward(x[rows], batch_sizes=rows.sum(axis=1))
            gradients = layer.backward(tape, dy[rows])
            for mine, where in ((y, "y"), (gradients["x"], "x")):
                whole = np.zeros((9, 70, mine.shape[1]))
                whole[rows] = mine
                gradients[where] = whole
            return {**gradients, "final": state}
        swap = (lambda a: np.ascontiguousarray(a.swapaxes(0, 1))) if form == "batch" else (lambda a: a)
        y, state, tape = layer.forward(swap(x), lengths=lengths)
        gradients = layer.backward(tape, swap(dy))
        return {**gradients, "x": swap(gradients["x"]), "y": swap(y), "final": state}

    expected = run("time", 1, "cpu")
    for form, threads in (("time", 2), ("batch", 3), ("packed", 1), ("packed", 2)):
        assert_same_results(expected, run(form, threads, "cpu"))
    pytest.importorskip("numba")
    assert_same_results(expected, run("packed", 1, "reference"), expected, 1e-11)


# ---- initial weights, cells --------------------------------------------------------------------------------


def test_classes_choose_the_cells_and_name_their_parameters():
    bias, both = ["bias_ih_l0", "bias_hh_l0"], ["weight_ih_l0", "weight_hh_l0"]
    for layer, cell, names in (
        (LSTM(I, H), "lstm", [*both, *bias]),
        (LSTM(I, H, peephole=True, proj_size=2), "lstm_peephole", [*both, *bias, "weight_unit_l0", "weight_hr_l0"]),
        (LSTM(I, H, coupled=True), "lstm_coupled", [*both, *bias]),
        (LSTM(I, H, layer_norm=True), "lstm_norm", [*both, "weight_unit_l0"]),
        (GRU(I, H), "gru", [*both, *bias]),
        (GRU(I, H, reset_after=False, bias=False), "gru_reset_before", both),
        (GRU(I, H, layer_norm=True), "gru_norm", [*both, "weight_unit_l0"]),
        (RNN(I, H, nonlinearity="relu"), "rnn_relu", [*both, *bias]),
        (IndRNN(I, H), "indrnn_relu", ["weight_ih_l0", *bias, "weight_unit_l0"]),
        (IndRNN(I, H, nonlinearity="tanh", bias=False), "indrnn_tanh", ["weight_ih_l0", "weight_unit_l0"]),
    ):
        assert layer.cell == cell and cell in type(layer).cells
        assert set(layer.parameters) == set(names), cell
        if "weight_unit_l0" in names:
            assert layer.parameters["weight_unit_l0"].shape == (_core.cells[cell]["U"] * H,)


def test_the_weights_of_a_unit_start_as_documented():
    peepholes = LSTM(I, 400, peephole=True, random_state=0).parameters["weight_unit_l0"]
    assert 0.045 < np.abs(peepholes).max() <= 0.05 and abs(peepholes.mean()) < 0.003  # U(-1/sqrt(400), 1/sqrt(400))
    recurrent = IndRNN(I, 400, random_state=0).parameters["weight_unit_l0"]
    assert 0 <= recurrent.min() < 0.02 and 0.98 < recurrent.max() <= 1 and abs(recurrent.mean() - 0.5) < 0.1
    blocks = LSTM(I, H, layer_norm=True).parameters["weight_unit_l0"].reshape(14, H)
    np.testing.assert_array_equal(blocks.T, [[1] * 8 + [0] * 4 + [1, 0]] * H)
    blocks = GRU(I, H, layer_norm=True).parameters["weight_unit_l0"].reshape(10, H)
    np.testing.assert_array_equal(blocks.T, [[1] * 6 + [0] * 4] * H)


@pytest.mark.parametrize("cell", [cell for cell, traits in gw.cells().items() if traits["has_c"]])
def test_a_cell_state_is_clipped_in_every_layer(cell, backend):
    plain, clipped = (Layer(cell, I, H, 2, cell_clip=c, dtype=np.float64, random_state=0) for c in (None, 0.5))
    x, state = numbers((1, N, I), 1), (numbers((2, N, H), 2), 2 * numbers((2, N, H), 3))
    (_, (_, c), _), (_, (_, limited), _) = plain.forward(x, state), clipped.forward(x, state)
    np.testing.assert_allclose(limited[0], np.clip(c[0], -0.5, 0.5), rtol=1e-13)
    assert 0 < (np.abs(limited[1]) == 0.5).mean() < 1 and np.abs(limited[1]).max() == 0.5


@pytest.mark.parametrize("cell", ["lstm", "lstm_peephole", "lstm_norm"])
def test_a_forget_bias_is_that_of_the_forget_gate_and_changes_nothing_else(cell):
    plain, ours = (
        Layer(cell, I, H, 2, forget_bias=bias, random_state=0, dtype=np.float64).state_dict() for bias in (None, 2.5)
    )
    changed = {name: np.flatnonzero(plain[name].ravel() != ours[name].ravel()) for name in plain}
    for layer in range(2):
        if cell == "lstm_norm":
            forget = np.arange(9 * H, 10 * H)
            np.testing.assert_array_equal(changed.pop(f"weight_unit_l{layer}"), forget)
            assert (ours[f"weight_unit_l{layer}"][forget] == 2.5).all()
        else:
            forget = np.arange(H, 2 * H)
            for kind, value in (("bias_ih", 0.0), ("bias_hh", 2.5)):
                np.testing.assert_array_equal(changed.pop(f"{kind}_l{layer}"), forget)
                assert (ours[f"{kind}_l{layer}"][forget] == value).all()
    assert not any(len(where) for where in changed.values())


# ---- layouts, what is kept, 16 bits ------------------------------------------------------------------------


def assert_same_results(a, b, rounded=(), rtol=0.0):
    """To the bit, but for the names in `rounded`: to `rtol` of the largest number."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        for mine, other in zip(as_tuple(value), as_tuple(b[name])):
            if name in rounded:
                np.testing.assert_allclose(mine, other, rtol=0, atol=rtol * np.abs(mine).max(), err_msg=name)
            else:
                np.testing.assert_array_equal(mine, other, err_msg=name)


def results_of(layer, x, dy, **options):
    y, state, tape = layer.forward(x, **options)
    return {**layer.backward(tape, dy, state), "y": y, "final": state}, tape


@pytest.mark.parametrize("view", [
    lambda a: a[::2], lambda a: a[::-1][::2], lambda a: a[1:-1:2, ::2], lambda a: a[::2].swapaxes(0, 1),
    lambda a: a[::2, :, 1:4],
], ids=["every other step", "backwards", "every other row", "batch-major", "some inputs"])  # fmt: skip
@pytest.mark.parametrize("batch_first", [False, True])
def test_x_may_be_any_view_of_contiguous_rows(view, batch_first, backend):
    x = view(numbers((2 * T, 2 * T, 5), 1))
    layer = LSTM(x.shape[2], H, bidirectional=True, batch_first=batch_first, dtype=np.float64, random_state=0)
    dy = numbers((*x.shape[:2], 2 * H), 2)
    assert not x.flags.c_contiguous
    assert_same_results(results_of(layer, x, dy)[0], results_of(layer, x.copy(), dy)[0])


@pytest.mark.parametrize("options", [
    {}, {"lengths": LENGTHS}, {"reset": np.random.default_rng(4).random((T, N)) < 0.3},
], ids=["whole", "lengths", "reset"])  # fmt: skip
@pytest.mark.parametrize("save", ["states", "checkpoints"])
@pytest.mark.parametrize("cell", gw.cells())
def test_less_memory_gives_the_same_bits(cell, save, options, backend):
    random = all_random(cell)
    full, lean = (
        Layer(cell, I, H, 2, bidirectional=True, **random, save=kind, random_state=0) for kind in ("all", save)
    )
    x, dy = (numbers((T, N, size), size).astype(np.float32) for size in (I, 2 * H))
    (a, tape), (b, lean_tape) = results_of(full, x, dy, **options), results_of(lean, x, dy, **options)
    # Between checkpoints, weight gradients are summed over other stretches of steps.
    assert_same_results(a, b, full.parameters if save == "checkpoints" else (), 1e-6)
    assert tape.nbytes == sum(run.nbytes for pair in tape.runs for run in pair) > 0
    assert backend == "reference" or lean_tape.nbytes <= tape.nbytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_16_bits_are_how_arrays_are_kept(cell, dtype, backend):
    """The result is that of float32 on the same numbers, rounded once where it is stored."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.dtype(dtype)
    options = {"bidirectional": True, "recurrent_dropout": 0.3, "zoneout": 0.2, "input_dropout": 0.4}
    ours = Layer(cell, I, H, **options, dtype=dtype, random_state=0)
    wide = Layer(cell, I, H, **options, random_state=0)
    wide.load_state_dict({name: value.astype(np.float32) for name, value in ours.state_dict().items()})
    wide.random = np.random.default_rng(3)
    ours.random = np.random.default_rng(3)
    x = numbers((T, N, I), 1).astype(kind)
    y, _, tape = ours.forward(x)
    other, _, wide_tape = wide.forward(x.astype(np.float32))
    eps = float(ml_dtypes.finfo(kind).eps)
    assert y.dtype == kind and all(p.dtype == kind for p in ours.parameters.values())
    np.testing.assert_allclose(y.astype(np.float32), other, rtol=4 * eps, atol=4 * eps)
    dy = numbers(y.shape, 2).astype(kind)
    gradients, expected = ours.backward(tape, dy), wide.backward(wide_tape, dy.astype(np.float32))
    for name, gradient in gradients.items():
        for mine, theirs in zip(as_tuple(gradient), as_tuple(expected[name])):
            assert mine.dtype == kind, name
            np.testing.assert_allclose(
                mine.astype(np.float32), theirs, rtol=0, atol=16 * eps * np.abs(theirs).max(), err_msg=name
            )


# ---- resets, chunks, state from call to call ---------------------------------------------------------------


@pytest.mark.parametrize("reset_to", ["initial", "zero"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_reset_makes_two_sequences_of_one(cell, reset_to, backend):
    """In both directions and all layers: outputs and gradients are those of the two parts by themselves."""
    layer = Layer(cell, I, H, 2, bidirectional=True, dtype=np.float64, random_state=0)
    x, dy = numbers((T, N, I), 1), numbers((T, N, 2 * H), 2)
    state = tuple(numbers((4, N, H), 3 + k) for k in range(1 + layer.has_c))
    start = state if layer.has_c else state[0]
    reset = np.zeros((T, N), bool)
    reset[2] = True
    y, _, tape = layer.forward(x, start, reset=reset, reset_to=reset_to)
    gradients = layer.backward(tape, dy)
    zero = None if reset_to == "zero" else start
    # Each direction starts where it starts walking: forward ones in the first part, backward ones in the last.
    forward = np.array([True, False, True, False])[:, None, None]
    first, last = (
        tuple(np.where(own, part, 0 if zero is None else part) for part in state) for own in (forward, ~forward)
    )
    a, _, a_tape = layer.forward(x[:2], first if layer.has_c else first[0])
    b, _, b_tape = layer.forward(x[2:], last if layer.has_c else last[0])
    np.testing.assert_allclose(y, np.concatenate((a, b)), rtol=1e-12)
    ga, gb = layer.backward(a_tape, dy[:2]), layer.backward(b_tape, dy[2:])
    np.testing.assert_allclose(gradients["x"], np.concatenate((ga["x"], gb["x"])), rtol=1e-11)
    for name in layer.parameters:
        np.testing.assert_allclose(gradients[name], ga[name] + gb[name], rtol=1e-11, atol=1e-14, err_msg=name)
    used_a, used_b = (forward, ~forward) if reset_to == "zero" else (True, True)
    for whole, of_a, of_b in zip(*(as_tuple(g["state"]) for g in (gradients, ga, gb))):
        np.testing.assert_allclose(whole, used_a * of_a + used_b * of_b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("cell", gw.cells())
def test_chunks_joined_by_hand_are_one_long_pass_and_alone_they_are_truncated(cell, backend):
    layer = Layer(cell, I, H, 2, dtype=np.float64, random_state=0)
    x, dy = numbers((T, N, I), 1), numbers((T, N, H), 2)
    y, final, tape = layer.forward(x)
    whole = layer.backward(tape, dy)
    chunks, state, tapes = (slice(0, 2), slice(2, 3), slice(3, T)), None, []
    for chunk in chunks:
        part, state, part_tape = layer.forward(x[chunk], state)
        np.testing.assert_array_equal(part, y[chunk])
        tapes.append(part_tape)
    for mine, other in zip(as_tuple(state), as_tuple(final)):
        np.testing.assert_array_equal(mine, other)

    dstate, joined = None, []
    for chunk, part_tape in zip(reversed(chunks), reversed(tapes)):  # what a chunk hands on is what came before it
        joined.insert(0, layer.backward(part_tape, dy[chunk], dstate))
        dstate = joined[0]["state"]
    np.testing.assert_allclose(np.concatenate([part["x"] for part in joined]), whole["x"], rtol=1e-10, atol=1e-13)
    for name in layer.parameters:
        total = sum(part[name] for part in joined)
        np.testing.assert_allclose(total, whole[name], rtol=1e-10, atol=1e-12, err_msg=name)

    # Alone, a chunk's gradient is that of a loss which sees its outputs only, by what happens within the chunk.
    truncated = [layer.backward(part_tape, dy[chunk]) for chunk, part_tape in zip(chunks, tapes)]
    later = np.zeros_like(dy)
    later[chunks[2]] = dy[chunks[2]]
    whole_of_last = layer.backward(tape, later)
    np.testing.assert_allclose(truncated[2]["x"], whole_of_last["x"][chunks[2]], rtol=1e-10, atol=1e-13)
    assert np.abs(whole_of_last["x"][: chunks[2].start]).max() > 1e-6  # what truncation cuts
    cut = np.zeros((T, N), bool)
    cut[[chunk.start for chunk in chunks[1:]]] = True
    assert any(np.abs(sum(part[name] for part in truncated) - whole[name]).max() > 1e-6 for name in layer.parameters)


@pytest.mark.parametrize("cell", gw.cells())
def test_a_stateful_layer_goes_on_row_by_row(cell, backend):
    layer = Layer(cell, I, H, 2, dtype=np.float64, random_state=0)
    going, x = Stateful(layer), numbers((T, N, I), 1)
    y, final, _ = layer.forward(x, training=False)
    assert going.state is None
    for chunk in (slice(0, 2), slice(2, 3), slice(3, T)):
        out, state, tape = going.forward(x[chunk], training=False)
        np.testing.assert_array_equal(out, y[chunk])
        assert tape is None and state is going.state
    for mine, other in zip(as_tuple(going.state), as_tuple(final)):
        np.testing.assert_array_equal(mine, other)

    kept = going.state
    for rows in (np.array([True, False, False, True, False]), np.array([0, 3]), [0, 3]):
        going.state = kept
        going.reset(rows)
        for now, before in zip(as_tuple(going.state), as_tuple(kept)):
            assert not now[:, [0, 3]].any() and before[:, [0, 3]].any()  # what was handed out stays as it was
            np.testing.assert_array_equal(now[:, [1, 2, 4]], before[:, [1, 2, 4]])
    out, _, _ = going.forward(x, training=False)
    np.testing.assert_array_equal(out[:, [0, 3]], y[:, [0, 3]])
    assert (out[:, 1] != y[:, 1]).any()
    going.reset()
    assert going.state is None
    going.reset(np.array([1]))  # of zeros
    np.testing.assert_array_equal(going.forward(x[:, :2].copy(), training=False)[0], y[:, :2])  # another N


def test_a_stateful_layer_takes_lengths_resets_and_gives_gradients(backend):
    layer = LSTM(I, H, dtype=np.float64, random_state=0)
    going, x = Stateful(layer), numbers((T, N, I), 1)
    _, before, _ = going.forward(x)
    lengths, reset = np.array([0, 2, 6, 6, 1]), np.zeros((T, N), bool)
    reset[3, 2] = True
    y, state, tape = going.forward(x, lengths, reset=reset)
    other, after, other_tape = layer.forward(x, before, lengths, reset=reset, reset_to="zero")
    np.testing.assert_array_equal(y, other)
    assert_same_results(layer.backward(tape, y), layer.backward(other_tape, y))
    for mine, theirs, old in zip(state, after, before):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine[:, 0], old[:, 0])  # no step, no change
    alone, _, _ = layer.forward(x[3:, 2:3].copy())
    np.testing.assert_array_equal(y[3:, 2:3], alone)  # from zeros, not from the state before the call


def test_what_a_stateful_layer_refuses():
    with pytest.raises(ValueError, match="Stateful: expected a layer of one direction; got bidirectional=True"):
        Stateful(LSTM(I, H, bidirectional=True))
    going = Stateful(LSTM(I, H))
    going.forward(np.zeros((T, N, I), np.float32))
    for rows in (np.array([5]), np.array([True, False]), 0.5, "all"):
        with pytest.raises(ValueError, match="rows: expected a mask or indices of 5 rows; got"):
            going.reset(rows)
    with pytest.raises(ValueError, match=r"state: expected a pair \(h, c\)"):
        going.state = np.zeros((1, N, H), np.float32)
    with pytest.raises(ValueError, match="h0"):
        going.forward(np.zeros((T, N + 1, I), np.float32))
    assert going.state is not None


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
    ({"dtype": np.int32}, "dtype: expected float32, float64, float16 or bfloat16; got int32"),
    ({"cell": "lsmt"}, "cell: expected one of .*lstm.*; got 'lsmt'"),
    ({"proj_size": -1}, "proj_size: expected an integer of 0 or more; got -1"),
    ({"proj_size": H + 1}, "proj_size: expected at most hidden_size = 4; got 5"),
    ({"cell_clip": 0.0}, "cell_clip: expected a positive number or None; got 0.0"),
    ({"input_dropout": -0.1}, r"input_dropout: expected a probability in \[0, 1\); got -0.1"),
    ({"recurrent_dropout": np.nan}, r"recurrent_dropout: expected a probability in \[0, 1\); got nan"),
    ({"weight_dropout": "0.5"}, r"weight_dropout: expected a probability in \[0, 1\); got '0.5'"),
    ({"zoneout": 1.0}, r"zoneout: expected a probability in \[0, 1\); got 1.0"),
    ({"zoneout": (0.1, 0.2, 0.3)}, "zoneout: expected a probability or a pair, of h and of c; got"),
    ({"save": "some"}, "save: expected one of 'all', 'states', 'checkpoints'; got 'some'"),
    ({"forget_bias": 1.0, "bias": False}, "forget_bias: of the cell 'lstm' expected None, for there are no biases"),
    ({"cell": "gru", "forget_bias": 1.0}, "forget_bias: of the cell 'gru' expected None, for it has no forget gate"),
    ({"cell": "lstm_coupled", "forget_bias": 1.0}, "forget_bias: of the cell 'lstm_coupled' expected None"),
    ({"cell": "gru", "proj_size": 2}, "proj_size: of the cell 'gru' expected 0, for it has no projection; got 2"),
    ({"cell": "lstm_norm", "proj_size": 2}, "proj_size: of the cell 'lstm_norm' expected 0"),
    ({"cell": "gru", "cell_clip": 2.0}, "cell_clip: of the cell 'gru' expected None, for it has no cell state c; got"),
    ({"cell": "gru", "zoneout": (0.0, 0.1)}, "zoneout: of the cell 'gru' expected 0 for c"),
    ({"cell": "indrnn_relu", "recurrent_dropout": 0.1}, "recurrent_dropout: of the cell 'indrnn_relu' expected 0"),
    ({"cell": "indrnn_relu", "weight_dropout": 0.1}, "weight_dropout: of the cell 'indrnn_relu' expected 0"),
    ({"cell": "gru_norm", "bias": False}, "bias: of the cell 'gru_norm' expected True, for its biases are blocks"),
])  # fmt: skip
def test_bad_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Layer(**{"cell": "lstm", "input_size": I, "hidden_size": H, **arguments})


def test_cells_that_do_not_exist_are_named():
    with pytest.raises(
        ValueError, match="lstm: expected at most one of peephole, coupled, layer_norm; got peephole and"
    ):
        LSTM(I, H, peephole=True, layer_norm=True)
    with pytest.raises(
        ValueError, match="gru: expected at most one of reset_after=False, layer_norm; got reset_after=F"
    ):
        GRU(I, H, reset_after=False, layer_norm=True)
    with pytest.raises(ValueError, match="nonlinearity: expected 'tanh' or 'relu'; got 'sin'"):
        IndRNN(I, H, nonlinearity="sin")


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
    with pytest.raises(ValueError, match="reset_to: expected one of 'initial', 'zero'; got 'zeros'"):
        gru.forward(x, reset_to="zeros")
    with pytest.raises(ValueError, match="reset: expected bool"):
        gru.forward(x, reset=np.zeros((N, T), bool))
    sizes = np.array([3, 1])
    with pytest.raises(ValueError, match=r"x: expected float32 \(rows, I\) with I = 3; got float32 \(6, 5, 3\)"):
        gru.forward(x, batch_sizes=sizes)
    with pytest.raises(ValueError, match="batch_sizes"):
        gru.forward(np.zeros((4, I), np.float32), lengths=np.array([2, 1, 1]), batch_sizes=sizes)
