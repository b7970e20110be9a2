"Generation in any order: conditionals by enumeration, the burst's distribution, prompts kept, training, bad input."
from functools import partial
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from selectbench.core.conformance import check_method
from selectbench.order.generation import (
    SigmaGPT,
    burst_distribution,
    burst_sample,
    exact_burst_sample,
    in_burst,
    model_predictor,
    one_hot,
    order_log_likelihood,
    random_orders,
    sequential_sample,
    sigma_models,
    table_predictor,
    train_sigma,
)


def a_joint(seed, t=3, c=2):
    p = np.random.default_rng(seed).dirichlet(np.full(c ** t, 0.5)) * 0.9 + 0.1 / c ** t
    return p.reshape((c,) * t)


def a_model(seed=0, categories=3, length=5):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return SigmaGPT(categories, length, width=16, heads=2).eval()


def p_value(drawn, joint):
    at = np.ravel_multi_index(drawn.T, joint.shape)
    return stats.chisquare(np.bincount(at, minlength=joint.size), len(drawn) * joint.ravel()).pvalue


@given(st.integers(2, 4), st.integers(2, 3), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_table_gives_sums_over_all_rows(t, c, seed):
    joint, rng = a_joint(seed, t, c), np.random.default_rng(seed)
    rows = np.array(list(product(range(c), repeat=t)))
    x, order, known = rows[rng.integers(len(rows))], rng.permutation(t), int(rng.integers(t))
    p = table_predictor(joint)(x[None], order[None], np.array([known]))[0]
    for j in range(t):
        same = (rows[:, order[:min(j, known)]] == x[order[:min(j, known)]]).all(1)
        by_hand = np.bincount(rows[same, order[j]], joint.ravel()[same], minlength=c) / joint.ravel()[same].sum()
        assert np.allclose(p[j], by_hand)


def test_the_product_of_conditionals_is_the_joint_in_every_order():
    joint, rows = a_joint(1), np.array(list(product(range(2), repeat=3)))
    for path in permutations(range(3)):
        p = table_predictor(joint)(rows, np.tile(path, (8, 1)))
        assert np.allclose(np.take_along_axis(p, rows[:, list(path)][..., None], 2)[..., 0].prod(1), joint.ravel())


def test_a_model_sees_what_comes_before_and_nothing_else():
    model, rng = a_model(), np.random.default_rng(0)
    ask, x, order = model_predictor(model), rng.integers(0, 3, (20, 5)), random_orders(np.zeros((20, 5)), seed=1)
    for j in range(5):
        other = x.copy()
        np.put_along_axis(other, order[:, j:], rng.integers(0, 3, (20, 5 - j)), axis=1)
        assert np.allclose(ask(x, order)[:, : j + 1], ask(other, order)[:, : j + 1], atol=1e-6)
        changed = x.copy()
        np.put_along_axis(changed, order[:, [j]], (np.take_along_axis(x, order[:, [j]], 1) + 1) % 3, axis=1)
        assert j == 4 or not np.allclose(ask(x, order)[:, j + 1:], ask(changed, order)[:, j + 1:], atol=1e-6)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_step_of_a_burst_is_the_step_right_after_what_is_known(known, step, seed):
    known, step = min(known, step), max(known, step)
    rng, ask = np.random.default_rng(seed), model_predictor(a_model(seed))
    x, order = rng.integers(0, 3, (1, 5)), rng.permutation(5)[None]
    swapped = order.copy()
    swapped[:, [known, step]] = swapped[:, [step, known]]
    burst = ask(x, order, np.array([known]))
    assert np.allclose(burst[0, step], ask(x, swapped)[0, known], atol=1e-6)
    assert np.allclose(burst[0, :known], ask(x, order)[0, :known], atol=1e-6)


def test_the_mask_of_a_burst():
    sees = in_burst(torch.tensor([2]), 4)[0].int().tolist()
    assert sees == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("orders", [1, 2])
def test_the_enumerated_distribution_is_what_bursts_draw(orders):
    joint = a_joint(3)
    exact = burst_distribution(joint, orders=orders)
    assert np.isclose(exact.sum(), 1) and np.abs(exact - joint).sum() > 0.02
    drawn, _ = burst_sample(table_predictor(joint), np.zeros((20_000, 3), dtype=int), orders=orders, seed=7)
    assert p_value(drawn, exact) > 1e-3 > p_value(drawn, joint)


def test_two_tokens_by_hand():
    joint = a_joint(5, t=2)
    p = joint.sum(1), joint.sum(0)
    kept = np.minimum(joint, np.outer(*p))  # proposed and accepted, in both orders
    by_hand = kept.copy()
    for a, b in product(range(2), repeat=2):
        by_hand[a, b] += (p[0][a] - kept[a].sum()) * joint[a, b] / p[0][a] / 2
        by_hand[a, b] += (p[1][b] - kept[:, b].sum()) * joint[a, b] / p[1][b] / 2
    assert np.allclose(burst_distribution(joint), by_hand)


@pytest.mark.parametrize("t,c", [(3, 2), (2, 3)])
def test_the_repaired_rule_draws_from_the_joint(t, c):
    joint = a_joint(4, t, c)
    drawn, calls = exact_burst_sample(table_predictor(joint), np.zeros((20_000, t), dtype=int), seed=1)
    assert p_value(drawn, joint) > 1e-3 and calls.max() <= 2 * t


def test_independent_tokens_are_all_accepted():
    p = np.random.default_rng(0).dirichlet(np.ones(2), 3)
    joint = np.einsum("a,b,c->abc", *p)
    assert np.allclose(burst_distribution(joint, orders=2), joint)
    for sample in (burst_sample, exact_burst_sample):
        drawn, calls = sample(table_predictor(joint), np.zeros((5000, 3), dtype=int))
        assert (calls == 2).all() and p_value(drawn, joint) > 1e-3


@pytest.mark.parametrize("sample", [burst_sample, exact_burst_sample, partial(burst_sample, orders=2)])
def test_what_is_given_is_kept_and_the_rest_is_drawn_given_it(sample):
    joint = a_joint(6)
    x, given_ = np.tile([1, 0, 0], (4000, 1)), np.tile([True, False, False], (4000, 1))
    before = x.copy()
    drawn, calls = sample(table_predictor(joint), x, given_)
    assert np.array_equal(x, before) and (drawn[:, 0] == 1).all() and calls.max() <= 4
    sure, none = sample(table_predictor(joint), x, np.ones_like(given_))
    assert np.array_equal(sure, x) and not none.any()
    if sample is exact_burst_sample: assert p_value(drawn[:, 1:], joint[1] / joint[1].sum()) > 1e-3


def test_one_by_one():
    joint = a_joint(8)
    x, order = np.zeros((8000, 3), dtype=int), random_orders(np.zeros((8000, 3)))
    drawn, calls = sequential_sample(table_predictor(joint), x, order)
    assert p_value(drawn, joint) > 1e-3 and (calls == 3).all()
    again, _ = sequential_sample(table_predictor(joint), x, order)
    assert np.array_equal(drawn, again)


def test_training_learns_conditionals_and_leaves_the_generators_alone():
    joint = a_joint(9)
    x = np.stack(np.unravel_index(np.random.default_rng(0).choice(8, 3000, p=joint.ravel()), joint.shape), 1)
    state = torch.get_rng_state()
    short = dict(seeds=2, steps=200, batch=64, width=16, heads=2)
    trained = train_sigma(x, 2, **short)
    assert torch.equal(state, torch.get_rng_state()) and trained["loss"].shape == (200, 2)
    rows, order = np.array(list(product(range(2), repeat=3))), random_orders(np.zeros((8, 3)), seed=2)
    truth = np.log(joint.ravel())
    found = [order_log_likelihood(m, rows, order).sum(1) for m in sigma_models(trained)]
    assert all(joint.ravel() @ (truth - f) < 0.1 for f in found) and not np.allclose(*found, atol=1e-4)
    alone = sigma_models(train_sigma(x, 2, **(short | {"seeds": 1})))[0]
    assert np.allclose(order_log_likelihood(alone, rows, order).sum(1), found[0], atol=1e-2)
    plain = sigma_models(train_sigma(x, 2, share=(0.0, 0.0), **short))[0]
    kl = lambda order: joint.ravel() @ (truth - order_log_likelihood(plain, rows, order).sum(1))
    assert kl(np.arange(3)) < 0.05 < kl(np.array([2, 1, 0]))


def test_bad_input():
    with pytest.raises(ValueError, match="`tokens`"): one_hot([0, 3], 3)
    with pytest.raises(ValueError, match="`joint`"): table_predictor(np.array([[0.5, 0.5], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="`joint`"): burst_distribution(np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="`heads`"): SigmaGPT(2, 3, width=10, heads=4)
    with pytest.raises(ValueError, match="`width`"): SigmaGPT(2, 3, width=9, heads=3)
    x = one_hot(np.zeros((1, 5), dtype=int), 3)
    with pytest.raises(ValueError, match="`order`"): a_model()(x, torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="`x`"): a_model()(x[:, :4], torch.arange(4)[None])


def test_conformance(): check_method("SigmaGPT")
