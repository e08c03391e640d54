"""The kernels take as many instructions as the baseline says: a slowdown is seen without a clock."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from compiler import ARCHS, ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import instructions as guard


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return guard.build(tmp_path_factory.mktemp("instructions"))


def counts_or_skip(*arguments: object, **options: object) -> list[guard.Count]:
    try:
        return guard.count(*arguments, **options)
    except guard.CannotCount as reason:
        pytest.skip(str(reason))  # no valgrind, an arch that it cannot run, too slow a machine: nothing was counted


@pytest.mark.parametrize("arch", ARCHS)
def test_no_pass_leaves_its_baseline(program: Path, arch: str) -> None:
    counts = counts_or_skip(program, arch)
    baseline = guard.read_baseline()
    if not any(old.arch == arch for old in baseline):
        # counts are kept for the arches of the machine that made them; another's have nothing to be held to
        pytest.skip(f"there is no baseline of {arch}; make instructions ARGS=--update writes one")
    _, findings = guard.compare(counts, baseline)
    assert not findings, "\n".join(findings)


@pytest.mark.skipif("avx512" not in ARCHS, reason="single steps need an x86-64 CPU")
def test_the_two_ways_of_counting_agree(program: Path) -> None:
    problems = ["gru:T3,N3,I8,H24:f32:lengths"]
    by_valgrind = counts_or_skip(program, "generic", problems, step=False)
    by_steps = counts_or_skip(program, "generic", problems, step=True)
    assert [count.pass_ for count in by_steps] == ["forward", "backward"]
    for one, other in zip(by_valgrind, by_steps):
        assert 0 <= other.instructions - one.instructions <= 20  # to set and to clear the trap flag
        assert one.instructions > one.least  # or it was not the pass that was counted


@pytest.mark.skipif("avx2" not in ARCHS, reason="the C library is known to choose its memcpy by CPU on x86-64")
def test_a_count_does_not_depend_on_what_the_c_library_sees_of_the_cpu(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = ["gru:T3,N3,I8,H24:f32:lengths"]
    counts = counts_or_skip(program, "generic", problems, step=False)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2,-AVX,-ERMS,-FSRM,-AVX_Fast_Unaligned_Load")
    assert counts_or_skip(program, "generic", problems, step=False) == counts


def test_a_rise_a_fall_and_a_missing_row_are_findings() -> None:
    baseline = guard.read_baseline()

    def findings(factor: float, compiler: str | None = None) -> list[str]:
        now = [replace(old, instructions=round(old.instructions * factor)) for old in baseline]
        return guard.compare([replace(c, compiler=compiler or c.compiler) for c in now], baseline)[1]

    assert findings(1.01) == findings(0.99) == []
    assert len(baseline) == len(findings(1.03)) == len(findings(0.97)) > 0
    assert "slower" in findings(1.03)[0] and "--update" in findings(0.97)[0]
    # Another compiler's counts: only a rise that no compiler explains
    assert findings(1.3, "cc 1.0") == findings(0.7, "cc 1.0") == []
    assert len(findings(1.6, "cc 1.0")) == len(baseline)
    unknown = replace(baseline[0], problem="lstm:T1,N1,I1,H1:f32:train")
    assert "no such row" in guard.compare([unknown], baseline)[1][0]


def test_an_update_replaces_what_was_counted_and_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "instructions.csv"
    old = [guard.Count("g++ 1", arch, "lstm:T1,N1,I1,H1:f32:train", "forward", 10, 1) for arch in ("avx2", "generic")]
    guard.write_baseline(old, path)
    assert guard.read_baseline(path) == old
    new = replace(old[0], instructions=7)
    guard.write_baseline([new], path)
    assert guard.read_baseline(path) == [new, old[1]]
