"""Every bad input is one sentence: which argument, what was expected, what came.

Nothing of the caller's is touched. The sentences are the same for every backend: one door checks them all.
"""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gatewise as gw
from gatewise import _core, functional
from gatewise.backends import choose_num_threads

T, N, I, H = 4, 3, 5, 6
CALLS = {"rnn_tanh": gw.rnn, "lstm": gw.lstm, "gru": gw.gru}
GATES = {"rnn_tanh": 1, "lstm": 4, "gru": 3}


def arguments(cell="lstm", dtype=np.float32):
    rng = np.random.default_rng(3)
    rows = GATES[cell] * H
    shapes = {
        "x": (T, N, I),
        "w_ih": (rows, I),
        "w_hh": (rows, H),
        "b_ih": (rows,),
        "b_hh": (rows,),
        "h0": (N, H),
    }
    if cell == "lstm":
        shapes["c0"] = (N, H)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def incoming(cell="lstm", dtype=np.float32):
    rng = np.random.default_rng(4)
    shapes = {"dy": (T, N, H), "dhn": (N, H)}
    if cell == "lstm":
        shapes["dcn"] = (N, H)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def bits(arrays):
    return {name: a.tobytes() if isinstance(a, np.ndarray) else a for name, a in arrays.items()}


def refused(call, kwargs, *words, error=ValueError):
    """The call fails with one sentence that has all the words (regular expressions); its arguments stay."""
    before = bits(kwargs)
    with pytest.raises(error) as caught:
        call(**kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence and "incompatible function arguments" not in sentence
    for word in words:
        assert re.search(word, sentence), f"{word!r} is not in: {sentence}"
    assert bits(kwargs) == before
    return sentence


@pytest.fixture(params=CALLS)
def cell(request):
    return request.param


NAMES = ["x", "w_ih", "w_hh", "b_ih", "b_hh", "h0"]
SYMBOLS = {
    "x": r"\(T, N, I\)", "w_ih": r"\(4\*H, I\)", "w_hh": r"\(4\*H, H\)",
    "b_ih": r"\(4\*H,?\)", "b_hh": r"\(4\*H,?\)", "h0": r"\(N, H\)", "c0": r"\(N, H\)",
    "dy": r"\(T, N, H\)", "dhn": r"\(N, H\)", "dcn": r"\(N, H\)",
}  # fmt: skip


# ---- arrays: dtype, shape, layout, kind --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["f8", "f2", "i4", "i8", "c8", ">f4", "?", "O"])
def test_one_array_of_another_dtype(cell, name, dtype):
    kwargs = arguments(cell)
    kwargs[name] = kwargs[name].astype(dtype)
    wrong = {"f8": "float64", "f2": "float16", "i4": "int32", "i8": "int64", "c8": "complex64", ">f4": ">f4",
             "?": "bool", "O": "object"}[dtype]  # fmt: skip
    if name == "x" and dtype == "f8":  # x sets the dtype, so the first of the others is the odd one
        refused(CALLS[cell], kwargs, "^w_hh: expected float64 ", "got float32 ")
    elif name == "x" and dtype == "f2":  # an x of 16 bits says that they are only storage
        assert CALLS[cell](**kwargs)[0].dtype == np.float16
    else:
        refused(CALLS[cell], kwargs, f"^{name}: expected float32 ", f"got {wrong}")


@pytest.mark.parametrize("name", [*NAMES, "c0"])
def test_a_wrong_shape_is_answered_with_letters_and_numbers(name):
    for change in (
        lambda a: a[:-1].copy(),
        lambda a: a[None],
        lambda a: a[..., :-1].copy(),
        lambda a: a.ravel()[:1][0],
    ):
        kwargs = arguments()
        right, wrong = kwargs[name].shape, change(kwargs[name])
        if name == "x" and wrong.ndim == 3:
            continue  # x itself says what T, N and I are: then another array is the odd one
        if name in ("w_ih", "w_hh") and wrong.ndim == 2:
            continue  # as does w_hh for H; see below
        kwargs[name] = wrong
        numbers = re.escape(", ".join(map(str, right)))
        got = re.escape(", ".join(map(str, wrong.shape)))
        if name == "x":
            refused(gw.lstm, kwargs, r"^x: expected .*\(T, N, I\)", rf"got .*\({got}\)")
        else:
            words = [SYMBOLS[name], rf"got .*\({got},?\)"]
            if name != "w_hh":  # H itself comes from w_hh
                words.append(rf"= \({numbers},?\)")
            refused(gw.lstm, kwargs, rf"^{name}: expected ", *words)


def test_weights_that_do_not_belong_together(cell):
    G, call = GATES[cell], CALLS[cell]
    good = arguments(cell)
    wide = np.zeros((G * H, I + 1), np.float32)
    refused(call, {**good, "w_ih": wide}, "^w_ih: expected", rf"\({G * H}, {I}\)", rf"got .*\({G * H}, {I + 1}\)")
    short = np.zeros((G * H - 1, I), np.float32)
    refused(call, {**good, "w_ih": short}, "^w_ih: expected", rf"\({G * H}, {I}\)", rf"got .*\({G * H - 1}, {I}\)")
    refused(call, {**good, "x": good["x"][:, :, :-1].copy()}, "^w_ih: expected", rf"\({G * H}, {I - 1}\)")
    square = np.zeros((G * H + 1, H), np.float32)
    refused(call, {**good, "w_hh": square}, "^w_hh: expected", r"H\)", rf"got .*\({G * H + 1}, {H}\)")
    if G > 1:  # the weights of an RNN are no LSTM's
        refused(call, {**good, "w_hh": np.zeros((H, H), np.float32)}, "^w_hh: expected", rf"got .*\({H}, {H}\)")


LAYOUTS = {
    "every other row of a larger array": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every other column": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "Fortran order": np.asfortranarray,
    "reversed": lambda a: a[::-1],
    "transposed": lambda a: a.T.copy().T,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("name", [*NAMES, "c0"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_array_that_is_not_contiguous(name, layout):
    kwargs = arguments()
    kwargs[name] = LAYOUTS[layout](kwargs[name])
    if kwargs[name].flags.c_contiguous:
        assert kwargs[name].ndim == 1  # a vector is in C and in Fortran order
        return
    if name != "x":
        refused(gw.lstm, kwargs, f"^{name}: expected float32 ", "C-contiguous", "got .*(strided|contiguous)")
    elif kwargs[name].strides[-1] == kwargs[name].itemsize:  # the rows of x may lie anywhere
        copied = gw.lstm(**{**kwargs, name: kwargs[name].copy()})
        assert np.array_equal(gw.lstm(**kwargs)[0], copied[0])
    else:
        words = "^x: expected float32 or float64 ", "last axis contiguous", "got .*last axis not contiguous"
        refused(gw.lstm, kwargs, *words)


class OnTheGpu:
    """What CuPy's and Numba's device arrays look like from outside."""

    def __init__(self, shape):
        self.shape, self.dtype, self.ndim = shape, np.dtype(np.float32), len(shape)
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": (0, False), "version": 3}


@pytest.mark.parametrize("name", [*NAMES, "c0"])
@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda a: a.tolist(), "list"),
        (lambda a: tuple(a), "tuple"),
        (lambda a: object(), "object"),
        (lambda a: "weights", "str"),
        (lambda a: 1.0, "float"),
        (lambda a: SimpleNamespace(shape=a.shape, dtype=a.dtype, ndim=a.ndim), "SimpleNamespace"),
        (lambda a: OnTheGpu(a.shape), "OnTheGpu"),
    ],
)
def test_something_that_is_no_array(cell, name, make, kind):
    kwargs = arguments(cell)
    if name not in kwargs:
        return
    kwargs[name] = make(kwargs[name])
    refused(CALLS[cell], kwargs, f"^{name}: expected float32 ", f"got .*{kind}", error=(ValueError, TypeError))


@pytest.mark.parametrize("name", ["x", "w_ih", "w_hh"])
def test_none_where_an_array_must_be(cell, name):
    refused(
        CALLS[cell],
        {**arguments(cell), name: None},
        f"^{name}: expected float32 ",
        "got .*None",
        error=(ValueError, TypeError),
    )


def test_an_array_on_a_device_is_called_that():
    kwargs = arguments()
    kwargs["w_ih"] = OnTheGpu(kwargs["w_ih"].shape)
    refused(gw.lstm, kwargs, "^w_ih: expected", "got .*(GPU|CUDA|cuda|device)", error=(ValueError, TypeError))


@pytest.mark.parametrize("name", NAMES)
def test_a_torch_tensor_is_not_taken_for_an_array(name):
    torch = pytest.importorskip("torch")
    kwargs = arguments()
    kwargs[name] = torch.from_numpy(kwargs[name])
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected float32 .*; got .*Tensor"):
        gw.lstm(**kwargs)


def test_biases_are_independent(cell):
    """b_ih without b_hh and the other way round is no mistake: each may be left out."""
    kwargs = arguments(cell)
    zero = np.zeros_like(kwargs["b_ih"])
    for name in ("b_ih", "b_hh"):
        left_out = CALLS[cell](**{**kwargs, name: None})[0]
        assert np.array_equal(left_out, CALLS[cell](**{**kwargs, name: zero})[0])


def test_a_cell_state_for_a_cell_without_one():
    for call in (gw.gru, gw.rnn):
        name = "gru" if call is gw.gru else "rnn_tanh"
        kwargs = {**arguments(name), "c0": np.zeros((N, H), np.float32)}
        with pytest.raises(TypeError, match="c0"):
            call(**kwargs)
        with pytest.raises((ValueError, TypeError), match=r"^c0: expected None.*; got "):
            functional.forward(name, **kwargs)


# ---- options: of a cell, of a step, of the layout ------------------------------------------------------------

PEEPHOLES = np.zeros(3 * H, np.float32)
NORMED = {"b_ih": None, "b_hh": None, "w_unit": np.ones(14 * H, np.float32)}
FLAGS = np.zeros((T, N), bool)


def f4(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    "cell, options, words",
    [
        ("lstm", {"w_unit": PEEPHOLES}, ["^w_unit: expected None", "got "]),
        ("lstm_peephole", {}, ["^w_unit: expected an array; got None"]),
        ("lstm_peephole", {"w_unit": f4(2 * H)}, [r"^w_unit: expected float32 \(3\*H,\) = \(18,\)", r"got .*\(12,\)"]),
        ("lstm_norm", {"w_unit": f4(14 * H)}, ["^b_ih: expected None", "w_unit"]),
        ("lstm_norm", {**NORMED, "w_hr": f4(2, H)}, ["^w_hr: expected None", "lstm_norm"]),
        ("gru", {"w_hr": f4(2, H)}, ["^w_hr: expected None", "gru"]),
        ("lstm", {"w_hr": f4(H + 1, H)}, [r"^w_hr: expected .*\(R, H\)", r"got \(7, 6\)"]),
        ("lstm", {"w_hr": f4(2, H)}, [r"^w_hh: expected float32 \(4\*H, R\) = \(24, 2\)", r"got .*\(24, 6\)"]),
        ("lstm", {"h_mask": f4(N, H + 1)}, [r"^h_mask: expected float32 \(N, H\)", "got "]),
        ("lstm", {"h_mask": FLAGS}, ["^h_mask: expected float32", "got bool"]),
        ("lstm", {"reset": FLAGS.astype(int)}, [r"^reset: expected bool \(T, N\) = \(4, 3\)", "got int64"]),
        ("lstm", {"reset": FLAGS.T.copy()}, [r"^reset: expected bool \(T, N\)", r"got bool \(3, 4\)"]),
        ("lstm", {"reset": FLAGS, "reset_to": "h0"}, ["^reset_to: expected one of 'initial', 'zero'; got 'h0'"]),
        ("lstm", {"zoneout_h": 1.0}, [r"^zoneout_h: expected a probability in \[0, 1\); got 1.0"]),
        ("lstm", {"zoneout_c": -0.1}, ["^zoneout_c: expected a probability", "got -0.1"]),
        ("lstm", {"zoneout_c": "much"}, ["^zoneout_c: expected a probability", "got 'much'"]),
        ("lstm", {"zoneout_h": np.nan}, ["^zoneout_h: expected a probability", "got nan"]),
        ("gru", {"zoneout_c": 0.1}, ["^zoneout_c: expected 0, for the cell has no c; got 0.1"]),
        ("lstm", {"seed": -1}, [r"^seed: expected a whole number from 0 to 2\*\*64 - 1; got -1"]),
        ("lstm", {"seed": 2**64}, ["^seed: expected a whole number", "got 18446744073709551616"]),
        ("lstm", {"seed": 1.5}, ["^seed: expected a whole number", "got 1.5"]),
        ("lstm", {"seed": True}, ["^seed: expected a whole number", "got True"]),
        ("lstm", {"cell_clip": 0}, ["^cell_clip: expected a number above 0; got 0"]),
        ("lstm", {"cell_clip": np.inf}, ["^cell_clip: expected a number above 0; got inf"]),
        ("gru", {"cell_clip": 1.0}, ["^cell_clip: expected None, for the cell has no c; got 1.0"]),
        ("lstm", {"save": "some"}, ["^save: expected one of 'all', 'states', 'checkpoints'; got 'some'"]),
        ("lstm", {"save": 3}, ["^save: expected one of ", "got 3"]),
        ("lstm", {"batch_first": 1}, ["^batch_first: expected True or False; got 1"]),
        ("lstm", {"batch_sizes": np.array([3, 3])}, [r"^x: expected .*\(rows, I\)", r"got float32 \(4, 3, 5\)"]),
        ("lstm", {"batch_sizes": np.array([3]), "batch_first": True}, ["^batch_first: expected False", "batch_sizes"]),
        ("lstm", {"batch_sizes": np.array([3]), "lengths": np.array([1])}, ["^lengths: expected None", "batch_sizes"]),
        ("lstm", {"batch_sizes": np.array([2, 3])}, ["^batch_sizes: expected .*none larger", "got 3 at step 1"]),
        ("lstm", {"batch_sizes": np.array([2, 0])}, ["^batch_sizes: expected .*at least 1", "got 0 at step 1"]),
        (
            "lstm",
            {"batch_sizes": np.array([2, 1]), "x": f4(4, I), "h0": None, "c0": None},
            ["^batch_sizes: .*add up to the rows of x, 4; got 3"],
        ),
        ("lstm", {"batch_sizes": np.array([2**62, 2**62]), "x": f4(4, I)}, ["^(batch_sizes|h0): expected"]),
        (
            "lstm",
            {"batch_sizes": np.array([2**62, 2**62]), "x": f4(4, I), "h0": None, "c0": None},
            ["^batch_sizes: .*rows of x, 4"],
        ),
        ("lstm", {"batch_sizes": [3, 1]}, ["^batch_sizes: expected int64", "got list"]),
        ("indrnn_relu", {}, ["^w_hh: expected None, for the cell has no w_hh; got numpy"]),
        ("indrnn_relu", {"w_hh": None, "h_mask": f4(N, H)}, ["^h_mask: expected None"]),
    ],
)
def test_an_option_that_does_not_fit(cell, options, words):
    kwargs = {**arguments("lstm" if cell.startswith("lstm") else "gru" if cell == "gru" else "rnn_tanh"), **options}
    if cell == "indrnn_relu":
        kwargs.setdefault("w_unit", f4(H))
    for backend in ("cpu", "reference"):
        refused(functional.forward, {"cell": cell, **kwargs, "backend": backend}, *words)


def test_an_option_that_there_is_not():
    refused(gw.lstm, {**arguments(), "peephole": True}, "peephole", "no such option", "zoneout_h", error=TypeError)


@pytest.mark.parametrize("bad, words", [
    ({"x": f4(2, 3)}, [r"^x: expected float32 \(T, N, width\)", r"got float32 \(2, 3\)"]),
    ({"x": np.zeros((2, 3, 4), int)}, ["^x: expected float32", "got int64"]),
    ({"p": 1.0}, ["^p: expected a probability", "got 1.0"]), ({"seed": -1}, ["^seed: expected a whole number"]),
    ({"same_at_every_step": 1}, ["^same_at_every_step: expected True or False"]),
    ({"x": f4(3, 4), "batch_sizes": np.array([2, 2])}, ["^batch_sizes: .*add up to the rows of x, 3; got 4"]),
    ({"x": f4(3, 4), "batch_sizes": np.array([4, -1])}, ["^batch_sizes: .*at least 1", "got -1 at step 1"]),
])  # fmt: skip
def test_the_door_of_dropout(bad, words):
    refused(_core.dropout, {"x": f4(2, 3, 4), "p": 0.5, "seed": 1, **bad}, *words)


# ---- lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, words",
    [
        (np.array([1.0, 2.0, 3.0]), ["int64", "got float64"]),
        (np.array([1.0, np.nan, 3.0]), ["int64", "got float64"]),
        (np.array([1, 2, 3], np.int32), ["int64", "got int32"]),
        (np.array([1, 2, 3], np.uint64), ["int64", "got uint64"]),
        (np.array([True, False, True]), ["int64", "got bool"]),
        (np.array([1, 2, 3]).astype(">i8"), ["int64", "got >i8"]),
        (np.array([1, 2]), [r"\(N,?\)", r"\(3,?\)", r"got .*\(2,?\)"]),
        (np.array([[1, 2, 3]]), [r"\(N,?\)", r"got .*\(1, 3\)"]),
        (np.array(2), [r"\(N,?\)", "got "]),
        (np.array([1, 0, 2, 0, 3, 0])[::2], ["contiguous"]),
        ([1, 2, 3], ["int64", "got .*list"]),
        (3, ["int64", "got .*int"]),
        (np.array([1, -1, 3]), ["0", rf"{T}", "got -1 for sequence 1"]),
        (np.array([1, 2, T + 1]), ["0", rf"{T}", rf"got {T + 1} for sequence 2"]),
        (np.array([1, 2, np.iinfo(np.int64).max]), ["0", rf"{T}", "got .*9223372036854775807"]),
        (np.array([np.iinfo(np.int64).min, 2, 3]), ["0", rf"{T}", "got .*-9223372036854775808"]),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_lengths(lengths, words, backend):
    if backend == "reference":
        pytest.importorskip("numba")
    kwargs = {**arguments(), "lengths": lengths, "backend": backend}
    refused(gw.lstm, kwargs, "^lengths: expected", *words, error=(ValueError, TypeError))


# ---- sizes -------------------------------------------------------------------------------------------------


def test_no_hidden_units(cell):
    G = GATES[cell]
    kwargs = {
        "x": np.zeros((T, N, I), np.float32),
        "w_ih": np.zeros((0, I), np.float32),
        "w_hh": np.zeros((0, 0), np.float32),
    }
    sentence = refused(CALLS[cell], kwargs, "^w_hh: expected", "got ")
    assert G and ("H" in sentence)


def test_no_inputs(cell):
    kwargs = arguments(cell)
    kwargs["x"] = np.zeros((T, N, 0), np.float32)
    kwargs["w_ih"] = np.zeros((GATES[cell] * H, 0), np.float32)
    refused(CALLS[cell], kwargs, "^x: expected", "I", "got ")


def test_no_steps_and_no_sequences_are_fine(cell):
    kwargs = arguments(cell)
    y, state = CALLS[cell](**{**kwargs, "x": np.zeros((0, N, I), np.float32)})
    hn = state[0] if cell == "lstm" else state
    assert y.shape == (0, N, H) and np.array_equal(hn, kwargs["h0"])
    for name in ("h0", "c0"):
        if name in kwargs:
            kwargs[name] = np.zeros((0, H), np.float32)
    assert CALLS[cell](**{**kwargs, "x": np.zeros((T, 0, I), np.float32)})[0].shape == (T, 0, H)


@pytest.mark.parametrize("shape", [(0, N, I), (T, 0, I)], ids=["no steps", "no sequences"])
def test_a_tape_of_nothing_can_be_looked_into(cell, shape):
    kwargs = {name: array for name, array in arguments(cell).items() if name not in ("h0", "c0")}
    tape = functional.forward(cell, **{**kwargs, "x": np.zeros(shape, np.float32)})
    assert tape.gates.shape == (*shape[:2], GATES[cell], H)
    assert (tape.c is None) if cell != "lstm" else tape.c.shape == (*shape[:2], H)
    grads = functional.backward(tape, np.zeros((*shape[:2], H), np.float32))
    assert not grads.dw_hh.any() and grads.dx.shape == shape


# 2^46 of anything: more bytes than a 64-bit process can address, whatever the machine has and promises.


@pytest.mark.parametrize("shape", [(2**46, 0, 1), (0, 2**46, 1)], ids=["steps", "sequences"])
@pytest.mark.parametrize("training", [True, False])
def test_an_absurd_call_is_a_memory_error(cell, shape, training):
    """x has no element, so it exists; what the call would need does not fit, and nothing crashes."""
    G = GATES[cell]
    weights = {"w_ih": np.zeros((G, 1), np.float32), "w_hh": np.zeros((G, 1), np.float32)}
    with pytest.raises(MemoryError):
        functional.forward(cell, np.empty(shape, np.float32), **weights, training=training)


@pytest.mark.parametrize("sizes", [(2**24, 2**24), (1, 2**45), (2**62, 1)])
def test_an_absurd_layer_is_a_memory_error(sizes):
    with pytest.raises((MemoryError, ValueError), match=r"allocate|size|large"):
        gw.LSTM(*sizes)


# ---- names and numbers -------------------------------------------------------------------------------------


def test_an_unknown_backend_lists_the_known_ones(monkeypatch):
    refused(gw.lstm, {**arguments(), "backend": "gpu"}, "^backend: expected", "cpu", "reference", "got 'gpu'")
    monkeypatch.setenv("GATEWISE_BACKEND", "fpga")
    refused(gw.lstm, arguments(), "^GATEWISE_BACKEND: expected", "cpu", "reference", "got 'fpga'")
    assert gw.lstm(**arguments(), backend="cpu")[0].shape == (
        T,
        N,
        H,
    )  # the argument comes before the environment


def test_a_backend_that_is_not_a_name():
    refused(gw.lstm, {**arguments(), "backend": 3}, "^backend: expected", "got 3", error=(ValueError, TypeError))


def test_an_unknown_arch_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("GATEWISE_ARCH", "z80")
    refused(gw.lstm, arguments(), "^GATEWISE_ARCH: expected", "generic", "got 'z80'")


def test_an_unknown_nonlinearity():
    kwargs = {**arguments("rnn_tanh"), "nonlinearity": "sin"}
    refused(gw.rnn, kwargs, "^nonlinearity: expected", "tanh", "relu", "got 'sin'")


def test_an_unknown_cell():
    refused(functional.forward, {"cell": "lsmt", **arguments()}, "^cell: expected", *gw.cells(), "got 'lsmt'")


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**40, -(2**70), "2", 2.0, True, np.nan, np.ones(2, int)])
def test_num_threads(threads):
    kwargs = {**arguments(), "num_threads": threads}
    refused(
        gw.lstm,
        kwargs,
        "^num_threads: expected",
        "got .*" + re.escape(repr(threads)),
        error=(ValueError, TypeError),
    )


