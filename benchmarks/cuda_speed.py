"""The speed of the CUDA kernels on the card that is here: `make bench-gpu`.

Each problem is a race: ours, PyTorch's layer on the card (cuDNN) and a plain loop of CuPy's products (cuBLAS) take
turns, window by window, each timed by events on its stream. Every answer of ours is verified before it is timed. One
CSV comes of it, which names the card, the driver and the versions; CONTRIBUTING.md says where to send it.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Optional

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import gatewise as gw
from gatewise import bench, peers
from gatewise.problems import DTYPES, Inputs, Problem, draw, run

RESULTS = Path(__file__).resolve().parent / "results"
LOOPS = "persistent", "stepwise"
OPERANDS = "exact", "tf32", "bf16"
WINDOW, ROUNDS = 0.02, 9  # seconds of steps between two events; windows of each party
HOST = "lengths", "batch_sizes"  # what a call takes from the CPU
NOT_THERE = {"stream"}  # options that the CUDA kernels do not have

# ---- Arrays on a device --------------------------------------------------------------------------------------


class Library(ABC):
    """A library of arrays on a device: how they get there and back, and how its stream is timed."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def missing(cls) -> Optional[str]:
        """Why it has no device here, or None."""

    @abstractmethod
    def send(self, numbers: np.ndarray) -> Any: ...

    @abstractmethod
    def fetch(self, array: Any) -> np.ndarray: ...

    @abstractmethod
    def event(self) -> Any:
        """What notes the time on the current stream: it has `record` and `synchronize`."""

    @abstractmethod
    def between(self, start: Any, end: Any) -> float:
        """Milliseconds from one event to another."""

    def seconds(self, step: Callable[[], Any], calls: int) -> float:
        """A call's, of so many in a row."""
        start, end = self.event(), self.event()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return self.between(start, end) / 1e3 / calls

    @abstractmethod
    def copying(self, nbytes: int) -> Callable[[], Any]:
        """A step that copies so many bytes, which are read and written."""

    @abstractmethod
    def multiplying(self, n: int, dtype: str, operands: str) -> Optional[Callable[[], Any]]:
        """A step that multiplies two [n, n] matrices; None where the library cannot with these operands."""

    @abstractmethod
    def versions(self) -> str: ...

    @abstractmethod
    def give_back(self) -> None:
        """Memory that it keeps for its next arrays, which another library may want."""

    def placed(self, inputs: Inputs) -> Inputs:
        """The arrays of a problem on the device."""
        given = inputs._asdict().items()
        return inputs._replace(**{k: self.send(v) for k, v in given if v is not None and k not in HOST})


