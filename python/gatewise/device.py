"""Arrays on a CUDA device: whose they are, how that library allocates there, and on which stream it works.

A call runs where x is, on its library's current stream, and makes its results by that library. A library is one
function in `LIBRARIES`, by the name of the package that its arrays' class is from; it is called only with such an
array, so the library is loaded, and nothing here imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from . import _core


class Place(NamedTuple):
    """Where a call runs."""

    empty: Callable[[tuple[int, ...], str], Any]  # an array of the library's by shape and dtype
    stream: Any  # the library's, which must outlive the work on it
    handle: int  # of the stream, as CUDA writes it
    operands: str = "exact"  # what the library lets float32 products be rounded to, see `operands_of`


def _cupy(x: Any) -> Place:
    cupy, device = sys.modules["cupy"], x.device

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        with device:
            return cupy.empty(shape, dtype)

    with device:
        stream = cupy.cuda.get_current_stream()
    return Place(empty, stream, stream.ptr)


def _numba(x: Any) -> Place:
    """Numba has no current stream: it is the default one, for which the arrays' own streams are waited."""
    cuda = sys.modules["numba.cuda"]
    stream = cuda.default_stream()
    return Place(cuda.device_array, stream, int(stream))


def _torch(x: Any) -> Place | None:
    if not x.is_cuda:
        return None
    torch = sys.modules["torch"]
    stream = torch.cuda.current_stream(x.device)

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=x.device)

    return Place(empty, stream, stream.cuda_stream, torch_operands(torch))


def torch_operands(torch: Any) -> str:
    """What torch.set_float32_matmul_precision allows: its "high" is tf32, its "medium" bfloat16."""
    return {"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision(), "exact")


LIBRARIES: dict[str, Callable[[Any], Optional[Place]]] = {
    "cupy": _cupy, "numba": _numba, "numba_cuda": _numba, "torch": _torch,
}  # fmt: skip


def place_of(x: Any) -> Place | None:
    """Where a call with this x runs; None: on the CPU, or x is nothing that we know."""
    library = LIBRARIES.get(type(x).__module__.partition(".")[0])
    return None if library is None else library(x)


def operands_of(place: Place) -> str:
    """What the recurrent products' float32 operands are rounded to, for tensor cores: GATEWISE_CUDA_OPERANDS, else
    what the library says, else nothing. Sums are float32's always."""
    return _core.environment("GATEWISE_CUDA_OPERANDS") or place.operands


def loop_of() -> str | None:
    """How the steps are run, which the plan decides unless GATEWISE_CUDA_LOOP does, as tests and benchmarks ask for it:
    "persistent" or "stepwise"."""
    return _core.environment("GATEWISE_CUDA_LOOP")