def test_a_numpy_integer_is_a_number_of_threads():
    assert gw.lstm(**arguments(), num_threads=np.int64(2))[0].shape == (T, N, H)


@pytest.mark.parametrize("value", ["garbage", "0", "-1", "2.5", "99999999999999999999", "1 2", "two"])
def test_the_environments_number_of_threads(monkeypatch, value):
    monkeypatch.setenv("GATEWISE_NUM_THREADS", value)
    refused(gw.lstm, arguments(), "^GATEWISE_NUM_THREADS: expected", f"got '?{value}'?$")


def test_the_number_of_threads_follows_the_environment_at_every_call(monkeypatch):
    """os.environ, and the cores that the process may use, as they are when the call is made."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores of this process",
    )
    for name in ("GATEWISE_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert choose_num_threads(None) == cores
    for omp, expected in (("3", 3), ("5,2", 5), (" 7 , 2", 7), ("0008", 8), ("1024", 1024)):
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        assert choose_num_threads(None) == (expected, "OMP_NUM_THREADS")
    for omp in ("two", ",2", "1 2", "-1", "1025", "0", "9" * 30):
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
        with pytest.raises(ValueError, match=r"^OMP_NUM_THREADS: expected a whole number from 1 to 1024; got "):
            gw.lstm(**arguments())
        assert gw.lstm(**arguments(), num_threads=1)[0].shape == (T, N, H)
    monkeypatch.setenv("GATEWISE_NUM_THREADS", "4")
    assert choose_num_threads(None) == (4, "GATEWISE_NUM_THREADS")
    assert choose_num_threads(2) == (2, "num_threads")
    monkeypatch.setenv("GATEWISE_NUM_THREADS", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert choose_num_threads(None) == cores
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert choose_num_threads(None) == (1, "cores of this process")
        finally:
            os.sched_setaffinity(0, allowed)


def test_words_where_a_truth_value_or_a_name_must_be():
    refused(
        gw.lstm,
        {**arguments(), "reverse": "no"},
        "^reverse: expected",
        "got 'no'",
        error=(ValueError, TypeError),
    )
    for cell in (3, None):
        kwargs = {"cell": cell, **arguments()}
        refused(functional.forward, kwargs, "^cell: expected", f"got {cell}", error=(ValueError, TypeError))


def test_bytes_are_described_without_reading_past_them():
    sentence = refused(gw.lstm, {**arguments(), "x": b"123"}, "^x: expected float32 ", "got ")
    assert sentence.endswith("(3,)")


def test_reverse_and_training_are_keywords():
    kwargs = arguments()
    with pytest.raises(TypeError):
        gw.lstm(*kwargs.values(), None, True)


# ---- backward ----------------------------------------------------------------------------------------------


def taped(cell="lstm", **options):
    return functional.forward(cell, **arguments(cell), **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["dy", "dhn", "dcn"])
def test_gradients_coming_in(name, backend):
    if backend == "reference":
        pytest.importorskip("numba")
    tape = taped(backend=backend)
    good = incoming()
    right = good[name]

    def call(**kwargs):
        return gw.lstm_backward(tape, **kwargs)

    numbers = re.escape(", ".join(map(str, right.shape)))
    refused(call, {**good, name: right.astype(np.float64)}, f"^{name}: expected float32 ", "got float64")
    refused(call, {**good, name: right[:-1].copy()}, f"^{name}: expected ", SYMBOLS[name], numbers, "got ")
    refused(call, {**good, name: right[..., None]}, f"^{name}: expected ", SYMBOLS[name], "got ")
    refused(call, {**good, name: right[::-1]}, f"^{name}: expected ", "C-contiguous", "got ")
    refused(call, {**good, name: np.asfortranarray(right)}, f"^{name}: expected ", "C-contiguous", "got ")
    refused(
        call,
        {**good, name: right.tolist()},
        f"^{name}: expected ",
        "got .*list",
        error=(ValueError, TypeError),
    )
    refused(
        call,
        {**good, name: OnTheGpu(right.shape)},
        f"^{name}: expected ",
        "got ",
        error=(ValueError, TypeError),
    )


def test_a_gradient_of_a_cell_state_for_a_cell_without_one():
    tape = taped("gru")
    dcn = np.zeros((N, H), np.float32)
    with pytest.raises((ValueError, TypeError), match="dcn"):
        gw.gru_backward(tape, dcn=dcn)
    with pytest.raises((ValueError, TypeError), match=r"^dcn: expected None.*; got "):
        functional.backward(tape, dcn=dcn)


def test_a_tape_of_another_cell():
    refused(
        gw.gru_backward,
        {"tape": taped("lstm")},
        "^tape: expected .*gru",
        "got .*lstm",
        error=(ValueError, TypeError),
    )
    refused(
        gw.lstm_backward,
        {"tape": taped("gru")},
        "^tape: expected .*lstm",
        "got .*gru",
        error=(ValueError, TypeError),
    )
    refused(
        gw.rnn_backward,
        {"tape": taped("gru")},
        "^tape: expected .*rnn",
        "got .*gru",
        error=(ValueError, TypeError),
    )
    assert gw.rnn_backward(taped("rnn_tanh")).dx.shape == (T, N, I)


def test_something_that_is_no_tape():
    for thing in (None, np.zeros(3), "tape"):
        refused(
            functional.backward,
            {"tape": thing},
            "^tape: expected .*",
            "got .*" + type(thing).__name__,
            error=(ValueError, TypeError),
        )


def test_a_layer_takes_the_tapes_of_its_own_forward_alone():
    x = np.zeros((T, N, I), np.float32)
    layer = gw.LSTM(I, H)
    y, _, none = layer.forward(x, training=False)
    others = {
        "forward .*training=True.*NoneType": none,
        "forward .*training=True.*ndarray": y,
        "this layer's .*got one of .*'gru'": gw.GRU(I, H).forward(x)[2],
        r"this layer's .*got one of \(2, 1, 'lstm', 6\)": gw.LSTM(I, H, num_layers=2).forward(x)[2],
        r"this layer's .*got one of \(1, 2, 'lstm', 6\)": gw.LSTM(I, H, bidirectional=True).forward(x)[2],
        r"this layer's .*got one of \(1, 1, 'lstm', 7\)": gw.LSTM(I, H + 1).forward(x)[2],
    }
    for sentence, tape in others.items():
        refused(layer.backward, {"tape": tape}, f"^tape: expected .*{sentence}")


def test_a_forward_pass_that_kept_nothing():
    tape = taped(training=False)
    refused(functional.backward, {"tape": tape}, "^tape: ", "training=True")
    for look in ("gates", "c"):
        with pytest.raises(ValueError, match=r"^tape: .*training=True"):
            getattr(tape, look)


@pytest.mark.parametrize("wanted", [["dw"], ["dx", "dhn"], "dy", ["dc0"], [3], 3])
def test_an_unknown_gradient_lists_the_known_ones(wanted):
    tape = taped("gru")
    kwargs = {"tape": tape, "wanted": wanted}
    refused(functional.backward, kwargs, "^wanted: expected", "dx", "dw_ih", "got ", error=(ValueError, TypeError))


def test_a_bias_that_was_not_given_has_the_gradient_of_zeros():
    kwargs = arguments()
    zeros = {**kwargs, "b_hh": np.zeros_like(kwargs["b_hh"])}
    found, expected = (
        functional.backward(functional.forward("lstm", **given), **incoming())
        for given in ({**kwargs, "b_hh": None}, zeros)
    )
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_the_arch_may_change_between_forward_and_backward(monkeypatch, arch):
    """A tape's layout belongs to the arch that wrote it, whatever the environment says later."""
    tape = taped()
    expected = functional.backward(tape, **incoming())
    gates = tape.gates
    monkeypatch.setenv("GATEWISE_ARCH", "generic")
    for name, grad in functional.backward(tape, **incoming())._asdict().items():
        assert np.array_equal(grad, getattr(expected, name)), name
    assert np.array_equal(tape.gates, gates)


