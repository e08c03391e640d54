"""Which backends exist here, which one a call gets, and with how many threads."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from . import _core

NAMES = ("cpu", "reference", "cuda")


def unavailable(name: str) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if name == "reference" and importlib.util.find_spec("numba") is None:
        return "not available: Numba is not installed (pip install gatewise[reference])"
    if name == "cuda":
        module, reason = find_cuda()
        if module is not None:
            reason, _ = module.devices()
            return None if reason is None else f"not available: {reason}"
        return reason
    return None


def find_cuda() -> tuple[Any, str]:
    """The compiled CUDA kernels, imported when they are first asked for; or None, and why."""
    try:
        return importlib.import_module("gatewise._cuda"), ""
    except ModuleNotFoundError:
        return None, f"not built: {_core.no_cuda}"
    except ImportError as error:
        return None, f"not available: {error}"


def cuda() -> Any:
    """The compiled CUDA kernels, which say themselves if there is no device for them."""
    module, reason = find_cuda()
    if module is None:
        raise ValueError(f"backend: 'cuda' is {reason}")
    return module


def backends() -> dict[str, str]:
    """Every backend and what it is here: the CPU's arch, "numba", the devices, or the reason why it is missing."""
    return {name: unavailable(name) or _here(name) for name in NAMES}


def _here(name: str) -> str:
    if name == "cuda":
        return "; ".join(cuda().devices()[1])
    return _core.choose_arch() if name == "cpu" else "numba"


def choose(backend: str | None) -> str:
    """The backend of a call on arrays of the CPU: its argument, else GATEWISE_BACKEND, else "cpu"."""
    name, source = backend, "backend"
    if name is None:
        name, source = _core.environment("GATEWISE_BACKEND") or "cpu", "GATEWISE_BACKEND"
    if name == "cpu":
        return name
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}; got {name!r}")
    if reason := unavailable(name):
        raise ValueError(f"{source}: {name!r} is {reason}")
    if name == "cuda":
        raise ValueError(
            f"{source}: 'cuda' takes arrays of CuPy, Numba or PyTorch on a CUDA device; x is on the CPU, where the "
            "backends are cpu and reference"
        )
    return name


def check_is_cuda(backend: str | None) -> None:
    """The argument `backend` of a call on arrays of a CUDA device, where there is but one."""
    if backend not in (None, "cuda"):
        raise ValueError(f"backend: expected 'cuda' or None, for x is on a CUDA device; got {backend!r}")


def available_cores() -> int:
    """Cores this process may run on."""
    return _core.available_cores()


def choose_num_threads(num_threads: int | None) -> tuple[int, str]:
    """Threads of a call and where the number came from: the argument, else GATEWISE_NUM_THREADS, else
    OMP_NUM_THREADS, else the cores this process may use. Results are the same bits for any number."""
    return _core.choose_num_threads(num_threads)
