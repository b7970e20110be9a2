"CODA against what the authors' own program did (tests/data/coda_reference.md), and what it refuses."
from pathlib import Path

import numpy as np
import pytest

from selectbench.core.oracle import OracleError
from selectbench.core.vocabulary import sample_signals
from selectbench.model.active import ConfusionBelief, coda, consensus_prior, p_best, p_best_after
from selectbench.pools.fetch import available
from selectbench.pools.published import coda_digits, model_selector

reference = np.load(Path(__file__).parent / "data" / "coda_reference.npz", allow_pickle=False)
TOLERANCE = {"soft": (1e-7, 3e-6), "one_hot": (1e-7, 3e-6), "flat": (1e-7, 3e-6), "double": (1e-13, 1e-12)}


@pytest.fixture(scope="module")
def digits():
    if not available("coda_digits"): pytest.skip("needs SELECTBENCH_DATA")
    return coda_digits()


def given(digits, name):
    "The probabilities and the prior of the reference run `name`."
    soft = np.eye(10, dtype=np.float32)[digits.predictions] if name == "one_hot" else digits.soft_predictions
    return soft, np.full((10, 10), .2) if name == "flat" else None


@pytest.mark.parametrize("name", TOLERANCE)
def test_same_queries_same_models_same_belief(digits, name):
    soft, prior = given(digits, name)
    index = reference[f"{name}_index"]
    run = coda(soft, digits.y.__getitem__, len(index), prior=prior)
    assert run.index.tolist() == index.tolist()
    if f"{name}_best" in reference: assert run.info["best"].tolist() == reference[f"{name}_best"].tolist()
    belief = np.vstack([run.info["start"], run.info["belief"]])[reference[f"{name}_steps"]]
    assert np.abs(belief - reference[f"{name}_belief"]).max() < TOLERANCE[name][0]


@pytest.mark.parametrize("name", TOLERANCE)
def test_same_scores_of_all_items_before_the_first_label(digits, name):
    soft, prior = given(digits, name)
    soft, theirs = soft.astype(float), reference[f"{name}_gain"]
    ours = ConfusionBelief(soft, consensus_prior(soft, prior=prior)).gain(np.arange(500))
    candidates = (digits.predictions != digits.predictions[:, :1]).any(1)
    assert np.array_equal(candidates, ~np.isnan(theirs))
    assert np.nanmax(np.abs(ours - theirs)) < TOLERANCE[name][1] < np.nanmax(theirs) / 100


def test_published_regret_on_the_digits(digits):
    accuracy = (digits.predictions == digits.y[:, None]).mean(0)
    best = coda(digits.soft_predictions, digits.y.__getitem__, 100).info["best"]
    regret = 100 * (accuracy.max() - accuracy[best])
    assert np.allclose(regret[[0, 4, 9, 19, 49, 99]], [.8, .8, .8, 0, 0, 0])
    assert abs(regret.sum() - 18.4) < 1e-9


def test_the_failure_on_wnli_is_the_published_one():
    "The same queries, and the same poor model that hardly ever gives the second answer."
    if not available("model_selector"): pytest.skip("needs SELECTBENCH_DATA")
    p = model_selector("wnli")
    run = coda(np.eye(2, dtype=np.float32)[p.predictions], p.y.__getitem__, len(reference["wnli_index"]))
    assert run.index.tolist() == reference["wnli_index"].tolist()
    belief, theirs = run.info["belief"], reference["wnli_best"]
    assert (belief[np.arange(len(theirs)), theirs] > belief.max(1) - 1e-9).all()  # or a model that is exactly as good
    accuracy = (p.predictions == p.y[:, None]).mean(0)
    assert accuracy.max() - accuracy[run.info["best"][29]] > .1


@pytest.mark.parametrize("scale", [.01, .5, 3, 40])
def test_hypothetical_outcomes_equal_the_integral_of_each(scale):
    "Also where densities diverge (the exponent is clipped) and where they are narrow."
    rng = np.random.default_rng(0)
    a, b, hits = *(scale * rng.uniform(.5, 1.5, (2, 150))), rng.random((40, 150)) < .5
    each = [p_best(a + h, b + ~h) for h in hits]
    assert np.allclose(p_best_after(a, b, hits), each, rtol=1e-9, atol=1e-12)


