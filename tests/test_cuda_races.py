"""The CUDA layer's kernels under the sanitizers (tests/cuda_host/trial.cu): clean as they are, and each bug of a list,
planted in a copy of their source, is seen by the one that should see it."""

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from cuda_host import build

KERNELS = ["multiply", "add_parts", "column_sums", "standardise", "d_standardise", "gather"]
LAYERS = ["lstm", "gru", "lstm_norm", "gru_reset_before"]  # a projection; split; normed; a product in the middle

# Bugs by name: the header of cpp/cuda/ that has it, the text in whose place it is planted, itself. PLANTED(name) is
# true where the program is told to have that bug.
BUGS = {
    "multiply_barrier": (
        "product.hpp",
        "    __syncthreads();\n    if (k + Tile::depth < end)",
        "    if (!PLANTED(multiply_barrier)) __syncthreads();\n    if (k + Tile::depth < end)",
    ),
    "column_sums_barrier": (
        "step.hpp",
        "    __syncthreads();\n    if (int(threadIdx.y) < half)",
        "    if (!PLANTED(column_sums_barrier)) __syncthreads();\n    if (int(threadIdx.y) < half)",
    ),
    "block_sum_first_barrier": (
        "step.hpp",
        "  __syncthreads();  // the sum before may still be read",
        "  if (!PLANTED(block_sum_first_barrier)) __syncthreads();",
    ),
    "block_sum_barrier": (
        "step.hpp",
        "    __syncthreads();\n    if (int(threadIdx.x) < half)",
        "    if (!PLANTED(block_sum_barrier)) __syncthreads();\n    if (int(threadIdx.x) < half)",
    ),
    "block_sum_last_barrier": (
        "step.hpp",
        "  __syncthreads();\n  return of_thread[0];",
        "  if (!PLANTED(block_sum_last_barrier)) __syncthreads();\n  return of_thread[0];",
    ),
    "element_of_two_threads": (
        "product.hpp",
        "column = Index(blockIdx.y) * blockDim.x + threadIdx.x;",
        "column = Index(blockIdx.y) * (blockDim.x - PLANTED(element_of_two_threads)) + threadIdx.x;",
    ),
    "row_too_many": ("product.hpp", "if (row >= p.M) continue;", "if (row >= p.M + PLANTED(row_too_many)) continue;"),
    "beyond_a_part": (
        "step.hpp",
        "int half = kSumRows / 2;",
        "int half = kSumRows / (PLANTED(beyond_a_part) ? 1 : 2);",
    ),
    "column_too_few": (
        "step.hpp",
        "if (threadIdx.y == 0 && column < columns) sums",
        "if (threadIdx.y == 0 && column < columns - PLANTED(column_too_few)) sums",
    ),
    "read_only_cache": (
        "step.hpp",
        "  T* const to = gradient + (k + turn) % size;\n  *to = *to + sum;",
        "  T* const to = gradient + (k + turn) % size;\n  *to = (PLANTED(read_only_cache) ? __ldg(to) : *to) + sum;",
    ),
}  # fmt: skip


@cache
def shipped(sanitizer: str) -> Path:
    if reason := build.missing("native", sanitizer):
        pytest.skip(reason)
    layers = ["-DGATEWISE_TRIAL_LAYERS"]
    return build.build(build.HERE / "trial.cu", sanitizer=sanitizer, program=True, defines=layers)


def source_with(bugs: dict[str, tuple[str, str, str]], planted: str) -> Path:
    """trial.cu in a copy of its headers that has these bugs where the C++ expression `planted` is true."""
    originals = [*(build.ROOT / "cpp/cuda").glob("*.hpp"), build.HERE / "trial.cu", build.HERE / "device_memory.hpp"]
    texts = {path.name: path.read_text() for path in originals}
    for name, (file, old, new) in bugs.items():
        assert texts[file].count(old) == 1, f"{name}: {file} no longer has the line that it is planted in"
        texts[file] = texts[file].replace(old, new)
    head = f"#pragma once\n#include <cstdlib>\n#include <cstring>\n#define PLANTED(bug) {planted}\n"
    texts["device.hpp"] = head + texts["device.hpp"]
    name = hashlib.sha256("".join(texts.values()).encode()).hexdigest()[:20]
    tree = build.folder() / f"{name}-planted"
    (tree / "cuda").mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        path = tree / ("cuda" if file.endswith(".hpp") and file != "device_memory.hpp" else "") / file
        if not path.exists():
            path.write_text(text)
    return tree / "trial.cu"


@cache
def planted(mode: str, sanitizer: str | None = None) -> Path:
    """The program with bugs: natively with one that the environment names, as PTX with those that PTX sees."""
    if reason := build.missing(mode, sanitizer):
        pytest.skip(reason)
    if mode == "ptx":
        source = source_with({name: BUGS[name] for name in ("row_too_many", "read_only_cache")}, "1")
    else:
        source = source_with(BUGS, '(std::getenv("BUG") && !std::strcmp(std::getenv("BUG"), #bug))')
    return build.build(source, mode=mode, sanitizer=sanitizer, program=True)


def numbers(result: CompletedProcess[str]) -> dict[str, list[float]]:
    assert result.returncode == 0, result.stderr
    return {name: [float(word) for word in words] for name, *words in map(str.split, result.stdout.splitlines())}


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_the_kernels_are_clean(sanitizer: str) -> None:
    results = numbers(build.run(shipped(sanitizer), *KERNELS, *LAYERS))
    assert list(results) == [*KERNELS, *LAYERS]
    assert all(math.isfinite(number) for values in results.values() for number in values)


@pytest.mark.parametrize(
    ("bug", "kernel"),
    [
        ("multiply_barrier", "multiply"),
        ("column_sums_barrier", "column_sums"),
        ("block_sum_first_barrier", "standardise"),
        ("block_sum_barrier", "standardise"),
        ("block_sum_last_barrier", "d_standardise"),
        ("element_of_two_threads", "gather"),  # both write the same number
    ],
)
def test_the_race_detector_sees(bug: str, kernel: str) -> None:
    result = build.run(planted("native", "thread"), kernel, BUG=bug)
    assert result.returncode == 66, f"nothing was seen; it printed {result.stdout}"
    assert "ThreadSanitizer: data race" in result.stderr and f"gatewise::cuda::{kernel}<" in result.stderr


@pytest.mark.parametrize(
    ("bug", "kernel", "report"),
    [
        ("row_too_many", "multiply", "AddressSanitizer: heap-buffer-overflow"),
        ("beyond_a_part", "column_sums", "AddressSanitizer: use-after-poison"),
    ],
)
def test_the_address_sanitizer_sees(bug: str, kernel: str, report: str) -> None:
    result = build.run(planted("native", "address"), kernel, BUG=bug)
    assert report in result.stderr and f"gatewise::cuda::{kernel}<" in result.stderr, result.stdout


def test_a_number_that_was_never_written_is_nan() -> None:
    program = planted("native", "address")
    assert math.isfinite(sum(numbers(build.run(program, "column_sums"))["column_sums"]))
    values = numbers(build.run(program, "column_sums", BUG="column_too_few"))["column_sums"]
    assert sum(map(math.isnan, values)) == 1


@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        ("multiply", "an access to global memory outside of every allocation"),
        ("column_sums", "the kernel writes what it also reads through the read-only cache"),
    ],
)
def test_ptx_sees(kernel: str, sentence: str) -> None:
    result = build.run(planted("ptx"), kernel)
    assert result.returncode == 1 and sentence in result.stderr, result.stdout
