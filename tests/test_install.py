"""What a user's environment must have: NumPy, and nothing else until it is asked for."""

from __future__ import annotations

import subprocess
import sys

# Everything that is neither Python's own, nor NumPy, nor gatewise is refused.
ONLY_NUMPY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "gatewise", "_gatewise_editable"):
            raise ImportError(f"{name} is not NumPy")
sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_gatewise_imports_nothing_but_numpy() -> None:
    before = "import sys, numpy; before = set(sys.modules)\n"
    after = "import gatewise\nprint(*sorted({n.partition('.')[0] for n in set(sys.modules) - before}))"
    imported = set(python(before + after).split())
    assert "gatewise" in imported
    assert imported - {"gatewise", "numpy"} <= set(sys.stdlib_module_names)


def test_kernels_layers_and_check_run_with_numpy_alone() -> None:
    python(
        ONLY_NUMPY
        + """
import numpy as np
import gatewise as gw
layer = gw.LSTM(3, 5, num_layers=2, bidirectional=True, random_state=0)
x = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)
y, state, tape = layer.forward(x, lengths=np.array([6, 0, 3, 5]))
grads = layer.backward(tape, np.ones_like(y))
assert y.any() and all(np.isfinite(grads[name]).all() and grads[name].any() for name in layer.parameters)
assert gw.check.gradients(gw.GRU(2, 3, dtype="float64"), np.ones((3, 2, 2)))
assert "numba" not in sys.modules
"""
    )


def test_what_is_missing_is_named_with_the_extra_that_installs_it() -> None:
    for use, extra in (
        ("gw.SequenceClassifier", "train"),
        ("gw.LSTM(2, 3).save('never-written')", "io"),
        ("gw.sepsis.demo(report=None)", "demo"),
        ("gw.onnx", "onnx"),
        ("from gatewise import reference", "reference"),
    ):
        code = f"{ONLY_NUMPY}\nimport gatewise as gw\ntry:\n    {use}\nexcept ImportError as error:\n    print(error)"
        assert f"gatewise[{extra}]" in python(code), use
