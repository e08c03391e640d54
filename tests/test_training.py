"""Training: losses, Adam and clipping against torch, the whole loss by finite differences, the fit loop."""

import sys

import numpy as np
import pytest

from gatewise.layers import Layer
from gatewise.training import (
    Adam,
    Linear,
    Network,
    Sequences,
    batches,
    binary_cross_entropy,
    clip,
    fit,
    softmax_cross_entropy,
    squared_error,
)

LOSSES = {
    "binary": (binary_cross_entropy, 1),
    "softmax": (softmax_cross_entropy, 3),
    "squared": (squared_error, 2),
}


def targets_for(loss, shape, random):
    M, K = shape
    if loss == "softmax":
        return random.integers(0, K, (M, 1))
    return random.integers(0, 2, shape).astype(float) if loss == "binary" else random.standard_normal(shape)


def problem(loss="binary", per_step=True, N=7, seed=0, dtype="float64", layers=1, bidirectional=False, missing=0.3):
    """A network and sequences of lengths 1..6 with random weights, a part of them 0."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 7, N)
    x = [random.standard_normal((length, 3)) for length in lengths]
    M = lengths.sum() if per_step else N
    function, K = LOSSES[loss]
    weights = random.uniform(0.5, 2, (M, K if loss == "squared" else 1)) * (random.random((M, 1)) >= missing)
    weights[0] = 1
    targets = targets_for(loss, (M, K), random)
    if loss != "softmax":
        targets = targets.astype(dtype)
    data = Sequences(x, lengths, per_step, np.dtype(dtype), targets, weights.astype(dtype)).labelled()
    layer = Layer("lstm", 3, 5, layers, bidirectional=bidirectional, dtype=dtype, random_state=seed)
    head = Linear(5 * layer.directions, K, dtype=dtype, random=random)
    return Network(layer, head, function, per_step=per_step), data


def weights_of(network):
    return {name: value.copy() for name, value in network.parameters.items()}


def assert_same_weights(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ---- parts against torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_equal_torch(loss):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    random = np.random.default_rng(0)
    function, K = LOSSES[loss]
    z = 4 * random.standard_normal((50, K))
    y = targets_for(loss, z.shape, random)
    w = random.uniform(0, 2, (50, 1))
    value, gradient = function(z, y, w)
    z_torch, w_torch = torch.tensor(z, requires_grad=True), torch.tensor(w)
    if loss == "binary":
        theirs = functional.binary_cross_entropy_with_logits(z_torch, torch.tensor(y), reduction="none")
    elif loss == "softmax":
        theirs = functional.cross_entropy(z_torch, torch.tensor(y[:, 0]), reduction="none")[:, None]
    else:
        theirs = functional.mse_loss(z_torch, torch.tensor(y), reduction="none")
    (theirs * w_torch).sum().backward()
    np.testing.assert_allclose(value, (theirs * w_torch).sum().item(), rtol=1e-13)
    np.testing.assert_allclose(gradient, z_torch.grad.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_are_exact_for_huge_logits(dtype):
    w = np.ones((2, 1), dtype)
    value, gradient = binary_cross_entropy(np.array([[1000], [-1000]], dtype), np.array([[0], [1]], dtype), w)
    assert value == 2000
    np.testing.assert_array_equal(gradient, [[1], [-1]])
    value, gradient = softmax_cross_entropy(np.array([[1000, 0], [0, -1000]], dtype), np.array([[1], [1]]), w)
    assert value == 2000
    np.testing.assert_array_equal(gradient, [[1, -1], [1, -1]])
    small, _ = binary_cross_entropy(np.array([[-50]], dtype), np.zeros((1, 1), dtype), w[:1])
    np.testing.assert_allclose(small, np.exp(-50.0), rtol=1e-6)  # not rounded to 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_equals_torch(weight_decay):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    ours = {name: random.standard_normal(shape) for name, shape in (("a", (4, 3)), ("b", (5,)))}
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in ours.items()}
    mine = Adam(ours, 0.01, weight_decay=weight_decay)
    other = torch.optim.Adam(theirs.values(), lr=0.01, weight_decay=weight_decay)
    for _ in range(30):
        gradients = {name: random.standard_normal(value.shape) for name, value in ours.items()}
        gradients["b"][0] = 0  # a weight without gradient must not become NaN
        for name, value in theirs.items():
            value.grad = torch.tensor(gradients[name])
        mine.step(gradients)
        other.step()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_equals_torch(max_norm):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    ours = {"a": random.standard_normal((4, 3)), "b": random.standard_normal(5)}
    theirs = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in ours.values()]
    for p, g in zip(theirs, ours.values()):
        p.grad = torch.tensor(g)
    norm = clip(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, np.inf if max_norm is None else max_norm)
    np.testing.assert_allclose(norm, expected.item(), rtol=1e-14)
    for p, g in zip(theirs, ours.values()):
        np.testing.assert_allclose(g, p.grad.numpy(), rtol=1e-14)


def test_a_row_of_the_head_does_not_depend_on_the_rows_beside_it():
    random = np.random.default_rng(0)
    for K in (1, 3):
        head = Linear(101, K, dtype=np.float32, random=random)
        x = random.standard_normal((97, 101)).astype(np.float32)
        z = head.forward(x)
        np.testing.assert_allclose(z, x.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias, atol=1e-5)
        for start, stop in ((0, 1), (0, 33), (13, 97), (96, 97)):
            np.testing.assert_array_equal(head.forward(x[start:stop].copy()), z[start:stop])


# ---- the whole loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [{}, {"layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("per_step", [True, False], ids=["step", "sequence"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_the_whole_loss_by_finite_differences(loss, per_step, structure):
    network, data = problem(loss, per_step, **structure)
    batch = data.batch(np.arange(len(data)))
    targets, weights = data.targets[batch.source], data.weights[batch.source]
    total, gradients = network.gradients(batch, targets, weights)
    np.testing.assert_allclose(network.mean_loss(data), total / data.weights.sum(), rtol=1e-12)
    assert set(gradients) == set(network.parameters)
    random, step = np.random.default_rng(1), 1e-5
    for name, p in network.parameters.items():
        direction = random.standard_normal(p.shape)
        values = []
        for sign in (1, -2, 1):
            p += sign * step * direction
            values.append(network.gradients(batch, targets, weights)[0])
        slope = np.vdot(gradients[name], direction)
        assert slope != 0, name
        np.testing.assert_allclose((values[0] - values[1]) / (2 * step), slope, rtol=1e-6, atol=1e-8, err_msg=name)


def test_dropout_before_the_head_scales_its_gradient_with_the_same_mask():
    network, data = problem()
    network.dropout = 0.5
    batch = data.batch(np.arange(len(data)))
    arguments = batch, data.targets[batch.source], data.weights[batch.source]
    state = network.layer.random.bit_generator.state
    _, gradients = network.gradients(*arguments)
    w, step = network.layer.parameters["weight_hh_l0"], 1e-5
    direction = np.random.default_rng(1).standard_normal(w.shape)
    values = []
    for sign in (1, -2):
        w += sign * step * direction
        network.layer.random.bit_generator.state = state  # the same mask
        values.append(network.gradients(*arguments)[0])
    slope = np.vdot(gradients["weight_hh_l0"], direction)
    np.testing.assert_allclose((values[0] - values[1]) / (2 * step), slope, rtol=1e-6)


# ---- data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_step", [True, False])
def test_a_batch_holds_what_its_index_says(per_step):
    lengths = np.array([3, 1, 4, 2])
    x = [np.array([[10 * i + t] for t in range(length)]) for i, length in enumerate(lengths)]
    flat = np.concatenate(x) if per_step else np.arange(4)[:, None]
    weights = np.ones(flat.shape)
    weights[1] = 0
    data = Sequences(x, lengths, per_step, np.dtype(np.float32), flat, weights)
    batch = data.batch(np.array([0, 1, 2]))
    assert batch.x.dtype == np.float32
    np.testing.assert_array_equal(batch.x[:, 0], [20, 0, 10, 21, 1, 22, 2, 23])  # step by step, the longest first
    np.testing.assert_array_equal(batch.batch_sizes, [3, 2, 2, 1])
    if per_step:
        np.testing.assert_array_equal(flat[batch.source, 0], [20, 21, 22, 23, 0, 2, 10])  # step 1 of 0 has weight 0
        np.testing.assert_array_equal(batch.x[batch.rows, 0], flat[batch.source, 0])
    else:
        np.testing.assert_array_equal(batch.source, [2, 0])
        np.testing.assert_array_equal(batch.rows, [0, 1])
    part = data.subset(np.array([3, 0]))
    np.testing.assert_array_equal(part.targets[:, 0], [30, 31, 0, 1, 2] if per_step else [3, 0])
    whole = Sequences(x, lengths, per_step, data.dtype)
    assert len(whole.batch(np.arange(4)).rows) == (10 if per_step else 4)


@pytest.mark.parametrize("per_step", [True, False])
def test_packed_batches_are_padded_ones_without_the_padding(per_step):
    """To the bit, whichever sequences share a batch."""
    network, data = problem("softmax", per_step, N=11, dtype="float32", layers=2, bidirectional=True)
    x = np.zeros((6, len(data), 3), np.float32)
    for n, sequence in enumerate(data.x):
        x[: len(sequence), n] = sequence
    y, (h, _), _ = network.layer.forward(x, lengths=data.lengths, training=False)
    valid = np.arange(6) < data.lengths[:, None]
    features = y.swapaxes(0, 1)[valid] if per_step else np.concatenate(h[-2:], axis=1)
    for batch_size in (1, 4, 256):
        np.testing.assert_array_equal(network.logits(data, batch_size), network.head.forward(features))


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [1, 3]], ids=["beside others", "alone"])
def test_a_sequence_without_a_step_has_the_state_zero(kept):
    """It teaches the head's bias, and nothing else."""
    random = np.random.default_rng(0)
    x = [random.standard_normal((length, 3)) for length in (2, 0, 5, 0, 1)]
    lengths = np.array([len(sequence) for sequence in x])
    targets, weights = random.standard_normal((5, 2)), np.ones((5, 2))
    data = Sequences(x, lengths, False, np.dtype("float64"), targets, weights).subset(np.array(kept))
    layer = Layer("gru", 3, 5, 2, bidirectional=True, dtype="float64", random_state=0)
    network = Network(layer, Linear(10, 2, dtype="float64", random=random), squared_error, per_step=False)
    z = network.logits(data)
    for row, length in zip(z, data.lengths):
        assert (length == 0) == np.array_equal(row, network.head.bias)
    batch = data.batch(np.arange(len(data)))
    _, gradients = network.gradients(batch, data.targets[batch.source], data.weights[batch.source])
    np.testing.assert_allclose(gradients["head.bias"], 2 * (z - data.targets).sum(axis=0))
    some = data.subset(np.flatnonzero(data.lengths))
    if len(some):
        batch = some.batch(np.arange(len(some)))
        _, others = network.gradients(batch, some.targets[batch.source], some.weights[batch.source])
    for name, gradient in gradients.items():
        if name != "head.bias":
            np.testing.assert_allclose(gradient, others[name] if len(some) else 0, rtol=1e-12, err_msg=name)


