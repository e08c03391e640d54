"""The part of the results' page that is about CUDA kernels nobody has run: written from the tables of cuda_evidence.py
and cuda_plan.py, for report.py.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

Row = dict[str, str]
FILES = "cuda_kernels.csv", "cuda_occupancy.csv", "cuda_roofline.csv", "cuda_plan.csv"
MIX = "FFMA", "DFMA", "HMMA", "MUFU", "LDS", "STS", "LDG", "STG", "BAR"
SIZES = 128, 256, 512, 1024, 2048  # of H

HEAD = """## CUDA, without a GPU

No kernel has run on a GPU: what follows is compiled, counted and computed. `make cuda-evidence` writes the tables and
`benchmarks/report.py` this page; the tables have every row, the page a digest."""


def table(names: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    names = list(names)
    yield "| " + " | ".join(names) + " |"
    yield "|---" * len(names) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"


def across(numbers: Iterable[str]) -> str:
    """The least and the most of some whole numbers."""
    found = sorted(map(int, numbers))
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} – {found[-1]}"


def distinct(rows: Iterable[Row], value: Callable[[Row], str]) -> list[str]:
    return list(dict.fromkeys(map(value, rows)))


def base(row: Row) -> str:
    return row["kernel"].partition("<")[0]


def registers(rows: list[Row]) -> Iterator[str]:
    targets = distinct(rows, lambda row: row["target"])
    spilled = sum(any(int(row[name]) for name in ("stack", "spill_stores", "spill_loads")) for row in rows) or "none"
    yield (f"{len(rows) // len(targets)} kernels on each of {len(targets)} targets, nvcc {rows[0]['nvcc']}: "
           f"{spilled} of {len(rows)} spills a register or has a stack. Registers of a thread, over all cells and "
           "variants ([cuda_kernels.csv](cuda_kernels.csv)):")  # fmt: skip
    yield ""
    families = sorted({(base(row), row["dtype"]) for row in rows})
    lines = []
    for family in families:
        mine = [row for row in rows if (base(row), row["dtype"]) == family]
        each = [across(row["registers"] for row in mine if row["target"] == target) for target in targets]
        lines.append([f"`{family[0]}`", family[1] or "–", len(mine) // len(targets), *each])
    yield from table(["kernel", "dtype", "variants", *targets], lines)


def mix(rows: list[Row], target: str = "sm_90a") -> Iterator[str]:
    yield f"Instructions of the kernels that an LSTM in float32 spends its time in, on {target}, each counted once:"
    yield ""
    heavy = ("multiply", "cell_", "persistent")
    chosen = [row for row in rows if row["target"] == target and row["dtype"] != "f64" and base(row).startswith(heavy)]
    chosen = [row for row in chosen if row["cell"] in ("", "lstm")]
    lines = [[f"`{row['kernel']}`", row["instructions"], *(row[name] for name in MIX)] for row in chosen]
    yield from table(["kernel", "all", *MIX], lines)


def occupancy(rows: list[Row]) -> Iterator[str]:
    cards = distinct(rows, lambda row: row["card"])
    yield ("Threads resident on a multiprocessor, of the most that it takes, by NVIDIA's cuda_occupancy.h, for what an "
           "LSTM in float32 launches ([cuda_occupancy.csv](cuda_occupancy.csv)); blocks of it in brackets. The kernels "
           "that are not listed fill every card.")  # fmt: skip
    yield ""
    kinds: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["dtype"] != "f64" and row["cell"] in ("", "lstm"):
            kinds.setdefault((row["kernel"], row["threads"], row["shared"]), []).append(row)
    lines = [
        [f"`{kernel}`", threads, shared, *(f"{float(row['occupancy']):.0%} ({row['blocks']})" for row in on_cards)]
        for (kernel, threads, shared), on_cards in kinds.items()
        if any(float(row["occupancy"]) < 1 for row in on_cards)
    ]
    yield from table(["kernel", "threads", "bytes shared", *cards], lines)


def roofline(rows: list[Row], N: str = "32") -> Iterator[str]:
    yield (f"The least time of a step of a training LSTM in float32, N = {N}, I = H, forward + backward, in µs, and "
           "what bounds each: f the products' operations, m memory, s shared memory; *italic* where the plan is "
           "stepwise ([cuda_roofline.csv](cuda_roofline.csv)). From data sheets, not measured, without barriers and "
           "launches: what keeps this tape and multiplies floats exactly cannot be faster. How near ours comes is not "
           "known.")  # fmt: skip
    yield ""
    chosen = {
        (r["card"], int(r["H"]), r["pass"]): r for r in rows if (r["cell"], r["dtype"], r["N"]) == ("lstm", "f32", N)
    }

    def entry(card: str, H: int) -> str:
        both = [chosen[card, H, which] for which in ("forward", "backward")]
        words = [f"{row['least_us']} {row['bound_by'][0]}" for row in both]
        return " + ".join(f"*{w}*" if row["loop"] == "stepwise" else w for w, row in zip(words, both))

    cards = list(dict.fromkeys(card for card, _, _ in chosen))
    yield from table(["card", *(f"H = {H}" for H in SIZES)],
                     ([card, *(entry(card, H) for H in SIZES)] for card in cards))  # fmt: skip


def plans(rows: list[Row], N: str = "32") -> Iterator[str]:
    yield (f"Up to which H the persistent plan applies, forward / backward, N = {N} ([cuda_plan.csv](cuda_plan.csv)), "
           "and up to which PyTorch asks cuDNN for a persistent algorithm (`get_algo` in its RNN.cpp; in float16 there "
           "is one more, for multiples of 128 up to 1024, not for GRU). –: cuDNN has no such cell.")  # fmt: skip
    yield ""
    chosen = [row for row in rows if row["N"] == N]
    cards = distinct(chosen, lambda row: row["card"])
    found = {(row["card"], row["cell"], row["dtype"], row["pass"]): row for row in chosen}
    lines = []
    for cell, dtype in dict.fromkeys((row["cell"], row["dtype"]) for row in chosen):

        def both(card: str, name: str, cell: str = cell, dtype: str = dtype) -> str:
            values = [found[card, cell, dtype, which][name] for which in ("forward", "backward")]
            return " / ".join(values) if all(values) else "–"

        lines.append([cell, dtype, *(both(card, "largest_H") for card in cards), both(cards[0], "cudnn_persistent_H")])
    yield from table(["cell", "dtype", *cards, "cuDNN"], lines)


def section(folder: Path) -> list[str]:
    """The lines of the page, from the tables in a folder; none where one of them is missing."""
    if not all((folder / name).exists() for name in FILES):
        return []
    tables = []
    for name in FILES:
        with (folder / name).open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    kernels, launched, least, planned = tables
    parts = [registers(kernels), mix(kernels), occupancy(launched), roofline(least), plans(planned)]
    titles = ["Registers", "Instructions", "Occupancy", "Roofline of a step", "Persistent or not"]
    lines = [HEAD]
    for title, part in zip(titles, parts):
        lines += ["", f"### {title}", "", *part]
    return lines
