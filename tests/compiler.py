"""The C++ compiler, for tests of the kernel library without Python around it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import gatewise as gw

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "cpp/include"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"],
    "neon": [],
}
ARCHS = [arch for arch, _ in gw._core.archs]  # those of this build


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed; one that hangs (a lost barrier) fails."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def compile(*arguments: str | Path, include: Path = INCLUDE) -> None:
    """Calls the compiler that built this package, or another one on PATH."""
    assert COMPILER, "no C++ compiler on PATH, though one built the package; set CXX"
    run(COMPILER, "-std=c++17", f"-I{include}", *arguments)


def compile_kernels(arch: str, folder: Path, *flags: str) -> Path:
    """The object file of one arch's kernels."""
    path = folder / f"{arch}.o"
    source = ROOT / "cpp/cpu/kernels.cpp"
    compile(f"-DGATEWISE_ARCH={arch}", "-ffp-contract=off", *FLAGS[arch], *flags, "-c", source, "-o", path)
    return path
