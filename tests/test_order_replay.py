"Replay: real training against PyTorch's, where the expansion is exact, how its error falls, the secant, bad input."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from selectbench.order.replay import (
    Recipe,
    estimate_orders,
    make_batches,
    order_losses,
    order_study,
    projected_run,
    random_orders,
    rank_table,
    reference_run,
    replay_order,
    retrain,
    search_orders,
    search_study,
    table_batches,
    variance_shares,
    visited_run,
)
from selectbench.pools.tables import digits

rng = np.random.default_rng(0)
x, label, number = rng.normal(size=(40, 5)), rng.integers(3, size=40), rng.normal(size=(40, 2))
parts = np.array_split(rng.permutation(40), 6)
batches = make_batches(x, label, parts)
orders = random_orders(6, 8, seed=1)
off = lambda run, degree, **how: np.abs(estimate_orders(run, orders, degree, **how) - retrain(run, orders)).max()


def test_training_is_that_of_pytorch():
    run = reference_run(batches, Recipe(width=4, lr=0.05, epochs=2))
    for order, mine in zip(orders[:3], retrain(run, orders[:3]), strict=True):
        net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
        torch.nn.utils.vector_to_parameters(torch.tensor(run.params[0]), net.parameters())
        adam = torch.optim.Adam(net.parameters(), 0.05)
        for b in np.tile(order, 2):
            adam.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(torch.tensor(x[parts[b]])), torch.tensor(label[parts[b]]))
            loss.backward()
            adam.step()
        theirs = torch.nn.utils.parameters_to_vector(net.parameters()).detach().numpy()
        assert np.allclose(mine, theirs, atol=1e-10)
        got = order_losses(run, mine[None], batches)[0, order[-1]]
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(net(torch.tensor(x[parts[b]])), torch.tensor(label[parts[b]]))
        assert np.isclose(got, loss.item())


@pytest.mark.parametrize("moments", ["own", "reference"])
@pytest.mark.parametrize("curvature", ["exact", "secant"])
def test_the_runs_own_order_is_the_run(curvature, moments):
    run = reference_run(batches, Recipe(width=4, lr=0.05, epochs=2))
    for degree in (0, 1, 2):
        same = estimate_orders(run, [range(6)], degree, curvature=curvature, moments=moments)
        assert np.allclose(same, run.params[-1:], rtol=0, atol=1e-12)
    assert np.allclose(retrain(run, [range(6)]), run.params[-1:], rtol=0, atol=1e-12)


def test_a_quadratic_loss_is_exact_at_degree_one_and_only_about_the_right_checkpoint():
    run = reference_run(make_batches(x, number, parts),
                        Recipe(width=0, loss="squared", optimizer="sgd", lr=0.2, epochs=2))
    late = replace(run, params=np.concatenate([run.params[:1], run.params[:-1]]))
    assert max(off(run, 1), off(run, 2)) < 1e-10
    assert min(off(run, 0), off(late, 1), off(replace(run, terms=np.roll(run.terms, 1, axis=0)), 1)) > 1e-3


@pytest.mark.parametrize("optimizer, scale", [("sgd", 5.0), ("adam", 1.0)])
def test_the_error_falls_by_the_degree(optimizer, scale):
    rates = np.array([4e-3, 1e-3, 2.5e-4])
    runs = [reference_run(batches, Recipe(width=4, optimizer=optimizer, lr=scale * r)) for r in rates]
    for degree in (0, 1, 2):
        slope = np.polyfit(np.log(rates), np.log([off(run, degree) for run in runs]), 1)[0]
        assert abs(slope - degree - 2) < 0.25


def test_expanding_the_update_is_expanding_the_gradient_without_moments():
    run = reference_run(batches, Recipe(width=4, optimizer="sgd", lr=0.3))
    for degree in (0, 1, 2):
        assert np.allclose(*(estimate_orders(run, orders, degree, moments=m) for m in ("own", "reference")), atol=1e-12)


def test_secant_is_exact_for_separate_quadratics():
    run = reference_run(batches, Recipe(width=4, optimizer="sgd", lr=0.1))
    curve, target = rng.uniform(0.5, 1, (6, run.p)), rng.normal(size=(6, run.p))
    params, terms = [run.params[0]], []
    for b in range(6):
        terms.append(curve * (params[-1] - target))
        params.append(params[-1] - 0.1 * terms[-1][b])
    run = replace(run, params=np.stack(params), terms=np.stack(terms))
    real = np.repeat(run.params[:1], len(orders), axis=0)
    for b in orders.T: real = real - 0.1 * curve[b] * (real - target[b])
    for degree in (1, 2): assert np.allclose(estimate_orders(run, orders, degree, curvature="secant"), real, atol=1e-9)
    assert np.abs(estimate_orders(run, orders, 0) - real).max() > 1e-3