# ---- the door itself: gatewise._core -----------------------------------------------------------------------


def core_arrays(problem):
    saved, states, scratch, _ = problem.sizes
    shapes = {"y": (T, N, H), "hn": (N, H), "cn": (N, H), "saved": (saved,), "states": (states,)}
    arrays = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
    return {**arrays, "scratch": np.empty(scratch, np.uint8)}


@pytest.fixture
def problem():
    return _core.Problem("lstm", **arguments(), lengths=None, reverse=False)


@pytest.mark.parametrize("name", ["y", "hn", "cn", "saved", "states", "scratch"])
def test_outputs_are_checked_before_anything_is_written(problem, name):
    def call(**arrays):
        _core.forward(problem, **arrays, threads=1)

    good = core_arrays(problem)
    call(**good)
    frozen = good[name].copy()
    frozen.flags.writeable = False
    kind = str(frozen.dtype)
    refused(call, {**good, name: frozen}, f"^{name}: expected {kind} ", "writable", "got .*read-only")
    refused(call, {**good, name: good[name][:-1].copy()}, f"^{name}: expected {kind} ", "got ")
    refused(
        call,
        {**good, name: np.repeat(good[name], 2, axis=0)[::2]},
        f"^{name}: expected",
        "got .*not C-contiguous",
    )
    refused(call, {**good, name: good[name].astype(np.float64)}, f"^{name}: expected {kind} ", "got float64")
    if name == "scratch":  # then it is memory of the thread's own
        wanted = good["y"].copy()
        good["y"][...] = np.nan
        call(**{**good, name: None})
        assert np.array_equal(good["y"], wanted)
    else:
        refused(call, {**good, name: None}, f"^({name}|states): expected", "got ")


