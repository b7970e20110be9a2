"Influence: TRAK against its authors' program (tests/data/trak_reference.md), the solver and the oracles in hard cases."
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from selectbench import methods
from selectbench.data.influence import (
    Logistic,
    Ridge,
    datamodels,
    don_nod,
    donod,
    dsdm,
    influence_effects,
    influence_function,
    leave_one_out,
    leave_one_out_effects,
    linear_datamodelling_score,
    margin_gradients,
    random_subsets,
    topsis,
    train_on_subsets,
    trak,
    trak_effects,
)
from selectbench.pools.tables import digits, iris
from selectbench.zoo.classifier import Classifier

with np.load(Path(__file__).parent / "data" / "trak_reference.npz") as z: theirs = {k: z[k] for k in z.files}


def units():
    "The number that the program divides each model's scores by: the mean absolute entry of the inverse Gram matrix."
    grads = theirs["projected_grads"].astype(float)
    return np.array([np.abs(np.linalg.inv(g.T @ g)).mean() for g in grads])


def test_margin_gradients_are_those_of_the_authors_program():
    weights = {k.removeprefix("net."): torch.from_numpy(theirs[k]) for k in theirs if k.startswith("net.")}
    net = Classifier(weights, np.zeros(13, np.float32), np.ones(13, np.float32), np.zeros(1, np.float32))
    x, y = theirs["x"], theirs["y"]
    ours = margin_gradients(net.gradients(x, y), net.probs(x), y)
    assert np.allclose(ours, theirs["raw_grads"] * theirs["normalize"], rtol=1e-3, atol=1e-4)
    assert np.allclose(1 - net.probs(x)[np.arange(70), y], theirs["out_to_loss"][0], atol=1e-6)


def test_trak_is_the_authors_program_with_one_model():
    grads, targets, wrong = (theirs[k][:1] for k in ("projected_grads", "target_grads", "out_to_loss"))
    assert np.allclose(trak_effects(grads, targets, 1 - wrong) / units()[0], theirs["scores_one"], rtol=2e-3, atol=2e-4)


def test_trak_is_the_authors_program_with_three_models_in_its_units():
    "The program divides each model by a unit of its own before it averages, as scaling the target's gradients does."
    grads, targets, right = theirs["projected_grads"], theirs["target_grads"], 1 - theirs["out_to_loss"]
    same = trak_effects(grads, targets / units()[:, None, None], right)
    assert np.allclose(same, theirs["scores_all"], rtol=2e-3, atol=2e-4)
    paper = trak(grads, targets, right.astype(np.float32), 1).score
    assert spearmanr(paper, theirs["scores_all"].mean(1)).statistic > .9  # program and paper differ


def test_averages_over_models_are_taken_apart():
    "A model that is sure of an example does not silence the geometry of the others."
    grads, targets, right = theirs["projected_grads"], theirs["target_grads"], 1 - theirs["out_to_loss"]
    apart = trak_effects(grads, targets, right)
    together = np.mean([trak_effects(grads[m:m + 1], targets[m:m + 1], right[m:m + 1]) for m in range(3)], axis=0)
    assert not np.allclose(apart, together, rtol=1e-2)


@pytest.fixture(scope="module")
def flowers():
    pool, rng = iris(), np.random.default_rng(0)
    rows = rng.permutation(150)
    x = (pool.features - pool.features.mean(0)) / pool.features.std(0)
    return x[rows[:60]], pool.y[rows[:60]], x[rows[60:80]], pool.y[rows[60:80]]


def test_leave_one_out_is_retraining_with_scikit_learn(flowers):
    X, y, Z, v = flowers
    effects = leave_one_out_effects(Logistic(3, 0.5), X, y, Z, v)
    one = lambda x: np.concatenate([x, np.ones((len(x), 1))], axis=1)

    def losses(kept):
        fit = LogisticRegression(C=2, fit_intercept=False, tol=1e-10, max_iter=9999).fit(one(X[kept]), y[kept])
        return -fit.predict_log_proba(one(Z))[np.arange(len(v)), v]
    whole = losses(np.arange(60))
    for i in range(0, 60, 7): assert np.allclose(effects[i], losses(np.delete(np.arange(60), i)) - whole, atol=1e-5)