@pytest.mark.parametrize("split, lr", [(parts, 0.0), ([np.arange(40)] * 6, 0.05)])
def test_orders_that_cannot_matter(split, lr):
    run = reference_run(make_batches(x, label, split), Recipe(width=4, lr=lr))
    for params in (retrain(run, orders), *(estimate_orders(run, orders, d) for d in (0, 1, 2))):
        assert np.ptp(params, axis=0).max() < 1e-12


def test_what_is_kept_of_a_run():
    run = reference_run(batches, Recipe(width=4, lr=0.05))
    seen = visited_run(run)
    assert all(np.array_equal(seen.terms[s, b], run.terms[b, b]) for s in range(6) for b in range(6))
    many = np.mean([projected_run(run, 39, seed).terms for seed in range(200)], axis=0)
    assert np.abs(many - run.terms).max() < 0.3 * np.abs(run.terms).max()  # unbiased
    assert np.allclose(estimate_orders(projected_run(run, 5), [range(6)], 0), run.params[-1:])


def test_search_gives_back_what_it_priced():
    run = reference_run(batches, Recipe(width=4, lr=0.05))
    found, losses = search_orders(run, batches, 30, rounds=3, degree=1)
    assert found.shape == (90, 6) and (np.sort(found, axis=1) == np.arange(6)).all()
    assert np.allclose(losses, order_losses(run, estimate_orders(run, found, 1), batches).mean(1))
    assert losses[30:].mean() < losses[:30].mean()


def test_variance_shares_and_ranks_of_a_made_up_study():
    one, two = np.random.default_rng(1).normal(size=(2, 400))
    frame = pd.DataFrame({"seed": np.repeat(np.arange(5), 400), "order": np.tile(np.arange(400), 5),
                          "real": np.tile(one, 5), "same": np.tile(one**3, 5), "blind": np.tile(two, 5)})
    shares, table = variance_shares(frame), rank_table(frame).set_index("estimate")
    assert shares["order"] > 0.999 and np.isclose(sum(shares.values()), 1)
    assert np.isclose(table["rank"]["same"], 1) and table.low["blind"] < 0 < table.high["blind"]
    assert (table.shuffled_low < 0).all() and (table.shuffled_high > 0).all()


def test_studies_are_small_when_asked():
    small = {"batches": 5, "size": 20, "width": 4, "orders": 12, "seeds": 2}
    study = order_study(digits(), **small)
    assert len(study) == 24 and study.groupby("seed")["1"].std().gt(0).all()
    table = rank_table(study).set_index("estimate")
    assert table["rank"]["1"] > 0.9 and table["rank"]["1"] > table.shuffled_high["1"]
    ways = search_study(digits(), candidates=50, **small)
    assert set(ways.way) == {"visited", "replay", "blind", "worst", "equal", "all"}
    assert (ways[ways.way == "replay"].gradients == 25).all() and (ways[ways.way == "equal"].gradients == 25).all()


def test_bad_input():
    run = reference_run(batches, Recipe(width=4))
    for bad in ([[0, 1, 2, 3, 4, 4]], [[0, 1, 2, 3, 4, 6]], [range(5)], [[0.0, 1, 2, 3, 4, 5]]):
        for act in (retrain, estimate_orders):
            with pytest.raises(ValueError, match="`orders`"): act(run, bad)
    for option in ({"degree": 3}, {"curvature": "none"}, {"moments": "other"}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}`"): estimate_orders(run, orders, **option)
    with pytest.raises(ValueError, match="`features`"): make_batches(x[:-1], label, parts)
    with pytest.raises(ValueError, match="`parts`"): make_batches(x, label, [[]])
    with pytest.raises(ValueError, match="`loss`"): Recipe(loss="other")
    with pytest.raises(ValueError, match="`lr`"): Recipe(lr=-1)
    with pytest.raises(ValueError, match="`size`"): projected_run(run, 0)
    with pytest.raises(ValueError, match="`kind`"): table_batches(digits(), "sorted")
    with pytest.raises(ValueError, match="`batches`"): replay_order(x, label, x, label, batches=0)


def test_the_method_places_every_item_once():
    out = replay_order(x.astype(np.float32), label, x.astype(np.float32), label, batches=5, candidates=60)
    assert sorted(out.index) == list(range(40)) and out.info["estimated_loss"] < out.info["mean_estimated_loss"]
