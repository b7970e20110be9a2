"""Views, picks and panels without a browser: published critical values, the matrix by hand, the selection behind a
cell, what is stored. The browser's part is in test_browser.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from selectbench.core.selection import Selection
from selectbench.core.study import Study
from selectbench.core.task import Task
from selectbench.pools.tables import iris
from selectbench.report import picks, views
from selectbench.report.panel import Panel, select, stored, themed

NBS = Path(__file__).resolve().parents[1] / "nbs"


def planted(values, **columns):
    "Results as a study gives them, for values [seeds, methods]; the first method is random."
    n, k = values.shape
    names = ["random", *(f"m{j}" for j in range(1, k))]
    return pd.DataFrame({"task": "planted", "method": np.tile(names, n), "settings": "default", "budget": 10,
                         "error": "", "seed": np.repeat(np.arange(n), k), "metric": "worth",
                         "value": values.ravel(), "size": 10, "total_seconds": 0., "labels": 0,
                         "cached": False} | columns)


@pytest.fixture(scope="module")
def study():
    task = Task.from_dataset(iris(), LogisticRegression(max_iter=200), name="iris")
    study = Study(task, ["k_center", "herding"], [6, 12], seeds=4)
    study.run()
    return study


# A ranking


CRITICAL = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]  # for two to ten methods


@pytest.mark.parametrize("k, q", [*enumerate(CRITICAL, start=2)])
def test_critical_values_are_those_published(k, q):
    "Demšar 2006, table 5a, at 5 %."
    assert abs(views.critical_difference(k, 14) - q * np.sqrt(k * (k + 1) / (6 * 14))) < 2e-3


def test_ranking_by_hand():
    "Three methods, four blocks, one tie; Friedman's p with ties as scipy has it; who is told apart."
    values = np.array([[.1, .5, .9], [.2, .6, .8], [.3, .3, .7], [.9, .4, .5]])
    found = views.ranking(planted(values))
    assert found.set_index("method").mean_rank.round(9).to_dict() == {"m2": 1.25, "m1": 2.375, "random": 2.375}
    assert np.isclose(found.attrs["p"], stats.friedmanchisquare(*values.T).pvalue) and found.attrs["blocks"] == 4
    far = views.ranking(planted(np.arange(5.) + np.zeros((30, 1))))
    assert far.with_best.tolist() == [True, True, False, False, False]  # CD for 5 in 30 is 1.11
    assert np.isclose(views.ranking(planted(np.ones((4, 3)))).attrs["p"], 1)


def test_a_method_that_lacks_a_block_is_left_out():
    table = planted(np.random.default_rng(0).random((5, 4)))
    found = views.ranking(table.drop(index=table.index[(table.method == "m2") & (table.seed == 3)]))
    assert found.attrs["left_out"] == ["m2"] and "m2" not in set(found.method) and len(found) == 3


@pytest.mark.parametrize("bad", [dict(k=1, blocks=3), dict(k=3, blocks=0), dict(k=3, blocks=3, level=1)])
def test_critical_difference_refuses(bad):
    with pytest.raises(ValueError, match="`(k|blocks|level)`"): views.critical_difference(**bad)


# Win or loss


def test_differences_by_hand():
    values = np.random.default_rng(1).random((6, 3)) + np.array([0, 0, 2])
    found = views.differences(planted(values), "m1").set_index("method")
    assert np.isclose(found.gain["m2"], (values[:, 2] - values[:, 1]).mean())
    assert np.isclose(found.p["random"], stats.ttest_rel(values[:, 0], values[:, 1]).pvalue)
    assert found.verdict.to_dict() == {"random": "tie", "m2": "win"}
    assert np.isclose(found.p_holm["m2"], 2 * found.p["m2"])


def test_pools_are_not_mixed():
    "The same seeds in two pools: each pool has its own gain."
    a, b = np.tile([0., 1.], (4, 1)), np.tile([0., -1.], (4, 1))
    both = pd.concat([planted(a), planted(b, task="other")], ignore_index=True)
    found = views.differences(both).set_index("pool").gain
    assert found["planted"] == 1 and found["other"] == -1


def test_choice_refuses_what_is_not_there(study):
    for name, value in dict(pools="no", methods=["no"], metric="no", budgets=[7]).items():
        with pytest.raises(ValueError, match=f"`{name}`"): views.chosen(study, **{name: value})
    with pytest.raises(ValueError, match="`baseline`"): views.differences(study, "no")
    with pytest.raises(ValueError, match="`results`"): views.results_of(3)


def test_the_choice_is_made_again(study):
    "What was written down is what the choice made again is worth."
    t = study.results
    for method, budget, seed in (("k_center", 12, 2), ("random", 6, 1)):
        noted = t[(t.method == method) & (t.budget == budget) & (t.seed == seed)].value.item()
        again = views.cell_selection(study, method, budget, seed)
        assert again.k == budget and study.task.fold(seed).evaluate(again, seed)["accuracy"] == noted
        assert views.cell_pool(study, iris(), seed).n == again.n
    for bad in (dict(method="no"), dict(method="k_center", budget=7), dict(method="k_center", seed=99)):
        with pytest.raises(ValueError, match="`(method|budget|seed)`"): views.cell_selection(study, **bad)


# What was picked


def test_composition_by_hand():
    pool = iris()
    found = picks.composition(Selection(np.arange(30), n=150), pool)
    assert found.pick.tolist() == [1, 0, 0] and found.verdict.tolist() == ["more", "less", "less"]
    low, high = stats.hypergeom(150, 50, 30).ppf([.025, .975]) / 30
    assert np.allclose(found.low, low) and np.allclose(found.high, high)
    with pytest.raises(ValueError, match="`selection`"): picks.composition(Selection([0], n=9), pool)


def test_picks_are_in_the_order_of_choice():
    pool, order = iris(), [120, 3, 77, 51]
    frame = picks.picked_frame(Selection(order, n=150), pool)
    assert frame["index"].tolist() == order
    assert frame["class"].tolist() == ["virginica", "setosa", "versicolor", "versicolor"]
    assert picks.picks(Selection(order, n=150), pool, n=3)["rank"].tolist() == [0, 1, 2]


# Panels


def test_a_panel_draws_what_reads_the_control():
    drawn = []
    panel = Panel("p", {"a": select("a", [1, 2]), "b": select("b", [1, 2])},
                  {"x": lambda a: drawn.append("x") or f"a{a}", "y": lambda b: drawn.append("y") or f"b{b}"},
                  [["a", "x"]])
    panel.controls["a"].value = 2
    assert drawn == ["x", "y", "x"] and panel.still() == "<div>a2</div><div>b1</div>"


def test_ink_leaves_no_black(study):
    drawn = themed(views.curves_figure(study), 'curves "of" iris')
    assert not re.search(r"#([0-9a-f]{2})\1\1\b", drawn) and 'aria-label="curves &quot;of&quot; iris"' in drawn
    assert drawn == themed(views.curves_figure(study), 'curves "of" iris'), "the same figure, the same bytes"


@pytest.mark.parametrize("path", sorted((NBS / "report").glob("*.ipynb")), ids=lambda p: p.stem)
def test_no_widget_is_stored_live(path):
    "A live view without its kernel is an error box, and the state of widgets is large: `panel.stored` drops both."
    text = path.read_text(encoding="utf-8")
    if "widget-view+json" not in text and '"widgets"' not in text: return
    notebook = json.loads(text)
    assert stored(json.loads(text)) == notebook, "store it with selectbench.report.panel.stored"


def test_import_is_light():
    "The command line and the atlas load no ipywidgets."
    code = ("import sys, selectbench, selectbench.report.cli, selectbench.report.atlas; "
            "print('ipywidgets' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
