"""The CUDA layer's kernels under the sanitizers (tests/cuda_host/trial.cu): clean as they are, and each bug of a list,
planted in a copy of their source, is seen by the one that should see it."""

from __future__ import annotations

import hashlib
import math
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from cuda_host import build

KERNELS = ["multiply", "add_parts", "column_sums", "standardise", "d_standardise", "gather"]
KERNELS += ["persistent_forward", "persistent_backward", "persistent_tf32"]
LAYERS = [
    "lstm",
    "gru",
    "gru_persistent",
    "lstm_norm",
    "gru_reset_before",
]  # a projection; split; normed; a product in the middle

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
    "relaxed_arrival": (
        "device.hpp",
        "  __atomic_fetch_add(p, v, __ATOMIC_RELEASE);",
        "  if (PLANTED(relaxed_arrival)) __atomic_fetch_add(p, v, __ATOMIC_RELAXED);\n"
        "  else __atomic_fetch_add(p, v, __ATOMIC_RELEASE);",
    ),
    "barrier_before_arrival": (
        "persistent.hpp",
        "    __syncthreads();\n    if (threadIdx.x == 0) {",
        "    if (!PLANTED(barrier_before_arrival)) __syncthreads();\n    if (threadIdx.x == 0) {",
    ),
    "barrier_after_arrival": (
        "persistent.hpp",
        "continue;\n    }\n    __syncthreads();",
        "continue;\n    }\n    if (!PLANTED(barrier_after_arrival)) __syncthreads();",
    ),
    "forward_sums": (
        "persistent.hpp",
        "block.multiply(loop.row(s, i0), rows);\n      __syncthreads();",
        "block.multiply(loop.row(s, i0), rows);\n      if (!PLANTED(forward_sums)) __syncthreads();",
    ),
    "forward_next_tile": (
        "persistent.hpp",
        "if (pass > 0) __syncthreads();  // sums",
        "if (pass > 0 && !PLANTED(forward_next_tile)) __syncthreads();  // sums",
    ),
    "backward_sums": (
        "persistent.hpp",
        "block.multiply(loop.row(s + 1, i0), fed);\n      __syncthreads();",
        "block.multiply(loop.row(s + 1, i0), fed);\n      if (!PLANTED(backward_sums)) __syncthreads();",
    ),
    "one_exchange": ("persistent.hpp", "(s & 1) * other", "(PLANTED(one_exchange) ? 0 : s & 1) * other"),
    "h_through_read_only_cache": (
        "persistent.hpp",
        "    for (int n = 0; n < 4; ++n) h[n] = *reinterpret_cast<const Chunk<T>*>(from + n * pitch);",
        "    for (int n = 0; n < 4; ++n)\n      for (int v = 0; v < int(16 / sizeof(T)); ++v) {\n"
        "        const T* const p = from + n * pitch + v;\n"
        "        h[n].numbers[v] = PLANTED(h_through_read_only_cache) ? __ldg(p) : *p;\n      }",
    ),
    "wrong_fragment": (
        "persistent.hpp",
        "__float_as_uint(h[0].numbers[k]), __float_as_uint(h[1].numbers[k]),",
        "__float_as_uint(h[PLANTED(wrong_fragment)].numbers[k]),"
        " __float_as_uint(h[!PLANTED(wrong_fragment)].numbers[k]),",
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
        seen = "row_too_many", "read_only_cache", "h_through_read_only_cache"
        source = source_with({name: BUGS[name] for name in seen}, "1")
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
        ("relaxed_arrival", "persistent_forward"),  # whose numbers are right on every run
        ("relaxed_arrival", "persistent_backward"),
        ("barrier_before_arrival", "persistent_forward"),
        ("barrier_after_arrival", "persistent_backward"),
        ("forward_sums", "persistent_forward"),
        ("forward_next_tile", "persistent_forward"),
        ("backward_sums", "persistent_backward"),
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
        ("persistent_forward", "the kernel writes what it also reads through the read-only cache"),
    ],
)
def test_ptx_sees(kernel: str, sentence: str) -> None:
    result = build.run(planted("ptx"), kernel)
    assert result.returncode == 1 and sentence in result.stderr, result.stdout


def test_wrong_numbers_of_the_persistent_loop_are_seen() -> None:
    """Of tensor cores with operands in each other's place: without, their numbers are those of exact products, but for
    what rounding to 11 bits makes of sums of 20 products of less than 1 / 4, through functions no steeper than 1. And
    of a step that overwrites what others still read: the blocks have a barrier between them either way."""
    program, kernels = planted("native", "address"), ("persistent_forward", "persistent_tf32")
    bound = 2 * 20 / 4 * 2.0**-10
    exact, rounded = (np.array(values) for values in numbers(build.run(program, *kernels)).values())
    assert 0 < np.abs(rounded - exact).max() <= bound
    for bug, kernel in zip(("one_exchange", "wrong_fragment"), kernels):
        wrong = numbers(build.run(program, kernel, BUG=bug))[kernel]
        assert np.abs(wrong - exact).max() > bound, bug
