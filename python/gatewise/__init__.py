"""Recurrent layers (RNN, LSTM, GRU, IndRNN) whose forward and backward passes are hand-written SIMD kernels.

Three levels, each a few lines over the one below: functions on arrays (`lstm`, `lstm_forward`, `lstm_backward`, the
same for `gru` and `rnn`, and `forward`, `backward`, `double_backward` for any cell), layers that hold weights under
PyTorch's names (`LSTM`, `GRU`, `RNN`, `IndRNN`; with their state from call to call, `Stateful`), and estimators with
scikit-learn's interface (`SequenceClassifier`, `SequenceRegressor`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _core
from .backends import backends
from .functional import (
    Gradients,
    Options,
    SecondGradients,
    Tape,
    backward,
    double_backward,
    forward,
    gru,
    gru_backward,
    gru_forward,
    lstm,
    lstm_backward,
    lstm_forward,
    rnn,
    rnn_backward,
    rnn_forward,
)

if TYPE_CHECKING:
    from . import check as check
    from . import onnx as onnx
    from .estimators import SequenceClassifier as SequenceClassifier
    from .estimators import SequenceRegressor as SequenceRegressor
    from .layers import GRU as GRU
    from .layers import LSTM as LSTM
    from .layers import RNN as RNN
    from .layers import IndRNN as IndRNN
    from .layers import Stateful as Stateful

__version__ = "0.1.0"

# Loaded when first used: importing gatewise costs NumPy and the kernels, nothing else.
_LAZY = {
    "RNN": "layers",
    "LSTM": "layers",
    "GRU": "layers",
    "IndRNN": "layers",
    "Stateful": "layers",
    "SequenceClassifier": "estimators",
    "SequenceRegressor": "estimators",
    "check": "check",
    "onnx": "onnx",
    "sepsis": "sepsis",
    "torch": "torch",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    value = module if name == _LAZY[name] else getattr(module, name)
    globals()[name] = value
    return value


def cells() -> dict[str, dict[str, Any]]:
    """The cells by name, with their traits.

    G: gates; S: blocks that the kernels save of a step; U: blocks of per-unit weights; has_c: there is a cell state c;
    split: gx and gh have gradients of their own (GRU); product: h meets w_hh; normed: W_ih x and W_hh h are
    standardised; middle: what a step does between the cell's two phases ("none", "product", "norm").
    """
    return {name: dict(traits) for name, traits in _core.cells.items()}


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Gradients",
    "IndRNN",
    "Options",
    "SecondGradients",
    "SequenceClassifier",
    "SequenceRegressor",
    "Stateful",
    "Tape",
    "__version__",
    "backends",
    "backward",
    "cells",
    "check",
    "double_backward",
    "forward",
    "gru",
    "gru_backward",
    "gru_forward",
    "lstm",
    "lstm_backward",
    "lstm_forward",
    "onnx",
    "rnn",
    "rnn_backward",
    "rnn_forward",
    "torch",
]
