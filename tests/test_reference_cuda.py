"""The step kernels of reference_cuda.py make what reference.py makes, in Numba's simulator."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from compiler import ROOT
from gatewise import reference

KERNELS = ROOT / "python/gatewise/reference_cuda.py"
# Roundings. A number is rounded when it is stored, once a phase; the gates of a second phase are made of rounded ones.
BOUND = 2


def output(kernels: Path, *cells: str, **variables: str) -> list[list[str]]:
    """The words of each line."""
    command = [sys.executable, ROOT / "tests/reference_cuda.py", kernels, *cells]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0", **variables}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.split() for line in run.stdout.splitlines()]


@cache
def errors(kernels: Path, *cells: str) -> dict[tuple[str, str, str], float]:
    """By cell, dtype and array. Ordinary Python on both sides: nothing here takes long enough to be compiled."""
    lines = output(kernels, *cells, NUMBA_ENABLE_CUDASIM="1", NUMBA_DISABLE_JIT="1")
    return {(cell, dtype, name): float(error) for cell, dtype, name, error in lines}


@pytest.mark.parametrize("cell", reference.CELLS)
def test_kernels_equal_the_reference(cell: str) -> None:
    maths = reference.CELLS[cell]
    made = {"gates", "first", "c_next", "dgx", "dgh", "dh", "dc"} | ({"dunit"} if maths.U else set())
    made |= {"h_next", "dmid"} if maths.middle != "none" else set()
    found = {key: error for key, error in errors(KERNELS).items() if key[0] == cell}
    assert found.keys() == {(cell, dtype, name) for dtype in ("float32", "float64") for name in made}
    assert all(error <= BOUND for error in found.values()), found


def cuda_home() -> Path | None:
    """A toolkit whose compiler library Numba takes: that of the environment, or the package nvidia-cuda-nvcc-cu12."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(place) / "cuda_nvcc" for place in package.submodule_search_locations or ()] if package else []
    given = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    return next((folder for folder in given + folders if any(folder.glob("nvvm/lib64/libnvvm.so*"))), None)


@pytest.mark.skipif(cuda_home() is None, reason="no libnvvm: neither CUDA_HOME nor nvidia-cuda-nvcc-cu12 has it")
def test_kernels_compile_for_a_gpu() -> None:
    """The simulator runs Python, of which a GPU takes less: it has no complex exponential, say."""
    lines = output(KERNELS, CUDA_HOME=str(cuda_home()))
    found = {(cell, role) for cell, role, length in lines if int(length) > 0}
    roles = {name: ["forward", "backward"] for name in reference.CELLS}
    for name, maths in reference.CELLS.items():
        roles[name] += ["output", "output_backward"] if maths.middle != "none" else []
    assert found == {(name, role) for name, of_cell in roles.items() for role in of_cell}


# (what stands there, what to put there): seen by one of two cells, which have a second phase, c, and weights of a unit
WRONG = [
    ("if j < h.shape[1] and n", "if j < h.shape[1] - 1 and n"),
    ("x[g], y[g] = gx[n, g, j], gh[n, g, j]", "x[g], y[g] = gh[n, g, j], gx[n, g, j]"),
    ("w[u] = unit[u, j]", "w[u] = unit[u, 0]"),
    ("a[g] = gates[n, g, j]", "a[g] = gates[0, g, j]"),
    ("return State(float64(h[n, j]), float64(c[n, j]))", "return State(float64(c[n, j]), float64(c[n, j]))"),
    ("out[n, k, j] += numbers[k]", "out[n, k, j] = numbers[k]"),
    ("dc[n, j] += dprev.c", "dc[n, j] = dprev.c"),
    ("dmid[n, j] += dm", "dmid[n, j] -= dm"),
    ("cuda.local.array(G, float64)", "cuda.local.array(G, float32)"),
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG, ids=[new for _, new in WRONG])
def test_a_wrong_line_is_seen(tmp_path: Path, line: tuple[str, str]) -> None:
    text = KERNELS.read_text()
    assert line[0] in text, f"not in reference_cuda.py: {line[0]}"
    wrong = tmp_path / "reference_cuda.py"
    wrong.write_text(text.replace(*line).replace("import cuda, float64", "import cuda, float32, float64"))
    assert not all(error <= BOUND for error in errors(wrong, "lstm_norm", "gru_reset_before").values())
