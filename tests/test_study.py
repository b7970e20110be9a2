"""A study is resumable after a kill, survives failing methods, and keeps its seeds apart."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression

from selectbench import Selection, Setting, Study, Task, method

SCRIPT = """
import sys, time
from pathlib import Path
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from selectbench import Study, Task
from selectbench.core import study

class Slow(LogisticRegression):
    "Leaves a mark for each training that finished, slowly."
    def fit(self, X, y, sample_weight=None):
        time.sleep(0.15)
        out = super().fit(X, y, sample_weight)
        with open(sys.argv[1], "a") as f: f.write(f"{len(X)}\\n")
        return out

task = Task.from_dataset(load_wine(return_X_y=True), Slow(max_iter=500), name="wine")
results = Study(task, [], budgets=[5, 10, 20], seeds=4).run()
print(len(results), int((results["error"] != "").sum()))
"""


@pytest.fixture
def task(monkeypatch, tmp_path):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path / "cache"))
    return Task.from_dataset(load_wine(return_X_y=True), LogisticRegression(max_iter=500), name="wine")


def test_killed_study_repeats_no_finished_cell(tmp_path):
    "SIGKILL half-way, start again: what finished before the kill is not trained twice, but for the cell in flight."
    script, marks = tmp_path / "run.py", tmp_path / "marks"
    script.write_text(textwrap.dedent(SCRIPT)); marks.touch()
    env = os.environ | {"SELECTBENCH_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(script), str(marks)]
    first = subprocess.Popen(command, env=env)
    while len(marks.read_text().split()) < 6: time.sleep(.02); assert first.poll() is None
    first.send_signal(signal.SIGKILL); first.wait()
    before = len(marks.read_text().split())
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    cells = 4 * (3 + 1)
    assert before < cells and done.stdout.split() == [str(cells), "0"]
    assert len(marks.read_text().split()) in (cells, cells + 1)


def test_failing_method_gives_rows_and_the_rest_completes(task):
    @method("data", paper="planted", name="fails_in_test_study")
    def fails(features, k): raise RuntimeError("no luck")

    study = Study(task, [fails], budgets=[5, 10], seeds=2)
    results = study.run()
    errors = results[results["method"] == "fails_in_test_study"]
    assert len(errors) == 4 and errors["error"].str.contains("no luck").all() and errors["value"].isna().all()
    assert (results[results["method"] != "fails_in_test_study"]["error"] == "").all()
    assert "fails_in_test_study" not in set(study.summary()["method"])


def test_unservable_signal_is_an_error_row(task):
    @method("data", paper="planted", name="reads_passes_in_test_study")
    def reads(passes, k): return Selection(np.arange(k), n=len(passes))

    results = Study(task, [reads], budgets=[5], seeds=1).run()
    assert results["error"].str.contains("cannot provide `passes`").sum() == 1


def test_selection_and_training_seeds_are_apart(task):
    "With training seeds given, each selection is evaluated under each of them."
    results = Study(task, [], budgets=[5], seeds=3, train_seeds=2).run().query("method == 'random'")
    pairs = sorted(zip(results["seed"], results["train_seed"], strict=True))
    assert pairs == [(s, t) for s in range(3) for t in range(2)]


def test_seeds_pair_with_random_on_the_same_split(task):
    "A method that is random has gain zero exactly: the comparison is within the seed."
    @method("data", paper="planted", name="random_again_in_test_study")
    def again(n, k, *, seed=0): return Selection(np.random.default_rng(seed).permutation(n)[:k], n=n)

    row = Study(task, [again], budgets=[8], seeds=3).summary().set_index("method").loc["random_again_in_test_study"]
    assert row["gain"] == 0 and row["gain_ci95"] == 0 and row["verdict"] == "tie"


def test_results_do_not_depend_on_jobs(task):
    one = Study(task, [], budgets=[5, 9], seeds=2).run(n_jobs=1)
    two = Study(task, [], budgets=[5, 9], seeds=2).run(n_jobs=2)
    assert two["cached"].all() and one["value"].tolist() == two["value"].tolist()


def test_study_moves_to_dask(task):
    dask = pytest.importorskip("distributed", reason="needs the dask extra")
    import joblib
    client = dask.Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None)
    with client, joblib.parallel_config("dask"): there = Study(task, [], budgets=[5], seeds=2).run(n_jobs=-1)
    here = Study(task, [], budgets=[5], seeds=2).run()
    assert (there["error"] == "").all() and there["value"].tolist() == here["value"].tolist()


def test_tuned_settings_are_told_apart(task):
    rows = Study(task, ["herding", Setting("herding", {}, label="herding tuned", trials=5)], budgets=[5], seeds=1).run()
    rows = rows.set_index("method")
    assert rows.loc["herding", "settings"] == "default" and rows.loc["herding tuned", "settings"] == "tuned"
    assert rows.loc["herding tuned", "total_seconds"] > 2 * rows.loc["herding tuned", "evaluate_seconds"]


@pytest.mark.parametrize("bad", [{"budgets": []}, {"seeds": [1, 1]}, {"methods": ["herding", "herding"]}])
def test_bad_study_names_the_argument(task, bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}`"):
        Study(task, **({"methods": [], "budgets": [5], "seeds": 1} | bad))


def test_only_evaluate_sees_the_test_part(task):
    "Poison the test rows: every signal a table task can give stays the same to the bit."
    from selectbench.core.task import _split
    X, y = load_wine(return_X_y=True)
    poisoned = X.copy(); poisoned[_split(X, y, 0, .3, .1, True)[2]] = 1e6
    other = Task.from_dataset((poisoned, y), LogisticRegression(max_iter=500), name="wine")
    for name in ("features", "y", "target_features", "target_y", "embeddings", "probs", "losses", "gradients"):
        assert np.array_equal(task.signal(name), other.signal(name)), name


def test_package_source_has_no_stray_study_state():
    "Methods planted above live in this process only."
    assert "fails_in_test_study" not in (Path(__file__).parents[1] / "selectbench" / "index.json").read_text()


def test_methods_that_buy_labels_run_in_a_study(tmp_path, monkeypatch):
    "A fresh oracle for every cell, on the meter, keyed by the task: another label is another cell, n_jobs no matter."
    from selectbench.model.active import labelling_task
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=60)
    predictions = np.where(rng.random((60, 5)) < np.linspace(.4, .9, 5), y[:, None], rng.integers(3, size=(60, 5)))
    names = ["random_labelling", "committee_entropy"]
    study = lambda y: Study(labelling_task(predictions, y, size=40), names, [3, 9], 2)
    first, again = study(y), study(y)
    rows = first.run()
    assert not len(first.errors()) and not rows["cached"].any()
    bought = rows[rows["method"] == "committee_entropy"]
    assert (bought["labels"] == bought["budget"]).all()
    assert again.run()["cached"].all() and again.run(n_jobs=2)["value"].tolist() == rows["value"].tolist()
    other = study((y + 1) % 3)
    assert not other.run()["cached"].any()


def test_a_policy_in_a_study():
    "A policy is made from the task's signals and the budget, and evaluated in place of a selection."
    from dataclasses import KW_ONLY, dataclass

    @method("token", paper="An example", kind="policy", name="policy_example")
    @dataclass(frozen=True)
    class Example:
        groups: np.ndarray
        sparsity: float
        _: KW_ONLY
        rate: float = 2.0

        def init(self, n, *, documents, steps, seed): return {}
        def step(self, state, signals): return state, None

    worth = lambda chosen, seed: {"score": chosen.rate * chosen.sparsity + chosen.groups.sum() + seed}
    task = Task("policies", signals={"n": 3, "groups": np.array([0, 1, 1])}, evaluate=worth, fingerprint="policies",
                accepts=("policy",))
    study = Study(task, [Setting(Example, {"rate": 4.0}, label="four"), "policy_example"], budgets=[0.25, 0.5], seeds=2)
    table = study.run().set_index(["method", "budget", "seed"])["value"]
    assert table["four", 0.5, 1] == 4 * 0.5 + 2 + 1 and table["policy_example", 0.25, 0] == 2 * 0.25 + 2
    assert len(study.errors()) == len(study.run().query("method in ('random', 'everything')"))  # no policies, these
    with pytest.raises(ValueError, match="`sparsity`"): Example(np.array([0, 1]), 1.5)
    with pytest.raises(ValueError, match="`groups`"): Example(np.array([0.5, 1]), 0.5)
