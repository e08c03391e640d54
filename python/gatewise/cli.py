"""The command line: `gatewise info | check | bench | demo`. It parses and prints; the work is done elsewhere.

Exit codes: 0 well, 1 a check missed, 2 the user's mistake (one sentence on stderr), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from math import isfinite
from typing import Any

from . import __version__, _core
from .backends import available_cores, backends, choose, choose_num_threads

EXTRAS = {  # package: the extra that installs it
    "numba": "reference",
    "scikit-learn": "train",
    "tqdm": "train",
    "matplotlib": "demo",
    "statsmodels": "demo",
    "polars": "demo",
    "safetensors": "io",
    "torch": "test",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's) and return its exit code."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough; point stdout elsewhere for the last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"gatewise {options.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gatewise", description="Fast recurrent layers: RNN, LSTM, GRU.")
    parser.add_argument("--version", action="version", version=f"gatewise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="info | check | bench | demo", required=True)

    info = commands.add_parser("info", help="what this installation can do here, and why not more")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="the correctness matrix: cell x backend x dtype x option")
    check.add_argument("--quick", action="store_true", help="fewer options of each cell")
    check.add_argument("--cell", action="append", metavar="NAME", help="only this cell (may be repeated)")
    check.add_argument("--backend", metavar="NAME", help="only this backend")
    check.add_argument("--table", action="store_true", help="what runs where, as Markdown, instead of the rows")
    check.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    check.set_defaults(run=_check)

    bench = commands.add_parser("bench", help="measure problems, verified, against other libraries")
    what = "names of sets (--list), problems as lstm:T64,N32,I64,H128:f32:train; default: grid"
    bench.add_argument("problems", nargs="*", default=["grid"], metavar="SET or PROBLEM", help=what)
    whom = "torch,onnxruntime,jax,... or none; default: torch and onnxruntime where installed"
    bench.add_argument("--party", default="gatewise", help="gatewise (default), or gatewise.torch: its modules")
    bench.add_argument("--against", type=_words, metavar="PEERS", help=whom)
    bench.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="default: 1")
    bench.add_argument("--rounds", type=_at_least_one, metavar="N", help="windows of each party (default 9)")
    bench.add_argument("--quick", action="store_true", help="three short windows: a smoke run, no figures to quote")
    bench.add_argument("--json", metavar="FILE", help="write the rows here as JSON")
    bench.add_argument("--csv", metavar="FILE", help="write the rows here as CSV")
    bench.add_argument("--plot", metavar="DIR", help="draw the roofline and the ratios there")
    bench.add_argument("--list", action="store_true", help="the sets, where their shapes come from, the peers")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="the study: predict sepsis from hourly intensive-care records")
    where = "PhysioNet/CinC 2019 records, MIMIC-III tables, or folders with both (default: a simulated cohort)"
    demo.add_argument("--data", metavar="DIR", help=where)
    demo.add_argument("--report", metavar="DIR", help="where the page goes, and what is kept to go on after a stop")
    demo.add_argument("--seed", type=int, metavar="N")
    demo.add_argument("--seeds", type=_at_least_one, metavar="N", help="trainings of each network (default 3)")
    demo.add_argument("--epochs", type=int, metavar="N")
    demo.add_argument("--hidden-size", type=int, metavar="H")
    demo.add_argument("--patients", type=int, metavar="N", help="how many patients to use")
    demo.set_defaults(run=_demo)
    return parser


# ---- check -------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    from . import check

    places = check.runnable(options.backend)
    features = [option.name for option in check.OPTIONS if option.feature]
    chosen = features if options.table else check.QUICK if options.quick else None
    matrix = check.matrix(options.cell, places, chosen)
    truth = check.truth_backend()[0]
    show: Callable[[str], None] = _silent if options.json or options.table else print
    start = time.perf_counter()
    show(f"gatewise {__version__}: relative errors against the {truth} backend in float64\n")
    if truth != "reference":
        show(f"reference: {backends()['reference']}; only `slope` tests the mathematics itself\n")
    show(check.Row.HEADER)
    rows = []
    for row in matrix:
        show(str(row))
        rows.append(row)
    functions = []
    archs = [arch for _, arch in places if arch]
    show(f"\n{check.FunctionRow.HEADER}" if archs else "")
    for found in check.functions(archs):
        show(str(found))
        functions.append(found)
    count = len(rows) + len(functions)
    passed = sum(row.ok for row in rows) + sum(row.ok for row in functions)
    show(f"\n{passed} of {count} checks passed in {time.perf_counter() - start:.0f} s")
    if options.table:
        print(check.table(rows))
    if options.json:
        document = {"gatewise": __version__, "truth": truth, "ok": passed == count}
        tables = {"matrix": [_plain(row) for row in rows], "functions": [_plain(row) for row in functions]}
        print(json.dumps({**document, **tables}, indent=1, allow_nan=False))
    return 0 if passed == count else 1


def _silent(line: str) -> None:
    pass


def _plain(row: Any) -> dict[str, Any]:
    """A row for JSON, which has no NaN and no infinity: they become words."""
    fields = {**asdict(row), "ok": row.ok}
    return {k: str(v) if isinstance(v, float) and not isfinite(v) else v for k, v in fields.items()}


# ---- bench -------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more; got {number}")
    return number


def _bench(options: argparse.Namespace) -> int:
    from . import bench

    if options.list:
        _list_bench()
        return 0
    peers = bench.installed(options.against, options.party)
    problems = bench.select(options.problems, options.party)
    for threads in options.threads:
        choose_num_threads(threads)
    if options.plot:  # what cannot be written is better known now
        bench.figure(1, 1)
        os.makedirs(options.plot, exist_ok=True)
    if options.json:
        open(options.json, "a", encoding="utf-8").close()
    shared = bench.context(peers, options.party)
    table = bench.Table(peers, options.party)
    rows: list[bench.Row] = []
    print(f"{shared['machine']}, {shared['cores']} cores, {shared['arch']}, built by {shared['compiler']}")
    print(f"{shared['versions']}, commit {shared['commit']}\n")
    print(table.header(), flush=True)
    settings: dict[str, Any] = {"rounds": 3, "window": 0.003} if options.quick else {}
    if options.rounds:
        settings["rounds"] = options.rounds
    file = bench.CsvFile(options.csv, shared) if options.csv else None
    try:
        for name, problem in problems:
            for threads in options.threads:
                measured = bench.measure(problem, peers, threads, name=name, party=options.party, **settings)
                rows += measured
                print(table.line(measured), flush=True)
                if file:
                    file.write(measured)
    except bench.WrongAnswer as error:  # a fault of ours, and not the user's mistake
        print(f"gatewise bench: wrong answer: {error}", file=sys.stderr)
        return 1
    print("", *table.summary(rows), sep="\n")
    if options.json:
        bench.write_json(options.json, shared, rows)
    if options.plot:
        for path in bench.plot([{**asdict(row), **shared} for row in rows], options.plot):
            print(path)
    return 0


def _list_bench() -> None:
    from . import bench
    from .peers import PEERS

    for name, chosen in bench.SETS.items():
        print(f"{name:<12} {len(chosen.problems):>3} problems: {chosen.origin}")
    print()
    for name, peer in PEERS.items():
        print(f"{name:<14} {peer.missing() or peer.version()}")


# ---- demo --------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from . import sepsis

    names = ("data", "report", "seed", "seeds", "epochs", "hidden_size", "patients")
    sepsis.demo(**{name: value for name in names if (value := getattr(options, name)) is not None})
    return 0


# ---- info --------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    from .bench import cpu_model

    def show(name: str, value: str) -> None:
        print(f"{name:<12}  {value}")

    show("gatewise", __version__)
    show("python", f"{platform.python_version()} ({platform.python_implementation()})")
    show("numpy", metadata.version("numpy"))
    show("platform", platform.platform())
    show("cpu", f"{cpu_model()}, {available_cores()} of {os.cpu_count()} cores usable")
    show("cells", ", ".join(_core.cells))
    show("archs", ", ".join(name + ("" if runs else " (not on this CPU)") for name, runs in _core.archs))
    for package, extra in EXTRAS.items():
        show(package, _version(package, extra))
    # What the environment decides comes last: a name in it that does not exist ends the list.
    source = "GATEWISE_ARCH" if os.environ.get("GATEWISE_ARCH") else "the best here"
    show("arch", f"{_core.choose_arch()} ({source})")
    threads, source = choose_num_threads(None)
    show("threads", f"{threads} ({source})")
    source = "GATEWISE_BACKEND" if os.environ.get("GATEWISE_BACKEND") else "the default"
    show("backend", f"{choose(None)} ({source})")
    for name, state in backends().items():
        show(f"  {name}", state)
    return 0


def _version(package: str, extra: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f'not installed: pip install "gatewise[{extra}]"'
