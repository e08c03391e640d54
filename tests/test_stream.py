"""Streams: one step a call on a snapshot of a layer, the same bits as the layer's own steps."""

from __future__ import annotations

import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gatewise as gw
from gatewise.layers import Layer

T, N, I, H = 5, 3, 4, 19  # H fills no register of any arch


def numbers(shape: tuple[int, ...], seed: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def as_tuple(state: Any) -> tuple[np.ndarray, ...]:
    return state if isinstance(state, tuple) else (state,)


def assert_same(a: Any, b: Any) -> None:
    for mine, other in zip(as_tuple(a), as_tuple(b)):
        assert mine.dtype == other.dtype and np.array_equal(mine, other, equal_nan=True)


def steps_of(layer: Layer, xs: np.ndarray, state: Any = None) -> tuple[list[np.ndarray], Any]:
    """The layer's own forward pass, a step a call."""
    ys, time = [], int(layer.batch_first)
    for x in xs:
        y, state, _ = layer.forward(np.expand_dims(x, time), state, training=False)
        ys.append(y.squeeze(time))
    return ys, state


# Options that not every cell has; what is random or of memory changes nothing here.
SPECIAL = [
    ("lstm", {"proj_size": 7}),
    ("lstm", {"proj_size": 21, "num_layers": 3, "zoneout": (0.2, 0.4), "cell_clip": 0.1}),
    ("lstm_peephole", {"cell_clip": 0.05, "num_layers": 2, "batch_first": True, "save": "states"}),
    ("lstm_norm", {"zoneout": (0.0, 0.3), "num_layers": 2, "weight_dropout": 0.5}),
    ("gru", {"zoneout": 0.3, "num_layers": 2, "recurrent_dropout": 0.5, "input_dropout": 0.5}),
    ("gru_reset_before", {"zoneout": 0.3, "dtype": np.float64, "batch_first": True}),
]


@pytest.mark.parametrize("cell, options", [
    *((cell, options) for cell in gw.cells() for options in (
        {}, {"num_layers": 3, "dropout": 0.5}, {"num_layers": 2, "dtype": np.float64}, {"num_threads": 3},
    )),
    *((cell, {"bias": False}) for cell, traits in gw.cells().items() if not traits["normed"]),
    *SPECIAL,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("size", [(1, 1), (N, H), (7, 130), (2, 300)], ids=str)
def test_steps_are_the_layers_own_to_the_bit(cell: str, size: tuple[int, int], options: Any, arch: str) -> None:
    batch, hidden = size
    options = {**options, "proj_size": min(options.get("proj_size", 0), hidden)}
    layer = Layer(cell, I, hidden, random_state=0, **options)
    xs = numbers((T, batch, I), 1, layer.dtype)
    stream = layer.stream(batch)
    sizes = (layer.output_size, hidden)[: 1 + layer.has_c]
    start = tuple(numbers((layer.num_layers, batch, size), 2 + k, layer.dtype) for k, size in enumerate(sizes))
    for state in (None, start if layer.has_c else start[0], None):  # a stream may be used again and again
        stream.reset(state)
        ys, final = steps_of(layer, xs, state)
        for x, y in zip(xs, ys):
            assert_same(stream.step(x), y)
        assert_same(stream.state, final)


def test_infinite_weights_meet_no_state_before_the_first_step() -> None:
    """Zeros that nobody gave are not multiplied: infinity times 0 would be NaN."""
    layer = gw.LSTM(I, H, random_state=0)
    layer.parameters["weight_hh_l0"][3, 5] = np.inf
    xs = numbers((2, 1, I), 1)
    stream = layer.stream()
    for y, x in zip(steps_of(layer, xs)[0], xs):
        assert_same(stream.step(x), y)


def test_a_stream_is_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the weights nor the arch of later moments reach it."""
    layer, xs = gw.GRU(I, H, 2, random_state=0), numbers((T, N, I), 1)
    ys, _ = steps_of(layer, xs)
    stream = layer.stream(N)
    monkeypatch.setenv("GATEWISE_ARCH", "generic")
    for weight in layer.parameters.values():
        weight[...] = 7
    for x, y in zip(xs, ys):
        assert_same(stream.step(x), y)


@pytest.mark.parametrize("make", [gw.LSTM, gw.GRU])
def test_the_state_comes_out_as_a_copy_and_goes_in_as_one(make: Any) -> None:
    layer, xs = make(I, H, 2, random_state=0), numbers((2 * T, N, I), 1)
    _, state, _ = layer.forward(xs[:T], training=False)
    ys, final = steps_of(layer, xs[T:], state)
    stream = layer.stream(N)
    for kept in as_tuple(stream.state):
        assert not kept.any() and kept.shape == (2, N, H)
        kept[...] = np.nan
    stream.state = state
    for part in as_tuple(state):
        part[...] = np.nan
    for x, y in zip(xs[T:], ys):
        out = stream.step(x)
        assert_same(out, y)
        out[...] = np.nan  # the caller's to spoil: the state is elsewhere
    assert_same(stream.state, final)
    h, *c = as_tuple(final)
    if layer.has_c:  # either may be None: zeros
        stream.reset((h, None))
        assert_same(stream.state, (h, np.zeros_like(c[0])))
        stream.reset((None, c[0]))
        assert_same(stream.state, (np.zeros_like(h), c[0]))


def test_the_output_may_be_the_next_input() -> None:
    layer = gw.LSTM(H, H, 2, random_state=0)
    stream, other = layer.stream(N), layer.stream(N)
    fed_back, copied = numbers((N, H), 1), numbers((N, H), 1)
    for _ in range(T):
        fed_back, copied = stream.step(fed_back), other.step(copied).copy()
        assert_same(fed_back, copied)


def test_a_step_allocates_nothing() -> None:
    stream, x = gw.LSTM(64, 64, 2, num_threads=1).stream(4), np.ones((4, 64), np.float32)
    y = stream.step(x)
    tracemalloc.start()
    try:
        stream.step(x)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(100):
            assert stream.step(x) is y
        assert tracemalloc.get_traced_memory()[1] - before < 1024  # the loop's own objects; y alone is 1024 bytes
    finally:
        tracemalloc.stop()


def test_threads_cannot_spoil_a_stream() -> None:
    """A step in one thread while another is inside is refused, not mixed in: those that were done add up."""
    layer, x = gw.LSTM(256, 256, random_state=0, num_threads=1), numbers((32, 256), 1)
    stream, alone = layer.stream(32), layer.stream(32)
    stream.step(x)

    def step(_: int) -> bool:
        try:
            stream.step(x)
        except RuntimeError as error:
            assert str(error) == "stream: another thread is inside a step; give each thread a stream of its own"
            return False
        return True

    with ThreadPoolExecutor(3) as pool:
        done = 1 + sum(pool.map(step, range(60)))
    for _ in range(done):
        alone.step(x)
    assert_same(stream.state, alone.state)


def test_streams_of_several_threads_do_not_meet() -> None:
    layer, xs = gw.GRU(I, 200, random_state=0), numbers((4, 40, 8, I), 1)
    expected = [steps_of(layer, x)[1] for x in xs]

    def last(x: np.ndarray) -> np.ndarray:
        stream = layer.stream(8)
        for one in x:
            stream.step(one)
        return stream.state

    with ThreadPoolExecutor(4) as pool:
        list(map(assert_same, pool.map(last, xs), expected))


@pytest.mark.parametrize("x, sentence", [
    (np.zeros((N, I + 1), np.float32), "x: expected float32 (N, I) = (3, 4), C-contiguous; got float32 (3, 5)"),
    (np.zeros((1, I), np.float32), "x: expected float32 (N, I) = (3, 4), C-contiguous; got float32 (1, 4)"),
    (np.zeros((1, N, I), np.float32), "x: expected float32 (N, I) = (3, 4), C-contiguous; got float32 (1, 3, 4)"),
    (np.zeros((N, I)), "x: expected float32 (N, I) = (3, 4), C-contiguous; got float64 (3, 4)"),
    (np.zeros((I, N), np.float32).T,
     "x: expected float32 (N, I) = (3, 4), C-contiguous; got float32 (3, 4), not C-contiguous"),
    (None, "x: expected float32 (N, I) = (3, 4), C-contiguous; got NoneType"),
    ([[0.0] * I] * N, "x: expected float32 (N, I) = (3, 4), C-contiguous; got list"),
])  # fmt: skip
def test_a_bad_input_is_named_and_changes_nothing(x: Any, sentence: str) -> None:
    stream = gw.LSTM(I, H, random_state=0).stream(N)
    y = stream.step(np.ones((N, I), np.float32)).copy()
    before = stream.state
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        stream.step(x)
    assert_same(stream.state, before)
    assert (y != stream.step(np.ones((N, I), np.float32))).any()


def test_bad_states_are_named_and_change_nothing() -> None:
    stream, h = gw.LSTM(I, H, random_state=0).stream(N), np.ones((1, N, H), np.float32)
    stream.step(np.ones((N, I), np.float32))
    before = stream.state
    for bad, words in (
        (h, r"^state: expected a pair \(h, c\), each \(L\*D, N, H\); got ndarray"),
        ((h, h[0]), r"^state: expected c of shape \(L\*D, N, H\) with L\*D = 1; got \(3, 19\)"),
        ((h, h[:, :1]), r"^c: expected float32 \(L, N, H\) = \(1, 3, 19\), C-contiguous; got float32 \(1, 1, 19\)"),
        ((h.astype(np.float64), h), r"^h: expected float32 \(L, N, H\) = \(1, 3, 19\), .*; got float64"),
    ):
        with pytest.raises(ValueError, match=words):
            stream.reset(bad)
        assert_same(stream.state, before)


def test_layers_that_cannot_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^stream: expected a layer of one direction; got bidirectional=True"):
        gw.LSTM(I, H, bidirectional=True).stream()
    for batch_size in (0, -1, 2.0, "2", None):
        with pytest.raises(ValueError, match=f"^batch_size: expected an integer of 1 or more; got {batch_size!r}$"):
            gw.LSTM(I, H).stream(batch_size)
    with pytest.raises(ValueError, match=r"^stream: expected a layer of float32 or float64; got float16$"):
        gw.LSTM(I, H, dtype="float16").stream()
    with pytest.raises(ValueError, match=r"^num_threads: expected a whole number from 1 to 1024; got 0$"):
        gw.LSTM(I, H, num_threads=0).stream()
    pytest.importorskip("numba")
    with pytest.raises(ValueError, match=r"^stream: expected the backend 'cpu', .*; got 'reference'$"):
        gw.LSTM(I, H, backend="reference").stream()
