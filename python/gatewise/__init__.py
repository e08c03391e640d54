"""Recurrent layers (RNN, LSTM, GRU) whose forward and backward passes are hand-written SIMD kernels.

Three levels, each a few lines over the one below: functions on arrays (`lstm`, `lstm_forward`, `lstm_backward`, and
the same for `gru` and `rnn`), layers that hold weights under PyTorch's names (`LSTM`, `GRU`, `RNN`), and estimators
with scikit-learn's interface (`SequenceClassifier`, `SequenceRegressor`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _core
from .backends import backends
from .functional import (
    Gradients,
    Tape,
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

__version__ = "0.1.0"

# Loaded when first used: importing gatewise costs NumPy and the kernels, nothing else.
_LAZY = {
    "RNN": "layers",
    "LSTM": "layers",
    "GRU": "layers",
    "SequenceClassifier": "estimators",
    "SequenceRegressor": "estimators",
    "check": "check",
    "onnx": "onnx",
    "sepsis": "sepsis",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gatewise' has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    value = module if name == _LAZY[name] else getattr(module, name)
    globals()[name] = value
    return value


def cells() -> dict[str, dict[str, Any]]:
    """The cells by name: G gates, S saved blocks, whether there is a cell state c, whether it is split (GRU)."""
    return {name: dict(traits) for name, traits in _core.cells.items()}


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Gradients",
    "SequenceClassifier",
    "SequenceRegressor",
    "Tape",
    "__version__",
    "backends",
    "cells",
    "check",
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
]
