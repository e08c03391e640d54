"""Which backends exist here, which one a call gets, and with how many threads."""

from __future__ import annotations

import importlib.util

from . import _core

NAMES = ("cpu", "reference", "cuda")


def _unavailable(name: str) -> str | None:
    """Why a backend cannot run here, or None if it can."""
    if name == "reference" and importlib.util.find_spec("numba") is None:
        return "not available: Numba is not installed (pip install gatewise[reference])"
    if name == "cuda":
        return "not built: the CUDA kernels cannot be called from Python yet"
    return None


def backends() -> dict[str, str]:
    """Every backend and what it is here: the CPU's arch, "numba", or the reason why it is missing."""
    here = {"cpu": _core.choose_arch(), "reference": "numba"}
    return {name: _unavailable(name) or here[name] for name in NAMES}


def choose(backend: str | None) -> str:
    """The backend of a call: its argument, else GATEWISE_BACKEND, else "cpu"."""
    name, source = backend, "backend"
    if name is None:
        name, source = _core.environment("GATEWISE_BACKEND") or "cpu", "GATEWISE_BACKEND"
    if name == "cpu":
        return name
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}; got {name!r}")
    if reason := _unavailable(name):
        raise ValueError(f"{source}: {name!r} is {reason}")
    return name


def available_cores() -> int:
    """Cores this process may run on."""
    return _core.available_cores()


def choose_num_threads(num_threads: int | None) -> tuple[int, str]:
    """Threads of a call and where the number came from: the argument, else GATEWISE_NUM_THREADS, else
    OMP_NUM_THREADS, else the cores this process may use. Results are the same bits for any number."""
    return _core.choose_num_threads(num_threads)
