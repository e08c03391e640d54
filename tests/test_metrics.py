"""Areas and their bootstrap against the definitions."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the study needs scikit-learn: pip install "gatewise[demo]"')

from gatewise.sepsis import metrics


def hours(patients: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label, score with ties, patient) of some patients' hours."""
    random = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), random.integers(1, 20, patients))
    label = (random.random(patient.size) < 0.2).astype(np.int8)
    return label, np.round(random.normal(0, 1, patient.size) + label, 1), patient


def test_areas_are_what_they_are_defined_as() -> None:
    label, score, _ = hours()
    positive, negative = score[label == 1][:, None], score[label == 0]
    pairs = (positive > negative).mean() + 0.5 * (positive == negative).mean()
    thresholds = np.unique(score)[::-1]
    recall = np.array([0.0, *(label[score >= t].sum() / label.sum() for t in thresholds)])
    precision = np.array([label[score >= t].mean() for t in thresholds])
    auroc, auprc = metrics.areas(label, score)
    assert auroc == pytest.approx(pairs) and auprc == pytest.approx((np.diff(recall) * precision).sum())
    assert np.isnan(metrics.areas(np.zeros(3, np.int8), np.arange(3.0))).all()


def test_a_replicate_is_the_areas_of_the_patients_drawn() -> None:
    """Each drawn patient's hours written out as often as it was drawn, and scored by scikit-learn."""
    label, score, patient = hours()
    drawn = metrics.draws(60, 20, seed=3)
    assert (drawn.sum(axis=1) == 60).all() and (drawn == 0).any() and (drawn > 1).any()
    got = metrics.replicated_areas(label, score, patient, drawn)
    for row, times in zip(got, drawn):
        rows = np.repeat(np.arange(label.size), times[patient])
        np.testing.assert_allclose(row, metrics.areas(label[rows], score[rows]), rtol=1e-12)


def test_a_replicate_without_one_kind_of_label_has_no_area() -> None:
    label, score, patient = np.array([1, 0, 0], np.int8), np.array([0.3, 0.2, 0.1]), np.array([0, 1, 1])
    got = metrics.replicated_areas(label, score, patient, np.array([[2, 0], [0, 2], [1, 1]]))
    np.testing.assert_array_equal(np.isnan(got), [[True, True], [True, True], [False, False]])
    value, *ends = metrics.interval(1.0, got[:2, 0])
    assert value == 1.0 and np.isnan(ends).all()


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Normal scores, shifted by 1 where the label is 1: the true area is Phi(1 / sqrt(2)) = 0.7602.

    A patient's label and half of its noise are shared by its hours; an interval that takes hours as independent covers
    the truth in two thirds of the trials. Of 100 trials 95 are to cover, with a deviation of 2.2; percentile intervals
    of small samples are known to be a little short, so four deviations below 93.
    """
    random = np.random.default_rng(1)
    covered = covered_if_independent = 0
    for trial in range(100):
        patient = np.repeat(np.arange(80), 6)
        label = np.repeat(random.random(80) < 0.4, 6).astype(np.int8)
        shared = np.repeat(random.normal(0, np.sqrt(0.5), 80), 6)
        score = shared + random.normal(0, np.sqrt(0.5), label.size) + label
        for name, whose, size in (("patients", patient, 80), ("hours", np.arange(label.size), label.size)):
            found = metrics.replicated_areas(label, score, whose, metrics.draws(size, 100, seed=trial))
            _, low, high = metrics.interval(0.0, found[:, 0])
            hit = low <= 0.7602 <= high
            covered += hit and name == "patients"
            covered_if_independent += hit and name == "hours"
    assert covered >= 93 - 4 * 2.6 and covered > covered_if_independent + 10
