"Preference rankings: the paper's identities, exactly; optima against optimisers; training on a tiny model; bad input."
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special

from selectbench.order.preference import (
    answer_log_probs,
    dpo_loss,
    flip_loss,
    idealised_log_ratio,
    idealised_ranking_accuracy,
    ipo_flip_loss,
    ipo_loss,
    ranked_right,
    ranking_accuracy,
    reward_accuracy,
    tilted,
    train_dpo,
    win_rate,
)
from selectbench.zoo.lm import train_lm
from selectbench.zoo.text_task import tiny_llama

logs = st.floats(-60, 0)
cases = st.tuples(logs, logs, logs, logs, st.sampled_from([0.01, 0.1, 0.5]), st.sampled_from([0.0, 0.5, 1.0, 2.0]))


@given(cases)
@settings(max_examples=300, deadline=None)
def test_right_if_and_only_if_below_the_threshold(case):
    a, b, c, d, beta, gamma = case
    model, reference = np.array([[a, b]]), np.array([[c, d]])
    if 0 < abs(a - b) < 1e-6: return  # nearer to the threshold than a loss can tell
    loss, threshold = dpo_loss(model, reference, beta=beta, gamma=gamma), flip_loss(reference, beta=beta, gamma=gamma)
    if a == b: assert np.isclose(loss, threshold)
    elif threshold > 1e-12: assert (loss <= threshold)[0] == ranked_right(model)[0]


@given(cases)
@settings(max_examples=200, deadline=None)
def test_a_low_loss_keeps_what_was_right(case):
    a, b, c, d, beta, _ = case
    model, reference = np.array([[a, b]]), np.array([[max(c, d), min(c, d)]])
    if dpo_loss(model, reference, beta=beta) <= 0.6: assert ranked_right(model)[0]          # proposition 2.6


@given(cases, st.sampled_from([0.02, 0.1, 1.0]))
@settings(max_examples=200, deadline=None)
def test_ipo(case, tau):
    a, b, c, d = case[:4]
    model, reference = np.array([[a, b]]), np.array([[c, d]])
    limit = ipo_flip_loss(reference, tau=tau)[0]
    assert np.isnan(limit) == (c - d < -1 / (2 * tau))
    if ipo_loss(model, reference, tau=tau)[0] < limit * (1 - 1e-9): assert ranked_right(model)[0]


def test_losses_by_hand():
    model, reference = np.array([[-1.0, -3.0]]), np.array([[-2.0, -2.5]])
    assert np.isclose(dpo_loss(model, reference, beta=0.2)[0], np.log1p(np.exp(-0.2 * 1.5)))
    assert np.isclose(dpo_loss(model, reference, beta=0.2, gamma=3)[0], np.log1p(np.exp(-0.2 * 0.5)))
    assert np.isclose(ipo_loss(model, reference, tau=0.5)[0], 0.25)
    assert np.isclose(flip_loss(reference, beta=0.2)[0], np.log1p(np.exp(0.1)))
    assert np.isfinite(dpo_loss([[-9e5, 0.0]], [[0.0, -9e5]], beta=1.0)).all()


def test_accuracies():
    model = np.array([[-1.0, -2.0], [-2.0, -1.0], [-3.0, -3.0], [-5.0, -4.0]])
    reference = np.array([[0.0, -5.0], [-9.0, -1.0], [-3.0, -3.0], [-5.0, -4.0]])
    assert ranked_right(model).tolist() == [True, False, True, False] and ranking_accuracy(model) == 0.5
    assert reward_accuracy(model, reference) == 0.25               # only the second grew
    assert ranked_right(model[:2], lengths=[[1, 4], [4, 1]]).tolist() == [False, True]
    every = np.array(list(permutations(range(5))), dtype=float)
    assert ranking_accuracy(every) == 1 / 120                      # chance of an exact match of five


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_optimum_of_rlhf(beta):
    rng = np.random.default_rng(3)
    reference, reward = special.log_softmax(rng.normal(0, 2, 4)), rng.normal(size=4)
    policy = tilted(reference, reward, beta=beta)
    objective = lambda lp: np.exp(lp) @ (reward - beta * (lp - reference))
    for _ in range(50): assert objective(policy) >= objective(special.log_softmax(policy + rng.normal(0, 0.5, 4)))
    for i, j in permutations(range(4), 2):
        agree = special.expit(reward[i] - reward[j])
        ideal = idealised_log_ratio(reference[None, [i, j]], agree, beta=beta)
        assert np.isclose(policy[i] - policy[j], ideal[0])


