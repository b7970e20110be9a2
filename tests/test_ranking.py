"Orders: distances against brute force, both models against enumeration, fits against optimisers, consensus, bad input."
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from selectbench.core.conformance import check_method
from selectbench.core.selection import Selection
from selectbench.order.ranking import (
    borda,
    check_orders,
    disagreement,
    expected_kendall,
    fit_dispersion,
    fit_plackett_luce,
    footrule,
    kemeny,
    kemeny_local,
    kendall_distance,
    mallows,
    mallows_log_likelihood,
    mallows_log_normaliser,
    ordering,
    pairwise_wins,
    places,
    plackett_luce,
    plackett_luce_log_likelihood,
    sample_mallows,
    sample_plackett_luce,
    top_weighted_tau,
)

every = lambda n: np.array(list(permutations(range(n))))
pairs = st.integers(1, 40).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.permutations(range(n))))
tables = st.tuples(st.integers(2, 6), st.integers(1, 6), st.integers(0, 999)).map(
    lambda z: np.random.default_rng(z[2]).integers(0, 5, (z[1], z[0])).astype(float))


# distances

@given(pairs)
@settings(max_examples=60, deadline=None)
def test_distances_are_their_definitions(pair):
    a, b = map(np.array, pair)
    pa, pb = np.argsort(a), np.argsort(b)
    crossed = (pa[:, None] < pa) & (pb[:, None] > pb)
    assert kendall_distance(a, b)[0] == crossed.sum() == kendall_distance(b, a)[0]
    assert footrule(a, b)[0] == np.abs(pa - pb).sum()
    assert crossed.sum() <= footrule(a, b)[0] <= 2 * crossed.sum()  # Diaconis and Graham 1977
    if len(a) > 1:
        tau = stats.kendalltau(pa, pb).statistic
        assert np.isclose(tau, 1 - 4 * crossed.sum() / (len(a) * (len(a) - 1)))