@pytest.mark.parametrize("exchange", [None, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.int32])
def test_tensors_of_other_numbers_are_refused(kind, exchange):
    """Tensors, and DLPack's capsules, come through the same door as arrays, and are named as what they are."""
    lend = torch.utils.dlpack.to_dlpack if exchange is None else lambda t: t
    good = {name: torch.from_numpy(a) for name, a in arguments().items() if isinstance(a, np.ndarray)}
    names = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")

    def make(**other):
        return _core.Problem("lstm", *(lend({**good, **other}[n]) for n in names), None, False, None, exchange)

    assert len(good["x"]) == make().T
    for name in names:
        strided = good[name].repeat_interleave(2, -1)[..., ::2]
        if exchange is not None:
            assert make(**{name: strided}).T == make().T  # as PyTorch's own operations take it
        else:
            with pytest.raises(ValueError, match=f"^{name}: expected .*got float32 .*not .*contiguous"):
                make(**{name: strided})
        for bad, got in (
            (good[name].to(kind), f"got (torch.)?{str(kind).removeprefix('torch.')} "),
            (good[name][:0], r"got (torch.)?float32 \(0"),
            (good[name].to("meta"), "got a tensor on another device|got (torch.)?Tensor"),
        ):
            if name == "x" and len(bad) == 0:  # no steps: nothing to refuse
                continue
            if bad.is_meta and exchange is None:  # there are no capsules of them
                continue
            with pytest.raises(ValueError, match=f"^{name}: expected .*{got}"):
                make(**{name: bad})


