"Ensembles: greedy and population search against the authors' classes (tests/data/qdo_reference.npz), bad input."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from selectbench.core.vocabulary import sample_signals
from selectbench.model.ensemble import (
    combine,
    gower_similarity,
    greedy_ensemble,
    loss_correlation,
    optimal_weighted_ensemble,
    qdo_es,
    qo_es,
)
from selectbench.model.gated import PerturbedTopK, draw_noise, gated_ensemble

reference = np.load(Path(__file__).parent / "data" / "qdo_reference.npz")
soft, y = reference["soft"], reference["y"]
gower = gower_similarity(json.loads(str(reference["configs"])))
SEARCHES = {"qo_es": (qo_es, {}), "qdo_es": (qdo_es, {"similarity": gower})}


@pytest.mark.parametrize("metric", ["balanced_accuracy", "roc_auc"])
def test_greedy_reaches_what_the_authors_class_reaches(metric):
    "Both break ties at random, so the ranges over seeds are compared: the ends of theirs are one or two items wide."
    theirs = reference[f"greedy|{metric}"]
    ours = [greedy_ensemble(soft, y, metric=metric, seed=s).info["validation"] for s in range(20)]
    assert abs(np.mean(ours) - theirs.mean()) < 4 * np.hypot(np.std(ours), theirs.std()) / 20**.5
    assert min(ours) >= theirs.min() - 1e-9 and max(ours) <= theirs.max() + 2e-4


@pytest.mark.parametrize("metric", ["balanced_accuracy", "roc_auc"])
@pytest.mark.parametrize("name", SEARCHES)
def test_population_search_is_no_worse_than_the_authors(name, metric):
    "Mean validation score over seeds: not below theirs by more than three standard errors; same budget."
    (find, options), theirs = SEARCHES[name], reference[f"{name}|{metric}"]
    picks = [find(soft, y, metric=metric, seed=s, **options) for s in range(12)]
    ours = np.array([p.info["validation"] for p in picks])
    assert ours.mean() > theirs.mean() - 3 * np.sqrt(ours.var() / 12 + theirs.var() / 20)
    assert all(len(p.info["curve"]) == 50 * soft.shape[1] for p in picks)
    if metric == "roc_auc":  # theirs stays on a plateau in some seeds; ties at random leave it
        assert ours.min() > theirs.min() + .001


def test_every_search_beats_the_single_best_on_validation():
    single = max(greedy_ensemble(soft[:, [j]], y).info["validation"] for j in range(soft.shape[1]))
    for find in greedy_ensemble, qo_es, qdo_es:
        pick = find(soft, y)
        right = combine(soft, pick).argmax(axis=1) == y
        assert pick.info["validation"] >= single
        assert np.isclose(np.mean([right[y == c].mean() for c in (0, 1)]), pick.info["validation"])


def test_duplicates_and_constants():
    "Copies of a model and constant models are allowed; weights stay a convex combination."
    rng = np.random.default_rng(0)
    truth = rng.normal(size=30)
    forecasts = np.column_stack([truth + rng.normal(size=30)] * 3 + [np.zeros(30)] * 2)
    pick = optimal_weighted_ensemble(forecasts, truth)
    assert np.isclose(pick.weight.sum(), 1) and (pick.weight > 0).all()
    assert optimal_weighted_ensemble(np.column_stack([forecasts, truth]), truth).index.tolist() == [5]
    same = np.repeat(soft[:, :1], 4, axis=1)
    for find in greedy_ensemble, qo_es, qdo_es: assert np.allclose(combine(same, find(same, y, rounds=5)), same[:, 0])
    flat = np.full((len(y), 3, 2), .5, np.float32)
    assert not loss_correlation(flat, y).any()
    for find in greedy_ensemble, qo_es, qdo_es: assert find(flat, y, rounds=3).info["validation"] == .5


def test_one_model():
    for find in greedy_ensemble, qo_es, qdo_es: assert find(soft[:, :1], y).index.tolist() == [0]
    assert optimal_weighted_ensemble(soft[:, :1, 1], y.astype(float)).weight.tolist() == [1]


@pytest.mark.parametrize("find", [greedy_ensemble, qo_es, qdo_es])
@pytest.mark.parametrize("change, named", [
    ({"y": np.zeros_like(y)}, "y"), ({"y": y + 2}, "y"), ({"y": y - 1}, "y"), ({"metric": "f1"}, "metric"),
    ({"rounds": 0}, "rounds"), ({"soft_predictions": soft * 2}, "soft_predictions"),
    ({"soft_predictions": np.where(soft > .99, np.nan, soft)}, "soft_predictions")])
def test_bad_input_of_searches(find, change, named):
    with pytest.raises(ValueError, match=f"`{named}`"): find(**({"soft_predictions": soft, "y": y} | change))


def test_bad_input_of_options():
    with pytest.raises(ValueError, match="`similarity`"): qdo_es(soft, y, similarity=np.eye(3))
    with pytest.raises(ValueError, match="`elites`"): qdo_es(soft, y, elites=10)
    for w in np.zeros(len(y)), np.ones(3), np.full(len(y), np.nan):
        with pytest.raises(ValueError, match="`item_weight`"):
            optimal_weighted_ensemble(soft[..., 1], y.astype(float), item_weight=w)


def test_gate_refuses_what_makes_no_sense():
    given = sample_signals(["features", "soft_predictions", "y"])
    for k in 0, given["soft_predictions"].shape[1] + 1:
        with pytest.raises(ValueError, match="`k`"): gated_ensemble(**given, k=k)
    for labels in np.zeros(40, int), given["y"] + 9:
        with pytest.raises(ValueError, match="`y`"): gated_ensemble(**given | {"y": labels}, k=2)


def test_gate_with_constant_features_and_all_models():
    "No spread in a column, and k = m: still a proper set of probabilities, equal to the uniform vote."
    given = sample_signals(["features", "soft_predictions", "y"])
    given["features"][:, 0] = 3
    gate = gated_ensemble(**given, k=7, epochs=2)
    with torch.no_grad(): p = gate(torch.tensor(given["features"]), torch.tensor(given["soft_predictions"])).numpy()
    assert np.allclose(p, given["soft_predictions"].mean(axis=1), atol=1e-6)
    assert torch.isfinite(gate.scores(torch.tensor(given["features"]))).all()


def test_gradient_of_the_layer_does_not_see_a_shift_of_all_scores():
    "The top k is the same after adding a constant, so the gradient sums to zero on average."
    z = draw_noise("gaussian", (100_000, 1, 4), torch.Generator().manual_seed(0), torch.float64)
    c = torch.tensor([[.3, -.2, .1, 0]], dtype=torch.float64, requires_grad=True)
    PerturbedTopK.apply(c, 2, 1., z).backward(torch.tensor([[1., 2, -1, 0]], dtype=torch.float64))
    assert abs(float(c.grad.sum())) < .02 < float(c.grad.abs().max())
