"PDS and Mates: a Hugging Face model, other seeds and shapes than the notebook's, input at the edge."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selectbench.core.policy import random_run
from selectbench.core.selection import gumbel_top_k
from selectbench.data.control import (
    Mates,
    control_gains,
    influence_model,
    pds,
    project_simplex,
    row_embeddings,
    trajectory,
)


def tables(seed, n=40, d=6, q=9, classes=3):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)).astype(np.float32), rng.integers(classes, size=n),
            rng.normal(size=(q, d)).astype(np.float32), rng.integers(classes, size=q))


def test_gains_of_a_gpt2_are_finite_differences_of_its_training():
    "Rows outside the batches, each as if it were added to every step."
    from transformers import GPT2Config, GPT2LMHeadModel
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0,
                            eos_token_id=0, attn_implementation="eager")
        model = GPT2LMHeadModel(config).double().eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(11, size=(16, 7)))

    def losses(params, rows):
        logits = torch.func.functional_call(model, params, (rows[:, :-1],)).logits
        return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

    start = {k: v.detach() for k, v in model.named_parameters()}
    training = lambda p, t: losses(p, ids[3 * t: 3 * t + 3]).mean()
    target, judged = lambda p: losses(p, ids[12:14]).mean(), ids[14:]
    path = trajectory(training, start, steps=4, lr=0.2)
    gains = control_gains(training, target, lambda p: losses(p, judged), path, 0.2)

    def area(row, e):
        pushed = lambda p, t: training(p, t) + e * losses(p, row[None])[0]
        return float(sum(target(p) for p in trajectory(pushed, start, steps=4, lr=0.2)[1:]))

    assert np.allclose(gains, [(area(r, -1e-5) - area(r, 1e-5)) / 2e-5 for r in judged], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("hidden", [(), (5,)])
def test_gains_add_up_to_the_change_of_the_area(hidden):
    "A small move of all weights at once changes the area by the sum of the gains."
    x, y, tx, ty = tables(1)
    options = dict(steps=20, hidden=hidden, temperature=0)
    one = pds(x, y, tx, ty, 5, epochs=1, alpha=1e-4, **options)
    two = pds(x, y, tx, ty, 5, epochs=2, alpha=1e-4, **options)
    fall = two.info["area"][0] - two.info["area"][1]
    z = (one.info["gamma"] - 1 / 40) * 40 / 1e-4                       # standardised gains
    assert np.allclose(z, one.score, atol=1e-6) and fall > 0
    three = pds(x, y, tx, ty, 5, epochs=2, alpha=2e-4, **options)
    assert np.isclose((three.info["area"][0] - three.info["area"][1]) / fall, 2, rtol=1e-3)


def test_pds_follows_a_shuffled_pool_without_noise():
    for seed in range(3):
        x, y, tx, ty = tables(seed)
        order = np.random.default_rng(seed).permutation(40)
        whole, moved = (pds(x[i], y[i], tx, ty, 40, steps=15, temperature=0) for i in (np.arange(40), order))
        assert np.allclose(moved.score, whole.score[order], atol=1e-9)
        assert (order[moved.index] == whole.index).all()


def test_noise_of_pds_is_gumbel_on_the_score():
    x, y, tx, ty = tables(0)
    picked = pds(x, y, tx, ty, 12, steps=5, temperature=0.5, seed=4)
    keys = picked.score + 0.5 * np.random.default_rng([4, 1]).gumbel(size=40)
    assert (picked.index == np.argsort(-keys)[:12]).all()


@pytest.mark.parametrize(("change", "word"), [
    ({"target_features": np.zeros((0, 6), np.float32), "target_y": np.zeros(0, int)}, "`target_features`"),
    ({"y": np.ones(40, int), "target_y": np.ones(9, int)}, "one class"),
    ({"target_y": np.full(9, -1)}, "`target_y`"),
    ({"features": np.full((40, 6), np.inf, np.float32)}, "`features`"),
    ({"target_features": np.full((9, 6), np.nan, np.float32)}, "`target_features`"),
    ({"target_features": np.zeros((9, 5), np.float32)}, "`target_features`"),
])
def test_pds_refuses(change, word):
    given = dict(zip(("features", "y", "target_features", "target_y"), tables(0), strict=True)) | change
    with pytest.raises(ValueError, match=word): pds(**given, k=3, steps=3)


def test_pds_at_the_edge():
    x, y, tx, ty = tables(0)
    with pytest.raises(ValueError, match="`lr`"): pds(x, y, 1e30 * tx, ty, 3, steps=5, lr=1e300)
    ones = np.ones((6, 2), np.float32)
    same = pds(ones, np.array([0, 0, 0, 1, 1, 1]), ones[:2], np.array([0, 1]), 6)
    assert np.isfinite(same.score).all() and same.k == 6             # columns without spread
    only_target_class = pds(x, np.zeros(40, int), tx, np.ones(9, int), 3, steps=3)
    assert np.isfinite(only_target_class.score).all()                # a class the pool lacks: nothing helps, no crash
    assert pds(x, y, x[:9], y[:9], 9, steps=20, temperature=0).score[:9].mean() > 0   # target inside the pool


def test_projection():
    assert np.allclose(project_simplex(np.full(5, 7.0)), 0.2)
    assert np.allclose(project_simplex([5.0, 0, 0]), [1, 0, 0]) and np.allclose(project_simplex([-3.0]), [1])


def mates(**change):
    return Mates(**({"embeddings": np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)} | change))


