"""The CUDA launch plan (cpp/cuda/plan.hpp) from Python, and the limits of some cards."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import gatewise as gw
from compiler import ROOT, compile

KB, MB = 1 << 10, 1 << 20
FRAGMENT_BYTES = 512  # of weights: what a warp multiplies at a time
CELL_SLOTS = 8  # cells whose states a thread keeps
DTYPES = {"f32": (4, 4), "f64": (8, 8), "bf16": (2, 4)}  # bytes of a number kept and of a sum; f16 is as bf16


class Record(ctypes.Structure):
    """A struct of plan.hpp; its fields in its order."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name, _ in self._fields_)})"


def integers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names.split()]


class DeviceLimits(Record):
    _fields_ = integers(
        "multiprocessors shared_per_block shared_per_multiprocessor registers_per_multiprocessor threads_per_block "
        "threads_per_multiprocessor blocks_per_multiprocessor warp_size l2_bytes major minor"
    )


class StepProblem(Record):
    _fields_ = [
        ("gates", ctypes.c_int64),
        *((name, ctypes.c_bool) for name in ("has_c", "has_product", "has_middle")),
        *integers("N H R storage accumulator"),
        ("backward", ctypes.c_bool),
    ]


class Plan(Record):
    _fields_ = [
        ("reason_number", ctypes.c_int),
        *integers(
            "grid_units grid_rows block units batch_tile shared_bytes weight_registers registers fragments "
            "register_fragments blocks_per_multiprocessor"
        ),
    ]

    @property
    def persistent(self) -> bool:
        return self.reason_number == 0


def device(multiprocessors: int, l2: int, capability: str) -> DeviceLimits:
    shared, threads, blocks = CAPABILITIES[capability]
    major, minor = map(int, capability.split("."))
    reserved = 1 if major >= 8 else 0  # KB of every block, the driver's
    return DeviceLimits(
        multiprocessors, (shared - reserved) * KB, shared * KB, 65536, 1024, threads, blocks, 32, l2, major, minor
    )


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": KB of shared memory a multiprocessor,
# threads and blocks resident there. All have 65536 registers, 1024 threads a block, warps of 32.
CAPABILITIES = {
    "7.5": (64, 1024, 16),
    "8.0": (164, 2048, 32),
    "8.6": (100, 1536, 16),
    "8.9": (100, 1536, 24),
    "9.0": (228, 2048, 32),
    "10.0": (228, 2048, 32),
    "12.0": (100, 1536, 24),
}
# Multiprocessors and L2 cache: NVIDIA's white papers on Turing (T4), A100, GA102 (RTX 3090), Ada (RTX 4090) and H100,
# its Blackwell tuning guide (B200's cache). As drivers report them, in what users of the cards have published: T4 (40),
# A100 (108, 41943040 bytes), L4 (58), B200 (148, 126.5 MB), RTX 5090 (170, 100663296 bytes, 102400 of shared memory and
# 1536 threads a multiprocessor). Not seen from a driver: the caches of RTX 3090, RTX 4090, L4 and H100.
CARDS = {
    "T4": device(40, 4 * MB, "7.5"),
    "A100 40GB": device(108, 40 * MB, "8.0"),
    "RTX 3090": device(82, 6 * MB, "8.6"),
    "RTX 4090": device(128, 72 * MB, "8.9"),
    "L4": device(58, 48 * MB, "8.9"),
    "H100 SXM": device(132, 50 * MB, "9.0"),
    "B200": device(148, 126 * MB, "10.0"),
    "RTX 5090": device(170, 96 * MB, "12.0"),
}


def problem(cell: str, N: int, H: int, dtype: str, backward: bool, R: int | None = None) -> StepProblem:
    traits = gw.cells()[cell]
    middle = traits["middle"] != "none" or traits["normed"]
    return StepProblem(
        traits["G"],
        traits["has_c"],
        traits["product"],
        middle,
        N,
        H,
        H if R is None else R,
        *DTYPES[dtype],
        backward,
    )


def cuda_include() -> Path | None:
    """The toolkit's headers, found through nvcc."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=True).stderr
    found = re.search(r'^#\$ INCLUDES="-I([^"]+)"', said, re.M)
    return Path(found[1]) if found else None


@cache
def library(source: Path = ROOT / "cpp/cuda") -> ctypes.CDLL:
    """tests/cuda_plan.cpp with the plan.hpp of a folder. `nvidia_*` are there if the toolkit's headers are."""
    include = cuda_include()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.so"
        flags = ["-O1", "-Wall", "-Wextra", "-fPIC", "-shared", f"-I{source}"]
        headers = ["-isystem", include] if include else []
        compile(*flags, *headers, ROOT / "tests/cuda_plan.cpp", "-o", path)
        found = ctypes.CDLL(str(path))
    limits, asked, made = (ctypes.POINTER(kind) for kind in (DeviceLimits, StepProblem, Plan))
    number = ctypes.c_int64
    found.plan.argtypes, found.plan.restype = [limits, asked, made], None
    found.reason_sentence.argtypes, found.reason_sentence.restype = [ctypes.c_int], ctypes.c_char_p
    found.resident.argtypes, found.resident.restype = [limits, number, number, number], number
    found.largest_H.argtypes, found.largest_H.restype = [limits, asked], number
    if include:
        found.nvidia_resident.argtypes, found.nvidia_resident.restype = found.resident.argtypes, number
        found.nvidia_knows.argtypes, found.nvidia_knows.restype = [limits], ctypes.c_bool
    return found


def plan(limits: DeviceLimits, asked: StepProblem, source: ctypes.CDLL | None = None) -> Plan:
    made = Plan()
    ctypes.memset(ctypes.byref(made), 0xFF, ctypes.sizeof(made))  # what is not written is seen
    (source or library()).plan(limits, asked, made)
    return made


def reason(made: Plan) -> str:
    return library().reason_sentence(made.reason_number).decode()