def test_what_lends_tensors_is_checked():
    x, w = np.zeros((2, 1, 3), np.float32), np.zeros((4, 3), np.float32)
    for wrong in ("tensor", torch.utils.dlpack.to_dlpack(torch.zeros(1))):
        with pytest.raises(ValueError, match=r"tensors: expected .*exchange API.*got"):
            _core.Problem(
                "rnn_tanh", x, w, np.zeros((4, 4), np.float32), None, None, None, None, None, False, None, wrong
            )


@pytest.mark.parametrize("name", functional.Gradients._fields[:7])
def test_gradients_going_out_are_checked(problem, name):
    forward = core_arrays(problem)
    _core.forward(problem, **forward, threads=1)
    out = {"d" + key: np.zeros_like(array) for key, array in arguments().items()}
    taped = {key: forward[key] for key in ("y", "saved", "states")}
    scratch = np.empty(problem.sizes[3], np.uint8)

    def call(**outputs):
        gradients = [outputs.get(field) for field in functional.Gradients._fields]
        _core.backward(problem, **taped, **incoming(), gradients=gradients, scratch=scratch, threads=1)

    call(**out)
    call(**{**out, name: None})  # not wanted
    frozen = out[name].copy()
    frozen.flags.writeable = False
    refused(call, {**out, name: frozen}, f"^{name}: expected float32 ", "writable", "got .*read-only")
    refused(call, {**out, name: out[name][:-1].copy()}, f"^{name}: expected float32 ", "got ")
    refused(call, {**out, name: out[name].astype(np.float64)}, f"^{name}: expected float32 ", "got float64")
    refused(call, {**out, name: out[name].tolist()}, f"^{name}: expected float32 ", "got list")


