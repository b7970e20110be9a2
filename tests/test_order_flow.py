"Flows that keep an order: exact distributions, paths, the loss by hand, what training reads, controls, bad input."
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectbench.core.conformance import check_method
from selectbench.order.flow import (
    GridFlow,
    balance,
    branin_currin,
    built,
    exact_policy,
    grid_cells,
    hypergrid_reward,
    log_flow,
    non_dominated,
    one_hot_cells,
    order_batch,
    order_loss,
    order_pairs,
    sample_paths,
    terminal_distribution,
    train_flows,
)

train = partial(train_flows, height=4, dims=2, seeds=3, steps=60, batch=32, width=16)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_the_policy_in_balance_builds_the_reward(height, dims, seed):
    reward = np.random.default_rng(seed).gamma(0.5, size=height ** dims) + 1e-6
    policy = exact_policy(reward, height, dims)
    assert np.allclose(policy.sum(1), 1) and (policy >= 0).all()
    assert np.allclose(terminal_distribution(policy, height, dims), reward / reward.sum())


@pytest.mark.parametrize("height, dims", [(5, 1), (3, 2), (2, 3)])
def test_every_path_is_in_balance(height, dims):
    rng, n, t = np.random.default_rng(0), height ** dims, dims * (height - 1) + 1
    reward = rng.gamma(1, size=n) + 0.1
    policy = exact_policy(reward, height, dims)
    cells, steps = sample_paths(np.stack([policy, policy]), rng.random((2, 300, t)), height, dims)
    ends = built(cells, steps)
    parents = np.maximum((grid_cells(height, dims) > 0).sum(1), 1).astype(float)
    with np.errstate(divide="ignore"): log_policy = torch.from_numpy(np.log(np.stack([policy, policy])))
    told = log_flow(log_policy, cells, steps, parents) + np.log(reward.sum())
    assert np.allclose(told, np.log(reward[ends]))
    assert balance(told, torch.from_numpy(reward[ends])[..., None], None).max() < 1e-20


def test_paths_are_paths():
    rng = np.random.default_rng(1)
    policy = np.stack([exact_policy(np.ones(27), 3, 3)] * 2)
    cells, steps = sample_paths(policy, rng.random((2, 50, 7)), 3, 3)
    at = grid_cells(3, 3)
    for c, s in zip(cells.reshape(-1, 7), steps.reshape(-1, 7), strict=True):
        length = (s >= 0).sum()
        assert s[length - 1] == 3 and (s[length:] == -1).all() and (c[length:] == 0).all() and c[0] == 0
        for i in range(length - 1): assert (at[c[i + 1]] - at[c[i]] == np.eye(3)[s[i]]).all()


def test_loss_by_hand():
    z = torch.tensor([[0.0, 1.0, 2.0]])
    front = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])   # the first two, neither better than the other
    assert torch.allclose(order_loss(z, front), -(z.log_softmax(-1)[:, 0] + z.log_softmax(-1)[:, 1]) / 2)
    assert torch.allclose(order_batch(z, front, None), order_loss(z, front))
    y = torch.tensor([[[3.0], [1.0], [3.0]]])
    partner = torch.tensor([[1, 0, 2]])
    by_hand = (2 * torch.nn.functional.softplus(torch.tensor(1.0)) + np.log(2)) / 3   # two reversed pairs, itself
    assert torch.allclose(order_pairs(z, y, partner), by_hand)
    assert torch.allclose(order_pairs(z + 5, y.exp(), partner), by_hand)
    assert torch.allclose(balance(z, y, None, power=2.0), (z - 2 * y[..., 0].log()).square().mean(1))


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_non_dominated_is_its_definition(s, k, seed):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, (s, k))).float()
    want = [not any(bool((b >= a).all() and (b > a).any()) for b in x) for a in x]
    assert non_dominated(x).tolist() == want and any(want)


def test_training_reads_the_order_alone():
    R = hypergrid_reward(4, 2)[:, None] + 0.01 * np.arange(16)[:, None]
    same = [train(f(R), loss=order_pairs)["distribution"] for f in (np.asarray, lambda x: 3 * x, np.exp)]
    assert np.array_equal(same[0], same[1]) and np.array_equal(same[0], same[2])
    assert not np.allclose(train(R, loss=balance)["distribution"], train(np.exp(R), loss=balance)["distribution"])


def test_order_finds_the_best_and_shuffled_labels_do_not():
    value = np.arange(16.0)[:, None]
    last = lambda x: train(x, loss=order_pairs, steps=150)["distribution"][-1]
    assert (last(value)[:, -1] > 0.8).all()
    blind = np.stack([np.random.default_rng(s).permutation(value[:-1]) for s in range(3)])
    blind = np.concatenate([blind, np.zeros((3, 1, 1))], axis=1)   # what is best is now worst
    assert (last(blind)[:, -1] < 0.1).all()
    assert (last(np.zeros((16, 1))).max(1) < 0.9).all()            # nothing to prefer: no single cell takes all


def test_balance_builds_in_proportion():
    reward = hypergrid_reward(4, 2, low=0.3)
    p = train(reward[:, None], loss=balance, steps=250)["distribution"][-1]
    assert (np.abs(p - reward / reward.sum()).sum(1) / 2 < 0.1).all()


def test_seeds_do_not_know_of_each_other():
    value = np.arange(16.0)[:, None]
    both, one = (train(value, loss=order_pairs, seeds=s, steps=20) for s in (2, 1))
    assert np.allclose(both["distribution"][:, :1], one["distribution"], atol=1e-5)
    assert (both["tried"][:, :1] == one["tried"]).all() and not np.allclose(*both["distribution"][-1])
    assert np.allclose(both["distribution"].sum(-1), 1, atol=1e-5) and both["paths"].tolist() == [0, 640]


def test_tasks():
    reward = hypergrid_reward(8, 3)
    assert (reward == reward.max()).sum() == 8 and np.isclose(reward.max(), 2.51) and np.isclose(reward.min(), 0.01)
    values = branin_currin(32)
    assert values.shape == (1024, 2) and np.isfinite(values).all() and values.max() <= 1
    assert np.isclose(values[-1, 0], 1 - 145.872191 / 308.13, atol=1e-6)    # Branin at (10, 15)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="`objectives`"): train(np.ones((15, 1)), loss=order_pairs)
    for bad in (np.ones(15), np.zeros(16)):
        with pytest.raises(ValueError, match="`reward`"): exact_policy(bad, 4, 2)
    with pytest.raises(ValueError, match="`cells`"): GridFlow(4, 2)(one_hot_cells(4, 2).long())


def test_conformance(): check_method("GridFlow")
