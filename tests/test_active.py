"Model Selector against what the authors' own program did, what the methods refuse, and tasks made of labels."
import csv
from pathlib import Path

import numpy as np
import pytest

from selectbench import methods
from selectbench.core.oracle import Oracle, OracleError
from selectbench.core.study import Study
from selectbench.model import active
from selectbench.pools.fetch import available
from selectbench.pools.published import MODEL_SELECTOR, model_selector

# model_selector_reference.npz: made by running the authors' program (RobustML-Lab/model-selector, 6aa57e57).
# <task>_order, _scores, _belief: its first 40 queries with every eighth step's entropies and posterior, on all items of
# wnli (epsilon .47) and the first 300 of pacs (.45). <task>_identified: success after each label (packed bits) on the
# realisations of `label_curve`, 200 of wnli and 100 of pacs.
DATA = Path(__file__).parent / "data"
reference = np.load(DATA / "model_selector_reference.npz", allow_pickle=False)
with open(DATA / "model_selector_published.csv") as f:
    published = {r["collection"]: r for r in csv.DictReader(f) if r["method"] == "model_selector"}
LABELLERS = ["model_selector", "model_selector_adaptive", "random_labelling", "committee_entropy", "committee_margin",
             "variance_minimising", "active_comparison"]


def pool_of(task):
    "The published collection, or a skip."
    if not available("model_selector"): pytest.skip("needs SELECTBENCH_DATA")
    return model_selector(task)


def votes(n=30, m=5, c=3, seed=0):
    "Predictions and labels of models that are right seven times of ten."
    rng = np.random.default_rng(seed)
    y = rng.integers(c, size=n)
    return np.where(rng.random((n, m)) < .7, y[:, None], rng.integers(c, size=(n, m))), y


