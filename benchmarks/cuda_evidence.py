"""What can be known of the CUDA kernels without a GPU: `make cuda-evidence`. Nothing here ran on one.

Two tables, for which nvcc compiles; cuda_plan.py computes two more, which need no compiler:
  cuda_kernels.csv    each kernel on each target, as nvcc makes it: registers, spills, stack, static shared memory, and
                      how many instructions of each kind its machine code has
  cuda_occupancy.csv  the launches that layers make (recorded by the tests' host runtime, which runs no kernel of them):
                      how many blocks of each are resident on a card, by NVIDIA's own count
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import gatewise as gw
from compiler import ROOT
from gatewise.problems import Problem

RESULTS = ROOT / "benchmarks/results"
TARGETS = "75", "80", "86", "89", "90a", "100", "120"
LIBRARY = ROOT / "cpp/cuda/layer.cu"
Row = dict[str, Any]

# ---- What nvcc makes ----------------------------------------------------------------------------------------

# Kinds of instructions, by the names that they have in machine code before the first dot
KINDS = {
    "FFMA": "FFMA FFMA2", "DFMA": "DFMA", "HMMA": "HMMA", "MUFU": "MUFU", "LDS": "LDS LDSM", "STS": "STS",
    "LDG": "LDG", "STG": "STG", "BAR": "BAR",
}  # fmt: skip
DTYPES = {"float": "f32", "double": "f64", "__nv_bfloat16": "bf16", "__half": "f16"}


class Failed(Exception):
    """What nvcc says of a source that it refuses; a warning is a refusal."""


@cache
def tool(name: str) -> Optional[str]:
    """A program of the CUDA toolkit: the one that is named in the environment or on PATH, or PyPI's, or none."""
    if found := os.environ.get(name.upper()) or shutil.which(name):
        return found
    pip = [Path(entry) / "nvidia/cu13/bin" / name for entry in sys.path]
    return next((str(path) for path in pip if path.is_file()), None)


class Compiled(NamedTuple):
    cubin: Path
    said: str  # by ptxas
    most_threads: dict[str, int]  # of a kernel's __launch_bounds__


