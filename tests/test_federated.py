"""Curricula in federated learning: FedAvg by plain descent, averages by loops, pacing by formula, blind controls."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from selectbench.order.federated import (ORDERS, _batches, curriculum_gains, dirichlet_clients, fedavg,
                                         federated_curricula, initial_weights, paced, weighted_average)

X, Y = load_digits(return_X_y=True)
X, Y = X[:400].astype(np.float32) / 16, Y[:400]


def federated(members, hidden=8, orders=("plain",), seeds=None, **options):
    runs = len(orders)
    how = {"client_orders": ("plain",) * runs, "seeds": seeds or range(runs), "rounds": 4, "lr": 0.5} | options
    return fedavg(np.stack([X] * runs), np.stack([Y] * runs), np.stack([members] * runs),
                  initial_weights(64, 10, hidden, runs), orders=orders, **how)


@pytest.mark.parametrize("hidden", [0, 8])
@pytest.mark.parametrize("clients", [1, 12])
def test_whole_clients_weighted_by_size_are_gradient_descent(hidden, clients):
    weights = [w[0].clone().requires_grad_() for w in initial_weights(64, 10, hidden, 1)]
    for _ in range(4):
        h = torch.tensor(X)
        for i in range(0, len(weights) - 2, 2): h = torch.relu(h @ weights[i] + weights[i + 1])
        loss = torch.nn.functional.cross_entropy(h @ weights[-2] + weights[-1], torch.tensor(Y))
        for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True): w.data -= 0.5 * g
    members = dirichlet_clients(Y, clients, 0.1)
    got = federated(members, hidden, participants=clients, batch=None)
    assert all(torch.allclose(g[0], w, atol=1e-5) for g, w in zip(got, weights, strict=True))


def test_average_by_hand():
    rng = np.random.default_rng(0)
    models, sizes = rng.normal(size=(2, 3, 4, 5)), np.array([[5.0, 1, 2], [1, 1, 0]])
    want = [sum(s * w for s, w in zip(sizes[r], models[r], strict=True)) / sizes[r].sum() for r in range(2)]
    assert np.allclose(weighted_average([torch.tensor(models)], torch.tensor(sizes))[0], want)


@pytest.mark.parametrize(("n", "steps", "a", "b"), [(100, 40, 0.8, 0.2), (37, 10, 0.5, 0.1), (9, 7, 1, 0),
                                                   (50, 5, 0.8, 1)])
def test_pacing_by_its_formula(n, steps, a, b):
    for t in range(steps + 1):
        now = int(b * n + (n - b * n) / (a * steps) * t + 1e-9)
        assert paced(t, steps, n, a=a, b=b) == max(1, min(n, now))
    with pytest.raises(ValueError, match="`a`"): paced(0, 1, 5, a=0)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 100])
def test_every_example_has_one_client(alpha):
    members = dirichlet_clients(Y, 25, alpha, least=3, seed=1)
    assert (np.sort(members[members >= 0]) == np.arange(len(Y))).all() and ((members >= 0).sum(1) >= 3).all()


def test_skew_goes_with_alpha():
    kinds = [np.mean([len(np.unique(Y[m[m >= 0]])) for m in dirichlet_clients(Y, 20, a)]) for a in (0.05, 0.5, 50)]
    assert kinds[0] < 5 < kinds[1] < kinds[2]
    for bad in ({"alpha": 0}, {"clients": 300}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}`"):
            dirichlet_clients(Y, **{"clients": 5, "alpha": 1} | bad)


def test_whole_clients_are_blind_to_order():
    members = dirichlet_clients(Y, 10, 0.2)
    models = [federated(members, orders=(o,), participants=3, batch=None) for o in ORDERS]
    assert all(torch.equal(a, b) for other in models[1:] for a, b in zip(models[0], other, strict=True))


@pytest.mark.parametrize("scorer", ["global", "local"])
def test_runs_at_once_are_runs_one_by_one(scorer):
    members, how = dirichlet_clients(Y, 10, 0.2), {"participants": 3, "scorer": scorer}
    together = federated(members, orders=ORDERS, **how)
    for i, order in enumerate(ORDERS):
        alone = federated(members, orders=(order,), seeds=(i,), **how)
        assert all(torch.allclose(a[0], t[i], atol=1e-4) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize(("order", "sign"), [("easy", 1), ("hard", -1)])
def test_batches_come_from_those_in_play(order, sign):
    rng = np.random.default_rng(0)
    loss, sizes = rng.random((3, 30)), (30, 20, 5)
    places = _batches(loss, np.arange(30) < np.array(sizes)[:, None], order, 10, 60, rng, 0.8, 0.2)
    for c, size in enumerate(sizes):
        best = np.argsort(sign * loss[c][:size])
        assert all(set(places[c, t]) <= set(best[: paced(t, 10, size)]) for t in range(10))
        assert set(places[c, -1]) <= set(range(size)) and len(set(places[c, -1])) > size / 2


def test_frame_and_gains():
    frame = federated_curricula(X, Y, alphas=(0.1, 10.0), seeds=3, rounds=2)
    assert len(frame) == 2 * 2 * 4 * 3 and frame["accuracy"].between(0, 1).all()
    gains = curriculum_gains(frame)
    one = frame[(frame.alpha == 0.1) & (frame.clients == "easy")]
    one = one.pivot(index="seed", columns="order", values="accuracy")
    row = gains[(gains.alpha == 0.1) & (gains.clients == "easy") & (gains.order == "hard")].iloc[0]
    assert np.isclose(row.gain, (one["hard"] - one["random"]).mean()) and np.isclose(row.accuracy, one["hard"].mean())
    with pytest.raises(ValueError, match="`against`"): curriculum_gains(frame, "none")
    for bad in ({"orders": ("sorted",)}, {"scorer": "expert"}, {"participants": 90}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}`"): federated_curricula(X, Y, **bad)