@pytest.mark.parametrize("agreement", [0.3, 0.6, 0.95])
def test_optimum_of_dpo(agreement):
    reference = np.array([[-7.0, -4.0]])
    turned = reference[:, ::-1]

    def expected(d):
        first, second = dpo_loss([[d, 0.0]], reference)[0], dpo_loss([[0.0, d]], turned)[0]
        return agreement * first + (1 - agreement) * second

    best = optimize.minimize_scalar(expected, bounds=(-60, 60), method="bounded", options={"xatol": 1e-6}).x
    assert np.isclose(best, idealised_log_ratio(reference, agreement)[0], atol=1e-3)


def test_idealised_accuracy():
    reference = np.array([[0.0, 5.0], [0.0, 30.0], [4.0, 0.0]])
    assert idealised_ranking_accuracy(reference, [0.7, 0.7, 0.5], beta=0.1) == 2 / 3      # 8.5 nats are enough for one
    assert idealised_ranking_accuracy(reference, 1.0, beta=0.1) == 1
    assert idealised_ranking_accuracy(reference, 1.0, beta=1.0) == 2 / 3                  # 6.9 nats
    assert idealised_ranking_accuracy(reference, 0.0, beta=1.0) == 0


def test_win_rate_rises_with_freedom():
    rng = np.random.default_rng(0)
    reference, reward = special.log_softmax(rng.normal(size=6)), rng.normal(size=6)
    preference = special.expit(reward[:, None] - reward)
    wins = [win_rate(tilted(reference, reward, beta=b), reference, preference) for b in np.geomspace(1e4, 1e-3, 20)]
    assert np.isclose(wins[0], 0.5, atol=1e-3) and (np.diff(wins) >= 0).all()
    assert np.isclose(wins[-1], np.exp(reference) @ preference[reward.argmax()])


def test_training_follows_labels_and_a_coin_teaches_nothing():
    rng = np.random.default_rng(0)
    lm = train_lm(tiny_llama(16, 1), ["abcabcabc" * 4, "bcabcacba" * 4], 2000, block=16)
    kinds = [rng.integers(97, 105, (150, 9)), rng.integers(105, 113, (150, 9))]            # letters a to h, or i to p
    pairs = np.stack(kinds, axis=1)
    pairs[..., 0] = lm.tokenizer.eot
    run = lambda p, **kw: train_dpo(lm, p[:100], p[100:], steps=25, lr=1e-2, seed=1, **kw)
    out = run(pairs)
    assert out["model"].shape == (150, 2) and np.allclose(out["reference"], run(pairs, beta=0.5)["reference"])
    held = lambda o: reward_accuracy(o["model"][100:], o["reference"][100:])
    coin = np.concatenate([np.where(rng.random((100, 1, 1)) < 0.5, pairs[:100, ::-1], pairs[:100]), pairs[100:]])
    assert held(out) > 0.9
    after, before = (np.abs(run(coin)[k][100:] @ [1, -1]).mean() for k in ("model", "reference"))
    assert abs(after - before) < np.abs((out["model"] - out["reference"])[100:] @ [1, -1]).mean()
    model = lm.model("cpu")
    with torch.no_grad(): told = answer_log_probs(model, torch.from_numpy(pairs[:3, 0]))
    row = model(input_ids=torch.from_numpy(pairs[:1, 0])).logits.log_softmax(-1)[0]
    assert np.isclose(sum(row[t, pairs[0, 0, t + 1]].item() for t in range(8)), told[0].item(), atol=1e-4)
    assert np.allclose(out["reference"][:3, 0], told, atol=1e-4)


@pytest.mark.parametrize("call, name", [
    (lambda: ranked_right([-1.0, -2.0]), "log_probs"), (lambda: ranked_right([[np.nan, 0.0]]), "log_probs"),
    (lambda: ranking_accuracy([[0.0, 1.0]], lengths=[[1, 0]]), "lengths"),
    (lambda: dpo_loss([[0.0, 1.0]], [[0.0, 1.0, 2.0]]), "reference"),
    (lambda: dpo_loss([[0, 1]], [[0, 1]], beta=0), "beta"),
    (lambda: ipo_loss([[0, 1]], [[0, 1]], tau=-1), "tau"), (lambda: flip_loss([[0.0]]), "reference"),
    (lambda: idealised_log_ratio([[0, 1]], [0.2, 0.3]), "agreement"),
    (lambda: idealised_log_ratio([[0, 1]], 1.2), "agreement"), (lambda: tilted([0.0], [1.0], beta=np.inf), "beta")])
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"): call()