def test_methods_score_by_the_effects_whatever_the_units(flowers):
    X, y, Z, v = (np.asarray(a) for a in flowers)
    mean, scale = X.mean(0), X.std(0)
    problem = (Logistic(3), (X - mean) / scale, y, (Z - mean) / scale, v)
    for fn, effects in ((leave_one_out, leave_one_out_effects), (influence_function, influence_effects)):
        ours = fn(X.astype(np.float32) * 1000, y, Z.astype(np.float32) * 1000, v, 5)
        assert np.allclose(ours.score, effects(*problem).mean(1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("l2", [1e-4, 1.0, 1e4])
def test_newton_reaches_the_minimum_of_ten_classes_and_lone_examples(l2):
    pool = digits()
    X, y = (pool.features[:120, 8:40] / 16).astype(float), pool.y[:120]
    weights = random_subsets(120, 6, share=.3).astype(float)
    weights = np.concatenate([weights, [np.eye(120)[0], 5 * np.ones(120), np.zeros(120)]])
    model = Logistic(10, l2)
    theta = model.fit(X, y, weights)
    for t, w in zip(theta, weights, strict=True):
        slope = w @ model.gradients(t, X, y) + l2 * t
        assert np.abs(slope).max() < 1e-5 * max(1, w.sum())
    assert np.abs(theta[-1]).max() < 1e-8  # nothing to learn from


def test_chunks_change_nothing(monkeypatch, flowers):
    X, y, _, _ = flowers
    weights = random_subsets(60, 11)
    whole = Logistic(3).fit(X, y, weights), Ridge().fit(X, y, weights)
    monkeypatch.setattr("selectbench.data.influence._CHUNK", 1)
    assert np.allclose(Logistic(3).fit(X, y, weights), whole[0], atol=1e-7)
    assert np.allclose(Ridge().fit(X, y, weights), whole[1])


def test_a_thousand_trainings_predict_fresh_ones(flowers):
    X, y, Z, v = flowers
    S = random_subsets(60, 1100, seed=3)
    L = train_on_subsets(Logistic(3), X, y, S, Z, v)
    learnt, held = slice(100, None), slice(100)
    for penalty in ("l1", "l2"):
        weights = datamodels(S[learnt], L[learnt][:, :4], penalty=penalty)[0]
        assert linear_datamodelling_score(-weights, S[held], L[held][:, :4]).mean() > .85
    noise = np.random.default_rng(0).normal(size=(60, 20))
    assert abs(linear_datamodelling_score(noise, S[held], L[held]).mean()) < .15


def test_donod_prefers_the_example_that_confirms_to_the_one_that_shakes():
    head = np.eye(2, dtype=np.float32)
    h = np.array([[2, 0], [2, 0], [.1, 0]], dtype=np.float32)
    probs = np.array([[.9, .1], [.9, .1], [.5, .5]], dtype=np.float32)
    right_wrong_faint = np.array([0, 1, 0])
    don, nod = don_nod(h, probs, right_wrong_faint, head)
    assert don[0] > don[2] > 0 > don[1] and nod[1] > nod[0] > nod[2]
    assert donod(h, probs, right_wrong_faint, head, 3).index[-1] == 1


def test_donod_takes_the_smaller_change_of_two_that_leave_the_norm_alone():
    head = np.array([[1, 0], [-1, 0]], dtype=np.float32)           # blind to the second embedding
    h = np.array([[3, 0], [3, 0], [0, 3], [0, 1]], dtype=np.float32)
    probs, y = np.array([[.8, .2], [.2, .8], [.5, .5], [.5, .5]], dtype=np.float32), np.zeros(4, int)
    don, nod = don_nod(h, probs, y, head)
    assert abs(don[2]) < 1e-2 * don[0] and nod[2] > nod[3]
    order = donod(h, probs, y, head, 4).index.tolist()
    assert order.index(3) < order.index(2)


def test_topsis_is_the_textbook():
    "Hwang and Yoon's steps, one alternative at a time."
    table = np.random.default_rng(0).normal(size=(7, 2))
    v = table / np.sqrt((table**2).sum(0))
    ideal, worst = (v[:, 0].max(), v[:, 1].min()), (v[:, 0].min(), v[:, 1].max())
    for row, score in zip(v, topsis(table, (1, -1)), strict=True):
        to = [np.hypot(row[0] - c[0], row[1] - c[1]) for c in (ideal, worst)]
        assert np.isclose(score, to[1] / sum(to))


@pytest.mark.parametrize("name", ["leave_one_out", "influence_function"])
def test_one_class_and_negative_classes_are_refused(name):
    x = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    with pytest.raises(ValueError, match="`y`"): methods[name](x, np.ones(9, int), x, np.ones(9, int), 2)
    with pytest.raises(ValueError, match="`y`"): methods[name](x, np.arange(9) % 2 - 1, x, np.ones(9, int), 2)


def test_a_target_class_that_the_pool_lacks_is_a_high_loss_and_no_error():
    x, y = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32), np.arange(12) % 2
    assert np.isfinite(leave_one_out(x, y, x[:3], np.full(3, 2), 4).score).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradients_are_refused(bad):
    g = theirs["projected_grads"].copy(); g[1, 5, 3] = bad
    with pytest.raises(ValueError, match="`model_gradients`"):
        trak(g, theirs["target_grads"], 1 - theirs["out_to_loss"], 3)


def test_nothing_to_tell_apart_keeps_the_order_of_the_pool():
    S = random_subsets(20, 50)
    assert (dsdm(S, np.ones((50, 3), np.float32), 4).index == np.arange(4)).all()
    ones = np.ones((3, 8, 2), np.float32)
    assert (trak(ones, ones, np.full((3, 8), .5, np.float32), 4).index == np.arange(4)).all()
    half = np.full((8, 2), .5, np.float32)
    assert (donod(half, half, np.zeros(8, int), np.zeros((2, 2), np.float32), 4).index == np.arange(4)).all()
    assert (linear_datamodelling_score(np.zeros((20, 3)), S, np.ones((50, 3))) == 0).all()


def test_scores_of_the_datamodelling_are_refused_by_name():
    S = random_subsets(20, 50)
    with pytest.raises(ValueError, match="`effects`"):
        linear_datamodelling_score(np.zeros((3, 20)), S, np.ones((50, 3)))
    with pytest.raises(ValueError, match="`subsets`"):
        linear_datamodelling_score(np.zeros((20, 3)), S[:2], np.ones((2, 3)))
    with pytest.raises(ValueError, match="`share`"): random_subsets(10, 3, share=0)
