# As _core.pyi; what is new: `stream`, as CUDA writes it, on which the work is put; arrays are those of a device, except
# lengths and batch_sizes, and lend the CUDA array interface. Nothing waits for the device, but `read` and `write`.
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Why no kernel can run here, or None; and the devices there are: "NVIDIA H100 (sm_90), driver 13.0"
def devices() -> tuple[str | None, list[str]]: ...

# Elements of saved and states for one sequence of T steps
def sequence_sizes(cell: str, float64: bool, T: int, H: int, R: int, save: str) -> tuple[int, int]: ...

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
        extras: tuple[Any, ...] | None,
        tensors: Any,
        stream: int,
        operands: str | None = None,  # "exact", "tf32", "bf16": cuda::Operands
        loop: str | None = None,  # "planned", "persistent", "stepwise": cuda::Loop
    ) -> None: ...
    @property
    def device(self) -> int: ...
    def __getattr__(self, name: str) -> Any: ...  # as of _core.Problem, but for arch, lanes and check_incoming

def forward(
    problem: Problem,
    y: Any,
    hn: Any,
    cn: Any,
    saved: Any,
    states: Any,
    scratch: Any,
    stream: int,
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
    gradients: tuple[Any, ...],
    scratch: Any,
    stream: int,
    fresh: bool = False,  # the gradients of the weights hold no numbers yet, to which others could be added
    tensors: Any = None,
) -> None: ...
def convert(name: str, numbers: Any, to: Any, stream: int) -> None: ...  # 16 bits to float32, or float32 rounded
def read(problem: Problem, numbers: Any, host: NDArray[np.floating[Any]], stream: int) -> None: ...
def write(problem: Problem, host: NDArray[np.floating[Any]], numbers: Any, stream: int) -> None: ...