def test_regularisers_and_a_projection_reach_the_layer_and_leave_prediction_alone():
    network, data = problem("squared", dtype="float32", layers=2)
    options = {"proj_size": 4, "dropout": 0.3, "input_dropout": 0.2, "recurrent_dropout": 0.2, "weight_dropout": 0.1}
    network.layer = Layer("lstm", 3, 5, 2, **options, zoneout=(0.1, 0.2), variational=True, random_state=0)
    network.head = Linear(4, 2, dtype="float32", random=np.random.default_rng(0))
    history = train(network, data, max_epochs=60, learning_rate=0.02)
    assert network.mean_loss(data) == network.mean_loss(data)  # nothing random in it
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]


LENGTHS = np.minimum(8 + np.random.default_rng(0).exponential(30, 5000).astype(np.int64), 336)


@pytest.mark.parametrize("bucket", [1, 64])
def test_batches_hold_every_sequence_once(bucket):
    groups = batches(LENGTHS, 64, np.random.default_rng(1), bucket)
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(5000))
    assert len(groups) == 79 and max(map(len, groups)) == 64
    again, other = (batches(LENGTHS, 64, np.random.default_rng(seed), bucket) for seed in (1, 2))
    assert all((a == b).all() for a, b in zip(groups, again))
    assert any(set(a) != set(b) for a, b in zip(groups, other))