@pytest.mark.parametrize("task", MODEL_SELECTOR)
def test_labels_to_the_best_model_are_the_authors(task):
    "Their figure is of 100 realisations too, so our interval is widened by the square root of two."
    pool, row = pool_of(task), published[task]
    size, theirs = int(row["pool"]), int(row["labels_90"])
    found = active.label_curve(pool.predictions, pool.y, active.model_selector, size=size, seeds=100,
                               k=min(size, theirs * 3 // 2), epsilon=float(row["epsilon"]))["identified"]
    ours, (low, high) = active.labels_to(found), active.labels_interval(found)
    assert ours - 2 ** .5 * (ours - low) <= theirs <= ours + 2 ** .5 * (high - ours), (ours, low, high)


@pytest.mark.parametrize(("task", "seeds"), [("wnli", 200), ("pacs", 100)])
def test_same_success_as_the_authors_on_the_same_realisations(task, seeds):
    pool, row = pool_of(task), published[task]
    size = int(row["pool"]); k = min(size, 250)
    theirs = np.unpackbits(reference[f"{task}_identified"], axis=1)[:, :size].astype(bool)[:, :k]
    ours = active.label_curve(pool.predictions, pool.y, active.model_selector, size=size, seeds=seeds, k=k,
                              epsilon=float(row["epsilon"]))["identified"]
    assert abs(active.labels_to(ours) - active.labels_to(theirs)) <= 5
    assert abs(ours.mean() - theirs.mean()) < .03


@pytest.mark.parametrize(("task", "rows", "epsilon"), [("wnli", 71, .47), ("pacs", 300, .45)])
def test_scores_and_belief_are_those_of_their_program(task, rows, epsilon):
    pool = pool_of(task)
    predictions, y = pool.predictions[:rows], pool.y[:rows]
    order, weight = reference[f"{task}_order"], np.full(predictions.shape[1], 1 / predictions.shape[1])
    for t, i in enumerate(order):
        if t % 8 == 0:
            scores, theirs = active.expected_entropy(predictions, weight, epsilon), reference[f"{task}_scores"][t // 8]
            left = np.isfinite(theirs)
            assert np.abs(scores - theirs)[left].max() < 1e-9
            assert scores[i] <= scores[left].min() + 1e-9
        weight = weight * ((1 - epsilon) / epsilon) ** (predictions[i] == y[i]); weight /= weight.sum()
        if t % 8 == 0: assert np.abs(weight - reference[f"{task}_belief"][t // 8]).max() < 1e-9


def test_half_is_random():
    "With epsilon = 1/2 a label says nothing: every contested item is as likely to come first."
    predictions, y = votes(8)
    first = [active.model_selector(predictions, Oracle(y, 8), 1, epsilon=.5, seed=s).index[0] for s in range(400)]
    split = np.flatnonzero(active.contested(predictions))
    count = np.bincount(first, minlength=8)
    assert set(first) == set(split.tolist())
    assert np.abs(count[split] - 400 / split.size).max() < 5 * np.sqrt(400 / split.size)


@pytest.mark.parametrize("name", LABELLERS)
def test_bad_tables_are_refused(name):
    fn, (predictions, y) = methods[name], votes()
    for bad, says in ((predictions[:, :1], "one model"), (np.repeat(predictions[:, :1], 4, axis=1), "tell them apart"),
                      (predictions - 1, "negative")):
        with pytest.raises(ValueError, match=f"`predictions`.*{says}"): fn(bad, Oracle(y, 30), 5)
    with pytest.raises(ValueError, match="`n_classes`"): fn(predictions, Oracle(y, 30), 5, n_classes=2)


@pytest.mark.parametrize("name", LABELLERS)
def test_what_was_bought_is_kept(name):
    "An oracle that breaks down, and one that answers with a class that cannot be."
    fn, (predictions, y) = methods[name], votes()
    order = fn(predictions, Oracle(y, 30), 10).index

    def broken(i):
        if i == order[6]: raise RuntimeError("no power")
        return y[i]

    for oracle, kept in ((broken, 6), (lambda i: 3 if i == order[6] else y[i], 7),
                         (lambda i: -1 if i == order[6] else y[i], 7)):
        with pytest.raises(OracleError) as error: fn(predictions, oracle, 10)
        assert error.value.selection.index.tolist() == order[:kept].tolist()
        assert error.value.selection.info["labels"][:6] == y[order[:6]].tolist()


@pytest.mark.parametrize("name", LABELLERS)
def test_odd_tables_that_must_work(name):
    "Classes that the oracle never gives, a class that no model predicts, two equal models."
    fn, (predictions, _) = methods[name], votes()
    assert fn(predictions, lambda i: 0, 30).k == 30
    assert fn(predictions, lambda i: 3, 30, n_classes=4).info["labels"].tolist() == [3] * 30
    twins = np.column_stack([predictions, predictions[:, 0]])
    run = fn(twins, lambda i: int(predictions[i, 0]), 30)
    assert set(run.info["best"][5:].tolist()) == {0, 5}
    assert np.allclose(run.info["belief"][:, 0], run.info["belief"][:, 5])


@pytest.mark.parametrize("name", LABELLERS)
def test_agreement_items_come_last_and_change_nothing(name):
    predictions, y = votes()
    predictions[::3] = predictions[::3, :1]
    split = active.contested(predictions)
    run = methods[name](predictions, Oracle(y, 30), 30)
    assert split[run.index[:split.sum()]].all() and np.unique(run.info["best"][split.sum() - 1:]).size == 1
    assert np.allclose(run.info["belief"].sum(axis=1), 1)


def test_epsilon_must_make_sense():
    predictions, y = votes()
    for bad in (0, -.1, .51, np.nan):
        with pytest.raises(ValueError, match="`epsilon`"):
            active.model_selector(predictions, Oracle(y, 30), 5, epsilon=bad)
    with pytest.raises(ValueError, match="`epsilons`"):
        active.model_selector_adaptive(predictions, Oracle(y, 30), 5, epsilons=())
    assert active.choose_epsilon(predictions) in active.EPSILONS


def test_active_testing_refuses():
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.ones(3), (20, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="`loss`"): active.active_testing(soft[:, 0], soft, lambda i: 0, 5, loss="mse")
    with pytest.raises(OracleError) as error: active.active_testing(soft[:, 0], soft, lambda i: 3, 5)
    assert error.value.selection.k == 1
    whole = active.active_testing(soft[:, 0], soft, lambda i: i % 3, 20)
    right = -np.log(soft[np.arange(20), 0, np.arange(20) % 3])
    assert np.isclose(whole.info["estimate"], right.mean(), rtol=1e-5)


def test_task_counts_labels_and_success():
    predictions, y = votes(60, 4)
    task = active.labelling_task(predictions, y, size=40)
    assert task.n == 40 and sorted(np.unique(task.fold(3).rows).tolist()) != sorted(np.unique(task.rows).tolist())
    table = Study(task, ["model_selector_adaptive"], [10], seeds=3).run()
    assert (table.error == "").all() and set(table.metric) == {"accuracy", "identified", "gap"}
    whole = table[(table.method == "everything") & (table.metric == "identified")]
    assert (whole.value == 1).all()
    assert (table[table.method == "model_selector_adaptive"].labels == 10).all()
    with pytest.raises(ValueError, match="`size`"): active.labelling_task(predictions, y, size=61)
    with pytest.raises(ValueError, match="`y`"): active.labelling_task(predictions, y[:-1])