@pytest.mark.parametrize(("change", "word"), [
    ({"sparsity": 1.0}, "`sparsity`"), ({"sparsity": -0.1}, "`sparsity`"), ({"stages": 0}, "`stages`"),
    ({"probes": 2}, "`probes`"), ({"temperature": -1.0}, "`temperature`"), ({"temperature": np.nan}, "`temperature`"),
    ({"embeddings": np.full((40, 6), np.nan, np.float32)}, "`embeddings`"),
])
def test_mates_refuses(change, word):
    with pytest.raises(ValueError, match=word): mates(**change)


def stage(policy, seed=0, **other):
    "The states before and after the end of the first stage of a run that never was."
    run = random_run()
    begin = policy.init(40, documents=run.pool.documents, steps=9, seed=seed)
    at = begin["length"] - 1
    signals = dict(run.step(at, policy.draw(begin, at, 40, 8, seed))) | other
    return begin, policy.step(begin, signals)[0], signals


def test_mates_needs_a_target_and_steps_that_do_not_diverge():
    with pytest.raises(ValueError, match="`validation_texts`"): stage(mates(), validation=None)
    with pytest.raises(ValueError, match="`probe_lr`"): stage(mates(probe_lr=1e38))
    with pytest.raises(ValueError, match="`embeddings`"): stage(mates(embeddings=np.zeros((7, 6), np.float32)))


def test_mates_draws_what_its_state_says():
    policy = mates(sparsity=0.5, temperature=0.0, probes=40)
    begin, after, signals = stage(policy)
    assert sorted(begin["rows"]) == list(range(40)) and after["start"] == begin["length"] == 2
    assert sorted(after["rows"]) == sorted(np.argsort(-after["scores"], kind="stable")[:20])
    drawn = np.concatenate([policy.draw(after, t, 40, 8, 0) for t in range(2, 7)])
    assert (drawn == np.tile(after["rows"], 2)).all()                  # 40 draws from 20 rows: each twice
    rows = row_embeddings(policy.embeddings, signals["pool"].documents)
    assert np.allclose(after["scores"], influence_model(rows, after["probe"], after["gains"]))


def test_equal_gains_leave_the_draw_to_the_noise():
    x = np.random.default_rng(0).normal(size=(30, 4))
    scores = influence_model(x, np.arange(10), np.full(10, 0.25))
    assert np.allclose(scores, scores[0])
    many = [gumbel_top_k(scores, 10, s)[0] for s in range(600)]
    assert np.abs(np.bincount(np.concatenate(many), minlength=30) / 600 - 1 / 3).max() < 0.1
