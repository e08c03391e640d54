"""Options of the suite: which problems, how many threads, against whom, on which instruction set, where the rows go.

pytest benchmarks --sets grid half --threads 1 2 --against torch,onnxruntime --arch avx2
pytest benchmarks --party gatewise.torch --threads 1
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gatewise import bench, peers
from gatewise.backends import available_cores

RESULTS = Path(__file__).resolve().parent / "results"
FILES = {peers.Ours.name: "speed.csv", peers.OursInTorch.name: "torch_layers.csv"}
# PyTorch is held to the instruction set that we are held to; it reads these when it is first imported.
TORCH_HELD: dict[str, dict[str, str]] = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "generic": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gatewise")
    group.addoption("--sets", nargs="+", default=[*bench.SETS], metavar="SET", help="names of sets, or problems")
    group.addoption("--party", choices=[*peers.OURS], default=peers.Ours.name, help="what of ours is measured")
    group.addoption("--threads", nargs="+", type=int, metavar="N", help="default: 1, and 2 where there are 2 cores")
    group.addoption("--against", metavar="PEERS", help="torch,jax,... or none; default: all that are installed")
    group.addoption("--arch", metavar="ARCH", help="sets GATEWISE_ARCH, and holds PyTorch to the same")
    group.addoption("--rounds", type=int, default=bench.ROUNDS, metavar="N")
    group.addoption("--window", type=float, default=bench.WINDOW, metavar="SECONDS")
    group.addoption("--results", type=Path, default=RESULTS, metavar="DIR", help="where the rows go")


def pytest_configure(config: pytest.Config) -> None:
    if arch := config.getoption("--arch"):
        os.environ.update(TORCH_HELD.get(arch, {}), GATEWISE_ARCH=arch)
    party = config.getoption("--party")
    try:
        rivals = peers.PEERS if party == peers.Ours.name else peers.OURS[party].rivals
        named = config.getoption("--against") or ",".join(n for n in rivals if peers.PEERS[n].missing() is None)
        config.against = bench.installed([] if named in ("", "none") else named.split(","), party)
        config.problems = bench.select(config.getoption("--sets"), party)
    except (ValueError, ImportError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    counts = config.getoption("--threads") or range(1, min(available_cores(), 2) + 1)
    cases = [(name, problem, n) for name, problem in config.problems for n in counts]
    metafunc.parametrize("name, problem, threads", cases, ids=[f"{name}-{p}-{n}" for name, p, n in cases])


@pytest.fixture(scope="session")
def speed(pytestconfig: pytest.Config) -> bench.CsvFile:
    """The rows of earlier runs stay until their problem is measured again."""
    folder = pytestconfig.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    party = pytestconfig.getoption("--party")
    return bench.CsvFile(folder / FILES[party], bench.context(pytestconfig.against, party), keep=True)


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> bench.Table:
    return bench.Table(pytestconfig.against, pytestconfig.getoption("--party"))


def pytest_report_header(config: pytest.Config) -> str:
    return bench.Table(config.against, config.getoption("--party")).header()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Prints the line of a problem as soon as it has been measured; a test's own output would be captured."""
    if report.when == "call":
        print(*(f"\n{line}" for name, line in report.user_properties if name == "line"), end=" ")
