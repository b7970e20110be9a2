"""Policies on tokens: CVaR against its variational formula, IGF's stream against the authors' loop, bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from selectbench.core.policy import StepSignals, random_run
from selectbench.core.registry import methods
from selectbench.signals.step import standardised
from selectbench.token.select import (
    DFT,
    ESLM,
    IGF,
    EveryToken,
    RandomTokens,
    at_risk,
    conditional_value_at_risk,
    foreseen_gains,
    value_at_risk,
)
from selectbench.zoo.lm import epoch_rows


def signals(**values): return StepSignals(values, {})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0, 0.95))
def test_cvar_is_the_variational_minimum_with_ties(values, alpha):
    x = np.array(values, dtype=float)
    risk = lambda c: c + np.maximum(x - c, 0).mean() / (1 - alpha)
    least = min(map(risk, x))  # piecewise linear and convex: the minimum is at one of the values
    assert conditional_value_at_risk(x, alpha) == pytest.approx(least, abs=1e-9)
    searched = minimize_scalar(risk, bounds=(x.min() - 1, x.max() + 1), method="bounded").fun
    assert conditional_value_at_risk(x, alpha) <= searched + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0, 0.95))
def test_kept_tokens_are_cvar_at_the_rate_that_is_left_out(values, alpha):
    x = np.array(values, dtype=float)[None]
    kept = at_risk(x, np.ones(x.shape, bool), alpha)
    left = 1 - kept.mean()
    assert left <= alpha + 1e-12
    assert x[kept].mean() == pytest.approx(conditional_value_at_risk(x, left), abs=1e-9)
    assert x[kept].min() > x[~kept].max(initial=-1)


@pytest.mark.parametrize("alpha", [0, 0.07, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("n", [1, 10, 30, 100, 2048])
def test_value_at_risk_is_numpys_inverted_cdf(alpha, n):
    x = np.random.default_rng(n).permutation(n).astype(float)
    rank = next(r for r in range(1, n + 1) if r * 100 >= round(alpha * 100) * n)  # whole numbers: no rounding
    assert value_at_risk(x, alpha) == rank - 1


def test_padding_has_no_say():
    scores = np.array([[1., 2., 3., 4.], [9., 9., 9., 9.]])
    mask = np.array([[True] * 4, [False] * 4])
    assert at_risk(scores, mask, 0.5).tolist() == [[False, True, True, True], [False] * 4]


@pytest.mark.parametrize("policy", [ESLM(0.9), ESLM(0.9, statistic="entropy")])
def test_equal_scores_are_all_kept(policy):
    mask = np.array([[True, True, False], [True, True, True]])
    _, kept = policy.step({}, signals(mask=mask, token_losses=np.ones((2, 3)), entropies=np.zeros((2, 3))))
    assert np.array_equal(kept, mask)


def test_entropy_reads_the_entropies():
    shown = signals(mask=np.ones((1, 3), bool), token_losses=np.array([[1., 2, 3]]), entropies=np.array([[3., 2, 1]]))
    assert ESLM(0.9).step({}, shown)[1].tolist() == [[False, False, True]]
    assert ESLM(0.9, statistic="entropy").step({}, shown)[1].tolist() == [[True, False, False]]


@pytest.mark.parametrize("made", [ESLM, RandomTokens])
@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan")])
def test_sparsity_outside_its_range(made, sparsity):
    with pytest.raises(ValueError, match="`sparsity`"): made(sparsity)


@pytest.mark.parametrize("policy", [ESLM(0.5), DFT(), RandomTokens(0.5)])
def test_a_batch_of_padding(policy):
    nothing = signals(mask=np.zeros((2, 3), bool), token_losses=np.zeros((2, 3)), step=0)
    with pytest.raises(ValueError, match="`mask`"):
        policy.step(policy.init(2, documents=np.zeros((2, 3)), steps=1, seed=0), nothing)


@pytest.mark.parametrize("call, name", [
    (lambda: ESLM(0.5, statistic="margin"), "statistic"), (lambda: IGF(pairs=0), "pairs"), (lambda: IGF(lr=0), "lr"),
    (lambda: IGF(objective=0), "objective"), (lambda: IGF(early=-1), "early"),
    (lambda: IGF(threshold=float("nan")), "threshold"), (lambda: value_at_risk([], 0.5), "values"),
    (lambda: value_at_risk([1, np.nan], 0.5), "values"), (lambda: conditional_value_at_risk([1], 1), "alpha"),
    (lambda: at_risk(np.ones((1, 2)), np.zeros((1, 2), bool), 0.5), "mask"),
    (lambda: standardised([1, np.inf]), "gains")])
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"): call()


def test_every_token_and_the_rate_of_random_tokens():
    run = random_run()
    shown = run.step(0, np.arange(8))
    real = int(shown["mask"].sum())
    assert EveryToken().step({}, shown) == ({}, None)
    for alpha in (0, 0.25, 0.5, 0.9):
        (_, loss), (_, drawn) = ESLM(alpha).step({}, shown), RandomTokens(alpha).step({"seed": 1}, shown)
        assert loss.sum() == drawn.sum() == real - max(np.ceil(round(alpha * real, 9)), 1) + 1
    other = [RandomTokens(0.5).step({"seed": s}, run.step(t, np.arange(8)))[1] for s, t in ((1, 0), (1, 1), (2, 0))]
    assert not np.array_equal(other[0], other[1]) and not np.array_equal(other[0], other[2])


def test_random_tokens_are_equally_likely():
    mask = np.ones((4, 5), bool)
    kept = np.mean([RandomTokens(0.5).step({"seed": s}, signals(mask=mask, step=0))[1] for s in range(2000)], 0)
    assert np.abs(kept - 11 / 20).max() < 5 * (0.55 * 0.45 / 2000) ** 0.5


def test_dft_has_the_gradient_of_the_mean_probability():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(2, 5, 7)) * 3, requires_grad=True)
    ids, mask = torch.tensor(rng.integers(7, size=(2, 5))), np.array([[True] * 5, [True] * 3 + [False] * 2])
    losses = -torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    _, weight = DFT().step({}, signals(mask=mask, token_losses=losses.detach().numpy()))
    ours = torch.autograd.grad((losses * torch.tensor(weight)).sum() / mask.sum(), logits, retain_graph=True)[0]
    likely = torch.softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    wanted = torch.autograd.grad(-(likely * torch.tensor(mask)).sum() / mask.sum(), logits)[0]
    assert torch.allclose(ours, wanted, atol=1e-12) and not DFT.normalise


def authors_loop(foreseen, order, batch, batches, threshold, early, later):
    "Contexts one at a time, those below the threshold passed over, until each of `batches` batches is full."
    epoch, done, out = 0, [], []
    while len(done) < batches:
        for row in order(epoch):
            limit = threshold if len(done) < early else later
            if foreseen[row] >= limit: out.append(row)
            if len(out) == batch: done.append(out); out = []
            if len(done) == batches: break
        epoch += 1
    return done


def test_igf_reads_only_what_the_authors_loop_would():
    n, batch = 60, 4
    foreseen = np.random.default_rng(0).normal(size=n)
    policy = IGF(threshold=0.5, later=-0.5, early=3)
    for seed in range(20):
        order = lambda e, s=seed: np.random.default_rng([s, e]).permutation(n)
        theirs = authors_loop(foreseen, order, batch, 8, 0.5, 3, -0.5)
        state = {"rows": None, "gains": None, "foreseen": foreseen, "seed": seed}
        ours = [policy.draw(state, t, n, batch, seed) for t in range(1, 9)]
        for t, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            assert (foreseen[a] >= (0.5 if t < 3 else -0.5)).all()
            assert (foreseen[b] >= (0.5 if t + 1 < 3 else -0.5)).all()
        late = np.concatenate(ours[2:])  # one epoch holds each passing row once
        assert len(set(late)) == len(late)


def test_a_stream_holds_each_passing_row_once_an_epoch():
    passing = np.array([2, 3, 5, 7, 11])
    whole = epoch_rows(passing, 0, 20, [1])
    assert np.array_equal(np.concatenate([epoch_rows(passing, s, 4, [1]) for s in range(0, 20, 4)]), whole)
    assert all(np.array_equal(np.sort(whole[i:i + 5]), passing) for i in range(0, 20, 5))
    assert not np.array_equal(whole[:5], whole[5:10])


def test_igf_where_too_few_pass_reads_the_best():
    foreseen = np.array([.1, .9, .3, .7, .5])
    assert IGF(threshold=5.).passing(foreseen, 0, 3).tolist() == [1, 3, 4]
    assert IGF(later=-9.).passing(foreseen, 10, 3).tolist() == [0, 1, 2, 3, 4]


def test_igf_needs_an_objective_set():
    run, policy = random_run(), IGF()
    state = policy.init(len(run.pool), documents=run.pool.documents, steps=9, seed=0)
    shown = StepSignals({**run.step(0, np.arange(8)), "validation": None}, {})
    with pytest.raises(ValueError, match="`validation_texts`"): policy.step(state, shown)


def test_foreseen_gains_are_ridge_on_token_shares():
    pool, rng = random_run().pool, np.random.default_rng(0)
    rows = np.arange(25)
    shares = np.zeros((len(pool), 17))
    for i in range(len(pool)):
        real = pool.tokens[i, 1:][pool.mask[i]]
        for token in real: shares[i, token] += 1 / len(real)
    gains = shares[rows] @ rng.normal(size=17)  # a linear truth is found
    foreseen = foreseen_gains(pool, rows, gains)
    truth = (gains - gains.mean()) / gains.std()
    assert np.corrcoef(foreseen[rows], truth)[0, 1] > 0.99
    assert np.allclose(foreseen_gains(pool, rows, np.full(25, 3.)), 0)


def test_gains_are_standardised():
    assert np.allclose(standardised([1., 2., 3., 6.]), np.array([-2, -1, 0, 3]) / 3.5 ** 0.5)
    assert standardised([2., 2.]).tolist() == [0, 0]


def test_the_family_is_listed():
    found = {c["name"]: c["key"] for c in methods.cards() if c["family"] == "token"}
    wanted = {"eslm": "eslm", "igf": "igf", "dft": "dft", "random_tokens": None, "every_token": None}
    assert found.items() >= wanted.items()
