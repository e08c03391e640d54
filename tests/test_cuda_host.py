"""The host runtime of the CUDA kernels (tests/cuda_host): it computes what CUDA would, in either mode and under every
schedule, and it catches each bug of a list, planted in small kernels (probes.cu)."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cuda_host import build, ptx

SOURCE = Path(__file__).resolve().parent / "cuda_host/probes.cu"
MODES = ["native", "ptx"]
SCHEDULES = ["forward", "reverse", "random:1", "random:2"]


@cache
def program(mode: str = "native", sanitizer: str | None = None, *defines: str) -> Path:
    if reason := build.missing(mode, sanitizer):
        pytest.skip(reason)
    return build.build(SOURCE, mode=mode, sanitizer=sanitizer, defines=defines, program=True)


def compute(kernel: str, bug: str = "none", mode: str = "native", sanitizer: str | None = None, **settings: str):
    """The lines of numbers that a run without errors prints."""
    result = build.run(program(mode, sanitizer), kernel, bug, **settings)
    assert result.returncode == 0, result.stderr
    return [np.array(line.split(), float) for line in result.stdout.splitlines()]


def complaint(
    kernel: str, bug: str = "none", mode: str = "native", sanitizer: str | None = None, **settings: str
) -> str:
    """What a run that must fail says."""
    result = build.run(program(mode, sanitizer), kernel, bug, **settings)
    assert result.returncode != 0, f"{kernel} ran with {bug} and nothing was seen; it printed {result.stdout}"
    return result.stderr


def numbers(n: int) -> np.ndarray:
    i = np.arange(n)
    return (((i * 37 + 11) % 101).astype(np.float32) / np.float32(101) - np.float32(0.5)).astype(np.float64)


def truncated(x: np.ndarray, bits: int) -> np.ndarray:
    """Without the last bits of float32."""
    words = x.astype(np.float32).view(np.uint32)
    return (words >> bits << bits).view(np.float32).astype(np.float64)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of finite float32 numbers, rounded to nearest, ties to even."""
    words = x.astype(np.float32).view(np.uint32)
    return ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16)


def expected(kernel: str) -> np.ndarray:
    """What a probe without a bug computes, in float64."""
    if kernel == "sum":
        return numbers(300).sum(keepdims=True)
    if kernel == "diffuse":
        a = numbers(96)
        for _ in range(4):
            a = a / 2 + (np.roll(a, 1) + np.roll(a, -1)) / 4
        return a
    if kernel == "reverse":
        return numbers(32)[::-1]
    if kernel == "multiply_tf32":
        return (truncated(numbers(128), 13).reshape(16, 8) @ truncated(numbers(64), 13).reshape(8, 8)).ravel()
    assert kernel == "multiply_bf16"
    a, b = ((to_bf16(numbers(n)).astype(np.uint32) << 16).view(np.float32).astype(np.float64) for n in (256, 128))
    return (a.reshape(16, 16) @ b.reshape(8, 16).T).ravel()


KERNELS = ["sum", "diffuse", "reverse", "multiply_tf32", "multiply_bf16"]


def close(got: np.ndarray, want: np.ndarray) -> bool:
    """NaN is not close."""
    return got.shape == want.shape and bool(np.all(np.abs(got - want) <= 2e-6 * (1 + np.abs(want))))


