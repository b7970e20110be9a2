"""How fast facility location and k-center are, against named peers on the same input, in one run.

    python benchmarks/coverage.py                        # whatever peers this Python can import
    python benchmarks/coverage.py --peers /tmp/peers     # and those in a folder made by
        pip install --target /tmp/peers apricot-select==0.6.1 submodlib-py==0.0.3

Each contender runs in a fresh process, all in turn, `--rounds` times over; medians are shown. Seconds go from the
embeddings to the chosen indices in the first call of that process, the similarity matrix of those that need one
included. Memory is the peak above what the process had after its imports and the data. Threads are the libraries'
own choice. A peer that needs an n x n matrix is left out where that matrix passes `--largest` GB.
"""
import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

# `coverage`, this file's name, is also a package that numba looks for.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent: del sys.path[0]

FACILITY = ("selectbench facility_location", "apricot-select lazy", "submodlib-py lazy")
CENTER = ("selectbench k_center", "numpy farthest-first")
MODULE = {"apricot-select lazy": "apricot", "submodlib-py lazy": "submodlib"}  # those that build a matrix
MATRIX_BYTES = {"apricot-select lazy": 12, "submodlib-py lazy": 18}            # per pair, as observed


def embeddings(n, clusters, d=64):
    "Gaussian clusters of uneven size, float32 and seeded; `clusters` 0 is one round Gaussian."
    import numpy as np
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d))
    if clusters:
        share = rng.dirichlet(np.full(clusters, 2.0))
        x += 3 * rng.normal(size=(clusters, d))[rng.choice(clusters, size=n, p=share)]
    return x.astype(np.float32)


def kernel(x):
    "Cosine similarity with negative values at 0: apricot refuses negative ones, and they are served as 0 by all."
    import numpy as np
    from sklearn.metrics.pairwise import cosine_similarity
    s = cosine_similarity(x)
    return np.maximum(s, 0, out=s)


def contender(name):
    "A function (x, k) -> (indices, rises an example or None); its imports happen here, before the clock starts."
    if name == "selectbench facility_location":
        from selectbench.data.coverage import facility_location
        return lambda x, k: (lambda s: (s.index, s.info["rises"]))(facility_location(x, k))
    if name == "selectbench k_center":
        from selectbench.data.coverage import k_center
        return lambda x, k: (k_center(x, k, seed=0).index, None)
    if name == "numpy farthest-first": return farthest_first
    import sklearn.metrics.pairwise  # noqa: F401
    if name == "apricot-select lazy":
        from apricot import FacilityLocationSelection
        return lambda x, k: (FacilityLocationSelection(k, metric="precomputed", optimizer="lazy")
                             .fit(kernel(x)).ranking, None)
    from submodlib.functions.facilityLocation import FacilityLocationFunction
    def submodlib(x, k):
        f = FacilityLocationFunction(n=len(x), mode="dense", sijs=kernel(x), separate_rep=False)
        return [i for i, _ in f.maximize(budget=k, optimizer="LazyGreedy", show_progress=False)], None
    return submodlib


def farthest_first(x, k):
    "What one would write in numpy."
    import numpy as np
    v, gap, index = int(np.random.default_rng(0).integers(len(x))), np.inf, []
    for _ in range(k):
        index.append(v)
        away = x - x[v]
        gap = np.minimum(gap, np.einsum("ij,ij->i", away, away))
        v = int(gap.argmax())
    return index, None


def peak_mb():
    "Peak resident memory of this process, not of the one that started it."
    if sys.platform == "linux":
        return next(int(line.split()[1]) / 2**10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def child(name, n, k, clusters):
    "Run one contender once and print what happened as JSON."
    run = contender(name)
    x = embeddings(n, clusters)
    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    index, rises = run(x, k)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mb": peak_mb() - before, "imports": before, "rises": rises,
                      "index": [int(i) for i in index]}))


