"""Tests of models against the numbers of mlxtend, the library by the author of the survey, and their bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from selectbench.model import compare
from selectbench.pools.tables import wine

# mlxtend 0.25.0 on seeded labels and predictions; the 5x2cv tests on scores handed to it by a scorer
REFERENCE = json.loads((Path(__file__).parent / "data/compare_reference.json").read_text())
Y, P, D = (np.array(REFERENCE[k]) for k in ("y", "predictions", "differences"))


@pytest.mark.parametrize("name, found", [
    ("mcnemar_chi2", compare.mcnemar_chi2(Y, P[:, 0], P[:, 2])),
    ("mcnemar_chi2_uncorrected", compare.mcnemar_chi2(Y, P[:, 0], P[:, 2], correction=False)),
    ("cochran_q", compare.cochran_q(Y, P)),
    ("paired_t_5x2cv", compare.paired_t_5x2cv(D)), ("combined_f_5x2cv", compare.combined_f_5x2cv(D))])
def test_numbers_of_mlxtend(name, found): np.testing.assert_allclose(found, REFERENCE[name], rtol=1e-9)


def test_f_statistic_of_mlxtend():
    "Their p value takes other degrees of freedom than the residual has, so the statistic alone is compared."
    assert np.isclose(compare.f_test(Y, P).statistic, REFERENCE["f_test"][0], rtol=1e-9)


def test_exact_mcnemar_and_the_rule_of_size():
    exact = compare.mcnemar_exact(Y, P[:, 0], P[:, 2])
    assert np.isclose(exact.pvalue, REFERENCE["mcnemar_exact_p"], rtol=1e-9)
    disagree = sum(compare._pair(Y, P[:, 0], P[:, 2]))
    assert (compare.mcnemar(Y, P[:, 0], P[:, 2]) == exact) == (disagree < 50)


def test_two_wrong_ways_are_not_a_disagreement():
    y = np.array([0, 0, 1, 1])
    assert compare.mcnemar(y, [1, 0, 1, 1], [2, 0, 1, 1]).pvalue == 1


def test_table_orders_pairs_and_corrects_for_them():
    table = compare.compare_classifiers(P, Y)
    pairs = table[table.test == "mcnemar"]
    assert len(pairs) == 6 and (pairs.p_holm >= pairs.p).all() and np.isnan(table.p_holm[0])


def test_nested_scores_come_from_untouched_folds():
    "Labels that are noise: the best of many is above chance, the nested score is not."
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 5)), np.arange(30) % 2
    grid = {"n_neighbors": range(1, 16, 2), "p": [1, 2], "weights": ["uniform", "distance"]}
    model, labels = KNeighborsClassifier(), [rng.permutation(y) for _ in range(6)]
    flat = [compare.flat_cv(model, grid, X, noise, seed=0) for noise in labels]
    nested = [compare.nested_cv(model, grid, X, noise, seed=0).scores.mean() for noise in labels]
    assert np.mean(flat) > .56 and np.mean(nested) < np.mean(flat) - .04, (flat, nested)


def test_bootstrap_of_a_memoriser_and_of_noise():
    table = wine()
    found = compare.bootstrap_accuracy(KNeighborsClassifier(1), table.features, table.y, n_splits=20)
    assert found.resubstitution == 1 and found.out_of_bag < found.point632_plus < found.point632 < 1
    noise = np.random.default_rng(0).permutation(table.y)
    plus = compare.bootstrap_accuracy(KNeighborsClassifier(1), table.features, noise, n_splits=20)
    assert plus.point632 > .5 and plus.point632_plus < .45  # .632 takes half of the perfect training score at its word


@pytest.mark.parametrize("name, call", [
    ("predictions", lambda: compare.compare_classifiers(P[:, :1], Y)),
    ("predictions", lambda: compare.cochran_q(Y[:-1], P)),
    ("y", lambda: compare.cochran_q(P, P)),
    ("a", lambda: compare.mcnemar(Y, P[:-1, 0], P[:, 1])),
    ("b", lambda: compare.mcnemar(Y, P[:, 0], P[:-1, 1])),
    ("differences", lambda: compare.resampled_t([.1])),
    ("differences", lambda: compare.resampled_t([.1, np.nan])),
    ("differences", lambda: compare.paired_t_5x2cv(D.T)),
    ("test_share", lambda: compare.corrected_resampled_t(D.ravel(), test_share=0)),
    ("n", lambda: compare.type_one_error(np.zeros((40, 4)), np.arange(40) % 2, n=41)),
    ("handicap", lambda: compare.type_one_error(np.zeros((40, 4)), np.arange(40) % 2, n=40, handicap=2))])
def test_bad_input_is_named(name, call):
    with pytest.raises(ValueError, match=f"`{name}`"): call()
