"Learned orders: likelihood and bound by enumeration, the leave-one-out gradient, prefixes, training, bad input."
from itertools import permutations

import numpy as np
import pytest
import torch

from selectbench.core.conformance import check_method
from selectbench.order.generation import one_hot
from selectbench.order.learned import (
    LearnedOrder,
    easy_order,
    exact_bound,
    learned_model,
    likelihood_bounds,
    loo_objective,
    path_log_prob,
    prefix_log_prob,
    train_learned,
)
from selectbench.order.ranking import plackett_luce_log_likelihood


def a_model(seed=0, categories=2, length=3, width=12):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LearnedOrder(categories, length, width=width)
    for p in model.parameters(): p.data *= 2.5
    return model


def all_rows(c, t): return np.stack(np.unravel_index(np.arange(c ** t), (c,) * t), 1)


@pytest.mark.parametrize("c,t", [(2, 3), (3, 3), (2, 4)])
def test_likelihood_and_bound_by_enumeration(c, t):
    model, rows = a_model(1, c, t), all_rows(c, t)
    exact, bound = (v.detach().numpy() for v in exact_bound(model, one_hot(rows, c)))
    logits = model(one_hot(rows, c))[2].detach()
    joint, log_q = [], []
    for z in permutations(range(t)):
        joint.append(np.add(*path_log_prob(model, rows, np.tile(z, (len(rows), 1)))))
        log_q.append(prefix_log_prob(logits, torch.tensor(z).expand(len(rows), -1), t).numpy())
    joint, log_q = np.array(joint), np.array(log_q)
    assert np.allclose(exact, np.logaddexp.reduce(joint, axis=0), atol=1e-5)
    assert np.allclose(bound, (np.exp(log_q) * (joint - log_q)).sum(0), atol=1e-5)
    assert np.isclose(np.exp(exact).sum(), 1, atol=1e-5) and (bound < exact).all()


def test_the_leave_one_out_gradient_is_unbiased():
    model, paths = a_model(2), np.array(list(permutations(range(3))))
    x = one_hot([[1, 0, 1]], 2)
    a, b = np.divmod(np.arange(36), 6)
    log_q = prefix_log_prob(model(x)[2].detach().expand(6, -1), torch.from_numpy(paths), 3)
    weight = (log_q[a] + log_q[b]).exp()
    pairs = torch.from_numpy(np.stack([paths[a], paths[b]]))
    of = lambda value: torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
    mean = sum(of((weight * loo_objective(model, x.expand(36, -1, -1), pairs, i)).sum()) for i in range(3)) / 3
    target = of(exact_bound(model, x)[1].sum())
    assert torch.allclose(mean, target, atol=1e-4) and target.abs().max() > 0.1


def test_prefixes_are_plackett_luce():
    rng = np.random.default_rng(0)
    theta, orders = rng.normal(size=5), np.argsort(rng.random((20, 5)), axis=1)
    for k in (1, 3, 5):
        found = prefix_log_prob(torch.from_numpy(theta).expand(20, -1), torch.from_numpy(orders), k)
        assert np.allclose(found, plackett_luce_log_likelihood(orders[:, :k], theta))


def test_sampled_bounds_agree_with_the_exact_ones():
    model, rows = a_model(3), np.tile(all_rows(2, 3), (200, 1))
    exact, bound = (v.detach().numpy().mean() for v in exact_bound(model, one_hot(rows, 2)))
    loose, tight = likelihood_bounds(model, rows, samples=20)
    assert abs(loose - bound) < 0.03 and loose < tight < exact + 0.02


def test_training_in_one_order_masters_it():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 500)
    rows = np.stack([first, rng.integers(0, 2, 500), first], axis=1)
    learn = lambda order: learned_model(train_learned(rows, 2, order, steps=200, rate=1e-2, width=16), 2)
    state = torch.get_rng_state()
    nll = -path_log_prob(learn(np.arange(3)), rows, np.arange(3))[0].mean()
    assert abs(nll - 2 * np.log(2)) < 0.05 and torch.equal(state, torch.get_rng_state())
    model = learn("learned")
    exact, bound = exact_bound(model, one_hot(rows, 2))
    assert -exact.mean() < 2 * np.log(2) + 0.1 and (bound <= exact + 1e-5).all()
    assert sorted(easy_order(model, rows)) == [0, 1, 2]


def test_bad_input():
    with pytest.raises(ValueError, match="`x`"): exact_bound(a_model(), torch.zeros(1, 13, 2))
    with pytest.raises(ValueError, match="`tokens`"): train_learned(np.full((4, 3), 2), 2)


def test_conformance(): check_method("LearnedOrder")
