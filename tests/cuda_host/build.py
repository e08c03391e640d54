"""Compiles a .cu file to run without a GPU.

`native`: a host compiler reads the source itself, against cuda_host.hpp. Debuggers and sanitizers work as ever.
`ptx`: nvcc compiles the kernels to PTX, ptx.py translates that to C++, and it runs on the same runtime, called by the
same host code. So nvcc's own output is executed, inline assembly included, with every access checked.

What was built is kept in a temporary folder under a hash of everything that it depends on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from cuda_host import ptx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
SANITIZERS = {
    # what UBSan finds ends the program, as what ASan finds does
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
INCLUDES = [f"-I{HERE}", f"-I{ROOT / 'cpp'}", f"-I{ROOT / 'cpp/include'}"]
# No unique symbols: two libraries in one process must not share a kernel's __shared__ variables.
FLAGS = ["-std=c++17", "-g", "-fPIC", "-fno-gnu-unique", "-ffp-contract=off", "-pthread"]


def missing(mode: str = "native", sanitizer: str | None = None) -> str | None:
    """Why this cannot be built or run here; None where it can."""
    if not COMPILER:
        return "no C++ compiler on PATH"
    if mode == "ptx" and not NVCC:
        return "no nvcc on PATH"
    if (mode == "ptx" or sanitizer) and platform.machine() not in ("x86_64", "AMD64"):
        return f"only tried on x86-64, not on {platform.machine()}"
    return None


def folder() -> Path:
    """Where builds are kept: a folder of the user's own."""
    path = Path(tempfile.gettempdir()) / f"gatewise-cuda-host-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def call(*command: str | Path) -> None:
    """Runs a compiler; what it says is the error's text."""
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(" ".join(map(str, command)) + "\n" + result.stdout + result.stderr)


@cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def kept(name: str, inputs: Sequence[Path], key: Sequence[str], write: Callable[[Path], object]) -> Path:
    """The path of what `write` makes of these files, which is called where it is not there already.

    key: what else it depends on. Processes that want the same one wait for the first.
    """
    hashed = hashlib.sha256("\0".join(key).encode())
    for path in inputs:
        hashed.update(path.read_bytes())
    path = folder() / f"{hashed.hexdigest()[:20]}-{name}"
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = path.with_name("unfinished-" + path.name)
            write(unfinished)
            unfinished.replace(path)
    return path


def make(name: str, inputs: Sequence[Path], command: Sequence[str | Path]) -> Path:
    """What `command -o PATH` makes."""
    key = [version(str(command[0])), *map(str, command)]
    return kept(name, inputs, key, lambda path: call(*command, "-o", path))


def headers() -> list[Path]:
    return sorted([*(ROOT / "cpp").rglob("*.hpp"), *HERE.glob("*.hpp")])


def runtime(defines: Sequence[str]) -> Path:
    """The runtime's object file: never with sanitizers."""
    source = HERE / "cuda_host.cpp"
    command = [COMPILER, *FLAGS, "-O2", "-Wall", "-Wextra", *INCLUDES, *defines, "-c", source]
    return make("cuda_host.o", [source, HERE / "cuda_host.hpp"], command)


def translated(source: Path, arch: str, defines: Sequence[str]) -> Path:
    """nvcc's PTX of a .cu file, as C++."""
    command = [NVCC, "-std=c++17", "-lineinfo", f"-arch={arch}", "-ptx", f"-I{ROOT / 'cpp'}",
               f"-I{ROOT / 'cpp/include'}", *defines, source]  # fmt: skip
    assembly = make(f"{source.stem}.ptx", [source, *headers()], command)
    name = f"{source.stem}.ptx.cpp"
    return kept(
        name, [assembly, HERE / "ptx.py"], [], lambda path: path.write_text(ptx.translate(assembly.read_text()))
    )


def compiled(
    source: Path, mode: str, sanitizer: str | None, defines: Sequence[str], arch: str = "compute_90"
) -> list[Path]:
    """The object files of a .cu file and of what runs it."""
    if reason := missing(mode, sanitizer):
        raise RuntimeError(reason)
    if mode not in ("native", "ptx"):
        raise ValueError(f"mode: expected 'native' or 'ptx', got {mode!r}")
    flags = [*FLAGS, *INCLUDES, *defines, *(SANITIZERS[sanitizer] if sanitizer else [])]
    # Unoptimised under a sanitizer: the optimiser takes longer over its checks than it saves.
    command = [COMPILER, *flags, "-O0" if sanitizer else "-O1"]
    kernels = make(f"{source.stem}.o", [source, *headers()], [*command, "-Wall", "-x", "c++", "-c", source])
    objects = [kernels, runtime(defines)]
    if mode == "ptx":
        assembly = translated(source, arch, defines)
        objects.append(make(f"{source.stem}.ptx.o", [assembly, *headers()], [*command, "-c", assembly]))
    return objects


def build(
    source: Path,
    *,
    mode: str = "native",
    sanitizer: str | None = None,
    program: bool = False,
    defines: Sequence[str] = (),
    arch: str = "compute_90",
) -> Path:
    """A shared library (for ctypes), or a program where the source has a `main`.

    mode: "native" or "ptx"; sanitizer: None, "address" (with undefined behaviour) or "thread"; defines: further
    options of the compilers, such as -DNAME=1; arch: whose PTX. Raises RuntimeError with the compiler's words.
    """
    objects = compiled(source, mode, sanitizer, defines, arch)
    # Kernels are found by their names: a program exports them too.
    link = [COMPILER, *FLAGS, *(SANITIZERS[sanitizer] if sanitizer else []), *objects, "-ldl"]
    return make(f"{source.stem}-{mode}", objects, [*link, "-rdynamic"] if program else [*link, "-shared"])


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program made by `build`. Its output is text; one that hangs raises subprocess.TimeoutExpired."""
    # The race detector wants the address space where it was before kernels randomised more of it.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    settings = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:atexit_sleep_ms=0",
                **environment}  # fmt: skip
    return subprocess.run([*fixed, str(program), *arguments], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **settings})  # fmt: skip
