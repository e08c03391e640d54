"""Estimators: scikit-learn's contract, forms of input and output, what counts as a target, learning."""

import pickle
import time
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

import gatewise as gw
from gatewise import SequenceClassifier, SequenceRegressor

SMALL = {"hidden_size": 6, "max_epochs": 3, "batch_size": 4, "random_state": 0}


def sequences(N=12, I=3, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return [random.standard_normal((int(length), I)).astype(dtype) for length in random.integers(1, 8, N)]


def padded(arrays, fill):
    """A list of [T_i, ...] as one array [N, T, ...] and its lengths."""
    lengths = np.array([len(a) for a in arrays])
    out = np.full((len(arrays), lengths.max(), *arrays[0].shape[1:]), fill, arrays[0].dtype)
    for row, a in zip(out, arrays):
        row[: len(a)] = a
    return out, lengths


def labels(X, seed=1):
    random = np.random.default_rng(seed)
    return [random.integers(0, 2, len(x)) for x in X]


def assert_equal_fits(a, b):
    for name, value in a.network_.parameters.items():
        np.testing.assert_array_equal(value, b.network_.parameters[name], err_msg=name)
    assert [h["train_loss"] for h in a.history_] == [h["train_loss"] for h in b.history_]


# ---- scikit-learn's own checks -----------------------------------------------------------------------------
# They feed two-dimensional X, which the estimators refuse; so each row becomes a sequence of one step. In
# float64 and one batch, as a check asks for equality to 1e-7 of weighted and repeated rows. None is excluded.


def steps(X):
    return X if hasattr(X, "toarray") or np.asarray(X).ndim != 2 else np.asarray(X)[:, None, :]


class OnRows:
    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = True, False
        return tags

    def fit(self, X, y=None, sample_weight=None):
        return super().fit(steps(X), y, sample_weight=sample_weight)

    def predict(self, X):
        return super().predict(steps(X))

    def score(self, X, y, sample_weight=None):
        return super().score(steps(X), y, sample_weight=sample_weight)


class RowClassifier(OnRows, SequenceClassifier):
    def predict_proba(self, X):
        return super().predict_proba(steps(X))

    def decision_function(self, X):
        return super().decision_function(steps(X))


class RowRegressor(OnRows, SequenceRegressor):
    pass


ON_ROWS = {
    "target": "sequence", "hidden_size": 16, "max_epochs": 60, "learning_rate": 0.02, "batch_size": 1000,
    "validation_fraction": 0.0, "dtype": "float64", "random_state": 0,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([RowClassifier(**ON_ROWS), RowRegressor(**ON_ROWS)])
def test_scikit_learns_checks(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        check(estimator)


# ---- learning ----------------------------------------------------------------------------------------------


def delayed_memory(N, seed):
    """y[t] = [x[t-3, 0] > 0], and 0 before: no function of x[t] alone does better than chance."""
    random = np.random.default_rng(seed)
    X = [random.standard_normal((int(length), 2)).astype(np.float32) for length in random.integers(8, 16, N)]
    return X, [np.concatenate((np.zeros(3, int), (x[:-3, 0] > 0).astype(int))) for x in X]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_delayed_memory_is_learnt_and_cannot_be_without_a_memory(cell):
    (X, y), (X_test, y_test) = delayed_memory(300, 0), delayed_memory(100, 1)
    model = SequenceClassifier(
        cell=cell, hidden_size=24, learning_rate=0.02, max_epochs=40, batch_size=32, random_state=0
    ).fit(X, y)
    memoryless = LogisticRegression().fit(np.concatenate(X), np.concatenate(y))
    assert memoryless.score(np.concatenate(X_test), np.concatenate(y_test)) < 0.7
    assert model.score(X_test, y_test) > 0.97


def test_several_classes_per_sequence_are_learnt():
    random = np.random.default_rng(0)
    X = sequences(1000, seed=3)
    y = np.array(["low", "mid", "top"])[np.array([int(np.argmax(x.sum(axis=0))) for x in X])]
    order = random.permutation(1000)
    train, test = order[:900], order[900:]
    model = SequenceClassifier(cell="gru", learning_rate=0.02, max_epochs=40, random_state=0)
    model.fit([X[i] for i in train], y[train])
    X_test = [X[i] for i in test]
    assert model.score(X_test, y[test]) > 0.85
    p = model.predict_proba(X_test)
    assert p.shape == (100, 3)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(model.predict(X_test), model.classes_[p.argmax(axis=1)])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_sum_of_the_past_is_learnt_per_step_and_per_sequence(bidirectional):
    X = sequences(300, seed=4)
    running = [0.3 * np.cumsum(x[:, :2], axis=0) for x in X]
    options = {"learning_rate": 0.01, "max_epochs": 30, "batch_size": 16, "random_state": 0}
    model = SequenceRegressor(bidirectional=bidirectional, **options).fit(X, running)
    assert model.score(X, running) > 0.9 and model.predict(X)[5].shape == running[5].shape
    last = np.array([r[-1, 0] for r in running])
    model = SequenceRegressor(bidirectional=bidirectional, **options).fit(X, last)
    assert model.score(X, last) > 0.9 and model.predict(X).shape == (300,)


# ---- forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_padded_and_list_are_the_same_problem(dtype):
    X, lost = sequences(dtype=dtype), 7.0  # what lies past the ends must not be read
    y = labels(X)
    X_padded, lengths = padded(X, lost)
    y_padded, _ = padded(y, 1)
    a = SequenceClassifier(**SMALL).fit(X, y)
    b = SequenceClassifier(**SMALL).fit(X_padded, y_padded, lengths)
    assert_equal_fits(a, b)
    for method in ("predict_proba", "predict", "decision_function"):
        from_list = getattr(a, method)(X)
        from_padded = getattr(b, method)(X_padded, lengths)
        assert [len(v) for v in from_list] == lengths.tolist()
        fill = 0 if method == "predict" else np.nan
        np.testing.assert_array_equal(from_padded, padded(from_list, fill)[0])
    assert a.score(X, y) == b.score(X_padded, y_padded, lengths)


@pytest.mark.parametrize("kind", ["int", "string", "bool", "float"])
def test_labels_of_any_kind(kind):
    X = sequences()
    values = {"int": np.array([-1, 5]), "string": np.array(["no", "yes"]), "bool": np.array([False, True]),
              "float": np.array([0.0, 1.0])}[kind]  # fmt: skip
    model = SequenceClassifier(**SMALL).fit(X, [values[y] for y in labels(X)])
    np.testing.assert_array_equal(model.classes_, values)
    assert set(np.concatenate(model.predict(X))) <= set(values)


def test_targets_auto_is_by_shape():
    X = sequences()
    X_padded, lengths = padded(X, 0)
    y = labels(X)
    assert SequenceClassifier(**SMALL).fit(X, y).target_ == "step"
    assert SequenceClassifier(**SMALL).fit(X_padded, padded(y, 0)[0], lengths).target_ == "step"
    per_sequence = np.arange(12) % 2
    assert SequenceClassifier(**SMALL).fit(X, per_sequence).target_ == "sequence"
    assert SequenceClassifier(**SMALL).fit(X, per_sequence.tolist()).target_ == "sequence"
    two = np.random.default_rng(0).standard_normal((12, 2))
    assert SequenceRegressor(**SMALL).fit(X_padded, two, lengths).target_ == "sequence"
    assert SequenceRegressor(**SMALL).fit(X, two).predict(X).shape == (12, 2)


def test_an_empty_sequence_is_predicted_as_such():
    X = sequences()
    model = SequenceClassifier(**SMALL).fit(X, labels(X))
    empty = np.zeros((0, 3), np.float32)
    assert [len(p) for p in model.predict_proba([X[0], empty, X[1]])] == [len(X[0]), 0, len(X[1])]
    model = SequenceClassifier(**SMALL).fit(X, np.arange(12) % 2)
    assert np.isfinite(model.predict_proba([empty])).all()


def test_input_is_neither_copied_nor_changed(monkeypatch):
    X_padded, lengths = padded(sequences(), 0)
    X_padded.flags.writeable = False
    seen = []
    model = SequenceClassifier(**SMALL)
    network = model._network
    monkeypatch.setattr(model, "_network", lambda data, random: seen.append(data.x) or network(data, random))
    model.fit(X_padded, np.arange(12) % 2, lengths)
    assert all(np.shares_memory(x, X_padded) for x in seen[0])


# ---- causality, order --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [*gw.cells(), "rnn"])
def test_a_prediction_does_not_see_the_future_nor_its_neighbours(cell):
    X = sequences(40)
    model = SequenceClassifier(cell=cell, **{**SMALL, "hidden_size": 17}).fit(X, labels(X))
    p = model.predict_proba(X)
    cut = model.predict_proba([x[: (len(x) + 1) // 2] for x in X])
    moved = [x.copy() for x in X]
    for x in moved:
        x[(len(x) + 1) // 2 :] += 100
    changed = model.predict_proba(moved)
    alone = [model.predict_proba([x])[0] for x in X]
    for a, b, c, d in zip(p, cut, changed, alone):
        np.testing.assert_array_equal(a[: len(b)], b)
        np.testing.assert_array_equal(c[: len(b)], b)
        np.testing.assert_array_equal(a, d)


# ---- what counts -------------------------------------------------------------------------------------------


def test_missing_targets_influence_nothing():
    X = sequences(20)
    y = [v.astype(float) for v in labels(X)]
    holes = [np.random.default_rng(5).random(len(v)) < 0.3 for v in y]
    weights = [np.where(h, 0.0, 1.0) for h in holes]
    missing = SequenceClassifier(**SMALL).fit(X, [np.where(h, np.nan, v) for h, v in zip(holes, y)])
    for value in (0, 1, 9):  # 9 is no class: it is not even looked at
        weighted = SequenceClassifier(**SMALL).fit(
            X, [np.where(h, value, v) for h, v in zip(holes, y)], sample_weight=weights
        )
        assert_equal_fits(missing, weighted)
        np.testing.assert_array_equal(weighted.classes_, [0, 1])
        assert weighted.score(X, [np.where(h, value, v) for h, v in zip(holes, y)], sample_weight=weights) == (
            missing.score(X, [np.where(h, np.nan, v) for h, v in zip(holes, y)])
        )


@pytest.mark.parametrize("kind", ["step", "sequence"])
def test_weight_zero_is_the_same_as_leaving_out(kind):
    X = sequences(20)
    y = labels(X) if kind == "step" else np.arange(20) % 2
    weights = np.ones(20)
    weights[[3, 7, 11]] = 0
    kept = np.flatnonzero(weights)
    without = [X[i] for i in kept], [y[i] for i in kept]
    options = {**SMALL, "class_weight": "balanced"}
    assert_equal_fits(
        SequenceClassifier(**options).fit(X, y, sample_weight=weights),
        SequenceClassifier(**options).fit(*without),
    )


def test_one_of_several_outputs_may_be_missing():
    X = sequences(30)
    y = np.array([[x[-1, 0], x[-1, 1]] for x in X])
    y[::2, 1] = np.nan
    fits = []
    for poison in (0.0, 5.0):
        z = y.copy()
        z[0] = poison  # weight 0
        weights = np.ones(30)
        weights[0] = 0
        fits.append(
            SequenceRegressor(**{**SMALL, "max_epochs": 60, "validation_fraction": 0}, learning_rate=0.02).fit(
                X, z, None, weights
            )
        )
    assert_equal_fits(*fits)
    assert np.isfinite(fits[0].predict(X)).all()
    assert fits[0].score(X, y) > 0.8


def test_balanced_classes_have_equal_total_weight_and_a_dict_is_obeyed():
    X = sequences(60)
    y = [(np.random.default_rng(i).random(len(x)) < 0.1).astype(int) for i, x in enumerate(X)]
    share = np.concatenate(y).mean()
    options = {
        **SMALL,
        "validation_fraction": 0.0,
        "max_epochs": 1,
        "learning_rate": 1e-9,
    }  # the head's start
    means = []
    for class_weight in (None, "balanced", {1: 10}):
        model = SequenceClassifier(**options, class_weight=class_weight).fit(X, y)
        bias = float(model.network_.head.bias[0])
        means.append(1 / (1 + np.exp(-bias)))
    np.testing.assert_allclose(means, [share, 0.5, 10 * share / (1 - share + 10 * share)], rtol=1e-4)
    with pytest.raises(ValueError, match=r"class_weight: expected labels among \[0, 1\]; got \['a'\]"):
        SequenceClassifier(class_weight={"a": 1}).fit(X, y)


# ---- fitting -----------------------------------------------------------------------------------------------

RANDOM = {
    "dropout": 0.3, "input_dropout": 0.1, "recurrent_dropout": 0.2, "weight_dropout": 0.1, "zoneout": (0.1, 0.05),
}  # fmt: skip


def test_every_option_of_a_layer_reaches_it_and_none_of_training_reaches_prediction():
    X = sequences(30)
    y = labels(X)
    options = {
        **RANDOM, "variational": True, "proj_size": 3, "cell_clip": 2.0, "forget_bias": 1.0, "save": "checkpoints",
        "num_layers": 2, "dtype": "float64",
    }  # fmt: skip
    model = SequenceClassifier(cell="lstm_peephole", **SMALL, **options)
    assert {**model.get_params(), **options} == model.get_params() == clone(model).get_params()
    model.fit(X, y)
    arguments = model.network_.layer._arguments()
    assert {**arguments, **options} == arguments and arguments["cell"] == "lstm_peephole"
    for a, b in zip(model.predict_proba(X), model.predict_proba(X)):
        np.testing.assert_array_equal(a, b)
    less = SequenceClassifier(cell="lstm_peephole", **SMALL, **{**options, "save": "states"}).fit(X, y)
    for name, value in model.network_.parameters.items():
        np.testing.assert_allclose(value, less.network_.parameters[name], rtol=1e-9, err_msg=name)
    with pytest.raises(ValueError, match="proj_size: of the cell 'gru' expected 0, for it has no projection; got 3"):
        SequenceClassifier(cell="gru", proj_size=3, **SMALL).fit(X, y)


def test_an_integer_seed_makes_two_fits_equal_to_the_bit_for_any_threads():
    X = sequences(30)
    options = {**SMALL, "num_layers": 2, "bidirectional": True, **RANDOM}
    fits = [SequenceClassifier(**options, num_threads=n).fit(X, labels(X)) for n in (1, 1, 2)]
    assert_equal_fits(fits[0], fits[1])
    assert_equal_fits(fits[0], fits[2])
    other = SequenceClassifier(**{**options, "random_state": 1}).fit(X, labels(X))
    assert (other.network_.head.weight != fits[0].network_.head.weight).any()


def test_validation_data_chooses_the_weights_and_all_of_X_is_trained_on():
    X, V = sequences(20), sequences(10, seed=9)
    y, v = labels(X), labels(V)
    model = SequenceClassifier(**{**SMALL, "max_epochs": 200}, learning_rate=0.05, patience=3)
    model.fit(X, y, validation_data=(V, v))
    losses = [h["val_loss"] for h in model.history_]
    assert len(losses) == int(np.argmin(losses)) + 1 + 3
    p = np.concatenate(model.predict_proba(V)).astype(np.float64)
    np.testing.assert_allclose(-np.log(p[np.arange(len(p)), np.concatenate(v)]).mean(), min(losses), rtol=1e-5)
    V_padded, lengths = padded(V, 0)
    again = SequenceClassifier(**{**SMALL, "max_epochs": 200}, learning_rate=0.05, patience=3)
    assert_equal_fits(model, again.fit(X, y, validation_data=(V_padded, padded(v, 0)[0], lengths)))
    with pytest.raises(ValueError, match=r"validation y: expected labels among \[0, 1\]; got \[2\]"):
        model.fit(X, y, validation_data=(V, [w + 1 for w in v]))


def test_whole_sequences_are_set_aside_and_not_trained_on(monkeypatch):
    from gatewise import training

    X, seen = sequences(20), []
    fit = training.fit
    monkeypatch.setattr(training, "fit", lambda *args, **options: seen.append(args) or fit(*args, **options))
    SequenceClassifier(**SMALL, validation_fraction=0.25).fit(X, labels(X))
    _, train, validation = seen[0]
    held_out = [id(x) for x in validation.x]
    assert len(held_out) == 5
    assert sorted(held_out + [id(x) for x in train.x]) == sorted(id(x) for x in X)
    assert held_out != [id(x) for x in X[:5]]
    place = {id(x): y for x, y in zip(X, labels(X))}
    for part in (train, validation):
        np.testing.assert_array_equal(part.targets[:, 0], np.concatenate([place[id(x)] for x in part.x]))


def test_clone_and_pickle():
    X = sequences()
    model = SequenceClassifier(**SMALL, class_weight="balanced").fit(X, labels(X))
    copy = pickle.loads(pickle.dumps(model))
    for a, b in zip(copy.predict_proba(X), model.predict_proba(X)):
        np.testing.assert_array_equal(a, b)
    fresh = clone(model)
    assert fresh.get_params() == model.get_params() and not hasattr(fresh, "network_")
    with pytest.raises(NotFittedError):
        fresh.predict(X)


def test_ctrl_c_leaves_a_usable_estimator(monkeypatch):
    from gatewise import training

    X = sequences(20)
    step, calls = training.Adam.step, []

    def interrupted(self, gradients):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        step(self, gradients)

    monkeypatch.setattr(training.Adam, "step", interrupted)
    model = SequenceClassifier(**{**SMALL, "max_epochs": 100})
    with pytest.warns(RuntimeWarning, match="interrupted in epoch 3; the weights are those of epoch"):
        model.fit(X, labels(X))
    assert len(model.history_) == 2
    assert 0 <= model.score(X, labels(X)) <= 1


def test_heads_losses_and_optimizer_do_not_dominate():
    """The share is reported; here only that it is a share, and that its parts are not counted twice."""
    X = sequences(64)
    start = time.perf_counter()
    model = SequenceClassifier(**SMALL).fit(X, labels(X))
    elapsed = time.perf_counter() - start
    assert sum(h["seconds"] for h in model.history_) <= elapsed
    assert all(0 < h["kernel_share"] < 1 for h in model.history_)


# ---- bad input ---------------------------------------------------------------------------------------------

X_BAD = sequences(4)
NAN = [x.copy() for x in X_BAD]
NAN[2][0, 1] = np.nan
INF = padded(X_BAD, 0)[0]
INF[1, 0, 2] = np.inf


@pytest.mark.parametrize("X, y, options, sentence", [
    (NAN, [0, 1, 0, 1], {}, "X contains NaN: sequence 2, step 0, feature 1"),
    (INF, [0, 1, 0, 1], {}, "X contains infinity: sequence 1, step 0, feature 2"),
    (np.zeros((4, 3)), [0, 1, 0, 1], {}, r"X: expected a padded array \(N, T, I\) or a list .* got \(4, 3\)"),
    ([], [], {}, "X: found array with 0 sequence"),
    ([np.zeros((2, 3)), np.zeros((2, 4))], [0, 1], {}, r"X\[1\]: expected .*\(T_i, 3\); got \(2, 4\)"),
    (X_BAD, [0, 1, 0], {}, r"y: expected one target per sequence, \(4,\); got \(3,\)"),
    (X_BAD, [0, 0, 0, 0], {}, "y: expected two classes or more; got 1 class"),
    (X_BAD, [np.zeros(99)] * 4, {"target": "step"}, r"y\[0\]: expected a target per step"),
    (X_BAD, [np.nan] * 4, {}, "y: every target is missing"),
    (X_BAD, [0, 1, 0, 1], {"target": "steps"}, "target: expected 'auto', 'step' or 'sequence'; got 'steps'"),
    (X_BAD, [0, 1, 0, 1], {"cell": "lsmt"}, "cell: expected one of"),
    (X_BAD, [0, 1, 0, 1], {"max_epochs": 0}, "max_epochs: expected an integer of 1 or more; got 0"),
    (X_BAD, [0, 1, 0, 1], {"learning_rate": -1.0}, "learning_rate: expected a positive number"),
    (X_BAD, [0, 1, 0, 1], {"schedule": "linear"}, "schedule: expected one of constant, cosine; got 'linear'"),
    (X_BAD, [0, 1, 0, 1], {"class_weight": "equal"}, "class_weight: expected None, 'balanced' or a dict"),
])  # fmt: skip
def test_bad_input_is_named(X, y, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SequenceClassifier(**{**SMALL, **options}).fit(X, y)


@pytest.mark.parametrize("lengths, sentence", [
    ([1, 1, 1], "lengths: expected integers"),
    ([1.5, 1, 1, 1], "lengths: expected integers"),
    ([1, 1, 1, 99], "lengths: expected 0 to T = 4; got 1 to 99"),
    ([-1, 1, 1, 1], "lengths: expected 0 to T"),
])  # fmt: skip
def test_bad_lengths_are_named(lengths, sentence):
    with pytest.raises(ValueError, match=sentence):
        SequenceClassifier(**SMALL).fit(np.zeros((4, 4, 2), np.float32), [0, 1, 0, 1], lengths)


def test_other_bad_arguments_are_named():
    X = sequences(4)
    y = [0, 1, 0, 1]
    with pytest.raises(ValueError, match="lengths: a list of sequences has its own"):
        SequenceClassifier(**SMALL).fit(X, y, [1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"sample_weight: expected one per sequence, \(4,\); got \(2,\)"):
        SequenceClassifier(**SMALL).fit(X, y, sample_weight=[1, 2])
    with pytest.raises(ValueError, match="sample_weight: expected finite numbers of 0 or more"):
        SequenceClassifier(**SMALL).fit(X, y, sample_weight=[1, 2, -1, 1])
    model = SequenceClassifier(**SMALL).fit(X, y)
    with pytest.raises(ValueError, match="X has 5 features, but SequenceClassifier is expecting 3 features"):
        model.predict(sequences(4, I=5))
    with pytest.raises(ValueError, match="y: expected numbers"):
        SequenceRegressor(**SMALL).fit(X, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="y contains infinity"):
        SequenceRegressor(**SMALL).fit(X, [np.inf, 1, 2, 3])
    with pytest.raises(FloatingPointError, match="try a learning_rate below"):
        SequenceRegressor(**SMALL, clip_norm=None).fit(X, [3e38, -3e38, 3e38, -3e38])