# --- It computes what CUDA would -------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compute(kernel: str, mode: str, schedule: str) -> None:
    (got,) = compute(kernel, mode=mode, CUDA_HOST_SCHEDULE=schedule)
    assert close(got, expected(kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compute_where_fibres_are_the_system_s(kernel: str) -> None:
    """As on a CPU that the runtime has no assembly for."""
    result = build.run(program("native", None, "-DCUDA_HOST_UCONTEXT"), kernel)
    assert close(np.array(result.stdout.split(), float), expected(kernel))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_warps_exchange_as_cuda_does(mode: str, schedule: str) -> None:
    lane = np.arange(32)
    (got,) = compute("exchange", mode=mode, CUDA_HOST_SCHEDULE=schedule)
    thirds = sum(1 << int(k) for k in lane[lane % 3 == 0])
    want = [
        np.full(32, 5),
        lane // 8 * 8 + 5,
        lane ^ 3,
        np.where(lane % 16 >= 2, lane - 2, lane),
        np.where(lane + 20 < 32, lane + 20, lane),
        np.full(32, np.array(thirds, np.uint32).view(np.int32)),
        np.ones(32),
        np.zeros(32),
        lane ^ 8,
        np.where(lane < 16, lane ^ 5, lane ^ 1),
    ]
    np.testing.assert_array_equal(got.reshape(10, 32), want)


@pytest.mark.parametrize("mode", MODES)
def test_blocks_vote_and_update_together(mode: str) -> None:
    np.testing.assert_array_equal(compute("agree", mode=mode)[0], [22, 2, 1, 63, -5, 255, 64, 9])


def test_translated_arithmetic_is_the_compiler_s() -> None:
    native, translated = compute("calculate"), compute("calculate", mode="ptx")
    np.testing.assert_array_equal(translated[0], native[0])
    for got, want, bound in zip(translated[1:], native[1:], (3e-7, 1e-15)):
        np.testing.assert_allclose(got, want, rtol=bound, atol=bound * 1e-30)


@pytest.mark.parametrize("mode", MODES)
def test_half_and_bfloat16_round_to_nearest_even(mode: str) -> None:
    if reason := build.missing(mode):
        pytest.skip(reason)
    library = ctypes.CDLL(str(build.build(SOURCE, mode=mode)))
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    exact = halves[np.isfinite(halves)].astype(np.float32)
    with np.errstate(over="ignore"):
        # every half, the middle between it and the next, and a bit to either side of that; the two ends; beyond them
        middle = (exact + np.nextafter(exact.astype(np.float16), np.float16(np.inf)).astype(np.float32)) / 2
        middle = middle[np.isfinite(middle)]
        ends = np.array([65519.996, 65520, 1e38, -1e38, np.inf, -np.inf, 2.0**-25, 2.0**-24], np.float32)
        x = np.concatenate([exact, middle, np.nextafter(middle, np.float32(np.inf)), ends])
        want = x.astype(np.float16)
    x = np.ascontiguousarray(x)
    half, bf16 = np.zeros((2, len(x)), np.uint16)
    back = np.zeros((len(x), 2), np.float32)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, half, bf16, back)]
    assert library.probe_rounding(*pointers, len(x)) == 0
    np.testing.assert_array_equal(half, want.view(np.uint16))
    np.testing.assert_array_equal(bf16, to_bf16(x))
    np.testing.assert_array_equal(back[:, 0], want.astype(np.float32))
    np.testing.assert_array_equal(back[:, 1], (bf16.astype(np.uint32) << 16).view(np.float32))


def test_schedules_order_threads_and_repeat() -> None:
    forward, reverse = (compute("come", CUDA_HOST_SCHEDULE=s)[0] for s in ("forward", "reverse"))
    np.testing.assert_array_equal(forward, np.arange(120))
    np.testing.assert_array_equal(reverse, np.arange(120)[::-1])
    first, again, other = (compute("come", CUDA_HOST_SCHEDULE=f"random:{s}")[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.sort(first), np.arange(120))


def test_memory_starts_as_nan() -> None:
    assert np.isnan(compute("uninitialised")[0]).all()


@pytest.mark.parametrize("deferred", ["", "1"])
@pytest.mark.parametrize("mode", MODES)
def test_graphs_replay_and_events_order_streams(mode: str, deferred: str) -> None:
    lines = compute("streams", mode=mode, CUDA_HOST_DEFERRED=deferred)
    np.testing.assert_array_equal(lines, [[0, 0, 0, 0], [5, 2, 3, 4], [6, 2, 3, 4], [0, 0, 0, 0]])


def test_streams_without_an_event_are_not_ordered() -> None:
    assert not np.array_equal(compute("streams_unordered", CUDA_HOST_DEFERRED="1")[-1], np.zeros(4))


# --- What it refuses and catches -------------------------------------------------------------------------------------


def test_what_no_device_would_take_is_refused() -> None:
    result = build.run(program(), "refusals")
    assert dict(line.split(": ") for line in result.stdout.splitlines()) == {
        "direction": "cudaErrorInvalidValue",
        "beyond": "cudaErrorInvalidValue",
        "foreign": "cudaErrorInvalidValue",
        "shared": "cudaErrorInvalidValue",
        "threads": "cudaErrorInvalidConfiguration",
        "attribute": "cudaErrorInvalidValue",
        "resident": "cudaErrorCooperativeLaunchTooLarge",
        "copy": "accepted",
    }


@pytest.mark.parametrize("mode", MODES)
def test_who_exits_before_a_barrier_and_who_during_it(mode: str) -> None:
    assert "exits while others of its block" in complaint("sum", "divergent_barrier", mode)
    assert "barrier after threads of the block have exited" in complaint("sum", "exited_warp", mode)


def test_occupancy_is_by_threads_and_shared_memory() -> None:
    np.testing.assert_array_equal(compute("occupancy")[0], [32, 8, 2, 2, 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel", "bug", "sentence"),
    [
        # which thread is first to come depends on the schedule
        ("sum", "divergent_barrier", "exits while others of its block|barrier after threads of the block have exited"),
        ("sum", "exited_thread", "exits while others of its block|barrier after threads of the block have exited"),
        ("sum", "exited_lane", "exits while others of its mask|names lanes that have exited"),
        ("sum", "different_barriers", "different barriers"),
        ("sum", "one_lane_shuffle", "different warp operations"),
        ("sum", "outside_mask", "outside its mask"),
        ("sum", "not_in_own_mask", "mask"),
        ("diffuse", "not_cooperative", "the launch is not cooperative"),
        ("diffuse", "too_little_shared", "shared memory"),
        ("livelock", "none", "livelock"),
        ("deadlock", "none", "deadlock"),
    ],
)
def test_threads_that_do_not_meet_are_an_error(kernel: str, bug: str, sentence: str, mode: str, schedule: str) -> None:
    said = complaint(kernel, bug, mode, CUDA_HOST_SCHEDULE=schedule)
    assert "cudaErrorLaunchFailure" in said and re.search(sentence, said)
    if kernel == "sum":
        assert "gatewise::cuda::sum: " in said and "probes.cu:" in said  # which kernel, and where


@pytest.mark.parametrize(
    ("kernel", "bug", "sentence"),
    [
        ("sum", "static_out_of_bounds", "beyond the shared memory"),
        ("sum", "global_out_of_bounds", "outside of every allocation"),
        ("sum", "misaligned", "misaligned"),
        ("diffuse", "read_only_cache", "read-only cache"),
    ],
)
def test_ptx_checks_every_access(kernel: str, bug: str, sentence: str) -> None:
    said = complaint(kernel, bug, "ptx")
    assert sentence in said and "probes.cu:" in said


def test_a_write_beyond_a_part_of_shared_memory_is_seen_by_its_guards() -> None:
    assert "behind the end of part 0" in complaint("diffuse", "part_overrun")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["multiply_tf32", "multiply_bf16"])
def test_a_wrong_fragment_of_a_matrix_gives_wrong_numbers(kernel: str, mode: str) -> None:
    (got,) = compute(kernel, "wrong_fragment", mode)
    assert not close(got, expected(kernel))


# --- With sanitizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "sanitizer"), [("native", "address"), ("native", "thread"), ("ptx", "thread")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_clean(kernel: str, mode: str, sanitizer: str) -> None:
    (got,) = compute(kernel, mode=mode, sanitizer=sanitizer)
    assert close(got, expected(kernel))


@pytest.mark.parametrize(
    ("kernel", "bug", "report"),
    [
        ("sum", "static_out_of_bounds", "index 4 out of bounds"),
        ("sum", "global_out_of_bounds", "AddressSanitizer"),
        ("sum", "misaligned", "misaligned address"),
        ("diffuse", "part_overrun", "AddressSanitizer: use-after-poison"),
    ],
)
def test_the_address_sanitizer_sees(kernel: str, bug: str, report: str) -> None:
    assert report in complaint(kernel, bug, sanitizer="address")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel", "bug"),
    [
        ("sum", "missing_syncthreads"),
        ("sum", "plain_addition"),
        ("diffuse", "relaxed_arrival"),  # whose numbers are right on every run
        ("diffuse", "missing_block_barrier"),
        ("reverse", "missing_syncwarp"),
    ],
)
def test_the_race_detector_sees(kernel: str, bug: str, mode: str) -> None:
    said = complaint(kernel, bug, mode, sanitizer="thread")
    assert "ThreadSanitizer: data race" in said and "probes.cu:" in said


