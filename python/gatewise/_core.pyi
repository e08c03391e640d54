# `ticks` of forward and backward: None, or a writable uint64 [3] to which the call adds what its first thread spent,
# in ticks of the CPU's clock: [products, epilogues, all]. Not zeroed here. Measuring costs time itself: time without.
# Benchmarks pass it through functional._forward(..., ticks=array) and functional._backward(tape, ..., ticks=array).
from typing import Any

compiler: str  # "g++ 12.2.0"
no_cuda: str  # why there is no gatewise._cuda; empty where there is one
archs: list[tuple[str, bool]]
# name: G, S, U, has_c, split (GRU's two parts), product (with w_hh), middle ("none" | "product" | "norm": what stands
# between the two phases of the cell), normed (gx and gh are standardised)
cells: dict[str, dict[str, Any]]

def choose_arch() -> str: ...
def available_cores() -> int: ...
def share_openmp() -> bool: ...  # False: the process has none
def choose_num_threads(num_threads: Any) -> tuple[int, str]: ...  # and who said so
def environment(name: str) -> str | None: ...  # as the C library sees it; os.environ writes to it
def dropout(
    x: Any, p: float, seed: int, same_at_every_step: bool = False, batch_first: bool = False, batch_sizes: Any = None
) -> Any: ...  # a new array; x [T, N, width] as in any of a layer's layouts
def evaluate(function: str, x: Any, arch: str) -> Any: ...
def mix64(z: int) -> int: ...  # splitmix64's finaliser, as in gatewise/random.hpp
def fma_rate(arch: str, dtype: str, seconds: float) -> float: ...

# `extras`, here and below: None for defaults, or the options of functional.Options that have no place of their own:
# (w_unit, w_hr, h_mask, reset, reset_to, zoneout_h, zoneout_c, seed, cell_clip, batch_sizes, batch_first, save)
class Problem:
    def __init__(
        self,
        cell: str,
        x: Any,
        w_ih: Any,
        w_hh: Any,
        b_ih: Any,
        b_hh: Any,
        h0: Any,
        c0: Any,
        lengths: Any,
        reverse: bool,
        extras: tuple[Any, ...] | None = None,
        tensors: Any = None,
    ) -> None: ...
    @property
    def cell(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def T(self) -> int: ...
    @property
    def N(self) -> int: ...
    @property
    def I(self) -> int: ...
    @property
    def H(self) -> int: ...
    @property
    def R(self) -> int: ...
    @property
    def U(self) -> int: ...
    @property
    def G(self) -> int: ...
    @property
    def S(self) -> int: ...
    @property
    def has_c(self) -> bool: ...
    @property
    def projects(self) -> bool: ...
    @property
    def lanes(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def sizes(self) -> tuple[int, int, int, int]: ...
    def write_rows(self, rows: Any) -> None: ...
    def check_incoming(self, dy: Any, dhn: Any, dcn: Any) -> None: ...

# Weights that stay packed from call to call. They are compared with those of every call, unless its `promise` is that
# of the last one, and not 0: that nobody can have written into them in between. So they cannot go stale.
class PackedWeights:
    @property
    def count(self) -> int: ...  # how many times they had to be packed

# Layers fed one step at a time, on one Problem of one step for each: see gatewise.layers.Stream.
class Stream:
    def __init__(self, problems: list[Problem], num_threads: Any) -> None: ...
    def step(self, x: Any, /) -> Any: ...
    def copy_state(self) -> tuple[Any, Any]: ...  # h, c [L, N, H]
    def set_state(self, h: Any, c: Any, /) -> None: ...  # None for zeros

# A whole call each, arguments by position: they allocate the outputs, and lend them to the same code as `forward` and
# `backward` below, to which the caller lends its own; `scratch` is None for memory that the thread keeps. `wanted`: a
# set of names, or None for all that the cell has. An array, here and above, is NumPy's, lends a buffer, or is a DLPack
# capsule of a tensor on the CPU; or the tensor, where `tensors` is its class's __dlpack_c_exchange_api__.
def run_forward(
    cell: Any,
    x: Any,
    w_ih: Any,
    w_hh: Any,
    b_ih: Any,
    b_hh: Any,
    h0: Any,
    c0: Any,
    lengths: Any,
    reverse: Any,
    num_threads: Any,
    training: bool,
    ticks: Any,
    packed: PackedWeights | None,
    promise: int,
    extras: tuple[Any, ...] | None,
    /,
) -> tuple[Problem, Any, Any, Any, Any, Any]: ...  # problem, y, hn, cn, saved, states
def run_backward(
    problem: Problem,
    y: Any,
    saved: Any,
    states: Any,
    dy: Any,
    dhn: Any,
    dcn: Any,
    wanted: frozenset[str] | None,
    num_threads: Any,
    ticks: Any,
    /,
) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any, Any]: ...  # in the order of functional.Gradients
def forward(
    problem: Problem,
    y: Any,
    hn: Any,
    cn: Any,
    saved: Any,
    states: Any,
    scratch: Any,
    threads: int,
    ticks: Any = None,
    packed: PackedWeights | None = None,
    tensors: Any = None,
) -> None: ...
def backward(
    problem: Problem,
    y: Any,
    saved: Any,
    states: Any,
    dy: Any,
    dhn: Any,
    dcn: Any,
    gradients: tuple[Any, ...],  # in the order of functional.Gradients
    scratch: Any,
    threads: int,
    ticks: Any = None,
    tensors: Any = None,
) -> None: ...
