"Routing: bad input by name, invariances, and the published answers of Mixtral and GPT-4 at full size."
from pathlib import Path

import numpy as np
import pytest

from selectbench.core.vocabulary import sample_signals
from selectbench.model.routing import (
    _reach,
    _scores,
    benchmark_mean,
    benchmark_routing,
    benchmark_share,
    cost_quality,
    held_out_accuracy,
    knn_router,
    linear_router,
    majority_router,
    matrix_factorisation_router,
    predict_knn,
    predict_linear,
    predict_majority,
    predict_matrix_factorisation,
    random_router,
    route,
    routing_gain,
    smoothed_accuracy,
    train_specialists,
)
from selectbench.pools.fetch import available
from selectbench.pools.published import routellm
from selectbench.signals.text import hashed_vectors

QUERY = sample_signals(["embeddings", "responses", "target_embeddings", "costs"])
TASK = sample_signals(["embeddings", "responses", "groups", "target_embeddings"]) | {"k": 1}
MEAN = {name: value for name, value in TASK.items() if name != "groups"}
ONE = {"responses": QUERY["responses"][:, :1], "costs": QUERY["costs"][:1]}
ALONE = {"responses": ONE["responses"]}
NEVER = np.where(np.arange(7) == 2, np.nan, QUERY["responses"]).astype(np.float32)


@pytest.mark.parametrize(("router", "given", "change", "named"), [
    (knn_router, QUERY, {"neighbors": 41}, "neighbors"), (knn_router, QUERY, {"neighbors": 0}, "neighbors"),
    (knn_router, QUERY, {"price": -1}, "price"), (linear_router, QUERY, {"price": np.nan}, "price"),
    (linear_router, QUERY, {"penalty": -1}, "penalty"), (knn_router, QUERY, ONE, "costs"),
    (knn_router, QUERY, {"costs": -QUERY["costs"]}, "costs"), (knn_router, QUERY, {"responses": NEVER}, "responses"),
    (matrix_factorisation_router, QUERY, {"epochs": 0}, "epochs"), (matrix_factorisation_router, QUERY, ONE, "costs"),
    (benchmark_mean, MEAN, {"neighbors": 41}, "neighbors"), (benchmark_share, MEAN, ALONE, "responses"),
    (benchmark_routing, TASK, {"task_neighbors": 40}, "task_neighbors"), (benchmark_routing, TASK, {"k": 8}, "k"),
    (benchmark_routing, TASK, ALONE, "responses"),
    (benchmark_routing, TASK, {"groups": np.zeros(40, np.int64)}, "groups"),
    (benchmark_routing, TASK, {"bandwidth": 0}, "bandwidth"),
    (benchmark_routing, TASK, {"responses": NEVER}, "responses")])
def test_bad_input_is_refused_by_name(router, given, change, named):
    with pytest.raises(ValueError, match=f"`{named}`"): router(**{**given, **change})


@pytest.mark.parametrize(("change", "named"), [
    ({"costs": [1, 1, 1]}, "costs"), ({"costs": [1, 2]}, "costs"), ({"responses": np.zeros((5, 2))}, "predicted"),
    ({"responses": np.tile([1., 0, 0], (6, 1))}, "responses")])
def test_a_curve_needs_a_gap_to_recover(change, named):
    good = {"predicted": np.zeros((6, 3)), "responses": np.tile([0., 0, 1], (6, 1)), "costs": [0, 1, 2]}
    with pytest.raises(ValueError, match=f"`{named}`"): cost_quality(**{**good, **change})


def test_other_bad_input():
    queries, costs = QUERY["target_embeddings"], QUERY["costs"]
    with pytest.raises(ValueError, match="`share`"): random_router(queries, costs, share=[.5, .5])
    with pytest.raises(ValueError, match="`size`"): train_specialists(["a", "b"], [0, 1], size=0)
    with pytest.raises(ValueError, match="`predicted`"): route(np.zeros((3, 2)), [1, 2, 3])


@pytest.mark.parametrize("router", [knn_router, linear_router, matrix_factorisation_router, majority_router])
def test_an_infinite_price_leaves_the_cheapest(router):
    given = {name: QUERY[name] for name in router.card.signals}
    assert (router(**given, price=np.inf) == QUERY["costs"].argmin()).all()
    dearer = [QUERY["costs"][router(**given, price=p)].mean() for p in (0, .05, .1, .3, 1)]
    assert (np.diff(dearer) <= 0).all() and dearer[0] > dearer[-1]


def test_random_router_calls_as_often_as_asked():
    called = random_router(np.zeros((20_000, 2), np.float32), QUERY["costs"], share=[.5, .2, .1, .1, .1, 0, 0], seed=1)
    assert np.allclose(np.bincount(called, minlength=7) / 20_000, [.5, .2, .1, .1, .1, 0, 0], atol=.015)


@pytest.mark.parametrize("price", [0.0, 0.5, np.inf])
def test_of_equal_models_the_cheapest_is_called(price):
    assert (route(np.ones((4, 3)), [2, 1, 3], price) == 1).all()


def test_matrix_factorisation_is_equivariant_to_the_scale_of_responses():
    args = QUERY["embeddings"], QUERY["responses"], QUERY["target_embeddings"]
    scaled = predict_matrix_factorisation(args[0], 8 * args[1] - 16, args[2], epochs=5)
    assert np.allclose(scaled, 8 * predict_matrix_factorisation(*args, epochs=5) - 16, atol=1e-4)


