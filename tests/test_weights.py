"Weights against what the authors' programs answered (tests/data/loss_weights_reference.md), and inputs at the edge."
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from selectbench import methods
from selectbench.core.vocabulary import sample_signals
from selectbench.data.weights import (
    RULES,
    SCORES,
    DRRho,
    LossReweighting,
    _resampled,
    draw_pairs,
    implied_resampling,
    loss_weights,
    selective_mixup,
)

DATA = Path(__file__).parent / "data"
sow, wei = (np.load(DATA / f"{name}_reference.npz") for name in ("loss_reweighting", "drrho"))
NAMES = ("features", "y", "groups", "target_features", "target_y")


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("r", [0.4, 1.0])
def test_loss_weights_are_the_authors(score, r):
    for losses, theirs in zip(sow["losses"], sow[f"{score}_{r}"], strict=True):
        step = {"step": 9, "steps": 10, "losses": losses}
        assert np.allclose(LossReweighting(score=score, r=r).step({}, step)[1], theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_drrho_normaliser_is_the_authors(gamma):
    "Anchor by anchor: its losses are those of its pairs. Weights follow from the normaliser."
    policy, losses = DRRho(tau=float(wei["tau"]), gamma=gamma), wei[f"losses_{gamma}"]
    theirs = wei[f"log_normaliser_{gamma}"]
    for anchor in range(9):
        state = policy.init(8, documents=None, steps=6, seed=0)
        for (loss, reference), log_u in zip(losses[:, :, anchor], theirs[:, anchor], strict=True):
            state, weight = policy.step(state, {"losses": loss, "reference_losses": reference})
            assert np.isclose(state["log_u"] + np.log(8 / 9), log_u, atol=1e-9)
            assert np.allclose(weight * 9 / 8, np.exp((loss - reference) / wei["tau"] - log_u), rtol=1e-9)


def test_shapes_put_the_weight_where_they_say():
    losses = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    at = {name: loss_weights(losses, name) for name in SCORES}
    assert (np.diff(at["linupper"])[:2] > 0).all() and np.allclose(at["linupper"][2:], at["linupper"][4])
    assert at["quadratic"].argmax() == 2 and at["extremes"].argmin() == 2
    for name, w in at.items(): assert np.isclose(w.sum(), 1) and np.allclose(w, loss_weights(10 * losses + 3, name))


def test_equal_losses_and_large_losses():
    "Equal losses, or one row, give equal weights; losses of thousands of nats overflow nothing."
    for score in SCORES:
        assert np.allclose(loss_weights(np.full(6, 3.25, dtype=np.float32), score), 1 / 6)
        assert np.allclose(loss_weights([5.0], score), 1)
    far = {"losses": np.array([5e3, 0, 1]), "reference_losses": np.zeros(3)}
    assert np.allclose(DRRho(tau=0.01).step({"log_u": None}, far)[1], [3, 0, 0])
    same = {"losses": np.full(4, 2.0), "reference_losses": np.full(4, 7.0)}
    assert np.allclose(DRRho().step({"log_u": None}, same)[1], 1)


def test_warmup_reads_no_loss():
    class Silent(dict):
        def __missing__(self, name): raise AssertionError(f"{name} was read")

    policy = LossReweighting(warmup=0.5)
    assert policy.step({}, Silent(step=49, steps=100))[1] is None
    with pytest.raises(AssertionError): policy.step({}, Silent(step=50, steps=100))
    falling = [LossReweighting(warmup=0.5, initial_r=100).temperature(t, 100) for t in range(0, 51, 10)]
    ratios = [b / a for a, b in pairwise(falling)]
    assert falling[0] == 100 and falling[-1] == 0.4 and np.allclose(ratios, ratios[0])


@pytest.mark.parametrize("name, call", [
    ("score", lambda: LossReweighting(score="upper")), ("r", lambda: LossReweighting(r=0.0)),
    ("r", lambda: LossReweighting(r=float("nan"))), ("initial_r", lambda: LossReweighting(initial_r=-1.0)),
    ("warmup", lambda: LossReweighting(warmup=1.5)), ("tau", lambda: DRRho(tau=0.0)), ("tau", lambda: DRRho(tau=-1.0)),
    ("tau", lambda: DRRho(tau=float("inf"))), ("gamma", lambda: DRRho(gamma=0.0)), ("gamma", lambda: DRRho(gamma=1.1)),
])
def test_bad_policies_are_refused(name, call):
    with pytest.raises(ValueError, match=f"`{name}`"): call()


@pytest.mark.parametrize("name, bad", [
    ("alpha", {"alpha": 0.0}), ("C", {"C": -1.0}), ("copies", {"copies": 0}),
    ("y", {"y": np.zeros(40, dtype=np.int64)}), ("y", {"y": np.zeros(39, dtype=np.int64)}),
])
def test_bad_analyses_are_refused(name, bad):
    with pytest.raises(ValueError, match=f"`{name}`"): selective_mixup(**{**sample_signals(NAMES), **bad})


def test_one_domain_leaves_the_rules_on_domains_without_pairs():
    signals = sample_signals(NAMES) | {"groups": np.zeros(40, dtype=np.int64)}
    for rule in ("other domain", "same class, other domain"):
        assert np.allclose(implied_resampling(signals["y"], signals["groups"], rule), 1 / 40)
        first, second = draw_pairs(signals["y"], signals["groups"], rule, 100, np.random.default_rng(0))
        assert (first == second).all()
    frame = selective_mixup(**signals).set_index(["variant", "rule"])
    assert frame.loc[("resampling", "other domain"), "accuracy"] == frame.loc[("ERM", "any"), "accuracy"]
    assert len(frame) == 2 + 3 * (len(RULES) - 1) and np.allclose(frame.filter(like="class_").sum(axis=1), 1)


def test_every_first_member_comes_equally_often():
    y, groups = np.arange(30) % 3, np.arange(30) % 2
    for rule in RULES:
        first, _ = draw_pairs(y, groups, rule, 120, np.random.default_rng(1))
        assert (np.bincount(first) == 4).all()


def test_a_class_that_only_the_target_has_counts_as_missed():
    signals = sample_signals(NAMES)
    signals["target_y"] = signals["target_y"] + 5
    assert (selective_mixup(**signals).accuracy == 0).all()


def test_registered_under_their_keys():
    keys = {n: methods[n].card.key for n in ("loss_reweighting", "drrho", "selective_mixup")}
    assert list(keys.values()) == ["dynamic-loss-reweighting", "drrho", "selective-mixup-resampling"]


def test_rows_against_fits_written_out():
    "ERM and resampling alone, with the weights of the closed form, by hand; the marginals by counting."
    s = sample_signals(NAMES, 5)
    frame = selective_mixup(**s).set_index(["variant", "rule"])
    scale = StandardScaler().fit(s["features"])
    x, target = scale.transform(s["features"]), scale.transform(s["target_features"])
    for rule in RULES:
        p = implied_resampling(s["y"], s["groups"], rule)
        right = LogisticRegression(max_iter=1000).fit(x, s["y"], sample_weight=40 * p).predict(target) == s["target_y"]
        row = frame.loc[("ERM" if rule == "any" else "resampling", rule)]
        assert row.accuracy == right.mean() and row.recall_1 == right[s["target_y"] == 1].mean()
        assert np.isclose(row.class_2, p[s["y"] == 2].sum()) and np.isclose(row.group_0, p[s["groups"] == 0].sum())


def test_resampling_draws_every_example_as_often_as_it_should():
    p = np.random.default_rng(0).dirichlet(np.ones(30))
    count = np.bincount(_resampled(p, 120, np.random.default_rng(1)), minlength=30)
    assert count.sum() == 120 and (abs(count - 120 * p) < 1).all()


def test_pairs_across_two_classes_halve_them_in_the_frame():
    s = sample_signals(NAMES, c=2)
    s["y"] = (np.arange(40) < 5).astype(np.int64)
    across = selective_mixup(**s).query("rule == 'other class'")
    assert np.allclose(across[["class_0", "class_1"]], 0.5) and len(across) == 3