def test_order_of_models_and_classes_does_not_matter():
    soft = np.random.default_rng(0).dirichlet(np.ones(4), (60, 9)).astype(np.float32)
    y = np.random.default_rng(1).integers(4, size=60)
    models, classes = np.random.default_rng(2).permutation(9), np.array([2, 0, 3, 1])
    one = coda(soft, y.__getitem__, 30)
    two = coda(soft[:, models][:, :, classes], np.argsort(classes)[y].__getitem__, 30)
    assert one.index.tolist() == two.index.tolist()
    assert np.allclose(one.info["belief"][:, models], two.info["belief"])


def test_seed_draws_among_equal_items_only():
    "Items 0 to 3 are one item four times, and so are 4 to 7."
    soft = np.repeat(np.random.default_rng(3).dirichlet(np.ones(3), (2, 5)), 4, axis=0)
    runs = [coda(soft, lambda i: i // 4, 8, seed=s) for s in range(8)]
    assert len({tuple(r.index.tolist()) for r in runs}) > 1
    assert len({tuple((r.index // 4).tolist()) for r in runs}) == 1


def test_items_on_which_all_agree_come_last():
    soft = np.random.default_rng(0).dirichlet(np.ones(3), (30, 4))
    soft[10:20] = soft[10:20, :1]
    disputed = (soft.argmax(2) != soft.argmax(2)[:, :1]).any(1)
    order = coda(soft, lambda i: 0, 30).index
    assert disputed[order[:disputed.sum()]].all() and 10 <= disputed.sum() < 30


def valid(): return sample_signals(["soft_predictions", "oracle"])


@pytest.mark.parametrize(("change", "word"), [
    ({"soft_predictions": np.full((40, 1, 3), 1 / 3)}, "soft_predictions"),
    ({"soft_predictions": np.ones((40, 7, 1))}, "soft_predictions"),
    ({"soft_predictions": np.random.default_rng(0).dirichlet(np.ones(3), (40, 1)).repeat(7, 1)}, "soft_predictions"),
    ({"soft_predictions": np.full((40, 7, 3), np.nan)}, "soft_predictions"),
    ({"soft_predictions": np.full((40, 7, 3), .5)}, "soft_predictions"),
    ({"k": 41}, "k"), ({"k": 0}, "k"), ({"oracle": [0, 1]}, "oracle"), ({"alpha": 1.5}, "alpha"),
    ({"learning_rate": 0}, "learning_rate"), ({"multiplier": float("nan")}, "multiplier"),
    ({"prior": np.ones((2, 2))}, "prior"), ({"prior": np.zeros((3, 3))}, "prior"),
])
def test_refuses(change, word):
    with pytest.raises(ValueError, match=f"`{word}`"): coda(**{**valid(), "k": 5, **change})


@pytest.mark.parametrize("answer", ["raises", -1, 3])
def test_labels_already_bought_are_kept(answer):
    soft = valid()["soft_predictions"]
    order, asked = coda(soft, lambda i: i % 3, 10).index, []

    def oracle(i):
        asked.append(i)
        if len(asked) < 5: return i % 3
        if answer == "raises": raise ConnectionError("no annotator")
        return answer

    with pytest.raises(OracleError) as e: coda(soft, oracle, 10)
    assert e.value.selection.index[:4].tolist() == order[:4].tolist()
    assert e.value.selection.info["labels"][:4] == [i % 3 for i in order[:4]]


def test_classes_that_no_model_gives_can_be_labels():
    "Hard answers 0 and 1 of three classes; every label is 2."
    soft = np.eye(3, dtype=np.float32)[np.random.default_rng(0).integers(2, size=(30, 5))]
    run = coda(soft, lambda i: 2, 30)
    assert np.isfinite(run.info["belief"]).all() and np.allclose(run.info["belief"].sum(1), 1)