def test_a_bucket_pads_little_and_no_bucket_leaves_batches_random():
    def padding_and_means(bucket):
        groups = batches(LENGTHS, 64, np.random.default_rng(1), bucket)
        return sum(len(g) * LENGTHS[g].max() for g in groups) / LENGTHS.sum(), [LENGTHS[g].mean() for g in groups]

    padded, means = padding_and_means(64)
    assert padded < 1.1
    assert means[:64] != sorted(means[:64])  # batches come shuffled, also those sorted together
    padded, means = padding_and_means(1)
    assert padded > 3  # what a bucket saves
    # the mean of 64 random lengths spreads by their deviation / 8; 79 of them estimate that to within a third
    assert 2 / 3 < np.std(means) / (LENGTHS.std() / 8) < 4 / 3


# ---- the loop ----------------------------------------------------------------------------------------------


def train(network, data, validation=None, **options):
    return fit(network, data, validation, **{"random": np.random.default_rng(0), "verbose": 0, **options})


@pytest.mark.parametrize("per_step", [True, False])
def test_a_weight_of_two_is_the_sequence_twice(per_step):
    results = []
    for twice in (False, True):
        network, data = problem(per_step=per_step, missing=0)
        data.weights[:] = 1
        if twice:
            data = data.subset(np.array([0, 1, 2, 2, 3, 4, 5, 6]))
        else:
            counts = np.repeat(np.arange(7), data.lengths) if per_step else np.arange(7)
            data.weights[counts == 2] = 2
        history = train(network, data, max_epochs=5, learning_rate=0.01)  # one batch holds them all
        results.append((weights_of(network), [h["train_loss"] for h in history]))
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-9)
    for name, value in results[0][0].items():
        np.testing.assert_allclose(value, results[1][0][name], rtol=1e-8, atol=1e-10)