def compile(target: str, folder: Path, *flags: str, source: Path = LIBRARY) -> Compiled:
    """A source as machine code of one target, as the package compiles it; any warning, a spill's too, raises Failed."""
    nvcc = tool("nvcc")
    if not nvcc:
        raise Failed("no nvcc on PATH")
    cubin = folder / f"{source.stem}.sm_{target}.cubin"
    strict = ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    include = [f"-I{ROOT / 'cpp'}", f"-I{ROOT / 'cpp/include'}"]
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{target}", *include, *strict, *flags]
    command += ["--keep", "--keep-dir", str(folder), "-cubin", str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
    said = result.stdout + result.stderr
    if result.returncode or "warning" in said:
        raise Failed("\n".join(line for line in said.splitlines() if "info" not in line and "bytes stack" not in line))
    ptx = (folder / f"{source.stem}.ptx").read_text()
    bounds = re.findall(r"^\.visible \.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", ptx, re.M)
    return Compiled(cubin, said, {name: int(x) * int(y or 1) * int(z or 1) for name, x, y, z in bounds})


def demangled(names: Sequence[str]) -> list[str]:
    """Kernels' names as a reader of the source knows them: without namespaces and arguments."""
    filt = shutil.which("c++filt")
    if not filt:
        raise Failed("no c++filt on PATH, which comes with the C++ compiler")
    lines = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    shorter = [re.sub(r"\bgatewise::(?:cuda::|scalar::)?", "", line) for line in lines.splitlines()]
    # The arguments follow the last > of a template, which itself may have parentheses: (Operands)1
    return [re.sub(r"^void ", "", re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)$", "", line)) for line in shorter]


@cache
def cells() -> dict[str, str]:
    """The name of a cell by the name of its struct, without regard to case: Lstm is lstm, IndRnnTanh indrnn_tanh."""
    return {name.replace("_", ""): name for name in gw.cells()}


def of_name(kernel: str) -> Row:
    """The cell and dtype among the template arguments of a kernel's name; empty where it has none of its own."""
    words = re.findall(r"\w+", kernel.partition("<")[2])
    cell = next((cells()[word.lower()] for word in words if word.lower() in cells()), "")
    return {"kernel": kernel, "cell": cell, "dtype": next((DTYPES[word] for word in words if word in DTYPES), "")}


def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """How many instructions of each name every kernel has, from its disassembly; {} without a disassembler."""
    disassembler = tool("nvdisasm")
    if not disassembler:
        return {}
    text = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, Counter[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.(\w+),", line):
            counts = found.setdefault(match[1], Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z]\w*)", line):
            counts[match[1]] += 1
    return found


def kernels(target: str, folder: Path, *flags: str, source: Path = LIBRARY) -> Iterator[tuple[str, Row]]:
    """Every kernel of the source on a target: its mangled name, and its row."""
    made = compile(target, folder, *flags, source=source)
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*\n(?:.*Function properties for \w+\n)?"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers(?:, used (\d+) barriers)?(.*)",
        made.said,
    )
    mix = instructions(made.cubin)
    for (mangled, stack, stores, loads, registers, barriers, rest), name in zip(
        entries, demangled([entry[0] for entry in entries])
    ):
        shared = re.search(r"(\d+) bytes smem", rest)
        row = {"target": f"sm_{target}", **of_name(name), "registers": int(registers), "stack": int(stack),
               "spill_stores": int(stores), "spill_loads": int(loads), "static_shared": int(shared[1]) if shared else 0,
               "barriers": int(barriers or 0), "most_threads": made.most_threads.get(mangled, "")}  # fmt: skip
        if mix:
            counts = mix[mangled]
            row |= {"instructions": counts.total() - counts["NOP"]}
            row |= {kind: sum(counts[name] for name in names.split()) for kind, names in KINDS.items()}
        yield mangled, row


# ---- What layers launch -------------------------------------------------------------------------------------


class Launch(NamedTuple):
    kernel: str  # mangled
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cooperative: bool


@cache
def driver() -> ctypes.CDLL:
    """The layers and the tests' host runtime, in which they can be recorded."""
    from cuda_host import build

    return ctypes.CDLL(str(build.build(build.HERE / "layer_driver.cu")))


def launches(problem: Problem) -> list[Launch]:
    """What a layer launches for a problem, step by step, in order; no kernel of it runs."""
    import problems
    import test_cuda_kernels as layer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "launches.csv"
        driver().cuda_host_record(str(path).encode())
        try:
            layer.run(driver(), problem, problems.draw(problem))
        finally:
            driver().cuda_host_record(None)
        lines = path.read_text().splitlines()
    found = []
    for kernel, *numbers in csv.reader(lines):
        x, y, z, threads, shared, cooperative = map(int, numbers)
        found.append(Launch(kernel, (x, y, z), threads, shared, bool(cooperative)))
    return found


# ---- How many blocks are resident ---------------------------------------------------------------------------

# The target whose machine code a card runs
TARGET_OF = {"7.5": "75", "8.0": "80", "8.6": "86", "8.9": "89", "9.0": "90a", "10.0": "100", "12.0": "120"}
# Layers whose launches are looked at: small, ordinary and large ones, and options that bring kernels of their own
SHAPES = ("T3,N1,I64,H64", "T3,N32,I128,H128", "T3,N128,I1024,H1024")
OPTIONS = ("lengths,h0", "mask,reset,h0", "project,h0")


def occupancy(made: dict[str, dict[str, Row]]) -> Iterator[Row]:
    """Each kind of launch on each card, once. made: the rows of `kernels` by target and mangled name."""
    from plans import CARDS, library, plan, problem
    from problems import fits

    kinds: set[tuple[str, int, int]] = set()
    shapes = [Problem.parse(f"{cell}:{shape}:{dtype}:train")
              for cell, shape, dtype in itertools.product(gw.cells(), SHAPES, ("f32", "f64"))]  # fmt: skip
    for shape, options in itertools.product(shapes, OPTIONS):
        own = frozenset(option for option in options.split(",") if fits(shape.cell, [option]))
        kinds |= {(call.kernel, call.threads, call.shared) for call in launches(replace(shape, options=own))}
    for card, limits in CARDS.items():
        rows = made[TARGET_OF[f"{limits.major}.{limits.minor}"]]
        mangled = {(base, row["cell"], row["dtype"]): name for name, row in rows.items()
                   if (base := row["kernel"].partition("<")[0]).startswith("persistent_")}  # fmt: skip
        planned = set()  # by the card's own limits
        for of, backward in itertools.product(shapes, (False, True)):
            loop = plan(limits, problem(of.cell, of.N, of.H, of.dtype, backward))
            if loop.persistent:
                kernel = mangled["persistent_backward" if backward else "persistent_forward", of.cell, of.dtype]
                planned.add((kernel, loop.block, loop.shared_bytes))
        for kernel, threads, dynamic in sorted(kinds | planned):
            row = rows[kernel]
            shared = dynamic + row["static_shared"]
            blocks = library().nvidia_resident(limits, threads, row["registers"], shared)
            share = blocks * -(-threads // 32) * 32 / limits.threads_per_multiprocessor
            yield {"card": card, **{name: row[name] for name in ("kernel", "cell", "dtype", "registers")},
                   "threads": threads, "shared": shared, "blocks": blocks, "occupancy": round(share, 3)}  # fmt: skip


# ---- The tables ---------------------------------------------------------------------------------------------


def fingerprint() -> str:
    """Of the kernels' sources without comments and spaces, and of the compiler: what the table of kernels is of."""
    sources = sorted([*(ROOT / "cpp/cuda").glob("*.*"), *(ROOT / "cpp/include/gatewise").glob("*.hpp"),
                      ROOT / "cpp/cpu/rows.hpp"])  # fmt: skip
    text = "".join(re.sub(r"//.*|\s+", "", path.read_text()) for path in sources)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def compiler() -> str:
    said = subprocess.run([tool("nvcc") or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V([\d.]+)", said)[0]


def write(path: Path, rows: Iterable[Row]) -> None:
    """A file of rows, which is there whole or not at all."""
    rows = list(rows)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
    print(f"{path.name}: {len(rows)} rows")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="DIR", default=RESULTS)
    folder: Path = parser.parse_args().results
    if not tool("nvdisasm"):
        sys.exit(
            "cuda_evidence: nvdisasm counts the instructions; install nvidia-cuda-nvdisasm (PyPI) or a CUDA toolkit"
        )
    stamp = {"nvcc": compiler(), "source": fingerprint()}
    made = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as scratch:
            made[target] = dict(kernels(target, Path(scratch)))
        print(f"sm_{target}: {len(made[target])} kernels")
    rows = [row | stamp for of_target in made.values() for row in of_target.values()]
    write(folder / "cuda_kernels.csv", sorted(rows, key=lambda row: (row["kernel"], TARGETS.index(row["target"][3:]))))
    write(folder / "cuda_occupancy.csv", occupancy(made))


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        sys.exit(f"cuda_evidence: {error}")