@pytest.mark.parametrize("bad, got", [
    (np.zeros(3, np.int64), "got int64"), (np.zeros(2, np.uint64), r"got uint64 \(2,\)"), ([0, 0, 0], "got list"),
    (np.zeros((3, 1), np.uint64), r"got uint64 \(3, 1\)"), (np.zeros(6, np.uint64)[::2], "not C-contiguous"),
])  # fmt: skip
def test_ticks_are_three_numbers_to_add_to(bad, got):
    with pytest.raises(ValueError, match=rf"^ticks: expected uint64 \(3,\) = \(3,\), C-contiguous, writable; .*{got}"):
        functional._forward("lstm", **arguments(), ticks=bad)
    with pytest.raises(ValueError, match=rf"^ticks: expected uint64 \(3,\) = \(3,\), C-contiguous, writable; .*{got}"):
        functional._backward(taped(), ticks=bad)


def test_an_unaligned_array_is_refused():
    kwargs = arguments()
    raw = np.zeros(kwargs["w_hh"].nbytes + 1, np.uint8)
    kwargs["w_hh"] = raw[1:].view(np.float32).reshape(kwargs["w_hh"].shape)
    refused(gw.lstm, kwargs, "^w_hh: expected float32 ", "got .*not aligned")


def test_the_functions_own_door():
    for arguments_, word in (
        (("cosh", np.zeros(3), "generic"), "^function: expected one of exp, tanh, sigmoid; got 'cosh'$"),
        (("exp", np.zeros(3), "z80"), "^arch: expected one of .*generic; got 'z80'$"),
        (("exp", np.zeros(3, np.float16), "generic"), "^x: expected float32 .*; got float16"),
        (("exp", np.zeros((2, 2)), "generic"), "^x: expected float64 .*; got float64 "),
        (("exp", np.zeros(6)[::2], "generic"), "^x: expected .*; got float64 .*not C-contiguous"),
    ):
        with pytest.raises(ValueError, match=word):
            _core.evaluate(*arguments_)
