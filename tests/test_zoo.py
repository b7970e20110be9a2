"""What the zoo and its signals promise across processes: threads, the global generators, the cache."""
import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

PROGRAM = """
import sys
import numpy as np, torch
from sklearn.datasets import load_digits
from selectbench.zoo.classifier import train_classifier
from selectbench.zoo.tables import zoo_predictions
torch.set_num_threads(int(sys.argv[1]))
X, y = load_digits(return_X_y=True)
net = train_classifier.__wrapped__(X[:1200], y[:1200], seed=0)
zoo = zoo_predictions.__wrapped__(X[:600], y[:600], np.arange(300), seed=0)
np.savez(sys.argv[2], probs=net.probs(X), gradients=net.gradients(X[:64], y[:64]), curve=net.curve,
         projected=net.gradients(X[:64], y[:64], project=64), soft=zoo["soft_predictions"])
"""


def run(threads, path):
    env = {**os.environ, **{v: str(threads) for v in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
           "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", PROGRAM, str(threads), path], check=True, env=env)
    return dict(np.load(path))


def test_one_and_two_threads_agree(tmp_path):
    one, two = (run(n, str(tmp_path / f"{n}.npz")) for n in (1, 2))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5, rtol=1e-5, err_msg=name)


def test_training_leaves_global_generators_alone():
    torch = pytest.importorskip("torch")
    from selectbench.zoo.classifier import train_classifier
    from selectbench.zoo.tables import zoo_predictions
    X, y = load_digits(return_X_y=True)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the state that must not move
    train_classifier.__wrapped__(X[:200], y[:200], epochs=2).gradients(X[:20], y[:20], project=8)
    zoo_predictions.__wrapped__(X[:200], y[:200], np.arange(100))
    assert (torch.get_rng_state() == before[0]).all()
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_a_classifier_comes_back_from_the_cache_as_it_went_in(tmp_path, monkeypatch):
    monkeypatch.setenv("SELECTBENCH_CACHE", str(tmp_path))
    from selectbench.zoo.classifier import train_classifier
    X, y = load_digits(return_X_y=True)
    made, found = (train_classifier(X[:300], y[:300], epochs=3, seed=5) for _ in range(2))
    assert train_classifier.is_cached(X[:300], y[:300], epochs=3, seed=5)
    assert made.fingerprint == found.fingerprint and (made.probs(X) == found.probs(X)).all()


def test_one_weight_changes_the_fingerprint():
    from selectbench.zoo.classifier import Classifier, train_classifier
    X, y = load_digits(return_X_y=True)
    net = train_classifier.__wrapped__(X[:100], y[:100], n_classes=10, epochs=1)
    weights = {k: v.clone() for k, v in net.weights.items()}
    weights["0.bias"][3] += 1e-6
    assert Classifier(weights, net.mean, net.scale, net.curve).fingerprint != net.fingerprint


@pytest.mark.parametrize("table", ["digits", "breast_cancer", "wine", "iris"])
def test_the_zoo_serves_every_bundled_table(table):
    from selectbench.pools import tables
    from selectbench.signals.table import zoo_soft_predictions
    pool = getattr(tables, table)()
    soft = zoo_soft_predictions(pool.features, pool.y)
    accuracy = (soft.argmax(2) == pool.y[:, None]).mean(0)
    assert soft.shape[1] >= 60 and np.isfinite(soft).all() and np.allclose(soft.sum(2), 1, atol=1e-4)
    assert accuracy.max() > 0.94 and accuracy.max() - accuracy.min() > 0.3
    assert len(np.unique(accuracy.round(2))) >= 10