def measure(name, n, args):
    "The result of `child` in a fresh process."
    command = [sys.executable, __file__, "--one", name, "--n", str(n), "--k", str(args.k),
               "--clusters", str(args.clusters), *(["--peers", args.peers] if args.peers else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{name} failed at n = {n}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fits(name, n, args):
    "Is this contender here, and is its matrix within `--largest`?"
    if name not in MODULE: return True
    return importlib.util.find_spec(MODULE[name]) is not None and MATRIX_BYTES[name] * n * n / 2**30 <= args.largest


def difference(index, ours, n, clusters):
    "Where two greedy facility locations part, and whether both gains are equal there in double precision."
    if index == ours: return "same indices: yes"
    import numpy as np
    t, same = next(i for i in range(len(ours)) if index[i] != ours[i]), len(set(index) & set(ours))
    x = embeddings(n, clusters).astype(float); x /= np.linalg.norm(x, axis=1, keepdims=True)
    covered = np.maximum(x @ x[ours[:t]].T, 0).max(axis=1, initial=0)
    a, b = (np.maximum(x @ x[i] - covered, 0).sum() for i in (index[t], ours[t]))
    tie = abs(a - b) < 1e-9 * b and ours[t] < index[t]
    why = f"an exact tie, ours takes the lower index ({ours[t]} < {index[t]})" if tie else f"NOT a tie: {a!r}, {b!r}"
    return f"{same} of {len(ours)} the same, parting at pick {t} on {why}"


def compare(title, names, n, args):
    "Print one table: medians over interleaved rounds, the ratio to ours, and whether the indices are the same."
    present = [name for name in names if fits(name, n, args)]
    runs = {name: [] for name in present}
    for _ in range(args.rounds):
        for name in present: runs[name].append(measure(name, n, args))
    median = lambda name, what: statistics.median(run[what] for run in runs[name])
    ours = names[0]
    print(f"\n{title}: n = {n:,}, k = {args.k}, median of {args.rounds} (fastest - slowest)")
    for name in names:
        if name not in present:
            print(f"  {name:32s} left out: not installed, or an n x n matrix too large"); continue
        times = [run["seconds"] for run in runs[name]]
        same = difference(runs[name][0]["index"], runs[ours][0]["index"], n, args.clusters)
        note = f"{median(name, 'seconds') / median(ours, 'seconds'):7.1f} x ours; {same}"
        if name == ours: note = f"{runs[name][0]['rises']:.2f} rises an example" if runs[name][0]["rises"] else ""
        print(f"  {name:32s} {median(name, 'seconds'):8.3f} s ({min(times):.3f} - {max(times):.3f})"
              f"{median(name, 'cpu'):8.3f} s CPU"
              f"  {median(name, 'mb'):7.0f} MB above {median(name, 'imports'):.0f}  {note}", flush=True)
    return {name: median(name, "seconds") for name in present}


def main():
    "Compare at each n, then print the growth."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, nargs="+", default=[2_000, 10_000, 50_000], help="pool sizes")
    parser.add_argument("--k", type=int, default=200, help="how many to choose")
    parser.add_argument("--clusters", type=int, default=100, help="Gaussian clusters in the data; 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="times each contender runs")
    parser.add_argument("--peers", help="a folder with apricot-select and submodlib-py (pip install --target)")
    parser.add_argument("--largest", type=float, default=4, help="GB a peer's matrices may take")
    args = parser.parse_args()
    if args.peers: sys.path.append(str(Path(args.peers).resolve()))
    if args.one: return child(args.one, args.n[0], args.k, args.clusters)
    print(f"64-d float32, {args.clusters or 'no'} clusters, {sys.platform}, Python {sys.version.split()[0]}")
    for title, names in (("facility location (cosine)", FACILITY), ("k-center", CENTER)):
        seconds = {n: compare(title, names, n, args) for n in args.n}
        print(f"\n  growth of {names[0]}:", ", ".join(
            f"n x {b / a:g} -> time x {seconds[b][names[0]] / seconds[a][names[0]]:.1f}" for a, b in pairwise(args.n)))
        peers = [n for n in args.n if len(seconds[n]) > 1]
        for n in peers:
            best = min(s for name, s in seconds[n].items() if name != names[0])
            print(f"  n = {n:,}: {best / seconds[n][names[0]]:.1f} times as fast as the better of the others")


if __name__ == "__main__":
    main()
