"""Facility location, k-center and herding beyond their notebook: hard pools, memory, threads, and the benchmark."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from selectbench.data import coverage
from selectbench.data.coverage import facility_location, herding, k_center

ROOT = Path(__file__).parent.parent
GRID = hnp.arrays(np.float32, st.tuples(st.integers(2, 14), st.integers(1, 3)), elements=st.integers(-2, 2))


def naive(x, k):
    "Greedy facility location from the full matrix; the gains it saw, and its choices with ties to the lower index."
    x = x.astype(float)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    u = x / np.where(norm > 0, norm, 1)
    s, covered, chosen = u @ u.T, np.zeros(len(x)), []
    for _ in range(k):
        gain = np.maximum(s - covered, 0).sum(axis=1)
        gain[chosen] = -1
        chosen.append(int(np.flatnonzero(gain >= gain.max() - 1e-5)[0]))
        covered = np.maximum(covered, s[chosen[-1]])
    return chosen


@settings(max_examples=150, deadline=None)
@given(GRID)
@example(np.array([[-1, -1], [0, -1], [2, -2], [0, 2], [2, 2], [2, 2]], np.float32))
def test_facility_location_is_greedy_on_pools_full_of_ties(x):
    "Grid points: duplicates, opposite directions, zero vectors and exact ties, ordered to the end."
    assert facility_location(x, len(x)).index.tolist() == naive(x, len(x))


@settings(max_examples=100, deadline=None)
@given(GRID, st.integers(0, 3))
def test_all_are_orderings_on_pools_full_of_ties(x, seed):
    for pick in (k_center(x, len(x), seed=seed), herding(x, len(x)), facility_location(x, len(x), metric="dot")):
        assert sorted(pick.index.tolist()) == list(range(len(x)))
    assert k_center(x, len(x), seed=seed).info["radius"] == 0


def test_gains_never_rise_and_sum_to_the_objective():
    x = np.random.default_rng(0).normal(size=(800, 16)).astype(np.float32)
    pick = facility_location(x, 200)
    gains = pick.info["gains"]
    assert np.all(np.diff(gains) <= 1e-4) and np.isclose(gains.sum(), pick.info["objective"])
    left = np.setdiff1d(np.arange(800), pick.index)
    assert pick.score[left].max() <= gains[-1] + 1e-4


@pytest.mark.parametrize("make", ["round", "clusters", "narrow", "shifted"])
def test_slack_covers_the_error_of_single_precision(make, monkeypatch):
    "At every step, the running gain of every candidate is within its slack of the double-precision one."
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3000, 32))
    if make == "clusters": x += 4 * rng.normal(size=(20, 32))[rng.integers(20, size=3000)]
    if make == "narrow": x *= 0.01 ** np.linspace(0, 1, 32)
    if make == "shifted": x += 20
    x, seen, best = x.astype(np.float32), [], coverage._best

    def watched(gain, slack, exact):
        left = np.flatnonzero(gain > -np.inf)
        seen.append((np.abs(exact(left) - gain[left]) / (slack[left] + 1e-9)).max())
        return best(gain, slack, exact)
    monkeypatch.setattr(coverage, "_best", watched)
    facility_location(x, 60)
    assert len(seen) == 60 and max(seen) < 0.5


def test_k_center_far_from_the_origin():
    "Squared distances are differences of large numbers there: the choice must not suffer."
    x = np.random.default_rng(2).integers(0, 64, size=(400, 5)).astype(np.float32)
    assert np.array_equal(k_center(x, 50).index, k_center(x + 100_000, 50).index)


def test_metric_is_checked():
    with pytest.raises(ValueError, match="metric"): facility_location(np.eye(3, dtype=np.float32), 1, metric="l1")


RUN = """
import json, resource, sys
import numpy as np
from selectbench.data.coverage import facility_location
x = np.random.default_rng(0).normal(size=(int(sys.argv[1]), 64)).astype(np.float32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
index = facility_location(x, int(sys.argv[2])).index.tolist()
print(json.dumps([peak() - before, index]))
"""


def run(n, k, **env):
    "Peak MB above the imports, and the choice, in a fresh process."
    done = subprocess.run([sys.executable, "-c", RUN, str(n), str(k)], capture_output=True, text=True, check=True,
                          env=os.environ | env)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in Linux units")
def test_memory_stays_far_below_the_matrix():
    "The matrix of 10,000 would take 400 MB in single precision."
    assert run(10_000, 20)[0] < 100


def test_choice_does_not_depend_on_threads():
    one, two = (run(2_000, 100, OMP_NUM_THREADS=t, OPENBLAS_NUM_THREADS=t)[1] for t in "12")
    assert one == two


def test_benchmark_runs_small():
    command = [sys.executable, ROOT / "benchmarks/coverage.py", "--n", "200", "400", "--k", "10", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "growth" in done.stdout and "same indices: yes" in done.stdout and "NOT" not in done.stdout
