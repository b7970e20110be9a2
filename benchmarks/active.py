"""How fast Model Selector and CODA ask for labels, and CODA against its authors' program, in one run.

    python benchmarks/active.py                    # ours alone
    git clone https://github.com/justinkay/coda ../coda && git -C ../coda checkout f240a4cc
    python benchmarks/active.py --coda ../coda   # and the authors' (needs torch, tqdm, matplotlib, pillow)

Predictions are simulated (seeded); for the comparison the `coda_digits` pool is taken where SELECTBENCH_DATA holds it.
Time per label is the difference of a long and a short run over the difference of their labels, so that what is done
once does not count; that part is shown as `start`. The authors' time is from the first query to the last label, their
start left out. Medians of `--rounds`. Threads are the libraries' own choice.
"""
import argparse
import random
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent: del sys.path[0]

import numpy as np

from selectbench.model.active import coda, model_selector
from selectbench.pools.fetch import available
from selectbench.pools.published import coda_digits

SHORT, LONG = 5, 25  # labels


def simulated(n, m, c=10, seed=0):
    "Probabilities f32[n, m, c] of models of 50 to 95 % accuracy, and the labels int64[n]."
    rng = np.random.default_rng(seed)
    y = rng.integers(c, size=n)
    said = np.where(rng.random((n, m)) < np.linspace(.5, .95, m), y[:, None], rng.integers(c, size=(n, m)))
    soft = rng.dirichlet(np.full(c, .5), (n, m)) + 2 * np.eye(c)[said]
    return (soft / soft.sum(2, keepdims=True)).astype(np.float32), y


def seconds(run, k):
    start = time.perf_counter()
    run(k)
    return time.perf_counter() - start


def per_label(run, rounds):
    "Median seconds per label, and of the start, of `run(k)`."
    run(2)  # compiles, fills caches
    pairs = [(seconds(run, SHORT), seconds(run, LONG)) for _ in range(rounds)]
    step = statistics.median((b - a) / (LONG - SHORT) for a, b in pairs)
    return step, max(statistics.median(a for a, _ in pairs) - SHORT * step, 0)


def growth(title, make, sizes, rounds):
    "Print the time per label at each (n, m), then how it grows from one size to the next."
    print(f"\n{title}")
    times = {}
    for n, m in sizes:
        step, start = per_label(make(n, m), rounds)
        times[n, m] = step
        print(f"  {n:>7,} items x {m:>4} models: {1e3 * step:9.2f} ms a label, start {start:7.3f} s", flush=True)
    for (a, b) in pairwise(sizes):
        print(f"  items x {b[0] / a[0]:g}, models x {b[1] / a[1]:g} -> time x {times[b] / times[a]:.2f}")
    return times


def ours(n, m):
    soft, y = simulated(n, m)
    return lambda k: coda(soft, y.__getitem__, k)


def selector(n, m):
    soft, y = simulated(n, m)
    said = soft.argmax(2)
    return lambda k: model_selector(said, y.__getitem__, k, epsilon=.45, n_classes=10)


def theirs(folder, soft, y, k):
    "The authors' program for `k` labels: seconds, queries, and at each step the gap of its two best scores."
    if folder not in sys.path: sys.path.append(folder)
    import coda.coda as program
    import torch
    program.tqdm = lambda x, **_: x
    random.seed(0)
    data = type("Data", (), {"preds": torch.tensor(soft.transpose(1, 0, 2).copy())})
    state, gaps = program.CODA(data), []
    scores = state.eig_batched

    def watched(**options):
        gain, items = scores(**options)
        top = gain.flatten().topk(2).values
        gaps.append(float(top[0] - top[1]))
        return gain, items

    state.eig_batched, queries = watched, []
    start = time.perf_counter()
    for _ in range(k):
        item, gain = state.get_next_item_to_label()
        state.add_label(item, int(y[item]), gain)
        state.get_best_model_prediction()
        queries.append(item)
    return time.perf_counter() - start, queries, gaps


def compare(folder, k, rounds):
    "CODA and its authors' program on one tensor: time per label, ratio, and whether the queries are the same."
    digits = coda_digits() if available("coda_digits") else None
    soft, y = (digits.soft_predictions, digits.y) if digits else simulated(500, 32)
    what = "the digits" if digits else "a simulated tensor"
    print(f"\nCODA on {what}, {' x '.join(map(str, soft.shape))}, {k} labels")
    step, start = per_label(lambda k: coda(soft, y.__getitem__, k), rounds)
    print(f"  selectbench         {1e3 * step:10.2f} ms a label, start {start:.3f} s")
    if not folder:
        print("  the authors' program was not timed: give a checkout of it with --coda"); return
    index = coda(soft, y.__getitem__, k).index.tolist()
    total, queries, gaps = theirs(folder, soft, y, k)
    print(f"  the authors' program{1e3 * total / k:10.2f} ms a label: {total / k / step:.0f} times ours")
    whole = statistics.median(seconds(lambda k: coda(soft, y.__getitem__, k), k) for _ in range(rounds))
    print(f"  all {k} labels, our start included: {whole:.3f} s against {total:.3f} s, {total / whole:.0f} times")
    at = next((t for t in range(k) if index[t] != queries[t]), None)
    print("  same queries in the same order: " + ("yes" if at is None else
          f"until query {at}, where its two best scores differ by {gaps[at]:.1g} (single precision tells 3e-6)"))


def main():
    "Print all tables."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coda", help="a checkout of github.com/justinkay/coda")
    parser.add_argument("--labels", type=int, default=30, help="labels bought in the comparison")
    parser.add_argument("--rounds", type=int, default=3, help="times each of ours runs")
    args = parser.parse_args()
    print(f"{sys.platform}, Python {sys.version.split()[0]}, numpy {np.__version__}")
    growth("Model Selector (epsilon .45)", selector, [(2_500, 100), (5_000, 100), (10_000, 100)], args.rounds)
    growth("Model Selector (epsilon .45)", selector, [(10_000, 25), (10_000, 50)], args.rounds)
    growth("CODA, 10 classes", ours, [(500, 32), (1_000, 32), (2_000, 32), (4_000, 32)], args.rounds)
    growth("CODA, 10 classes", ours, [(1_000, 16), (1_000, 64), (1_000, 128)], args.rounds)
    compare(args.coda and str(Path(args.coda).resolve()), args.labels, args.rounds)


if __name__ == "__main__":
    main()