@given(pairs, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_distances_do_not_know_names(pair, seed):
    a, b = map(np.array, pair)
    name = np.random.default_rng(seed).permutation(len(a))
    for distance in (kendall_distance, footrule): assert distance(name[a], name[b]) == distance(a, b)


def test_many_rows_against_one():
    rows = np.random.default_rng(0).permuted(np.tile(np.arange(33), (20, 1)), axis=1)
    one = kendall_distance(rows, rows[3])
    assert one[3] == 0 and (one == [kendall_distance(r, rows[3])[0] for r in rows]).all()
    with pytest.raises(ValueError, match="`b`"): kendall_distance(rows, rows[:7])
    with pytest.raises(ValueError, match="`b`"): footrule(rows, np.arange(32))


def test_top_weighted_tau_weighs_the_top():
    top, bottom = [1, 0, 2, 3, 4, 5], [0, 1, 2, 3, 5, 4]
    assert top_weighted_tau(top, range(6)) < top_weighted_tau(bottom, range(6)) < 1
    assert np.isclose(top_weighted_tau([3, 1, 2, 0], [3, 1, 2, 0]), 1)
    with pytest.raises(ValueError, match="one order"): top_weighted_tau([[0, 1], [1, 0]], [0, 1])


# orders

def test_orders_are_selections():
    a = ordering([2, 0, 1], method="mine")
    assert isinstance(a, Selection) and a.is_ordering and a.method == "mine"
    assert (check_orders([a, a]) == [[2, 0, 1]] * 2).all() and (places(a) == [[1, 2, 0]]).all()
    assert (places(Selection([3, 1], n=4)) == [[np.inf, 1, np.inf, 0]]).all()
    assert kendall_distance(a, ordering([0, 1, 2]))[0] == 2


@pytest.mark.parametrize("bad, message", [
    ([0, 1, 1], "row 0 has a repeated item, 1"), ([[0, 1], [2, 0]], r"row 1 has an item outside \[0, 2\), 2"),
    ([0.0, 1.0], "integers"), ([], "integers"), ([-1, 0], "outside"), (np.zeros((2, 2, 2), int), "shape")])
def test_no_order(bad, message):
    with pytest.raises(ValueError, match=f"`orders`.*{message}"): check_orders(bad)


def test_incomplete_orders_are_refused_where_all_must_have_a_place():
    top = Selection([3, 1], n=4)
    for f in (lambda: kendall_distance(top, range(4)), lambda: footrule(top, top), lambda: ordering(top)):
        with pytest.raises(ValueError, match="must place all 4"): f()
    with pytest.raises(ValueError, match="differ"): check_orders([top, ordering([0, 1])])


# Plackett and Luce

@pytest.mark.parametrize("n", range(1, 7))
def test_plackett_luce_sums_to_one(n):
    theta = np.random.default_rng(n).normal(size=n) * 30  # far beyond what exp holds apart
    for k in range(1, n + 1):
        top = np.array(list(permutations(range(n), k)))
        assert np.isclose(np.exp(plackett_luce_log_likelihood(top, theta)).sum(), 1)


def test_plackett_luce_by_hand():
    w = np.array([1.0, 2.0, 5.0])
    p = np.exp(plackett_luce_log_likelihood([2, 0, 1], np.log(w)))
    assert np.isclose(p[0], 5 / 8 * 1 / 3)
    assert np.isclose(plackett_luce_log_likelihood([2, 0, 1], np.log(w) + 700), np.log(p))


def test_samples_follow_their_models():
    orders = every(4)
    code = lambda x: (x @ 5 ** np.arange(4)).tolist()
    count = lambda draws: [code(draws).count(c) for c in code(orders)]
    theta = np.array([0.5, -0.5, 0.0, 1.0])
    expected = np.exp(plackett_luce_log_likelihood(orders, theta))
    assert stats.chisquare(count(sample_plackett_luce(theta, 5000)), 5000 * expected).pvalue > 1e-3
    for dispersion in (0.0, 0.6):
        expected = np.exp(mallows_log_likelihood(orders, [1, 3, 0, 2], dispersion))
        assert stats.chisquare(count(sample_mallows([1, 3, 0, 2], dispersion, 5000)), 5000 * expected).pvalue > 1e-3
    assert (sample_mallows([1, 3, 0, 2], 60.0, 50) == [1, 3, 0, 2]).all()


@given(tables)
@settings(max_examples=40, deadline=None)
def test_mm_is_the_maximum(scores):
    place = stats.rankdata(-scores, axis=1)
    n, prior = scores.shape[1], 0.5

    def loss(x):  # Breslow's likelihood, and the Gamma prior at its best scale
        stages = [x[i] - np.log(np.exp(x[row >= row[i]]).sum()) for row in place for i in range(n) if row[i] < np.inf]
        return -sum(stages) - prior * (x.sum() - n * np.log(np.exp(x).sum()))

    found = fit_plackett_luce(place, prior=prior)
    spread = optimize.approx_fprime(found, loss, 1e-6)
    assert np.abs(spread).max() < 1e-3 and abs(found.mean()) < 1e-9


def test_top_k_and_weights_in_the_fit():
    orders = sample_plackett_luce([1.0, 0.0, -0.5, 0.3], 300, seed=1)
    again = np.r_[np.arange(300), np.arange(100)]
    weight = np.bincount(again)
    assert np.allclose(fit_plackett_luce(places(orders[again])), fit_plackett_luce(places(orders), weight=weight))
    both = fit_plackett_luce(places(orders), weight=np.stack([np.ones(300), weight]))
    assert both.shape == (2, 4) and np.allclose(both[0], fit_plackett_luce(places(orders)), atol=1e-5)
    only_first = fit_plackett_luce(places(orders[:, :1], n=4))  # a multinomial
    share = np.log(np.bincount(orders[:, 0], minlength=4))
    assert np.allclose(only_first, share - share.mean(), atol=1e-5)


def test_no_maximum_is_said():
    with pytest.raises(ValueError, match="`place` has no maximum.*`prior`"): fit_plackett_luce([[0, 1, 2], [0, 2, 1]])
    assert np.isfinite(fit_plackett_luce([[0, 1, 2], [0, 2, 1]], prior=0.1)).all()
    with pytest.raises(RuntimeError, match="`limit`"): fit_plackett_luce(places(every(3)[:5]), limit=2)


@pytest.mark.parametrize("call, name", [
    (lambda: fit_plackett_luce([[0, np.nan]]), "place"), (lambda: fit_plackett_luce([0.0, 1.0]), "place"),
    (lambda: fit_plackett_luce([[0.0, 1.0]], weight=[1, 1]), "weight"),
    (lambda: fit_plackett_luce([[0.0, 1.0]], weight=[-1]), "weight"),
    (lambda: fit_plackett_luce([[0.0, 1.0]], prior=-1), "prior"),
    (lambda: sample_plackett_luce([0, np.inf], 3), "log_weight"),
    (lambda: plackett_luce_log_likelihood([0, 1, 2], [0.0, 1.0]), "orders"),
    (lambda: sample_mallows([0, 1], -1.0, 3), "dispersion"),
    (lambda: mallows_log_likelihood([0, 1], [0, 1], np.inf), "dispersion"),
    (lambda: sample_mallows([0, 0], 1.0, 3), "order"), (lambda: fit_dispersion(4, 3), "mean_distance"),
    (lambda: kemeny(np.zeros((16, 16))), "wins")])
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"): call()


# Mallows and consensus

@pytest.mark.parametrize("n", range(2, 7))
@pytest.mark.parametrize("dispersion", [0.0, 1e-4, 0.4, 3.0])
def test_mallows_closed_forms(n, dispersion):
    distance = kendall_distance(every(n), np.arange(n))
    e = np.exp(-dispersion * distance)
    assert np.isclose(mallows_log_normaliser(dispersion, n), np.log(e.sum()))
    assert np.isclose(expected_kendall(dispersion, n), distance @ e / e.sum())
    assert np.isclose(fit_dispersion(distance @ e / e.sum(), n), dispersion, atol=2e-6)


def test_dispersion_at_the_ends():
    assert fit_dispersion(0, 5) == np.inf and fit_dispersion(5, 5) == fit_dispersion(9, 5) == 0


@given(tables)
@settings(max_examples=40, deadline=None)
def test_kemeny_is_the_best_order(scores):
    wins = pairwise_wins(scores)
    brute = [disagreement(o, wins) for o in every(scores.shape[1])]
    assert np.isclose(disagreement(kemeny(wins), wins), min(brute))
    assert disagreement(kemeny_local(wins), wins) >= min(brute) - 1e-9
    by_pairs = sum(np.sum((r[:, None] > r) + (r[:, None] == r) / 2) for r in scores) - len(scores) * wins.shape[0] / 2
    assert np.isclose(wins.sum(), by_pairs)


def test_local_search_reaches_what_no_move_improves():
    wins = pairwise_wins(np.random.default_rng(0).random((9, 20)))
    order = kemeny_local(wins)
    moved = [np.insert(np.delete(order, i), j, order[i]) for i in range(20) for j in range(20)]
    assert min(disagreement(o, wins) for o in moved) >= disagreement(order, wins) - 1e-9
    start = np.argsort(-wins.sum(1), kind="stable")
    assert disagreement(order, wins) < disagreement(start, wins)


def test_methods_find_the_planted_order():
    centre = np.random.default_rng(1).permutation(8)
    orders = sample_mallows(centre, 1.0, 200, seed=2)
    responses = -places(orders).astype(np.float32)
    for f, options in ((borda, {}), (plackett_luce, {}), (mallows, {})):
        assert kendall_distance(f(responses, **options), centre)[0] <= 1
    fitted = mallows(responses)
    assert fitted.info["exact"] and abs(fitted.info["dispersion"] - 1) < 0.1
    assert not mallows(np.tile(responses, (1, 2)) + np.float32(1e-3) * np.arange(16, dtype=np.float32)).info["exact"]


def test_order_blind_control():
    "Names shuffled row by row leave nothing: no dispersion to speak of, weights near each other."
    rng = np.random.default_rng(0)
    rows = rng.permuted(sample_mallows(np.arange(6), 1.5, 500, seed=1), axis=1)
    found = mallows(-places(rows).astype(np.float32))
    assert found.info["dispersion"] < 0.1 and np.abs(fit_plackett_luce(places(rows))).max() < 0.25


@pytest.mark.parametrize("name", ["borda", "plackett_luce", "mallows"])
def test_conformance(name): check_method(name)
