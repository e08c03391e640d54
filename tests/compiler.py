"""The C++ compiler, for tests of the kernel library without Python around it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
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


def compile(*arguments: str | Path, include: Path = INCLUDE, compiler: str | None = COMPILER) -> None:
    """Calls the compiler that built this package, or another one on PATH."""
    assert compiler, "no C++ compiler on PATH, though one built the package; set CXX"
    run(compiler, "-std=c++17", f"-I{include}", *arguments)


def compile_kernels(arch: str, folder: Path, *flags: str, compiler: str | None = COMPILER) -> Path:
    """The object file of one arch's kernels."""
    path = folder / f"{arch}.o"
    source = ROOT / "cpp/cpu/kernels.cpp"
    compile(f"-DGATEWISE_ARCH={arch}", "-ffp-contract=off", *FLAGS[arch], *flags, "-c", source, "-o", path,
            compiler=compiler)  # fmt: skip
    return path


def compile_program(
    source: str,
    objects: Sequence[Path],
    archs: Sequence[str],
    program: Path,
    *flags: str,
    compiler: str | None = COMPILER,
) -> Path:
    """A program of one source file, named from the root, linked with the kernels of these arches."""
    defines = [f"-DGATEWISE_HAS_{arch.upper()}" for arch in archs]
    library = [ROOT / "cpp/cpu/dispatch.cpp", ROOT / "cpp/cpu/threads.cpp"]
    compile(f"-I{ROOT}/tests", *flags, *defines, ROOT / source, *library, *objects, "-pthread", "-o", program,
            compiler=compiler)  # fmt: skip
    return program


def built_kernels(folder: Path) -> list[Path]:
    """The kernels of all arches as the package has them: the library that its build left, where that is of this source,
    this compiler and the usual flags; else compiled in `folder`."""
    newest = max(path.stat().st_mtime for path in (ROOT / "cpp").rglob("*") if path.is_file())
    for library in (ROOT / "build").glob(f"cp{sys.version_info.major}{sys.version_info.minor}-*/libgatewise_cpu.a"):
        cache = (library.parent / "CMakeCache.txt").read_text()
        compiler = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.M)
        usual = "CMAKE_CXX_FLAGS:STRING=\n" in cache and "CMAKE_BUILD_TYPE:STRING=Release\n" in cache
        same = compiler and COMPILER and os.path.realpath(compiler[1]) == os.path.realpath(COMPILER)
        if library.stat().st_mtime > newest and usual and same:
            return [library]
    return [compile_kernels(arch, folder, "-O3", "-fPIC") for arch in ARCHS]