class CuPy(Library):
    name = "cupy"

    def __init__(self) -> None:
        self.cupy = importlib.import_module("cupy")

    @classmethod
    def missing(cls) -> Optional[str]:
        if importlib.util.find_spec("cupy") is None:
            return 'CuPy is not installed (pip install "gatewise[gpu]")'
        try:
            importlib.import_module("cupy").cuda.runtime.getDeviceCount()
        except Exception as error:  # CUDARuntimeError, or ImportError without a driver
            return f"CuPy finds no device: {error}"
        return None

    def send(self, numbers: np.ndarray) -> Any:
        """With the strides that it has."""
        if numbers.flags.c_contiguous or numbers.base is None or not numbers.size:
            return self.cupy.asarray(numbers)
        base = self.cupy.asarray(numbers.base)
        offset = numbers.__array_interface__["data"][0] - numbers.base.__array_interface__["data"][0]
        return self.cupy.ndarray(numbers.shape, numbers.dtype, base.data + offset, numbers.strides)

    def fetch(self, array: Any) -> np.ndarray:
        return self.cupy.asnumpy(array)

    def event(self) -> Any:
        return self.cupy.cuda.Event()

    def between(self, start: Any, end: Any) -> float:
        return self.cupy.cuda.get_elapsed_time(start, end)

    def copying(self, nbytes: int) -> Callable[[], Any]:
        source = self.cupy.ones(nbytes // 4, np.float32)
        target = self.cupy.zeros_like(source)
        return lambda: self.cupy.copyto(target, source)

    def multiplying(self, n: int, dtype: str, operands: str) -> Optional[Callable[[], Any]]:
        if operands != "exact":
            return None  # a setting of the whole process: CUPY_TF32
        a, b = (self.cupy.ones((n, n), DTYPES[dtype]) for _ in range(2))
        c = self.cupy.empty_like(a)
        return lambda: self.cupy.matmul(a, b, out=c)

    def give_back(self) -> None:
        self.cupy.get_default_memory_pool().free_all_blocks()

    def versions(self) -> str:
        runtime = self.cupy.cuda.runtime.runtimeGetVersion()
        return f"cupy {self.cupy.__version__}, CUDA {runtime // 1000}.{runtime % 1000 // 10}"


class Torch(Library):
    name = "torch"
    device = "cuda"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")

    @classmethod
    def missing(cls) -> Optional[str]:
        if importlib.util.find_spec("torch") is None:
            return 'PyTorch is not installed (pip install "gatewise[gpu]")'
        torch = importlib.import_module("torch")
        return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} finds no CUDA device"

    def send(self, numbers: np.ndarray) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(numbers)).to(self.device)

    def fetch(self, array: Any) -> np.ndarray:
        return array.detach().cpu().numpy()

    def event(self) -> Any:
        return self.torch.cuda.Event(enable_timing=True)

    def between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end)

    def copying(self, nbytes: int) -> Callable[[], Any]:
        source = self.torch.ones(nbytes // 4, device=self.device)
        target = self.torch.zeros_like(source)
        return lambda: target.copy_(source)

    def multiplying(self, n: int, dtype: str, operands: str) -> Optional[Callable[[], Any]]:
        kind = self.torch.bfloat16 if operands == "bf16" else getattr(self.torch, np.dtype(DTYPES[dtype]).name)
        a, b = (self.torch.ones((n, n), dtype=kind, device=self.device) for _ in range(2))

        def step() -> Any:
            with rounding(self.torch, operands):
                return a @ b

        return step

    def give_back(self) -> None:
        self.torch.cuda.empty_cache()

    def versions(self) -> str:
        cudnn = self.torch.backends.cudnn.version()
        return f"torch {self.torch.__version__}, CUDA {self.torch.version.cuda}, cuDNN {cudnn}"


@contextmanager
def rounding(torch: Any, operands: str) -> Iterator[None]:
    """PyTorch's products of float32: exact, or by tensor cores in TF32."""
    flags = [(torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    kept = [getattr(owner, name) for owner, name in flags]
    for owner, name in flags:
        setattr(owner, name, operands != "exact")
    try:
        yield
    finally:
        for (owner, name), value in zip(flags, kept):
            setattr(owner, name, value)


def missing() -> Optional[str]:
    """What it lacks here to run the CUDA kernels, as a sentence, or None."""
    here = gw.backends()["cuda"]
    if here.startswith("not "):
        return f"the CUDA kernels are {here}"
    reasons = [kind.missing() for kind in (CuPy, Torch)]
    return None if None in reasons else "there is no library of arrays: " + "; ".join(filter(None, reasons))


def library() -> Library:
    """The one whose arrays are lent to the kernels: CuPy where it is."""
    return CuPy() if CuPy.missing() is None else Torch()


# ---- Parties -------------------------------------------------------------------------------------------------


class Refused(Exception):
    """The kernels do not run a problem in this way, and say why."""


@contextmanager
def execution(loop: str = "planned", operands: str = "exact") -> Iterator[None]:
    """How the kernels run inside; a refusal of theirs is Refused."""
    names = {"GATEWISE_CUDA_LOOP": loop, "GATEWISE_CUDA_OPERANDS": operands}
    kept = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    except ValueError as error:
        if str(error).startswith("loop: expected one that can be persistent"):
            raise Refused(str(error)) from None
        raise
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def results(
    problem: Problem, library: Library, loop: str = "planned", operands: str = "exact"
) -> dict[str, np.ndarray]:
    """Every result of a problem on the device, of the names that `gatewise.problems.run` gives."""
    with execution(loop, operands):
        found = run(problem, library.placed(draw(problem)), None)
    return {name: library.fetch(array) for name, array in found.items()}


class Ours(peers.Ours):
    """The functional API on arrays of a library."""

    backend = None  # where x is

    def __init__(
        self, problem: Problem, inputs: Inputs, library: Library, loop: str = "planned", operands: str = "exact"
    ) -> None:
        self.library, self.how = library, (loop, operands)
        super().__init__(problem, library.placed(inputs), 1)

    def results(self) -> peers.Arrays:
        return {name: self.library.fetch(array) for name, array in super().results().items()}

    def window(self) -> Any:
        return execution(*self.how)


class CuDNN(peers.Torch):
    """torch.nn's layer on the card. Lengths stay on the CPU, as PyTorch wants them."""

    name = "torch"
    device = "cuda"

    def __init__(self, problem: Problem, inputs: Inputs, operands: str = "exact") -> None:
        super().__init__(problem, inputs, 1)
        self.operands = operands
        self.layer.to(self.device)
        self.x, self.dy = self._moved(self.x), self._moved(self.dy)
        self.given, self.dstate = [*map(self._moved, self.given)], [*map(self._moved, self.dstate)]

    def _moved(self, tensor: Any) -> Any:
        return tensor.detach().to(self.device).requires_grad_(tensor.requires_grad)

    @contextmanager
    def window(self) -> Iterator[None]:
        with rounding(self.torch, self.operands):
            yield


class InTorch(CuDNN, peers.OursInTorch):
    """gatewise.torch's layer in the place of torch.nn's."""

    name = "gatewise.torch"
    options = peers.OursInTorch.options - NOT_THERE - {"reset", "reset0"}


class CuBLAS(peers.NumPy):
    """The plain loop of the NumPy peer on CuPy's arrays: products by cuBLAS, a kernel for every other operation."""

    name = "cupy"

    def __init__(self, problem: Problem, inputs: Inputs, library: CuPy) -> None:
        self.library, self.xp = library, library.cupy
        on_device = library.placed(inputs)
        if inputs.lengths is not None:
            on_device = on_device._replace(lengths=library.send(inputs.lengths))
        super().__init__(problem, on_device, 1)

    def results(self) -> peers.Arrays:
        return {name: self.library.fetch(array) for name, array in super().results().items()}

    @contextmanager
    def window(self) -> Iterator[None]:
        yield


def field(problem: Problem, inputs: Inputs, library: Library, operands: str) -> dict[str, peers.Party]:
    """Who takes part in a race, ours first: as planned, and, where products are exact, both loops, gatewise.torch, and
    a loop of CuPy's."""
    parties: dict[str, peers.Party] = {"ours": Ours(problem, inputs, library, "planned", operands)}
    exact, torch = operands == "exact", Torch.missing() is None
    if exact:
        parties |= {f"ours, {loop}": Ours(problem, inputs, library, loop) for loop in LOOPS}
    if exact and torch and InTorch.refuses(problem) is None:
        parties[InTorch.name] = InTorch(problem, inputs)
    if operands != "bf16" and torch and CuDNN.refuses(problem) is None:
        parties[CuDNN.name] = CuDNN(problem, inputs, operands)
    if exact and isinstance(library, CuPy) and CuBLAS.refuses(problem) is None:
        parties[CuBLAS.name] = CuBLAS(problem, inputs, library)
    return parties


# ---- What an answer is held to -------------------------------------------------------------------------------


def hold(problem: Problem, found: dict[str, np.ndarray], operands: str) -> None:
    """Raise bench.WrongAnswer unless an answer of ours is within its bounds of the float64 computation.

    Rounded operands change h and w_hh by the same share at each step, so the computation on a rounded w_hh shows how
    large an error that makes: twice as large with both, and twice that again as one draw of roundings is not like
    another.
    """
    if operands == "exact" or problem.dtype != "f32" or not peers.CELLS[problem.cell]["product"]:
        bench.verify(problem, "ours", found)
        return
    inputs, truth = draw(problem), bench._truth(problem)
    other = inputs._replace(w_hh=rounded(inputs.w_hh, operands)).astype(np.float64)
    moved = (bench.Reference if peers.NumPy.refuses(problem) else peers.NumPy)(problem, other, 1).results()
    sizes = problem.T, problem.N, problem.I, problem.H
    for of_gradients in (False, True):
        names = [name for name in truth if name.startswith("d") == of_gradients and name in found]
        error = max((largest(found[name] - truth[name]) for name in names), default=0.0)
        caused = max((largest(moved[name] - truth[name]) for name in names), default=0.0)
        bound = max((gw.check.bound(problem.cell, "float32", sizes, name) * largest(truth[name]) for name in names),
                    default=0.0)  # fmt: skip
        if not error <= bound + 4 * caused:
            raise bench.WrongAnswer(f"{problem}: with {operands} operands off by {error:.3g}, "
                                    f"more than {bound + 4 * caused:.3g}")  # fmt: skip


def rounded(numbers: np.ndarray, operands: str) -> np.ndarray:
    """float32 numbers as tensor cores take them: 10 bits behind the first one for tf32, 7 for bf16."""
    bits = {"tf32": 13, "bf16": 16}[operands]
    half = np.uint32(1 << (bits - 1))
    return ((numbers.view(np.uint32) + half) >> bits << bits).view(np.float32)


def largest(numbers: np.ndarray) -> float:
    return float(np.abs(numbers).max(initial=0.0))


# ---- The race ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One party on one problem. Times are medians over the rounds, the spread half the distance between the quartiles
    as a share of the median; shares are of what the card was seen to do."""

    set: str
    problem: str
    operands: str
    party: str
    ms: float
    spread: float
    ratio: Optional[float]  # of its time to ours as planned
    gflops: float  # of the products
    of_products: float  # share of the rate of a large product
    of_memory: float  # what has to move at least, as a share of the rate of a large copy
    of_roofline: float  # the larger of the two: 1 where nothing can be faster
    note: str


class Roofs(NamedTuple):
    """What the card does: operations a second of a large product, bytes a second of a large copy."""

    products: float
    memory: float


def per_second(library: Library, step: Callable[[], Any], work: float) -> float:
    """The most of a few windows, after one that wakes the card."""
    calls = calls_of(lambda n: library.seconds(step, n), WINDOW)
    return work / min(library.seconds(step, calls) for _ in range(5))


def calls_of(seconds: Callable[[int], float], window: float) -> int:
    """Calls that fill a window."""
    calls = 1
    while (taken := calls * seconds(calls)) < window:
        calls = max(calls + 1, int(calls * min(10.0, 1.2 * window / max(taken, 1e-9))))
    return calls


def measured_roofs(libraries: Sequence[Library], n: int = 4096, nbytes: int = 1 << 30) -> dict[tuple[str, str], Roofs]:
    """By dtype and operands: the best that any of these libraries shows."""
    memory = max(per_second(one, one.copying(nbytes), 2.0 * nbytes) for one in libraries)
    found = {}
    for dtype, operands in [*(("f32", operands) for operands in OPERANDS), ("f64", "exact")]:
        steps = [(one, one.multiplying(n, dtype, operands)) for one in libraries]
        rates = [per_second(one, step, 2.0 * n**3) for one, step in steps if step is not None]
        found[dtype, operands] = Roofs(max(rates, default=float("nan")), memory)
    return found


def race(
    problem: Problem, parties: dict[str, peers.Party], timer: Library, roofs: Roofs, operands: str = "exact",
    name: str = "", rounds: int = ROUNDS, window: float = WINDOW,
) -> list[Row]:  # fmt: skip
    """Verifies all, then times them by turns. A party that refuses or is wrong is left out, and the note of ours says
    so; where ours is wrong, that is raised."""
    notes, running = [], {}
    for party, one in parties.items():
        try:
            with one.window():
                found = one.results()
            if isinstance(one, Ours):
                hold(problem, found, operands)
            elif operands == "exact":
                bench.verify(problem, party, found)
            running[party] = one
        except Refused as reason:
            notes.append(f"{party}: {reason}")
        except bench.WrongAnswer as error:
            if party == "ours":
                raise
            notes.append(str(error))

    def seconds(one: peers.Party, calls: int) -> float:
        with one.window():
            return timer.seconds(one.step, calls)

    calls = {party: calls_of(lambda n, one=one: seconds(one, n), window) for party, one in running.items()}
    rows = [{party: seconds(one, calls[party]) for party, one in running.items()} for _ in range(rounds)]
    inputs = draw(problem)
    work, moved = bench.flops(problem, inputs), bench.least_bytes(problem, inputs)
    ours = np.array([row["ours"] for row in rows])
    made = []
    for party in running:
        times = np.array([row[party] for row in rows])
        middle = float(np.median(times))
        shares = work / middle / roofs.products, moved / middle / roofs.memory
        note = "; ".join(notes) if party == "ours" else ""
        made.append(Row(name, str(problem), operands, party, 1e3 * middle, bench._spread(times),
                        float(np.median(times / ours)), work / middle / 1e9, *shares, max(shares), note))  # fmt: skip
    return made


# ---- The run -------------------------------------------------------------------------------------------------

_MIDDLE = "T128,N64,I256,H256 T128,N64,I512,H512"
LARGE = bench._all("lstm gru", "f32", "train infer",
                   _MIDDLE + " T128,N128,I1024,H1024 T64,N64,I2048,H2048 T1024,N16,I768,H768")  # fmt: skip
LARGE += bench._all("lstm", "f64", "train", _MIDDLE)
SETS = "grid", "half", "rl", "charlm", "speech", "forecasting", "powers", "features", "long"


def chosen(names: Sequence[str]) -> Iterator[tuple[str, Problem]]:
    """The problems of sets, of "large", and those that are named, without what the kernels do not have."""
    for name in names:
        found = [("large", problem) for problem in LARGE] if name == "large" else bench.select([name])
        yield from ((of, problem) for of, problem in found if not problem.options & NOT_THERE)


def card() -> dict[str, str]:
    """What nvidia-smi says of the first card."""
    names = {"card": "name", "capability": "compute_cap", "driver": "driver_version", "clock": "clocks.max.sm",
             "power": "power.limit", "memory": "memory.total"}  # fmt: skip
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    values = [word.strip() for word in said.split(",")]
    return dict(zip(names, values)) if len(values) == len(names) else dict.fromkeys(names, "unknown")


def context(libraries: Sequence[Library]) -> dict[str, Any]:
    versions = [f"gatewise {gw.__version__}", *(one.versions() for one in libraries), f"numpy {np.__version__}",
                f"python {platform.python_version()}"]  # fmt: skip
    return {**card(), "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": bench.commit(),
            "versions": ", ".join(versions)}  # fmt: skip


def write(path: Path, rows: Sequence[Row], shared: dict[str, Any]) -> None:
    """All rows so far, so that a run that is cut short has kept what it measured."""
    beside = path.with_suffix(".unfinished")
    with beside.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Row._fields, *shared])
        for row in rows:
            numbers = [f"{value:.4g}" if isinstance(value, float) else value for value in row]
            writer.writerow([*numbers, *shared.values()])
    beside.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", default=["large", *SETS],
                        help=f"sets of problems, or problems: large, {', '.join(bench.SETS)}")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/gpu_CARD.csv")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"windows of each party; {ROUNDS}")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"bench-gpu: {reason}", file=sys.stderr)
        return 2
    libraries = [kind() for kind in (CuPy, Torch) if kind.missing() is None]
    lends, shared = libraries[0], context(libraries)
    slug = re.sub(r"\W+", "_", shared["card"].lower()).strip("_")
    path = arguments.out or RESULTS / f"gpu_{slug}.csv"
    roofs = measured_roofs(libraries)
    for (dtype, operands), roof in roofs.items():
        shared[f"{dtype}_{operands}_gflops"] = f"{roof.products / 1e9:.4g}"
        shared["copy_gbs"] = f"{roof.memory / 1e9:.4g}"
    rows: list[Row] = []
    wrong = 0
    for name, problem in chosen(arguments.sets):
        inputs = draw(problem)
        for operands in OPERANDS if problem.dtype == "f32" and "_" not in problem.cell else OPERANDS[:1]:
            start = time.perf_counter()
            try:
                new = race(problem, field(problem, inputs, lends, operands), lends, roofs[problem.dtype, operands],
                           operands, name, arguments.rounds)  # fmt: skip
            except bench.WrongAnswer as error:
                wrong += 1
                new = [Row(name, str(problem), operands, "ours", *[float("nan")] * 2, None, *[float("nan")] * 4,
                           f"WRONG: {error}")]  # fmt: skip
            for one in libraries:
                one.give_back()
            rows += new
            write(path, rows, shared)
            others = ", ".join(f"{row.party} {row.ratio:.2f}x" for row in new[1:])
            print(f"{problem} {operands}: {new[0].ms:.3f} ms, {new[0].of_roofline:.0%} of the roofline; {others} "
                  f"{new[0].note} ({time.perf_counter() - start:.1f} s)", flush=True)  # fmt: skip
    print(f"{path}: {len(rows)} rows" + f", {wrong} WRONG" * bool(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
