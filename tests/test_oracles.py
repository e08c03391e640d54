"""What torch.nn does not have, against Keras: the other GRU, masks of steps, dropout within a layer.

Keras runs on PyTorch here, whose autograd gives the gradients. It decides for a backend when it is imported: where that
was JAX, which tests/test_bench.py prefers if it is installed, these tests skip; they run if this file is run alone.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

import gatewise as gw

Array = np.ndarray
BACKENDS = ("cpu", "reference")

T, N, I, H = 6, 5, 3, 4
# cell: Keras' layer, our gates in its order (z r h where ours are r z n), its arguments: its own loop, not torch.nn's
LAYERS: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "rnn_tanh": ("SimpleRNN", [0], {"activation": "tanh"}),
    "rnn_relu": ("SimpleRNN", [0], {"activation": "relu"}),
    "lstm": ("LSTM", [0, 1, 2, 3], {"use_cudnn": False}),
    "gru": ("GRU", [1, 0, 2], {"use_cudnn": False, "reset_after": True}),
    "gru_reset_before": ("GRU", [1, 0, 2], {"use_cudnn": False, "reset_after": False}),
}
LENGTHS = np.array([4, 6, 1, 0, 3])
PADDED = np.arange(T)[:, None] < LENGTHS
HOLES = np.random.default_rng(3).random((T, N)) < [0.3, 0.5, 1, 0, 0.7]


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported, and kept from then on
    keras = pytest.importorskip("keras")
    if (backend := keras.backend.backend()) != "torch":
        # Keras takes one backend a process, and another test of this process may have imported it on JAX
        pytest.skip(f"Keras runs on {backend} in this process, not on torch")
    return keras


def draw(cell: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """The arrays of a call, and the gradients of its results."""
    rng, G = np.random.default_rng(1), gw.cells()[cell]["G"]
    shapes = {"x": (T, N, I), "w_ih": (G * H, I), "w_hh": (G * H, H), "b_ih": (G * H,), "b_hh": (G * H,), "h0": (N, H)}
    results = {"y": (T, N, H), "hn": (N, H)}
    if cell == "lstm":
        shapes, results = {**shapes, "c0": (N, H)}, {**results, "cn": (N, H)}
    return tuple({name: rng.normal(size=shape) for name, shape in pair.items()} for pair in (shapes, results))


def ours(cell: str, a: dict[str, Array], d: dict[str, Array], backend: str, **options: Any) -> dict[str, Array]:
    arrays = [a.get(name) for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")]
    tape = gw.functional.forward(cell, *arrays, **options, backend=backend)
    grads = gw.functional.backward(tape, d["y"], d["hn"], d.get("cn"))._asdict()
    results = {"y": tape.y, "hn": tape.hn, "cn": tape.cn, **grads}
    return {name: array for name, array in results.items() if array is not None}


def theirs(
    keras: Any,
    cell: str,
    a: dict[str, Array],
    d: dict[str, Array],
    steps: Array | None = None,
    reverse: bool = False,
    x_mask: Array | None = None,
    h_mask: Array | None = None,
) -> dict[str, Array]:
    """The same results of Keras' layer; steps [T, N] is its mask, x_mask [N, I] and h_mask [N, H] its dropout's."""
    kind, order, arguments = LAYERS[cell]
    layer = getattr(keras.layers, kind)(
        H, **arguments, return_sequences=True, return_state=True, zero_output_for_mask=True, go_backwards=reverse,
        dropout=0.5 * (x_mask is not None), recurrent_dropout=0.5 * (h_mask is not None), dtype="float64",
    )  # fmt: skip
    layer.build((N, T, I))

    def gates(array: Array) -> Array:
        parts = np.split(array, len(order))  # this order is its own inverse
        return np.concatenate([parts[k] for k in order])

    # One bias where b_ih and b_hh only meet as a sum, two where r acts on b_hh's
    biases = [gates(a["b_ih"]), gates(a["b_hh"])]
    layer.set_weights([gates(a["w_ih"]).T, gates(a["w_hh"]).T, np.stack(biases) if cell == "gru" else sum(biases)])
    for name, mask in (("_dropout_mask", x_mask), ("_recurrent_dropout_mask", h_mask)):
        if mask is not None:  # what it would draw at the first step: one for each gate, unless the cell says otherwise
            count = getattr(layer.cell, "dropout_mask_count", None)
            mask = torch.tensor(mask)
            setattr(layer.cell, name, [mask] * count if count else mask)
    leaves = {name: torch.tensor(a[name], requires_grad=True) for name in ("x", "h0", "c0") if name in a}
    y, *state = layer(
        leaves["x"].transpose(0, 1), initial_state=[leaves[name] for name in ("h0", "c0") if name in a],
        mask=None if steps is None else torch.tensor(steps.T), training=True,
    )  # fmt: skip
    y = (y.flip(1) if reverse else y).transpose(0, 1)
    results = {"y": y, **dict(zip(("hn", "cn"), state))}
    weights = [variable.value for variable in layer.trainable_variables]
    loss = sum((results[name] * torch.tensor(gradient)).sum() for name, gradient in d.items())
    *grads, dw_ih, dw_hh, db = torch.autograd.grad(loss, [*leaves.values(), *weights])
    out = {name: tensor.detach().numpy() for name, tensor in results.items()}
    out |= {f"d{name}": gradient.numpy() for name, gradient in zip(leaves, grads)}
    db_ih, db_hh = db if cell == "gru" else (db, db)
    return out | {
        "dw_ih": gates(dw_ih.numpy().T), "dw_hh": gates(dw_hh.numpy().T),
        "db_ih": gates(db_ih.numpy()), "db_hh": gates(db_hh.numpy()),
    }  # fmt: skip


def assert_same(mine: dict[str, Array], keras: dict[str, Array]) -> None:
    """All results; to the digits of float32, in which Keras multiplies matrices on PyTorch, whatever its dtype."""
    assert mine.keys() == keras.keys()
    for name, array in keras.items():
        np.testing.assert_allclose(mine[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)


each_cell = pytest.mark.parametrize("cell", LAYERS)
either_way = pytest.mark.parametrize("reverse", [False, True])


@either_way
@each_cell
def test_a_layer_is_keras_layer(cell: str, reverse: bool, keras: Any) -> None:
    """Of the cells that torch.nn has, this says that the oracle itself is read right."""
    a, d = draw(cell)
    want = theirs(keras, cell, a, d, reverse=reverse)
    for backend in BACKENDS:
        assert_same(ours(cell, a, d, backend, reverse=reverse), want)


@either_way
@each_cell
def test_lengths_are_a_mask_of_the_first_steps(cell: str, reverse: bool, keras: Any) -> None:
    a, d = draw(cell)
    want = theirs(keras, cell, a, d, PADDED, reverse)
    for backend in BACKENDS:
        assert_same(ours(cell, a, d, backend, lengths=LENGTHS, reverse=reverse), want)


@either_way
@each_cell
def test_a_mask_with_holes_leaves_shorter_sequences(cell: str, reverse: bool, keras: Any) -> None:
    """A masked step leaves the state as it was: the other steps of a row are a sequence of their own, with a length."""
    a, d = draw(cell)
    want = theirs(keras, cell, a, d, HOLES, reverse)
    order = np.argsort(~HOLES, axis=0, kind="stable")[:, :, None]  # the other steps first, in their order
    moved = [{**arrays, name: np.take_along_axis(arrays[name], order, 0)} for arrays, name in ((a, "x"), (d, "y"))]
    for backend in BACKENDS:
        mine = ours(cell, *moved, backend, lengths=HOLES.sum(axis=0), reverse=reverse)
        mine |= {name: np.take_along_axis(mine[name], np.argsort(order, axis=0), 0) for name in ("y", "dx")}
        assert_same(mine, want)


@pytest.mark.parametrize("of_h, of_x", [(True, False), (False, True), (True, True)])
@each_cell
def test_dropout_with_given_masks(cell: str, of_h: bool, of_x: bool, keras: Any) -> None:
    """Of h on its way into the product, under one mask for all gates (Keras draws one for each); of x at every step."""
    (a, d), rng = draw(cell), np.random.default_rng(2)
    h_mask = 2.0 * rng.integers(0, 2, (N, H)) if of_h else None
    x_mask = 2.0 * rng.integers(0, 2, (N, I)) if of_x else None
    want = theirs(keras, cell, a, d, PADDED, x_mask=x_mask, h_mask=h_mask)
    scale = np.ones((N, I)) if x_mask is None else x_mask
    for backend in BACKENDS:
        mine = ours(cell, {**a, "x": a["x"] * scale}, d, backend, h_mask=h_mask, lengths=LENGTHS)
        assert_same({**mine, "dx": mine["dx"] * scale}, want)
