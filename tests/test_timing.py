"""Training in gatewise and in PyTorch's loops: the work is the same, and what is not is said. No time is asserted."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

import gatewise
from gatewise.sepsis import timing

OPTIONS: dict[str, Any] = {"hidden_size": 5, "batch_size": 8, "learning_rate": 1e-2, "num_threads": 1}


def people(seed: int, number: int, scale: float = 1.0) -> timing.Patients:
    random = np.random.default_rng(seed)
    x = [random.normal(0, scale, (hours, 3)).astype(np.float32) for hours in random.integers(1, 20, number)]
    return timing.Patients(x, [(np.cumsum(one[:, 0]) > 1).astype(np.int8) for one in x])


@pytest.mark.parametrize("cell", timing.CELLS.values())
def test_every_way_trains_the_same_model(cell: str) -> None:
    """Losses by epoch, and what the model left of the best epoch predicts, are those of gatewise but for rounding."""
    torch = pytest.importorskip("torch")
    train, validation, test = people(0, 30), people(1, 10), people(2, 12)
    # The rate is so high that the last epoch is not the best.
    threads = torch.get_num_threads()
    others = 2 if threads == 1 else 1
    options = {**OPTIONS, "learning_rate": 0.3, "max_epochs": 6, "random_state": 3, "num_threads": others}
    fits = {way: timing.fit(way, cell, options, train, validation, test) for way in timing.WAYS}
    assert torch.get_num_threads() == threads
    ours = fits["gatewise"]
    losses = [epoch["val_loss"] for epoch in ours.history]
    assert losses[-1] > 1.001 * min(losses)
    assert ours.scores.shape == (sum(map(len, test.y)),)
    for way, fit in fits.items():
        for key in ("train_loss", "val_loss"):
            np.testing.assert_allclose([e[key] for e in fit.history], [e[key] for e in ours.history], rtol=2e-3)
        np.testing.assert_allclose(fit.scores, ours.scores, rtol=0.02, atol=1e-3, err_msg=way)


def test_every_way_lowers_the_rate_and_shrinks_the_weights_alike() -> None:
    pytest.importorskip("torch")
    train = people(0, 30)
    options = {**OPTIONS, "max_epochs": 4, "random_state": 3, "schedule": "cosine", "weight_decay": 0.05}
    ours, *others = (timing.fit(way, "lstm", options, train).history for way in timing.WAYS)
    for history in others:
        np.testing.assert_allclose([e["train_loss"] for e in history], [e["train_loss"] for e in ours], rtol=1e-5)


def test_epochs_gives_a_row_a_cell_and_way() -> None:
    pytest.importorskip("torch")
    wide = people(0, 40, scale=30)  # the norms of its gradients are beyond those at which they are clipped
    rows, why = timing.epochs(wide, ("GRU", "LSTM"), rounds=2, **{**OPTIONS, "hidden_size": 64})
    assert why == ""
    assert [(row["model"], row["loop"]) for row in rows] == [(c, w) for c in ("GRU", "LSTM") for w in timing.WAYS]
    for row in rows:
        assert 0 < row["least"] <= row["seconds"] <= row["most"] and row["epochs"] == 2
        ours = next(one for one in rows if one["model"] == row["model"])
        assert row["over gatewise"] == row["seconds"] / ours["seconds"]
        assert row["loss"] == pytest.approx(ours["loss"], rel=1e-5)


def test_the_rounds_end_with_the_time_that_is_given() -> None:
    rows, _ = timing.epochs(people(0, 20), ("RNN",), rounds=50, limit=0.0, **OPTIONS)
    assert {row["epochs"] for row in rows} == {1}


def test_without_pytorch_the_rest_is_measured_and_the_reason_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gatewise.torch", raising=False)
    monkeypatch.delattr(gatewise, "torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    rows, why = timing.epochs(people(0, 10), ("RNN",), rounds=1, **OPTIONS)
    assert [row["loop"] for row in rows] == ["gatewise"]
    assert why == 'gatewise.torch needs PyTorch 2.6 or newer: pip install "gatewise[torch]"'


def test_a_way_that_does_other_work_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    fit = timing.fit

    def other(way: str, cell: str, options: dict[str, Any], train: timing.Patients) -> timing.Fit:
        done = fit(way, cell, options, train)
        if way == "torch.nn padded":
            done = replace(done, history=[{**done.history[0], "train_loss": done.history[0]["train_loss"] * 1.01}])
        return done

    monkeypatch.setattr(timing, "fit", other)
    rows, why = timing.epochs(people(0, 20), ("GRU",), rounds=1, **OPTIONS)
    assert [row["loop"] for row in rows] == ["gatewise", "gatewise.torch", "torch.nn packed"]
    assert why.startswith("GRU, torch.nn padded: not the same work, its loss is 0.")


def test_another_way_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"way: expected one of gatewise, .*, torch.nn packed; got 'jax'"):
        timing.fit("jax", "gru", OPTIONS, people(0, 3))
