"""The published networks, rebuilt: their features, their layers, their protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("numba", reason='gatewise.torch needs numba: pip install "gatewise[torch]"')

import torch

from gatewise import training
from gatewise.sepsis import published, records
from gatewise.sepsis.published import ROWS, Iadi, V, Vuno


def made_up(patients: int = 40, seed: int = 0, hours: tuple[int, int] = (8, 30)) -> records.Records:
    """Random records of the challenge's columns; the label depends on the heart rate of the hour."""
    random = np.random.default_rng(seed)
    length = random.integers(*hours, patients)
    rows = int(length.sum())
    measured = random.normal(0, 1, (rows, V)).astype(np.float32)
    measured[random.random(measured.shape) < 0.5] = np.nan
    offset = np.concatenate([[0], np.cumsum(length)])
    clock = np.arange(rows) - np.repeat(offset[:-1], length) + 1
    return records.Records(
        measured=measured, variables=records.MEASURED,
        background=random.normal(0, 1, (rows, 5)).astype(np.float32), background_names=records.BACKGROUND,
        clock=clock.astype(np.float32), label=(np.nan_to_num(measured[:, 0]) > 0.8).astype(np.int8),
        length=length.astype(np.int64), patient=np.array([f"p{i}" for i in range(patients)]),
        group=np.array(["A", "B"])[np.arange(patients) % 2], fold=(np.arange(patients) % 20).astype(np.int8),
    )  # fmt: skip


