"""The kernel library under the sanitizers, without Python: no read or write out of bounds, no undefined behaviour,
no race, and the same bits from one thread and from three (tests/kernels.cpp)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compiler import ARCHS, COMPILER, compile, compile_kernels, compile_program, run

SANITIZERS = {
    # no recovery: what UBSan finds fails the test instead of being printed. Unoptimised, for with these checks the
    # optimiser takes longer than it saves.
    "address,undefined": ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-O1", "-fsanitize=thread"),
}


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernels_are_clean(sanitizer: str, tmp_path: Path) -> None:
    flags = SANITIZERS[sanitizer]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    try:
        compile(*flags, empty, "-o", tmp_path / "empty")
    except AssertionError:
        # Compilers ship without the sanitizers' libraries (clang's are a package of their own); nothing can run then.
        pytest.skip(f"{COMPILER} has no {sanitizer} sanitizer here")
    # Threads are shared the same way in every arch; bounds differ, for each has masked tails of its own.
    archs = ARCHS if sanitizer != "thread" else ["generic"]
    # One cell of each kind: with a projection; split; with weights of a unit's own; each stage; without a product
    cells = "-DGATEWISE_CELLS=Lstm,Gru,LstmPeephole,GruResetBefore,LstmNorm,IndRnnRelu"
    objects = [compile_kernels(arch, tmp_path, *flags, cells) for arch in archs]
    program = compile_program("tests/kernels.cpp", objects, archs, tmp_path / "kernels", *flags)
    # TSan's shadow memory wants the address space where it was before kernels randomised more of it.
    fixed = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    assert run(*fixed, program).strip().endswith("problems")
