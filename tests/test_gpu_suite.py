"""The suite for a GPU (tests/gpu.py, benchmarks/cuda_speed.py) where there is none: it says what is missing; and on the
host runtime, with a library of arrays of the tests' own, it measures, passes right kernels and sees wrong ones.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

import gatewise as gw
import problems
from compiler import ROOT
from gatewise import bench, peers
from problems import Problem
from test_cuda_binding import Pool, built, pool

sys.path.insert(0, str(ROOT / "benchmarks"))
import cuda_speed as gpu

__all__ = ["built", "pool"]


class Event:
    """Notes when the work before it was done."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.time = pool, float("nan")

    def record(self) -> None:
        assert self.pool.runtime.synchronize(None) == 0
        self.time = time.perf_counter()

    def synchronize(self) -> None: ...


class Fake(gpu.Library):
    """The host runtime's memory as a library, by the computer's clock."""

    name = "fake"

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    @classmethod
    def missing(cls) -> Optional[str]:
        return None

    def send(self, numbers: np.ndarray) -> Any:
        return self.pool.array(np.ascontiguousarray(numbers))

    def fetch(self, array: Any) -> np.ndarray:
        return array.get()

    def event(self) -> Any:
        return Event(self.pool)

    def between(self, start: Any, end: Any) -> float:
        return 1e3 * (end.time - start.time)

    def copying(self, nbytes: int) -> Callable[[], Any]:
        source = np.ones(nbytes // 4, np.float32)
        return lambda: source.copy()

    def multiplying(self, n: int, dtype: str, operands: str) -> Optional[Callable[[], Any]]:
        a = np.ones((n, n), problems.DTYPES[dtype])
        return (lambda: a @ a) if operands == "exact" else None

    def give_back(self) -> None: ...

    def versions(self) -> str:
        return "fake 1.0"


@pytest.fixture
def fake(pool: Pool) -> Fake:
    return Fake(pool)


def without_driver() -> dict[str, str]:
    """An environment in which no nvidia-smi is found."""
    folders = os.environ["PATH"].split(os.pathsep)
    return {**os.environ, "PATH": os.pathsep.join(f for f in folders if not (Path(f) / "nvidia-smi").exists())}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
@pytest.mark.parametrize("target", ["test-gpu", "bench-gpu"])
def test_without_a_driver_make_says_so_and_installs_nothing(tmp_path: Path, target: str) -> None:
    done = subprocess.run(["make", "-C", str(ROOT), target, f"VENV={tmp_path / 'venv'}"], env=without_driver(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode and "no NVIDIA driver" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("command", [["benchmarks/cuda_speed.py"], ["-m", "pytest", "tests/gpu.py"]])
def test_without_a_gpu_each_says_what_is_missing(command: list[str]) -> None:
    def called(*words: str) -> subprocess.CompletedProcess[str]:
        # a process of its own: once the module that ships is loaded, the host runtime's in this one would be it too
        return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)

    missing = "import sys; sys.path.insert(0, 'benchmarks'); import cuda_speed; print(cuda_speed.missing())"
    reason = called("-c", missing).stdout.strip()
    if reason == "None":
        pytest.skip("there is a GPU here: make test-gpu")
    done = called(*command)
    assert done.returncode not in (0, 5) and reason in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


PROBLEMS = [
    "lstm:T3,N3,I5,H9:f32:lengths,h0,reverse",
    "gru:T3,N2,I3,H7:f64:reset,checkpoints",
    "lstm:T3,N2,I4,H8:f32:infer",
]


@pytest.mark.parametrize("text", PROBLEMS)
def test_right_kernels_pass(fake: Fake, text: str) -> None:
    problem = Problem.parse(text)
    found = gpu.results(problem, fake)
    gpu.hold(problem, found, "exact")
    problems.check(problem, found)


@pytest.mark.parametrize("operands", ["tf32", "bf16"])
def test_rounded_operands_are_held_to_their_rounding(fake: Fake, operands: str) -> None:
    """And are not exact: which tells that they were rounded."""
    problem = Problem.parse("lstm:T4,N3,I7,H17:f32:h0")
    found = gpu.results(problem, fake, "persistent", operands)
    gpu.hold(problem, found, operands)
    with pytest.raises(bench.WrongAnswer):
        gpu.hold(problem, found, "exact")
    worse = {name: numbers + 0.1 * gpu.largest(numbers) for name, numbers in found.items()}
    with pytest.raises(bench.WrongAnswer, match="operands off by"):
        gpu.hold(problem, worse, operands)


def test_a_loop_that_cannot_be_is_a_refusal(fake: Fake) -> None:
    with pytest.raises(gpu.Refused, match="persistent"):
        gpu.results(Problem.parse("gru_norm:T3,N2,I3,H4:f32:train"), fake, "persistent")
    assert "GATEWISE_CUDA_LOOP" not in os.environ
    with pytest.raises(ValueError, match="loop"), gpu.execution("sideways"):
        problems.run(Problem.parse(PROBLEMS[0]), fake.placed(problems.draw(Problem.parse(PROBLEMS[0]))), None)


class Planted:
    """gatewise._cuda with one wrong number in what a pass leaves on the device."""

    def __init__(self, module: Any, name: str, argument: int) -> None:
        self.module, self.name, self.argument = module, name, argument

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.module, name)
        if name != self.name:
            return real

        def wrong(*arguments: Any, **words: Any) -> Any:
            real(*arguments, **words)
            array = arguments[self.argument]
            array = array[3] if isinstance(array, tuple) else array  # of the gradients, dw_ih
            array.numbers().flat[-1] *= 1.001

        return wrong


@pytest.mark.parametrize(("name", "argument"), [("forward", 1), ("forward", 2), ("backward", 7)])
def test_a_wrong_kernel_is_seen(fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str, argument: int) -> None:
    problem = Problem.parse("lstm:T4,N3,I5,H9:f32:h0")
    planted = Planted(sys.modules["gatewise._cuda"], name, argument)
    monkeypatch.setattr("gatewise.functional.cuda", lambda: planted)
    found = gpu.results(problem, fake)
    with pytest.raises(bench.WrongAnswer):
        gpu.hold(problem, found, "exact")
    with pytest.raises(AssertionError):
        problems.check(problem, found)
    with pytest.raises(bench.WrongAnswer):
        gpu.race(problem, {"ours": gpu.Ours(problem, problems.draw(problem), fake)}, fake, gpu.Roofs(1e9, 1e9))


class CuDNN(gpu.CuDNN):
    """PyTorch's layer, on the CPU."""

    device = "cpu"


class InTorch(gpu.InTorch):
    device = "cpu"


class CuBLAS(gpu.CuBLAS):
    """The loop, on NumPy's arrays."""

    def __init__(self, problem: Problem, inputs: Any) -> None:
        class Here:
            cupy = np
            send = fetch = staticmethod(lambda array: array)
            placed = staticmethod(lambda inputs: inputs)

        super().__init__(problem, inputs, Here())


@pytest.mark.parametrize("text", ["lstm:T3,N2,I3,H5:f32:h0", "gru:T3,N4,I3,H5:f64:half"])
def test_a_race(fake: Fake, text: str) -> None:
    problem = Problem.parse(text)
    inputs = problems.draw(problem)
    parties: dict[str, peers.Party] = {"ours": gpu.Ours(problem, inputs, fake), "torch": CuDNN(problem, inputs)}
    parties["gatewise.torch"] = InTorch(problem, inputs)
    if "half" in problem.options:
        parties["cupy"] = CuBLAS(problem, inputs)
    parties |= {f"ours, {loop}": gpu.Ours(problem, inputs, fake, loop) for loop in gpu.LOOPS}
    roofs = gpu.Roofs(1e12, 1e11)
    rows = gpu.race(problem, parties, fake, roofs, "exact", "some", rounds=3, window=0.002)
    assert [row.party for row in rows] == [*parties] and rows[0].ratio == 1.0 and not rows[0].note
    for row in rows:
        assert row.ms > 0 and row.ratio and row.ratio > 0 and (row.set, row.problem) == ("some", str(problem))
        flops = bench.flops(problem, inputs)
        assert row.gflops == pytest.approx(flops / (row.ms * 1e-3) / 1e9)
        assert row.of_products == pytest.approx(row.gflops * 1e9 / roofs.products)
        assert row.of_memory == pytest.approx(bench.least_bytes(problem, inputs) / (row.ms * 1e-3) / roofs.memory)
        assert row.of_roofline == max(row.of_products, row.of_memory)


def test_who_refuses_or_is_wrong_is_left_out_of_a_race(fake: Fake) -> None:
    problem = Problem.parse("gru_norm:T2,N2,I2,H8:f32:train")
    inputs = problems.draw(problem)
    parties = {"ours": gpu.Ours(problem, inputs, fake), "p": gpu.Ours(problem, inputs, fake, "persistent")}
    (row,) = gpu.race(problem, parties, fake, gpu.Roofs(1e12, 1e11), rounds=1, window=0.001)
    assert row.party == "ours" and "p: loop: expected one that can be persistent" in row.note

    plain = Problem.parse("gru:T2,N2,I2,H8:f32:train")
    inputs = problems.draw(plain)
    wrong = CuDNN(plain, inputs)
    wrong.layer.weight_ih_l0.data += 0.1
    parties = {"ours": gpu.Ours(plain, inputs, fake), "torch": wrong}
    (row,) = gpu.race(plain, parties, fake, gpu.Roofs(1e12, 1e11), rounds=1, window=0.001)
    assert row.party == "ours" and "of torch is off by" in row.note


def test_a_call_is_timed_by_events(fake: Fake) -> None:
    calls = []

    def step() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.002)

    assert fake.seconds(step, 5) >= 0.002 and len(calls) == 5


