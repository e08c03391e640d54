"""gatewise on arrays of a CUDA device, without a GPU: the module that ships, src/cuda_module.cpp, built on the tests'
host runtime, and an array library of the tests' own, with memory and streams of that runtime, in the place of CuPy.
Every cell gives the CPU's results; what does not fit is refused with a sentence; nothing needs an array for longer than
it is kept, though streams run only when somebody waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import re
import subprocess
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gatewise as gw
import problems
from cuda_host import build
from gatewise import device, functional
from problems import Problem

ml_dtypes = pytest.importorskip("ml_dtypes")
pybind11 = pytest.importorskip("pybind11")
torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

ROOT = build.ROOT
CELLS = list(problems.GATES)


def extension() -> Path:
    """gatewise._cuda as the host compiler builds it, with the kernels of test_cuda_kernels.py."""
    sources = [ROOT / "src/cuda_module.cpp", ROOT / "cpp/cpu/order.cpp"]
    flags = [*build.FLAGS, *build.INCLUDES, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = [
        build.make(f"{source.stem}.o", [source, *build.headers(), *sorted((ROOT / "src").glob("*.hpp"))],
                   [build.COMPILER, *flags, "-fvisibility=hidden", "-O0", "-Wall", "-c", source])
        for source in sources
    ]  # fmt: skip
    objects += build.compiled(build.HERE / "layer_driver.cu", "native", None, ())
    return build.make("_cuda.so", objects, [build.COMPILER, *build.FLAGS, "-shared", *objects, "-ldl"])


class Runtime:
    """The host runtime inside the module: device memory and streams."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name, result, *arguments in (
            ("allocate", ctypes.c_void_p, ctypes.c_size_t), ("free", ctypes.c_int, ctypes.c_void_p),
            ("stream", ctypes.c_void_p), ("synchronize", ctypes.c_int, ctypes.c_void_p),
            ("place", None, ctypes.c_void_p, ctypes.c_int), ("driver", None, ctypes.c_int, ctypes.c_int),
            ("deferred", None, ctypes.c_int),
            ("copy", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p),
        ):  # fmt: skip
            function = getattr(self.library, f"cuda_host_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


class Array:
    """An array of the tests' library. Its block goes back to the pool with it."""

    def __init__(self, pool: Pool, shape: Any, dtype: Any) -> None:
        self.pool, self.shape, self.dtype = pool, tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.pointer, self.stream = pool.take(self.nbytes), pool.stream
        self.changed: dict[str, Any] = {}  # of its interface

    def __del__(self) -> None:
        self.pool.give_back(self.pointer, self.nbytes, self.stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = {"shape": self.shape, "typestr": self.dtype.str, "data": (self.pointer, False), "version": 3}
        return {**interface, "strides": None, "stream": None, **self.changed}

    def numbers(self) -> np.ndarray:
        """The memory as it is now, whatever streams have yet to do."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        memory = (ctypes.c_char * self.nbytes).from_address(self.pointer)
        return np.frombuffer(memory, self.dtype).reshape(self.shape)

    def get(self) -> np.ndarray:
        assert self.pool.runtime.synchronize(None) == 0
        return self.numbers().copy()

    def but(self, **changed: Any) -> Array:
        """Itself, with another interface."""
        self.changed = changed
        return self


class Pool:
    """Memory in the manner of CuPy's and PyTorch's. A block belongs to the stream that was current when it was taken.
    Given back, it is for others on that stream at once, whatever is waiting there: they write NaN to it."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.stream = runtime, 0
        self.blocks: set[int] = set()

    def take(self, nbytes: int) -> int:
        if not nbytes:
            return 0
        block: int = self.runtime.allocate(nbytes)
        self.blocks.add(block)
        return block

    def give_back(self, block: int, nbytes: int, stream: int) -> None:
        if block in self.blocks:
            self.runtime.copy(block, b"\xff" * nbytes, nbytes, stream)

    def array(self, numbers: Any) -> Any:
        """Copies to the device; what is no array of numbers stays as it is."""
        if not isinstance(numbers, np.ndarray):
            return numbers
        array = Array(self, numbers.shape, numbers.dtype)
        array.numbers()[...] = numbers
        return array

    def free(self) -> None:
        self.runtime.synchronize(None)
        while self.blocks:
            self.runtime.free(self.blocks.pop())


@pytest.fixture(scope="session")
def built() -> tuple[Any, Runtime]:
    if reason := build.missing():
        pytest.skip(reason)
    path = extension()
    # Not by the name of the module that ships: where that is loaded, pybind11 would return it.
    spec = importlib.util.spec_from_file_location("cuda_host._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, Runtime(path)


@pytest.fixture
def pool(built: tuple[Any, Runtime], monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Device memory, and gatewise as it is where the module is installed."""
    module, runtime = built
    pool = Pool(runtime)
    monkeypatch.setitem(sys.modules, "gatewise._cuda", module)

    def place_of(x: Any) -> device.Place:
        return device.Place(lambda shape, dtype: Array(x.pool, shape, dtype), object(), x.pool.stream)

    monkeypatch.setitem(device.LIBRARIES, Array.__module__, place_of)
    yield pool
    runtime.deferred(0)
    runtime.driver(13000, 1)
    pool.free()


HOST = ("lengths", "batch_sizes")  # what stays on the CPU


def placed(pool: Pool, inputs: Any) -> Any:
    """The inputs of a problem, on the device."""
    return inputs._replace(**{
        name: pool.array(value) for name, value in inputs._asdict().items() if name not in HOST
    })  # fmt: skip


def check(problem: Problem, results: dict[str, Any]) -> None:
    """Holds what came from the device to the CPU's results. Each may be off by the bound of `gatewise check`."""
    expected = problems.run(problem, problems.draw(problem), "cpu")
    assert results.keys() == expected.keys()
    shape = problem.T, problem.N, problem.I, problem.H
    for name, exact in expected.items():
        assert isinstance(results[name], Array)
        got = results[name].get()
        assert got.dtype == exact.dtype and got.shape == exact.shape, name
        bound = 2 * gw.check.bound(problem.cell, exact.dtype.name, shape, name) * max(1, np.abs(exact).max(initial=0))
        assert (np.abs(got - exact) <= bound).all(), (str(problem), name)


OPTIONS = ["train", "lengths,h0,reverse", "reset,mask,zoneout,nobias", "project,clip,packed", "infer,batch,h0"]


@pytest.mark.parametrize("dtype", problems.DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell(pool: Pool, cell: str, dtype: str) -> None:
    for options in OPTIONS:
        own = [option for option in options.split(",") if problems.fits(cell, [option])]
        problem = Problem.parse(f"{cell}:T4,N3,I5,H9:{dtype}:{','.join(own)}")
        check(problem, problems.run(problem, placed(pool, problems.draw(problem)), None))


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_norm", "indrnn_relu"])
def test_nothing_at_all(pool: Pool, cell: str) -> None:
    """No step, or no sequence: arrays without memory, whose pointers are null."""
    for shape in ("T0,N3,I5,H9", "T4,N0,I5,H9", "T0,N0,I1,H2"):
        problem = Problem.parse(f"{cell}:{shape}:f32:h0")
        check(problem, problems.run(problem, placed(pool, problems.draw(problem)), None))


@pytest.mark.parametrize("loop", ["stepwise", "persistent"])
def test_the_loop_that_the_environment_names(pool: Pool, monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    monkeypatch.setenv("GATEWISE_CUDA_LOOP", loop)
    problem = Problem.parse("gru:T4,N3,I5,H9:f32:h0")
    check(problem, problems.run(problem, placed(pool, problems.draw(problem)), None))
    if loop == "persistent":
        with pytest.raises(ValueError, match="loop: "):  # IndRNN has no product to keep
            problem = Problem.parse("indrnn_relu:T4,N3,I5,H9:f32:h0")
            problems.run(problem, placed(pool, problems.draw(problem)), None)


STORAGE = {"float16": (np.float16, 2.0**-10), "bfloat16": (ml_dtypes.bfloat16, 2.0**-7)}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("cell", ["lstm_peephole", "gru", "indrnn_relu"])
def test_16_bit_arrays(pool: Pool, cell: str, storage: str) -> None:
    """They are what the CPU makes of the same arrays: its float32 results to rounding, rounded to 16 bits, which may
    then differ by one place. Everything the caller gets has the dtype that it has there."""
    dtype, place = STORAGE[storage]
    problem = Problem.parse(f"{cell}:T4,N3,I5,H9:f32:lengths,h0")
    inputs = problems.draw(problem)
    inputs = inputs._replace(**{
        name: value.astype(dtype) for name, value in inputs._asdict().items()
        if isinstance(value, np.ndarray) and value.dtype == np.float32 and name not in ("b_ih", "dcn")
    })  # fmt: skip
    expected = problems.run(problem, inputs, "cpu")
    results = problems.run(problem, placed(pool, inputs), None)
    assert results.keys() == expected.keys()
    for name, exact in expected.items():
        got = results[name].get()
        assert got.dtype == exact.dtype and got.shape == exact.shape, name
        got, exact = got.astype(np.float32), exact.astype(np.float32)
        bound = (place if expected[name].dtype == dtype else 2.0**-18) * np.abs(exact) + 2.0**-20
        assert (np.abs(got - exact) <= bound).all(), name


# -- what does not fit -------------------------------------------------------------------------------------------------


def lstm_inputs(pool: Pool) -> dict[str, Any]:
    """The arguments of an LSTM, T = 4, N = 3, I = 5, H = 9."""
    inputs = placed(pool, problems.draw(Problem.parse("lstm:T4,N3,I5,H9:f32:h0")))
    return {name: getattr(inputs, name) for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")}


class Foreign:
    """An array on the device of a library that gatewise does not know."""

    __module__ = "elsewhere"

    def __init__(self, like: Array) -> None:
        self.__cuda_array_interface__ = like.__cuda_array_interface__


def at(address: int) -> dict[str, Any]:
    return {"data": (address, False)}


ON_CPU = np.ones((36, 9), np.float32)
BAD = {
    "dtype": ("w_ih", lambda a: a.pool.array(np.ones(a.shape)), "float32 .4.H, I. = .36, 5.*; got float64 .36, 5."),
    "integers": ("x", lambda a: a.pool.array(np.ones(a.shape, np.int32)), "float32 or float64 .*; got int32"),
    "half": ("w_hh", lambda a: a.pool.array(np.ones(a.shape, np.float16)), "float32 .*; got float16"),  # x is float32
    "half columns": (
        "x",
        lambda a: a.pool.array(np.ones(a.shape, np.float16)).but(strides=(2, 8, 24)),
        "float16, bfloat16 or float32 .*; got float16 .*not C-contiguous",
    ),
    "complex": ("x", lambda a: a.pool.array(np.ones(a.shape, np.complex64)), "float32 or float64 .*; got complex64"),
    "byte order": ("w_hh", lambda a: a.pool.array(np.ones(a.shape, ">f4")), "float32 .*; got >f4"),
    "shape": ("b_ih", lambda a: a.pool.array(np.ones(35, np.float32)), r"float32 \(4.H,\) = \(36,\).*; got .*\(35,\)"),
    "axes": ("x", lambda a: a.pool.array(np.ones((1, 1, 1, 1, 1), np.float32)), "got Array of shape .1, 1, 1, 1, 1."),
    "negative": ("x", lambda a: a.but(shape=(-4, 3, 5)), "got Array of shape .-4, 3, 5."),
    "NumPy": ("w_hh", lambda a: a.numbers().copy(), "CUDA device 0; got numpy.ndarray, not on a CUDA device"),
    "None": ("w_hh", lambda a: None, "CUDA device 0; got NoneType"),
    "host": ("w_hh", lambda a: a.but(**at(ON_CPU.ctypes.data)), "got float32 .36, 9. in the CPU's memory, or freed"),
    "freed": ("w_hh", lambda a: (a.pool.runtime.free(a.pointer), a.pool.blocks.remove(a.pointer), a)[-1], "or freed"),
    "device": ("h0", lambda a: (a.pool.runtime.place(a.pointer, 1), a)[-1], "CUDA device 0; got .* on CUDA device 1"),
    "columns": ("x", lambda a: a.but(strides=(4, 16, 48)), "last axis contiguous.*; got .*last axis not contiguous"),
    "transposed": ("w_hh", lambda a: a.but(strides=(4, 144)), "C-contiguous.*; got .*not C-contiguous"),
    "strides": ("x", lambda a: a.but(strides=(61, 20, 4)), "strides .61, 20, 4. are not whole numbers of elements"),
    "unaligned": ("w_hh", lambda a: a.but(**at(a.pointer + 2)), "got .*, not aligned"),
    "stream": ("x", lambda a: a.but(stream=0), "on stream 0, which the CUDA array interface does not allow"),
    "version": ("x", lambda a: a.but(version=1), "version 1 of the CUDA array interface"),
    "mask": ("c0", lambda a: a.but(mask=a), "a masked array, whose mask would be ignored"),
    "nonsense": ("x", lambda a: a.but(data="nowhere"), "whose __cuda_array_interface__ is not that of version 2 or 3"),
    "foreign": ("x", Foreign, "got Foreign on a CUDA device, .*CuPy, Numba or PyTorch"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_named(pool: Pool, kind: str) -> None:
    name, make, sentence = BAD[kind]
    inputs = lstm_inputs(pool)
    inputs[name] = make(inputs[name])
    with pytest.raises(ValueError, match=f"^{name}: expected .*{sentence}"):
        gw.lstm(**inputs)


def test_lengths_stay_on_the_cpu(pool: Pool) -> None:
    """They steer launches: from a device they would have to be waited for."""
    for name in ("lengths", "batch_sizes"):
        given = {name: pool.array(np.ones(3, np.int64))}
        with pytest.raises(
            ValueError, match=f"^{name}: expected int64 .*; got Array on a CUDA device, not in the CPU's"
        ):
            gw.lstm(**lstm_inputs(pool), **given)


def test_backends_and_memory_go_together(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = lstm_inputs(pool)
    for backend in ("cpu", "reference", "nonsense"):
        with pytest.raises(ValueError, match=f"^backend: expected 'cuda' or None, .* got '{backend}'"):
            gw.lstm(**inputs, backend=backend)
    with pytest.raises(ValueError, match=r"^num_threads: expected"):
        gw.lstm(**inputs, num_threads=0)
    on_cpu = {name: array.get() for name, array in inputs.items()}
    with pytest.raises(ValueError, match=r"^backend: 'cuda' takes arrays of CuPy, Numba or PyTorch on a CUDA device"):
        gw.lstm(**on_cpu, backend="cuda")
    monkeypatch.setenv("GATEWISE_BACKEND", "cpu")  # the default of arrays on the CPU
    assert isinstance(gw.lstm(**inputs, backend="cuda")[0], Array)
    for variable in ("GATEWISE_CUDA_OPERANDS", "GATEWISE_CUDA_LOOP"):
        with monkeypatch.context() as context:
            context.setenv(variable, "nonsense")
            with pytest.raises(ValueError, match=r"^(operands|loop): expected one of '(exact|planned)', .*'nonsense'"):
                gw.lstm(**inputs)


def test_what_the_kernels_do_not_have(pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"^tape: expected one of arrays on the CPU"):
        gw.double_backward(gw.lstm_forward(**lstm_inputs(pool)))


def test_a_tape_without_gates_has_the_same_gradients(pool: Pool) -> None:
    inputs = lstm_inputs(pool)
    whole, *others = (gw.lstm_forward(**inputs, save=save) for save in ("all", "states", "checkpoints"))
    dy = pool.array(np.ones(whole.y.shape, np.float32))
    expected = gw.lstm_backward(whole, dy)
    for tape in others:
        assert tape.nbytes < whole.nbytes
        for got, want in zip(gw.lstm_backward(tape, dy), expected):
            assert (got is None) == (want is None)
            if want is not None:
                np.testing.assert_allclose(got.get(), want.get(), rtol=1e-5, atol=1e-6)


def test_nothing_is_written_where_something_does_not_fit(pool: Pool, built: tuple[Any, Runtime]) -> None:
    module, arrays = built[0], lstm_inputs(pool)
    p = module.Problem("lstm", *arrays.values(), None, False, None, None, 0)

    def blank(*shape: int, dtype: Any = np.float32) -> Array:
        return pool.array(np.full(shape, 7, dtype))

    saved, states, forward, backward = p.sizes
    outputs = [blank(4, 3, 9), blank(3, 9), blank(3, 9), blank(saved), blank(states), blank(forward, dtype=np.uint8)]
    names = ["y", "hn", "cn", "saved", "states", "scratch"]
    shapes = [a.shape for a in (arrays["x"], arrays["h0"], arrays["c0"], arrays["w_ih"], arrays["w_hh"])]
    grads = (*(blank(*shape) for shape in shapes), blank(36), blank(36), None, None)
    for k, name in enumerate(names):
        for wrong, sentence in (
            (blank(*outputs[k].shape, dtype=np.float64), "got float64"),
            (blank(*outputs[k].shape[:-1], outputs[k].shape[-1] - 1, dtype=outputs[k].dtype), "got "),
            (
                blank(*outputs[k].shape, dtype=outputs[k].dtype).but(data=(outputs[k].pointer, True)),
                "got .*, read-only",
            ),
        ):
            with pytest.raises(ValueError, match=f"^{name}: expected .*writable; {sentence}"):
                module.forward(p, *outputs[:k], wrong, *outputs[k + 1 :], 0)
    with pytest.raises(ValueError, match=r"^cn: expected an array; got None"):
        module.forward(p, *outputs[:2], None, *outputs[3:], 0)
    scratch = blank(backward, dtype=np.uint8)
    for k, name in enumerate(("dx", "dh0", "dc0", "dw_ih", "dw_hh", "db_ih", "db_hh")):
        some = (*grads[:k], blank(1), *grads[k + 1 :])
        with pytest.raises(ValueError, match=f"^{name}: expected float32"):
            module.backward(p, outputs[0], *outputs[3:5], None, None, None, some, scratch, 0, True)
    with pytest.raises(ValueError, match=r"^dw_unit: expected"):
        some = (*grads[:7], blank(1), None)
        module.backward(p, outputs[0], *outputs[3:5], None, None, None, some, scratch, 0, True)
    for array in (*outputs, *grads[:7], scratch):
        assert (array.get() == 7).all()


def test_errors_of_cuda_are_exceptions(pool: Pool) -> None:
    """The host runtime says that memory is device 1's, and then that it has no device 1."""
    inputs = lstm_inputs(pool)
    for array in inputs.values():
        pool.runtime.place(array.pointer, 1)
    sentence = r"^cuda\w+\(.*\): error 101, cudaErrorInvalidDevice: there is only device 0 \(.*\.[ch]pp:\d+\)$"
    with pytest.raises(RuntimeError, match=sentence):
        gw.lstm(**inputs)


def test_a_driver_that_does_not_do_is_told(pool: Pool) -> None:
    for driver, devices, sentence in (
        (0, 0, "not available: no NVIDIA driver; the kernels need driver 580 or newer"),
        (12040, 1, "not available: the NVIDIA driver is too old: it knows CUDA 12.4, and the kernels need driver 580"),
        (13000, 0, "not available: no CUDA device"),
        (13010, 1, "host (sm_90), driver 13.1"),
    ):
        pool.runtime.driver(driver, devices)
        assert gw.backends()["cuda"].startswith(sentence)


# -- what streams do later ---------------------------------------------------------------------------------------------


def test_streams_that_run_late(pool: Pool) -> None:
    """Forward on one stream, backward on another, everything let go of at once, and only then somebody waits, in either
    order: nothing is used before it is there, and nothing after it is gone."""
    problem = Problem.parse("lstm:T4,N3,I5,H9:f32:lengths,h0,project")
    inputs = problems.draw(problem)
    expected = problems.run(problem, inputs, "cpu")
    streams = [pool.runtime.stream() for _ in range(3)]
    for order in ((0, 1), (1, 0)):
        pool.runtime.deferred(1)
        pool.stream = streams[0]
        given, lengths = placed(pool, inputs), inputs.lengths.copy()
        for array in (given.x, given.w_hh):  # still to come, on a stream of their own
            numbers = array.numbers().tobytes()
            array.numbers()[...] = np.nan
            pool.runtime.copy(array.pointer, numbers, len(numbers), streams[2])
            array.changed = {"stream": streams[2]}
        tape = gw.lstm_forward(*given[:7], lengths=lengths, w_hr=given.w_hr)
        results = {"y": tape.y, "hn": tape.hn}
        assert np.isnan(tape.y.numbers()).all(), "nothing has run yet"
        lengths[...] = 99
        pool.stream = streams[1]
        grads = gw.lstm_backward(tape, given.dy, given.dhn, given.dcn)
        results |= {name: array for name, array in grads._asdict().items() if array is not None}
        del tape, grads, given, array
        for k in order:
            assert pool.runtime.synchronize(streams[k]) == 0
        for name, array in results.items():
            assert np.allclose(array.get(), expected[name], rtol=1e-4, atol=1e-5), name
        del results, array


# -- libraries ---------------------------------------------------------------------------------------------------------


class Current(contextlib.AbstractContextManager[None]):
    """A device that is made current, of a library that counts how often."""

    depth = entered = 0

    def __enter__(self) -> None:
        self.depth += 1
        self.entered += 1

    def __exit__(self, *_: Any) -> None:
        self.depth -= 1


@pytest.mark.parametrize("package", ["cupy", "numba.cuda"])
def test_a_library_allocates_and_tells_its_stream(pool: Pool, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """By the functions that CuPy and Numba have for it, on x's device; arrays are known by their class's package."""
    current, made = Current(), []

    def empty(shape: tuple[int, ...], dtype: str) -> Array:
        assert package != "cupy" or current.depth == 1
        made.append(array := new(pool, shape, dtype))
        return array

    class Stream:
        ptr = pool.runtime.stream()

        def __int__(self) -> int:
            return self.ptr

    stream, inputs = Stream(), lstm_inputs(pool)
    expected = gw.lstm(**inputs)[0].get()
    new = type("ndarray", (Array,), {"__module__": package, "device": current})
    cuda = types.SimpleNamespace(get_current_stream=lambda: stream, default_stream=lambda: stream, device_array=empty)
    monkeypatch.setitem(
        sys.modules, package, cuda if package != "cupy" else types.SimpleNamespace(cuda=cuda, empty=empty)
    )
    for array in inputs.values():
        array.__class__ = new
    pool.runtime.deferred(1)
    y, (hn, cn) = gw.lstm(**inputs)
    assert {id(y), id(hn), id(cn)} < {id(array) for array in made} and type(y) is new
    assert np.isnan(y.numbers()).all() and pool.runtime.synchronize(stream.ptr) == 0
    assert np.array_equal(y.numbers(), expected)
    assert current.depth == 0 and (current.entered > 0) == (package == "cupy")


def test_rounding_is_what_torch_allows_unless_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, operands in (("highest", "exact"), ("high", "tf32"), ("medium", "bf16")):
            torch.set_float32_matmul_precision(precision)
            place = device.Place(None, None, 0, device.torch_operands(torch))
            assert device.operands_of(place) == operands
            with monkeypatch.context() as context:
                context.setenv("GATEWISE_CUDA_OPERANDS", "exact")
                assert device.operands_of(place) == "exact"
    finally:
        torch.set_float32_matmul_precision(before)
    assert device.place_of(torch.zeros(2)) is None  # on the CPU, where functions take no tensors


# -- gatewise.torch ----------------------------------------------------------------------------------------------------


class OnDevice:
    """PyTorch as if it were built with CUDA: what gatewise.torch allocates is memory of the pool, in tensors that
    PyTorch takes for the CPU's."""

    def __init__(self, pool: Pool, patch: pytest.MonkeyPatch) -> None:
        self.pool, self.arrays = pool, []
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "zeros_like")):
            patch.setattr(owner, name, self.there(getattr(owner, name), 0 if name == "zeros_like" else 77))
        patch.setattr(gw.torch, "_place", lambda x: device.Place(None, None, 0))

    def tensor(self, numbers: np.ndarray) -> torch.Tensor:
        self.arrays.append(self.pool.array(np.ascontiguousarray(numbers)))
        return torch.from_numpy(self.arrays[-1].numbers())

    def there(self, make: Any, value: int) -> Any:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self.tensor(np.full_like(make(*args, **kwargs).detach().numpy(), value))

        return made


@pytest.mark.parametrize("exchange", [True, False], ids=["tensors", "capsules"])
def test_torch_modules(pool: Pool, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    """A module forward and backward, its tensors lent as they are or as older PyTorch lends them."""
    if not exchange:
        monkeypatch.setattr(gw.torch, "_EXCHANGE", None)
    results = []
    for there in (False, True):
        torch.manual_seed(0)
        layer, rng = gw.torch.LSTM(5, 9, proj_size=4, zoneout=0.2), np.random.default_rng(0)
        drawn = [rng.standard_normal(shape).astype(np.float32) for shape in
                 ((4, 3, 5), (1, 3, 4), (1, 3, 9), (4, 3, 4), (1, 3, 4), (1, 3, 9))]  # fmt: skip
        with monkeypatch.context() as context:
            place = OnDevice(pool, context).tensor if there else torch.from_numpy
            for parameter in layer.parameters():
                parameter.data = place(parameter.detach().numpy())
            x, h, c, dy, dhn, dcn = map(place, drawn)
            leaves = [x.requires_grad_(), h.requires_grad_(), c.requires_grad_(), *layer.parameters()]
            y, (hn, cn) = layer(x, (h, c), lengths=[4, 0, 3])
            torch.autograd.backward([y, hn, cn], [dy, dhn, dcn])
            results.append([tensor.detach().numpy().copy() for tensor in (y, hn, cn, *(leaf.grad for leaf in leaves))])
    for ours, expected in zip(*results):
        assert np.allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_tapes_of_ops_have_sizes_from_shapes_alone(pool: Pool, built: tuple[Any, Runtime], cell: str) -> None:
    """Those of the compiler's fake CUDA tensors: what the kernels ask for, without a device."""
    module = built[0]
    for options in ("train", "states", "checkpoints", "project"):
        if not problems.fits(cell, [options]):
            continue
        save = options if options in ("states", "checkpoints") else "all"
        inputs = problems.draw(Problem.parse(f"{cell}:T5,N3,I5,H9:f32:{options}"))
        given = placed(pool, inputs)
        extras = functional._extras({"w_unit": given.w_unit, "w_hr": given.w_hr, "save": save})
        p = module.Problem(cell, *given[:7], None, False, extras, None, 0)
        with FakeTensorMode():
            tensors = dict.fromkeys(gw.torch._TENSORS)
            for name in ("x", "w_ih", "w_hh", "b_ih", "b_hh", "w_unit", "w_hr"):
                array = getattr(inputs, name)
                tensors[name] = None if array is None else torch.empty(array.shape, device="cuda")
            y, hn, cn, saved, states = torch.ops.gatewise.forward(
                *tensors.values(), *gw.torch._Options(cell, save=save), True
            )
            assert all(out.device.type == "cuda" for out in (y, hn, cn, saved, states))
            assert (y.shape, hn.shape) == ((5, 3, p.R), (3, p.R)) and cn.numel() == (27 if p.has_c else 0)
            assert (saved.numel(), states.numel()) == p.sizes[:2]


def test_torch_tensors_where_there_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gatewise._cuda", None)
    with FakeTensorMode():
        model = torch.nn.LSTMCell(5, 9, device="meta")
        model.weight_ih = torch.nn.Parameter(torch.empty(36, 5, device="cuda"))
        x = torch.empty(4, 3, 5, device="cuda")
        assert gw.torch.convert(model).left[""].startswith("its weights are on cuda:0, whose kernels are not built: ")
    with pytest.raises(RuntimeError, match=r"^gatewise.torch: x is on cuda:0, whose kernels are not built: "):
        gw.torch._place(x)


# -- the module that was installed -------------------------------------------------------------------------------------


def test_the_module_that_ships() -> None:
    """It is small, nothing imports it unasked, and it says what is missing."""
    found = importlib.util.find_spec("gatewise._cuda")
    if found is None:
        assert gw.backends()["cuda"].startswith("not built: ")
        return
    assert found.origin is not None and Path(found.origin).stat().st_size < 8 << 20
    code = """
import sys, gatewise as gw
assert "gatewise._cuda" not in sys.modules
print(gw.backends()["cuda"])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert re.match("not available: |NVIDIA|Tesla|Quadro|GeForce", said)
