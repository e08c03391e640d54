"""gatewise on arrays of a CUDA device, without a GPU: the module that ships, src/cuda_module.cpp, built on the tests'
host runtime, and an array library of the tests' own, with memory and streams of that runtime, in the place of CuPy.
Every cell gives the CPU's results; what does not fit is refused with a sentence; nothing needs an array for longer than
it is kept, though streams run only when somebody waits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gatewise as gw
import problems
from cuda_host import build
from gatewise import device
from problems import Problem

pybind11 = pytest.importorskip("pybind11")
ROOT = build.ROOT
CELLS = list(problems.GATES)


def extension() -> Path:
    """gatewise._cuda as the host compiler builds it, with the kernels of test_cuda_kernels.py."""
    sources = [ROOT / "src/cuda_module.cpp", ROOT / "cpp/cpu/order.cpp"]
    flags = [*build.FLAGS, *build.INCLUDES, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = [
        build.make(f"{source.stem}.o", [source, *build.headers(), *sorted((ROOT / "src").glob("*.hpp"))],
                   [build.COMPILER, *flags, "-fvisibility=hidden", "-O1", "-Wall", "-c", source])
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
        ):  # fmt: skip
            function = getattr(self.library, f"cuda_host_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


class Array:
    """An array of the tests' library."""

    pool: Pool

    def __init__(self, pool: Pool, shape: Any, dtype: Any) -> None:
        self.pool, self.shape, self.dtype = pool, tuple(shape), np.dtype(dtype)
        self.nbytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.pointer = pool.take(self.nbytes)
        self.changed: dict[str, Any] = {}  # of its interface

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


class Pool:
    """Memory in the manner of CuPy's and PyTorch's: a block belongs to the stream that was current when it was taken,
    and who takes the next one of that stream may get it, though work on it may be waiting there."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.stream, self.blocks = runtime, 0, []

    def take(self, nbytes: int) -> int:
        if not nbytes:
            return 0
        self.blocks.append(self.runtime.allocate(nbytes))
        return self.blocks[-1]

    def array(self, numbers: Any) -> Any:
        """Copies to the device; what is no array of numbers stays as it is."""
        if not isinstance(numbers, np.ndarray):
            return numbers
        array = Array(self, numbers.shape, numbers.dtype)
        array.numbers()[...] = numbers
        return array


@pytest.fixture(scope="session")
def built() -> tuple[Any, Runtime]:
    if reason := build.missing():
        pytest.skip(reason)
    path = extension()
    spec = importlib.util.spec_from_file_location("gatewise._cuda", path)
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
    runtime.synchronize(None)
    for block in pool.blocks:
        runtime.free(block)


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
