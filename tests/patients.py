"""Where the real records are, and records with another future, for the tests of the study.

The real records are read only where they are: in $GATEWISE_DATA, or in shared/data beside the repository.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from gatewise.sepsis.records import Records, read

HERE = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("GATEWISE_DATA", HERE.parent / "shared/data/sepsis2019"))
real = pytest.mark.skipif(not list(DATA.glob("*.npz")), reason=f"no records in {DATA} (set GATEWISE_DATA)")


@lru_cache(maxsize=1)
def everybody() -> Records:
    """All real patients, read once."""
    return read(DATA)


def cut(table: Records, hours: int) -> Records:
    """Every record ends after so many hours."""
    keep = np.arange(table.label.size) - table.first_row < hours
    return replace(
        table, measured=table.measured[keep], background=table.background[keep], clock=table.clock[keep],
        label=table.label[keep], length=np.minimum(table.length, hours),
        risk=None if table.risk is None else table.risk[keep],
    )  # fmt: skip


def disturb(table: Records, hours: int) -> Records:
    """After so many hours every value, and which of them is measured, is another."""
    random = np.random.default_rng(9)
    later = np.arange(table.label.size) - table.first_row >= hours
    measured = table.measured.copy()
    noise = random.normal(0, 300, (later.sum(), measured.shape[1])).astype(np.float32)
    measured[later] = np.where(random.random(noise.shape) < 0.5, noise, np.nan)
    return replace(table, measured=measured, label=np.where(later, 1 - table.label, table.label))
