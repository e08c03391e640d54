"""Counts the instructions of forward and backward passes and compares them with a baseline: `make instructions`.

A clock on a shared machine says little about 2 %; a count of instructions repeats. It is a guard, not a measure of
speed: it sees a pass over memory too many, a tile that no longer fits its registers, a product that is done twice, and
it does not see a cache miss. valgrind counts where it can; it knows no AVX-512, so there the program steps through
itself, 12 microseconds an instruction, and its problems are small.

A count belongs to a compiler, not to a CPU: which code runs is asked for by name, and nothing of the C library's is
counted that it would choose by CPU. With a compiler that has no baseline, the counts are compared with another's and
only a much larger one is a finding: the compiler keeps a tile on the stack, say.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from compiler import ARCHS, ROOT, built_kernels, compile_program

BASELINE = ROOT / "benchmarks/results/instructions.csv"
TOLERANCE = 1.02  # of the same compiler. Counts repeat to the last one; this is room for changes that mean no harm.
OTHER_COMPILER = 1.5  # clang 14 takes 0.72 to 1.16 of what g++ 12 takes
SECONDS = 120  # for an arch; it takes about 5. Some machines take a hundred times as long for a step.

# One sequence; many; sizes that fill no register and no tile; unequal lengths with everything else that can be given.
SHAPES = ["T12,N1,I20,H64:f32:train", "T6,N32,I16,H64:f32:train", "T5,N7,I9,H33:f32:train",
          "T12,N16,I8,H24:f32:lengths,reverse,h0"]  # fmt: skip
CELLS = ["lstm", "gru", "rnn_tanh"]
PROBLEMS = [f"{cell}:{shape}" for cell in CELLS for shape in SHAPES] + ["lstm:T5,N7,I9,H33:f64:train"]
STEPPED = [f"{cell}:{shape}:f32:train" for cell in CELLS for shape in ("T4,N1,I8,H32", "T2,N6,I8,H32")]


class CannotCount(Exception):
    """Says why instructions cannot be counted here."""


@dataclass(frozen=True)
class Count:
    """Instructions of one pass of a problem; `least`, its multiply-adds in registers, of which it needs as many."""

    compiler: str
    arch: str
    problem: str
    pass_: str
    instructions: int
    least: int

    @classmethod
    def of(cls, row: Sequence[str]) -> Count:
        """From the words of a row of the baseline."""
        compiler, arch, problem, pass_, instructions, least = row
        return cls(compiler, arch, problem, pass_, int(instructions), int(least))

    @property
    def key(self) -> tuple[str, str, str]:
        return self.arch, self.problem, self.pass_


def build(folder: Path) -> Path:
    """The program that runs problems, with every arch of this build."""
    # -z now: finding a function when it is first called would be counted as well
    return compile_program("benchmarks/instructions.cpp", built_kernels(folder), ARCHS, folder / "instructions",
                           "-O2", "-Wall", "-Wextra", "-Wl,-z,now")  # fmt: skip


def count(program: Path, arch: str, problems: Sequence[str] | None = None, step: bool | None = None) -> list[Count]:
    """Counts forward and backward of each problem (by default: the arch's own), by steps or by valgrind.

    Raises:
        CannotCount: valgrind is not installed, or the arch does not run here, or not under valgrind.
    """
    step = arch == "avx512" if step is None else step
    problems = problems or (STEPPED if step else PROBLEMS)
    if not step and not shutil.which("valgrind"):
        raise CannotCount("valgrind is not installed")
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder) / "dump"
        valgrind = ["valgrind", "--quiet", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=counted",
                    "--dump-after=counted", f"--callgrind-out-file={dumps}"]  # fmt: skip
        command = [*([] if step else valgrind), str(program), *(["--step"] if step else []), arch, *problems]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise CannotCount(f"{arch}'s problems took more than {SECONDS} seconds") from None
        if result.returncode == 3:
            raise CannotCount(result.stdout.strip() + ("" if step else " under valgrind"))
        if step and result.returncode == -signal.SIGTRAP:
            raise CannotCount("single steps kill a program here")
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}: {result.stderr.strip()}")
        compiler, *lines = result.stdout.splitlines()
        counts = []
        for number, line in enumerate(lines, start=1):
            problem, pass_, least, *stepped = line.split()
            total = stepped[0] if step else _summary(dumps.with_name(f"dump.{number}"))
            counts.append(Count(compiler, arch, problem, pass_, int(total), int(least)))
        return counts


def _summary(dump: Path) -> str:
    match = re.search(r"^summary: (\d+)$", dump.read_text(), re.M)
    if match is None:
        raise RuntimeError(f"{dump}: callgrind wrote no summary")
    return match[1]


def read_baseline(path: Path = BASELINE) -> list[Count]:
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return [Count.of(row) for row in rows]


def write_baseline(counts: Sequence[Count], path: Path = BASELINE) -> None:
    """Replaces the rows of the arches counted, other compilers' too: they counted kernels that are no more."""
    counted = {count.arch for count in counts}
    kept = [old for old in read_baseline(path) if old.arch not in counted] if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["compiler", "arch", "problem", "pass", "instructions", "least"])
        for c in sorted([*kept, *counts], key=lambda count: (count.compiler, count.arch)):
            writer.writerow([c.compiler, c.arch, c.problem, c.pass_, c.instructions, c.least])


def compare(counts: Sequence[Count], baseline: Sequence[Count]) -> tuple[dict[Count, float], list[str]]:
    """(each count as a ratio to its baseline, where it has one; a sentence for each finding)."""
    ratios, findings = {}, []
    for now in counts:
        same = [old for old in baseline if old.key == now.key]
        own = [old for old in same if old.compiler == now.compiler]
        what = f"{now.arch} {now.problem} {now.pass_}"
        if not same:
            findings.append(f"{what}: the baseline has no such row; --update writes it")
            continue
        old = (own or same)[0]
        ratio = ratios[now] = now.instructions / old.instructions
        said = f"{what}: {now.instructions:,} instructions, {ratio:.3f} of the baseline's {old.instructions:,}"
        if not own and ratio > OTHER_COMPILER:
            findings.append(f"{said}, which is {old.compiler}'s; this is {now.compiler}")
        if own and ratio > TOLERANCE:
            findings.append(f"{said}: slower")
        if own and ratio < 1 / TOLERANCE:
            findings.append(f"{said}: faster; lower the baseline with --update, so that it stays so")
    return ratios, findings


def main() -> None:
    parser = argparse.ArgumentParser(description="instructions of the kernels against a baseline")
    parser.add_argument("--archs", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--update", action="store_true", help="make these counts the baseline")
    options = parser.parse_args()
    counts = []
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for arch in options.archs:
            try:
                counts += count(program, arch)
            except CannotCount as reason:
                print(f"{arch}: not counted: {reason}")
    if options.update:
        write_baseline(counts)
    baseline = read_baseline()
    ratios, findings = compare(counts, baseline)
    print(f"{'arch':<8}{'problem':<48}{'pass':<9}{'instructions':>13}{'of baseline':>13}{'of least':>10}")
    for c in counts:
        ratio, of_least = f"{ratios[c]:.3f}" if c in ratios else "-", c.instructions / c.least
        print(f"{c.arch:<8}{c.problem:<48}{c.pass_:<9}{c.instructions:>13,}{ratio:>13}{of_least:>10.2f}")
    if counts and not any(old.compiler == counts[0].compiler for old in baseline):
        print(f"\nNo baseline of {counts[0].compiler}: only more than {OTHER_COMPILER} of another's is a finding.")
    print("\n" + "\n".join(findings or ["no finding"]))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
