"""The suite: a benchmark for each problem and number of threads. `make bench` runs it and writes benchmarks/results/.

A round of pytest-benchmark is a window of many steps of ours; the others' windows, and the peak's, lie between two
rounds, so that all meet the same machine. All that is measured is gatewise.bench's; here it is handed on.
"""

from __future__ import annotations

from dataclasses import asdict

import pytest

from gatewise import bench

# Slow ones, and ones that others speak for, meet us on a few problems only: not long ones, on one thread.
FEW = ("torch-generic", "torch-cell", "keras", "numpy", "reference")
FEW_SETS = ("grid", "stream")
ONE_THREAD = ("jax",)  # or a full run would take longer than half an hour


class Clock:
    """Counts what steps of ours took, and stands still between them: pytest-benchmark then sees the time of a step
    where it would have seen that of a window and of the pause before it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


def opponents(config: pytest.Config, name: str, problem: bench.Problem, threads: int) -> list[str]:
    """The peers that meet us on a problem of a set: those that were named, else all but the slow ones."""
    if config.getoption("--against"):
        return list(config.against)
    short = problem.T * problem.N <= 8192 and problem.H <= 512 and problem.dtype == "f32"
    few = name in FEW_SETS and short and threads == 1
    return [peer for peer in config.against if few or (peer not in FEW and (threads == 1 or peer not in ONE_THREAD))]


@pytest.mark.filterwarnings("default")  # those of other libraries are no fault of ours
@pytest.mark.benchmark(timer=clock, warmup=False)
def test_speed(benchmark, pytestconfig, speed, table, record_property, name, problem, threads) -> None:
    peers, party = opponents(pytestconfig, name, problem, threads), pytestconfig.getoption("--party")
    measurement = bench.Measurement(problem, peers, threads, pytestconfig.getoption("--window"), party)
    others = [other for other in measurement.parties if other != "ours"]
    rounds: list[dict[str, float]] = []

    def between() -> None:
        rounds.append(measurement.round(others))

    def ours() -> None:
        rounds[-1]["ours"] = measurement.window("ours")
        clock.now += rounds[-1]["ours"]

    benchmark.pedantic(ours, setup=between, rounds=pytestconfig.getoption("--rounds"))
    rows = measurement.rows(rounds, name)
    if name == "scaling" and threads == 1:
        rows = bench.with_memory(rows, ["torch"], party)
    speed.write(rows)
    record_property("line", table.line(rows))
    benchmark.group = name
    facts, shares = asdict(rows[0]), ("products", "cells", "other", "call")
    benchmark.extra_info.update({key: facts[key] for key in ("gflops", "peak_share", *shares)})
    benchmark.extra_info.update({f"{row.against} / ours": row.ratio for row in rows if row.against})