@pytest.mark.parametrize("mode", MODES)
def test_errors_are_told_under_the_race_detector_too(mode: str) -> None:
    said = complaint("sum", "one_lane_shuffle", mode, sanitizer="thread")
    assert "different warp operations" in said and "ThreadSanitizer" not in said


# --- The translator guesses nothing ----------------------------------------------------------------------------------

MODULE = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p)
{{
 .reg .b32 %r<4>; .reg .f32 %f<4>; .reg .b64 %rd<4>;
 ld.param.u64 %rd1, [p];
 {instruction}
 ret;
}}
"""


@pytest.mark.parametrize(
    "instruction",
    [
        "add.s32 %r1, %r2, 1;",
        "ld.acquire.gpu.global.u32 %r1, [%rd1+4];",
        "{ .reg .pred q; setp.ne.s32 q, %r1, 0; @q add.f32 %f1, %f2, 0f3F800000; }",
    ],
)
def test_known_instructions_translate(instruction: str) -> None:
    assert "run_k(" in ptx.translate(MODULE.format(instruction=instruction))


@pytest.mark.parametrize(
    ("instruction", "unknown"),
    [
        ("cp.async.wait_all;", "instruction cp"),
        ("add.rz.f32 %f1, %f2, %f3;", "modifier .rz"),
        ("add.s32 %r1, %r2, %clock;", "operand %clock"),
        ("ld.acquire.cta.global.u32 %r1, [%rd1];", "scope"),
        ("bar.sync 1;", "barrier other than"),
        ("fence.acq_rel.gpu;", "instruction fence"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0}, {%r0}, {%r1}, {%f1};", "mma shape"),
        ("ld.global.u32 %r1, [nowhere];", "operand nowhere"),
    ],
)
def test_unknown_instructions_stop_the_translation(instruction: str, unknown: str) -> None:
    with pytest.raises(ptx.Unknown, match="PTX line 9, kernel k") as error:
        ptx.translate(MODULE.format(instruction=instruction))
    assert unknown in str(error.value)