def packed(x: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(rows, batch sizes, where each row of the sequences, one after the other, has gone)."""
    data = training.Sequences(x, np.array([len(one) for one in x]), True, np.dtype(np.float32))
    batch = data.batch(np.arange(len(x)))
    place = np.empty(len(batch.rows), np.int64)
    place[batch.source] = batch.rows
    return torch.from_numpy(batch.x), torch.from_numpy(batch.batch_sizes), place


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_hour_knows_a_later_one(row: published.Row) -> None:
    """Features and logits of the first hours, the later hours changed: the same to the last bit."""
    table = made_up()
    train = np.arange(40) < 30
    later = (np.arange(table.label.size) - table.first_row >= 5) & ~table.rows_of(train)
    changed = replace(table, measured=np.where(later[:, None], np.float32(3), table.measured))
    torch.manual_seed(0)
    one, other = (row.features(records, train)[30:] for records in (table, changed))
    model = row.module(one[0].shape[1]).eval()
    scores = []
    for sequences in (one, other):
        x, sizes, place = packed(sequences)
        with torch.no_grad():
            z = model(x, sizes).numpy()[place]
        scores.append(np.split(z, np.cumsum([len(s) for s in sequences])[:-1]))
    for a, b, za, zb in zip(one, other, *scores):
        assert a[:5].tobytes() == b[:5].tobytes() and za[:5].tobytes() == zb[:5].tobytes()
        assert not np.array_equal(za[5:], zb[5:])


def test_the_row_before_is_the_same_patients_hour_before() -> None:
    lengths = [4, 1, 6, 3]
    sequences = [np.stack([np.full(n, i), np.arange(n)], axis=1).astype(np.float32) for i, n in enumerate(lengths)]
    x, sizes, _ = packed(sequences)
    before = published._row_before(sizes)
    for row, earlier in enumerate(before.tolist()):
        patient, hour = x[row].tolist()
        assert earlier == -1 if hour == 0 else x[earlier].tolist() == [patient, hour - 1]


def test_decay_fades_what_was_not_measured_and_gives_its_change() -> None:
    """Against the definition, hour by hour: x exp(-max(0, W d + b)), and its difference from the hour before."""
    table = made_up(6)
    train = np.ones(6, bool)
    x, sizes, place = packed(published.vuno_features(True)(table, train))
    torch.manual_seed(1)
    model = Vuno(masks=True, decay=True, background=x.shape[1] - 3 * V)
    seen: list[torch.Tensor] = []
    model.project.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(x, sizes)
    rows = x.numpy()[place]
    value, measured, hours = rows[:, :V], rows[:, V : 2 * V], rows[:, 2 * V : 3 * V]
    weight, bias = (p.detach().numpy() for p in (model.fade.weight, model.fade.bias))
    faded = np.where(measured > 0, value, value * np.exp(-np.maximum(hours @ weight.T + bias, 0)))
    change = np.diff(faded, axis=0, prepend=0)
    change[table.offset[:-1]] = 0
    got = seen[0].detach().numpy()[place]
    np.testing.assert_allclose(got[:, :V], faded, atol=1e-6)
    np.testing.assert_allclose(got[:, -V:], change, atol=1e-6)
    np.testing.assert_array_equal(got[:, V:-V], rows[:, V:])


def test_iadi_sees_six_hours_of_vital_signs_and_minus_one_where_nothing_was_measured() -> None:
    table = made_up(10)
    built = published.iadi_features(table, np.arange(10) < 8)
    vitals, labs = published.VITALS, V - published.VITALS
    assert {one.shape[1] for one in built} == {6 * vitals + 6 + 2 * labs}
    for one, start, end in zip(built, table.offset, table.offset[1:]):
        raw = table.measured[start:end]
        np.testing.assert_array_equal(one[:, :vitals] == -1, np.isnan(raw[:, :vitals]))
        assert one.min() >= -1 and one.max() <= 1
        for back in range(1, 6):
            np.testing.assert_array_equal(one[back:, back * vitals : (back + 1) * vitals], one[:-back, :vitals])
            assert not one[:back, back * vitals : (back + 1) * vitals].any()
        np.testing.assert_array_equal(one[:, -labs:], ~np.isnan(raw[:, vitals:]))


def test_a_layer_of_iadi_sees_all_before_it() -> None:
    model = Iadi(106)
    assert [layer.input_size for layer in model.layers] == [32, 96, 160]
    assert {layer.hidden_size for layer in model.layers} == {64} and model.after.in_features == 32 + 3 * 64
    assert [(one.in_features, one.out_features) for one in model.embed] == [(106, 424), (424, 848), (848, 32)]


def test_every_patient_is_tested_in_one_quarter_and_teaches_in_none_that_tests_it() -> None:
    for row in ROWS:
        for parts in row.splits:
            assert sorted(fold for part in parts for fold in part) == list(range(20))
    assert sorted(fold for _, _, test in published.QUARTERS for fold in test) == list(range(20))
    assert [len(part) for part in published.SIXTY_TWENTY_TWENTY[0]] == [12, 4, 4]


def test_a_training_is_repeated_to_the_bit_and_learns() -> None:
    table = made_up(60)
    row = replace(ROWS[0], learning_rate=1e-2, max_epochs=2, batch_size=8)
    one, again, other = (published.reproduce(row, table, 0, seed) for seed in (0, 0, 1))
    assert (one.auroc, one.auprc, one.utility) == (again.auroc, again.auprc, again.utility)
    assert one.auroc != other.auroc
    assert one.auroc > 0.7  # the label can be read off the heart rate; chance is .5, and 200 hours deviate by .05


def test_a_loss_per_patient_is_the_sum_over_its_hours() -> None:
    """Where all stay 16 hours it is 16 times the mean, which Adam can't tell but beside an L2."""
    table = made_up(60, hours=(16, 17))

    def losses(per_patient: bool, weight_decay: float) -> list[float]:
        row = replace(ROWS[0], learning_rate=1e-2, max_epochs=3, batch_size=8)
        said: list[str] = []
        published.reproduce(replace(row, per_patient=per_patient, weight_decay=weight_decay), table, 0, 0, said.append)
        return [float(line.split()[-1]) for line in said]

    same = pytest.approx(losses(False, 0.01), rel=1e-3)  # float32 and Adam's epsilon: 4e-5 seen
    assert losses(True, 0.16) == same and losses(True, 0.01) != same


def test_the_command_adds_a_line_a_training_and_leaves_out_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int, int]] = []

    def reproduce(row: published.Row, table: object, split: int, seed: int, say: object) -> published.Fitted:
        trained.append((row.name, split, seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return published.Fitted(0.8 + 0.01 * seed, 0.1, 0.3, 5, 60.0)

    monkeypatch.setattr(published, "reproduce", reproduce)
    monkeypatch.setattr(published, "read", lambda data, progress: made_up(4))
    out = tmp_path / "models" / "out.csv"
    command = ["--data", "somewhere", "--out", str(out), "--seeds", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        with pytest.raises(KeyboardInterrupt):
            published.main(command)
        assert len(published.read_results(out)) == 3
        published.main(command)
    finally:
        torch.set_num_threads(threads)
    wanted = [(row.name, split, seed) for seed in (0, 1) for row in ROWS for split in range(len(row.splits))]
    assert trained == [*wanted[:4], *wanted[3:]]
    table = published.side_by_side(published.read_results(out))
    assert [(line["paper"], line["row"]) for line in table] == [(row.paper, row.name) for row in ROWS]
    assert table[0]["trainings"] == 2 and table[3]["trainings"] == 8
    assert table[0]["AUROC"] == pytest.approx(0.805) and table[0]["AUROC printed"] == 0.773
    assert (table[0]["AUROC low"], table[0]["AUROC high"]) == (0.80, 0.81)
    assert published.side_by_side(published.read_results(out)[:1])[0]["AUROC low"] is None
    assert [path.name for path in out.parent.iterdir()] == ["out.csv"]