def test_pytorchs_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of the adapter needs no card: there and back, a copy, a product with its settings, which are set back."""
    import torch

    monkeypatch.setattr(gpu.Torch, "device", "cpu")
    library = gpu.Torch()
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)[::-1]
    assert np.array_equal(library.fetch(library.send(numbers)), numbers)
    assert library.fetch(library.copying(64)()).sum() == 16
    kept = torch.backends.cudnn.allow_tf32
    for operands in gpu.OPERANDS:
        step = library.multiplying(4, "f32", operands)
        assert step is not None and float(step()[0, 0]) == 4
    with gpu.rounding(torch, "tf32"):
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    with gpu.rounding(torch, "exact"):
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == kept


def test_calls_fill_a_window() -> None:
    """Of a step that takes a microsecond, after a first one that takes a millisecond."""
    taken = []

    def seconds(calls: int) -> float:
        taken.append(calls)
        return 1e-6 + (1e-3 / calls if len(taken) == 1 else 0)

    calls = gpu.calls_of(seconds, 1e-2)
    assert calls == taken[-1] and 1e-2 <= calls * 1e-6 <= 3e-2


def test_roofs_are_the_best_of_all_libraries(fake: Fake) -> None:
    roofs = gpu.measured_roofs([fake], n=64, nbytes=1 << 20)
    assert set(roofs) == {("f32", "exact"), ("f32", "tf32"), ("f32", "bf16"), ("f64", "exact")}
    assert roofs["f32", "exact"].products > 1e7 and roofs["f64", "exact"].memory > 1e7
    assert np.isnan(roofs["f32", "tf32"].products)  # nobody can


def test_a_csv_names_the_card(tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, on the fake device."""
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "CuPy", type("Here", (Fake,), {"__init__": lambda self: Fake.__init__(self, fake.pool)}))
    monkeypatch.setattr(gpu.CuBLAS, "refuses", classmethod(lambda cls, problem: "it has no such arrays"))
    monkeypatch.setattr(gpu.Torch, "missing", classmethod(lambda cls: "not here"))
    monkeypatch.setattr(gpu, "card", lambda: {"card": "Some GPU", "driver": "1.2"})
    monkeypatch.setattr(gpu, "measured_roofs", lambda libraries: dict.fromkeys(
        [("f32", "exact"), ("f32", "tf32"), ("f32", "bf16"), ("f64", "exact")], gpu.Roofs(1e12, 1e11)))  # fmt: skip
    path = tmp_path / "some.csv"
    monkeypatch.setattr(sys, "argv", ["x", "gru_norm:T2,N2,I2,H8:f32:train", "lstm:T3,N2,I2,H9:f32:infer",
                                      "--rounds", "1", "--out", str(path)])  # fmt: skip
    assert gpu.main() == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert {row["problem"] for row in rows} == {"gru_norm:T2,N2,I2,H8:f32:train", "lstm:T3,N2,I2,H9:f32:infer"}
    assert {row["operands"] for row in rows if row["problem"].startswith("lstm:")} == set(gpu.OPERANDS)
    for row in rows:
        assert (row["card"], row["driver"]) == ("Some GPU", "1.2") and "fake 1.0" in row["versions"]
        assert gw.__version__ in row["versions"] and float(row["ms"]) > 0 and row["copy_gbs"] == "100"


def test_every_named_set_has_problems() -> None:
    found = list(gpu.chosen(["large", *gpu.SETS]))
    assert {name for name, _ in found} == {"large", *gpu.SETS}
    assert not any(problem.options & gpu.NOT_THERE for _, problem in found)
    with pytest.raises(ValueError, match="neither a problem"):
        list(gpu.chosen(["nothing"]))
