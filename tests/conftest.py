"""Fixtures every test file may use."""

from __future__ import annotations

import pytest

import gatewise._core

ARCHS = [name for name, runs_here in gatewise._core.archs if runs_here]


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that was built and runs on this machine, forced for the length of the test."""
    monkeypatch.setenv("GATEWISE_ARCH", request.param)
    return request.param