def test_weights_matter_in_batches_of_one():
    """The scale of a batch's loss is set over all data: normalised per batch, the weights would cancel."""
    results = []
    for weight in (1, 100):
        network, data = problem(per_step=False, missing=0)
        data.weights[:] = 1
        data.weights[0] = weight
        train(network, data, max_epochs=3, batch_size=1, clip_norm=None)
        results.append(weights_of(network))
    assert any((results[0][name] != results[1][name]).any() for name in results[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_of_weight_zero_influence_nothing(loss):
    results = []
    for poison in (0, 1):
        network, data = problem(loss, missing=0.5, dtype="float32")
        masked = (data.weights == 0).all(axis=1)
        assert masked.any()
        data.targets[masked] = poison if loss == "softmax" else [0, np.nan][poison]
        train(network, data, max_epochs=3, batch_size=3)
        results.append(weights_of(network))
    assert_same_weights(*results)


def test_two_fits_are_equal_to_the_bit():
    results = []
    for seed in (0, 0, 1):
        network, data = problem(dtype="float32", layers=2)
        network.layer.dropout = network.dropout = 0.3
        train(network, data, max_epochs=3, batch_size=2, random=np.random.default_rng(seed))
        results.append(weights_of(network))
    assert_same_weights(*results[:2])
    assert (results[0]["head.weight"] != results[2]["head.weight"]).any()


def test_early_stopping_keeps_the_best_weights():
    (network, data), (_, validation) = problem(N=12), problem(N=12, seed=5)
    for part in (
        data,
        validation,
    ):  # a rule with every fourth target wrong: first learnt, then learnt by heart
        part.targets[:, 0] = np.concatenate(part.x)[:, 0] > 0
        part.targets[::4] = 1 - part.targets[::4]
    history = train(network, data, validation, max_epochs=500, patience=4, learning_rate=0.02, batch_size=4)
    losses = [h["val_loss"] for h in history]
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1
    assert len(losses) == best + 1 + 4
    assert network.mean_loss(validation) == losses[best]
    assert [h["epoch"] for h in history] == list(range(1, len(history) + 1))
    assert all(0 < h["kernel_share"] < 1 and h["seconds"] > 0 for h in history)


def test_a_cosine_takes_the_learning_rate_to_zero(monkeypatch):
    """torch's CosineAnnealingLR, stepped with the optimizer, over the updates of all epochs."""
    torch = pytest.importorskip("torch")
    rates = []
    step = Adam.step
    monkeypatch.setattr(Adam, "step", lambda adam, gradients: (rates.append(adam.learning_rate), step(adam, gradients)))
    network, data = problem(N=10)
    train(network, data, max_epochs=4, batch_size=4, learning_rate=0.01, schedule="cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4 * 3)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_without_validation_the_last_weights_stay_and_the_loss_falls():
    network, data = problem()
    history = train(network, data, max_epochs=40, learning_rate=0.02)
    assert history[-1]["val_loss"] is None and len(history) == 40
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert network.mean_loss(data) < history[-1]["train_loss"]


@pytest.mark.parametrize("validated", [True, False])
def test_ctrl_c_leaves_the_weights_of_a_finished_epoch(validated, monkeypatch):
    network, data = problem(N=9)
    expected, expected_data = problem(N=9)
    validation = data if validated else None
    train(expected, expected_data, validation, max_epochs=2, batch_size=3)
    gradients, calls = network.gradients, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 8:  # in the middle of the third epoch of three batches
            raise KeyboardInterrupt
        return gradients(*arguments)

    monkeypatch.setattr(network, "gradients", interrupted)
    with pytest.warns(RuntimeWarning, match="interrupted in epoch 3; the weights are those of epoch 2"):
        history = train(network, data, validation, max_epochs=50, batch_size=3)
    assert len(history) == 2
    assert_same_weights(weights_of(network), weights_of(expected))


def test_a_loss_that_is_not_finite_says_what_to_try():
    network, data = problem("squared", dtype="float32")
    data.targets[0] = 3e38
    sentence = "loss became inf in epoch 1; try a learning_rate below 0.001, a smaller clip_norm, and inputs"
    with pytest.raises(FloatingPointError, match=sentence):
        train(network, data, max_epochs=2)
    network, data = problem()
    _, validation = problem()
    network.head.bias[:] = np.nan
    with pytest.raises(FloatingPointError, match="loss became nan"):
        train(network, data, validation, max_epochs=2)


def test_progress_can_be_silenced_and_needs_no_tqdm(capfd, monkeypatch):
    pytest.importorskip("tqdm")
    for verbose in (0, None):  # None: stderr is no terminal here
        network, data = problem()
        train(network, data, max_epochs=2, verbose=verbose)
        assert capfd.readouterr() == ("", "")
    train(network, data, max_epochs=2, verbose=1)
    assert "batch" in capfd.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(train(network, data, max_epochs=2, verbose=1)) == 2
