"""The tour's result as a table of one row per study, for the home page: `docs/build.py tour` writes it anew."""

from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "figures" / "tour.csv"


def row(family, study):
    "One study at its smallest budget: how many methods beat random, how many lost to it, and the best of them."
    from selectbench.core.study import BASELINES
    summary = study.summary()
    metric, budget = summary["metric"].iloc[0], min(study.budgets)
    at = summary[(summary["metric"] == metric) & (summary["budget"] == budget)]
    tried = at[~at["method"].isin(BASELINES)]
    best, verdict = tried.loc[tried["gain"].idxmax()], tried["verdict"].value_counts()
    random = at[at["method"] == "random"].iloc[0]
    return {"family": family, "pool": study.task.name, "budget": budget, "metric": metric, "seeds": len(study.seeds),
            "methods": len(tried), "wins": verdict.get("win", 0), "losses": verdict.get("loss", 0),
            "random": random["mean"], "best": best["method"], "gain": best["gain"], "ci95": best["gain_ci95"]}


def write():
    "Run every study of the tour, cells from the cache where they are there, and write the table."
    from threadpoolctl import threadpool_limits

    from selectbench.report.tour import STUDIES
    rows = []
    for family, make in STUDIES.items():
        study = make()
        with threadpool_limits(1): study.run()
        rows.append(row(family, study))
    pd.DataFrame(rows).round(4).to_csv(TABLE, index=False)