def test_majority_is_the_diagonal_with_many_models():
    rng = np.random.default_rng(0)
    costs, truth = np.array([1., 2, 4]), rng.random((400, 3)) + np.array([0, .2, .4])
    flat = cost_quality(np.tile(truth.mean(0), (400, 1)), truth, costs)
    assert abs(flat.summary.value["area"] - .5) < .2 and routing_gain(np.ones((400, 3)), truth, costs).auc == .5
    oracle = cost_quality(truth, truth, costs)
    best = np.interp(flat.curve.share, oracle.curve.share, oracle.curve.recovered)
    assert (best >= flat.curve.recovered - 1e-9).all()


def test_equally_cheap_models_share_one_zero():
    "Where several models are cheapest, every router is measured from the best of them."
    rng = np.random.default_rng(0)
    truth, costs = rng.random((300, 3)) + np.array([0, .1, .6]), np.array([1., 1, 2])
    worst = cost_quality(np.tile([.3, 0, .1], (300, 1)), truth, costs).curve
    best = cost_quality(np.tile([0, .3, .1], (300, 1)), truth, costs).curve
    assert worst.recovered[0] < 0 and best.recovered[0] == 0
    assert best.recovered.iloc[-1] == worst.recovered.iloc[-1] == 1


def test_accuracy_far_from_all_benchmarks_is_finite():
    p = np.array([[.2, .9], [.6, .7]])
    assert np.allclose(smoothed_accuracy(50.0, np.array([.1, .3]), p), p[1])
    assert np.allclose(smoothed_accuracy(.2, np.array([.1, .3]), p), p.mean(0))


REFERENCE = np.load(Path(__file__).parent / "data" / "routellm_reference.npz")


def test_matrix_factorisation_scores_as_the_authors_program():
    "Their score has no bias; ours is set to zero. Only the direction of a model's embedding counts."
    import torch
    queries, v, projection, w = (torch.from_numpy(REFERENCE[name]) for name in ("queries", "v", "projection", "w"))
    ours = _scores(queries, v, projection, torch.zeros(5), w).numpy()
    first, second = (ours[REFERENCE["query"], REFERENCE[name]] for name in ("first", "second"))
    assert np.allclose(first - second, REFERENCE["difference"], atol=1e-6)


def test_noise_in_training_flattens_what_is_learnt():
    args = QUERY["embeddings"], QUERY["responses"], QUERY["target_embeddings"]
    spread = [predict_matrix_factorisation(*args, noise=noise, lr=.01, batch_size=16).std(0).mean() for noise in (0, 3)]
    assert spread[1] < .7 * spread[0]


def test_metrics_of_the_authors_program():
    "APGR is the area. Their calls for 20, 50 and 80 % of the gap are first crossings of the same curve."
    gain, truth = REFERENCE["gain"], REFERENCE["truth"]
    found = cost_quality(np.stack([0 * gain, gain], axis=1), truth, [0, 1])
    assert np.isclose(found.summary.value["area"], REFERENCE["metrics"][4])
    share, recovered = (found.curve[name].to_numpy()[None] for name in ("share", "recovered"))
    reached = [100 * _reach(share, recovered, level)[0] for level in (.2, .5, .8)]
    assert np.allclose(reached, REFERENCE["metrics"][:3], atol=.01)
    assert np.isclose(found.summary.value["saved_50"], 1 - reached[1] / 100)


MMLU = pytest.mark.skipif(not available("routellm"), reason="needs the RouteLLM answers: set SELECTBENCH_DATA")


@MMLU
def test_all_of_mmlu():
    "Learnt routers beat chance beyond the interval, the majority is the diagonal, the oracle is far above."
    pool, costs = routellm("mmlu"), np.array([0., 1.])
    order = np.random.default_rng(0).permutation(len(pool))
    train, test = order[:7000], order[7000:]
    x = hashed_vectors([pool.texts[i] for i in train], pool.texts, dim=32, ngrams=1)
    args, truth = (x[train], pool.responses[train], x[test]), pool.responses[test]
    found = {"knn": predict_knn(*args, neighbors=40), "linear": predict_linear(*args),
             "mf": predict_matrix_factorisation(*args, lr=3e-3, epochs=10),
             "majority": predict_majority(args[1], args[2]), "oracle": truth}
    area = {name: cost_quality(p, truth, costs).summary.loc["area"] for name, p in found.items()}
    assert all(area[name].low > .55 for name in ("knn", "linear", "mf")) and area["oracle"].value > 1.2
    assert np.isclose(area["majority"].value, .5) and routing_gain(found["majority"], truth, costs).differs == 0
    assert all(.55 < routing_gain(found[name], truth, costs).auc < .75 for name in ("knn", "linear", "mf"))


@MMLU
def test_new_subjects_of_mmlu_are_left_to_the_strong_model():
    "GPT-4 is better almost everywhere, so all three scores, like the best on average, choose it for a new subject."
    pool = routellm("mmlu")
    pool = pool.subset(np.sort(np.random.default_rng(0).permutation(len(pool))[:4000]))
    x = hashed_vectors(pool.texts, pool.texts, dim=32, ngrams=1)
    chosen = []
    for subject in (0, 20, 40):
        past, new = pool.groups != subject, pool.groups == subject
        args = x[past], pool.responses[past], x[new]
        s3 = benchmark_routing(args[0], args[1], pool.groups[past], args[2], 1)
        chosen += [s3.index[0], s3.info["best_on_average"], benchmark_mean(*args, 1).index[0]]
        u, p = held_out_accuracy(args[0], args[1], pool.groups[past])
        assert u.shape == (56,) and p.shape == (56, 2) and (p[:, 1] > .5).mean() > .8
    assert set(chosen) == {1}
