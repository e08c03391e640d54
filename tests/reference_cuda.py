"""Runs reference_cuda.py in Numba's simulator beside reference.py: prints cell, dtype, what, and how far they differ.

A program of its own, since NUMBA_ENABLE_CUDASIM counts when Numba is imported: test_reference_cuda.py. Its arguments
are the file to run, so that a wrong one can be, and cells, or none for all. A line's last number is the largest
difference in roundings of the dtype, relative to the largest value. Without the simulator, nothing is run: the kernels
are compiled for a GPU of compute capability 8.0, and a line has cell, kernel, and the length of its PTX.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np

from gatewise import reference

# (N, H), the limit of |c|: a single unit; sizes that fill no block, one that fills several
PROBLEMS = [((1, 1), np.inf), ((3, 7), 0.5), ((5, 33), np.inf)]


def roundings(got: np.ndarray, want: np.ndarray) -> float:
    """NaN, where nothing was written, is infinitely many."""
    scale = np.finfo(got.dtype).eps * max(1e-3, np.abs(want).max())
    return float(np.nan_to_num(np.abs(got - want).max() / scale, nan=np.inf))


def compare(kernels: Any, launch: Any, name: str, dtype: Any, N: int, H: int, clip: float) -> dict[str, float]:
    """One step forward and backward: all that the kernels make against what the reference makes of the same numbers."""
    cell, rng = reference.CELLS[name], np.random.default_rng(N * H)
    step, grid = kernels(cell), launch(N, H, (4, 2))
    G, U = cell.G, cell.U

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    def empty(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, dtype)

    gx, gh, unit = drawn(N, G, H), drawn(N, G, H), drawn(U, H)
    h, c, mid, dh_next, dc_next = (drawn(N, H) for _ in range(5))
    staged, twice = drawn(N, H), cell.middle != "none"  # what came out of the middle stage
    gates, first, c_next, h_next = empty(N, G, H), empty(N, H), empty(N, H), empty(N, H)
    step.forward[grid](gx, gh, unit, h, c, clip, gates, first, c_next)
    if twice:
        step.output[grid](gx, gh, unit, h, c, staged, gates, h_next)

    # Gradients are added to what is there, here numbers that both begin from
    d = {"dgx": drawn(N, G, H), "dgh": drawn(N, G, H), "dunit": drawn(N, U, H), "dh": drawn(N, H), "dc": drawn(N, H)}
    begun = {key: array.copy() for key, array in d.items()}
    dmid, dmid_begun = (mid.copy() for _ in range(2))
    if twice:
        step.output_backward[grid](gx, gh, unit, h, c, staged, gates, dh_next, *d.values(), dmid)
    step.backward[grid](gx, gh, unit, h, c, clip, gates, first, c_next, dh_next, dc_next, *d.values())

    # The reference takes a row at a time; the gates that backward reads are those the kernels rounded
    worst: dict[str, float] = {}
    wide = {"gx": gx, "gh": gh, "unit": unit, "h": h, "c": c, "staged": staged, "gates": gates, "first": first,
            "c_next": c_next, "dh_next": dh_next, "dc_next": dc_next}  # fmt: skip
    wide = {key: array.astype(np.float64) for key, array in wide.items()}
    for n in range(N):
        row = {key: array if key == "unit" else array[n] for key, array in wide.items()}
        before = row["gx"], row["gh"], row["unit"], row["h"], row["c"]
        want = {"gates": np.zeros((G, H)), "first": np.zeros(H), "c_next": np.zeros(H), "h_next": np.zeros(H)}
        reference.forward_units(cell.forward, *before, clip, want["gates"], want["first"], want["c_next"])
        got = {"gates": gates[n], "first": first[n], "c_next": c_next[n]}
        if twice:
            reference.output_units(cell.output, *before, row["staged"], want["gates"], want["h_next"])
            got["h_next"] = h_next[n]
        grads = {key: array[n].astype(np.float64) for key, array in begun.items()}
        want["dmid"] = dmid_begun[n].astype(np.float64)
        if twice:
            reference.output_units_backward(
                cell.output_backward,
                *before,
                row["staged"],
                row["gates"],
                row["dh_next"],
                *grads.values(),
                want["dmid"],
            )
            got["dmid"] = dmid[n]
        reference.backward_units(
            cell.backward, *before, clip, row["gates"], row["first"], row["c_next"], row["dh_next"], row["dc_next"],
            *grads.values(),
        )  # fmt: skip
        want.update(grads)
        got.update({key: array[n] for key, array in d.items()})
        for key, array in got.items():
            if array.size:
                worst[key] = max(worst.get(key, 0.0), roundings(array, want[key]))
    return worst


def compile_for_gpu(kernels: Any, name: str) -> None:
    from numba import cuda, types
    from numba.cuda import dispatcher

    # What a kernel calls is compiled for the device that is there; so that none need be, one is made up.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(8, 0))
    array = {2: types.float32[:, ::1], 3: types.float32[:, :, ::1]}
    three = {"gx", "gh", "gates", "dgx", "dgh", "dunit"}
    for role, kernel in kernels(reference.CELLS[name])._asdict().items():
        if kernel is not None:
            names = inspect.signature(kernel.py_func).parameters
            given = tuple(types.float64 if name == "clip" else array[3 if name in three else 2] for name in names)
            ptx, _ = cuda.compile_ptx(kernel.py_func, given, cc=(8, 0))
            print(name, role, len(ptx))


def main() -> None:
    spec = importlib.util.spec_from_file_location("reference_cuda", sys.argv[1])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference_cuda"] = module
    spec.loader.exec_module(module)
    for name in sys.argv[2:] or reference.CELLS:
        if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
            compile_for_gpu(module.kernels, name)
            continue
        for dtype in (np.float32, np.float64):
            worst: dict[str, float] = {}
            for (N, H), clip in PROBLEMS:
                for key, error in compare(module.kernels, module.launch, name, dtype, N, H, clip).items():
                    worst[key] = max(worst.get(key, 0.0), error)
            for key, error in worst.items():
                print(name, np.dtype(dtype).name, key, error)


if __name__ == "__main__":
    main()
