"""DSIR against `data-selection` 1.0.3 and ZIP-FIT against a plain double loop over gzip, on the same text, in one run.

    pip install --no-deps --target FOLDER data-selection nltk && python benchmarks/importance.py --peers FOLDER

Needs the published collections (SELECTBENCH_DATA or the network). The pool is wikitext, Shakespeare, commonsense
questions, headlines and docstrings, repeated with a tenth of the words exchanged until it has `--mb` megabytes of
jsonl; the target is the questions of gsm8k. Every run is a fresh process, its clock started after imports, reading
of the texts and compilation; ours is one process with one thread for DSIR. `data-selection` gets the time of
fitting and weighing, with files as it wants them. Memory is the peak above what the process had when the clock started.
"""
import argparse
import json
import math
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# `coverage`, the file beside this one, is also a package that numba looks for.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent: del sys.path[0]


def source():
    "The texts of five collections, shuffled."
    import numpy as np

    from selectbench.pools.text import docstrings, headlines, llm_adapters, tinyshakespeare, wikitext2
    questions = [llm_adapters(task, "train").texts for task in ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge")]
    texts = sum([wikitext2(s).texts for s in ("valid", "test")] + questions
                + [tinyshakespeare().texts, headlines().texts, docstrings().texts], [])
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def write_pool(folder, megabytes):
    "pool.jsonl of about `megabytes` and target.jsonl in `folder`; the first round of the texts is as published."
    import numpy as np

    from selectbench.pools.text import gsm8k
    rng, texts, size, round_ = np.random.default_rng(1), source(), 0, 0
    words = re.findall(r"\w+", " ".join(texts[:2000]))
    with (folder / "pool.jsonl").open("w") as f:
        while size < megabytes * 1e6:
            for text in texts:
                if round_:
                    parts = re.split(r"(\w+)", text)
                    for i in np.flatnonzero(rng.random(len(parts) // 2) < .1):
                        parts[2 * i + 1] = words[rng.integers(len(words))]
                    text = "".join(parts)
                size += f.write(json.dumps({"text": text}) + "\n")
                if size >= megabytes * 1e6: break
            round_ += 1
    (folder / "target.jsonl").write_text("".join(json.dumps({"text": q}) + "\n" for q in gsm8k().questions))


def read(folder, name): return [json.loads(line)["text"] for line in (folder / f"{name}.jsonl").open()]


def peak_mb():
    "Peak resident memory of this process."
    if sys.platform == "linux":
        return next(int(x.split()[1]) / 2**10 for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class FromDisk:
    "Shards of 2,000 texts, read from pool.jsonl when their turn comes."
    def __init__(self, folder): self.file = folder / "pool.jsonl"

    def __iter__(self):
        shard = []
        with self.file.open() as f:
            for line in f:
                shard.append(json.loads(line)["text"])
                if len(shard) == 2000:
                    yield shard
                    shard = []
        yield shard


def ours(folder, hashing):
    "(weigh, what it takes): log importance weights of the pool on disk."
    from selectbench.data.importance import HashedNgrams, log_importance
    features, target = HashedNgrams(hashing=hashing), read(folder, "target")
    log_importance([["a warm up"]], ["of the compiler"], features=features)
    return lambda: log_importance(FromDisk(folder), target, features=features)


def theirs(folder, processes):
    "The same by the authors' program, in the order of the file."
    import numpy as np
    from data_selection import HashedNgramDSIR
    program = HashedNgramDSIR([str(folder / "pool.jsonl")], [str(folder / "target.jsonl")],
                              tempfile.mkdtemp(dir=folder), num_proc=processes)

    def weigh():
        program.fit_importance_estimator(num_tokens_to_fit="all")
        program.compute_importance_weights()
        parts = [np.load(Path(program.log_importance_weights_dir) / f"{i}.npy") for i in range(processes)]
        weights = np.empty(sum(map(len, parts)))
        for i, part in enumerate(parts): weights[i::processes] = part
        return weights
    return weigh


def pairs(folder, n):
    "`n` pool texts and 40 targets, at most 600 characters each."
    return [t[:600] for t in read(folder, "pool") if len(t) > 200][:n], [t[:600] for t in read(folder, "target")[:40]]


def plain(folder, n, once):
    "Mean alignment by a double loop over gzip; `once`: the lengths of single texts are kept, as the authors do."
    import gzip
    texts, target = ([t.encode() for t in some] for some in pairs(folder, n))
    size = lambda x: len(gzip.compress(x))

    def alignment(x, q, c, d): return 1 - (size(x + q) - min(c, d)) / max(c, d)

    def loop():
        if once:
            known = [size(q) for q in target]
            return [statistics.fmean(alignment(x, q, c, d) for q, d in zip(target, known, strict=True))
                    for x in texts for c in [size(x)]]
        return [statistics.fmean(alignment(x, q, size(x), size(q)) for q in target) for x in texts]
    return loop


def zipped(folder, n):
    "The same by `zip_fit`."
    from selectbench.data.importance import zip_fit
    texts, target = pairs(folder, n)
    zip_fit(["a warm up", "of the compiler"], ["b"], 1)
    return lambda: zip_fit(texts, target, 1).score


CONTENDERS = {"fast": lambda f, n: ours(f, "fast"), "sha256": lambda f, n: ours(f, "sha256"), "peer": theirs,
              "zip_fit": zipped, "double loop": lambda f, n: plain(f, n, False),
              "double loop, singles kept": lambda f, n: plain(f, n, True)}


def child(name, folder, n):
    "Run one contender once; print seconds and memory, leave its numbers in `folder`."
    import numpy as np
    run = CONTENDERS[name](folder, n)
    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    values = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    np.save(folder / f"{name}-{n}.npy", np.asarray(values))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mb": peak_mb() - before, "before": before}))


def measure(name, folder, n, args):
    "The result of `child` in a fresh process."
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--n", str(n)]
    done = subprocess.run(command + (["--peers", args.peers] if args.peers else []), capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(names, folder, n, args):
    "name -> median seconds, over interleaved rounds; prints a line each."
    runs = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names: runs[name].append(measure(name, folder, n, args))
    median = {name: statistics.median(r["seconds"] for r in rs) for name, rs in runs.items()}
    for name, rs in runs.items():
        print(f"  {name:28s}{median[name]:9.2f} s ({min(r['seconds'] for r in rs):.2f} - "
              f"{max(r['seconds'] for r in rs):.2f}){statistics.median(r['cpu'] for r in rs):9.2f} s CPU"
              f"{statistics.median(r['mb'] for r in rs):7.0f} MB above {rs[0]['before']:.0f}", flush=True)
    return median


def slope(sizes, seconds):
    "Of log seconds over log size, by least squares."
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    a, b = statistics.fmean(x), statistics.fmean(y)
    return sum((u - a) * (v - b) for u, v in zip(x, y, strict=True)) / sum((u - a) ** 2 for u in x)


def largest_difference(folder, a, b):
    "Of two arrays of numbers left by `child`."
    import numpy as np
    return float(np.abs(np.load(folder / f"{a}.npy") - np.load(folder / f"{b}.npy")).max())


def dsir(folder, args):
    "DSIR at full size against the peer, then ours at a half and a quarter."
    seconds = {}
    for share in (1, 2, 4):
        write_pool(folder, args.mb / share)
        print(f"DSIR, {args.mb / share:g} MB, {sum(1 for _ in (folder / 'pool.jsonl').open()):,} documents")
        seconds[share] = compare(["fast", "sha256"], folder, 1, args)
        if share > 1 or not args.peers: continue
        for processes in args.processes:
            peer = compare(["peer"], folder, processes, args)["peer"]
            apart = largest_difference(folder, f"peer-{processes}", "sha256-1")
            print(f"  data-selection, processes: {processes}, takes {peer / seconds[1]['fast']:.1f} (fast) and "
                  f"{peer / seconds[1]['sha256']:.1f} (sha256) times as long as ours in one thread; largest difference "
                  f"of a log weight {apart:.1e}", flush=True)
    for name in ("fast", "sha256"):
        growth = slope([1 / s for s in seconds], [s[name] for s in seconds.values()])
        print(f"  growth of {name}: log-log slope {growth:.2f}")


def zip_fits(folder, args):
    "ZIP-FIT against the double loops at three sizes."
    seconds = {}
    for n in args.texts:
        print(f"ZIP-FIT, {n:,} texts x 40 targets of at most 600 characters")
        seconds[n] = compare(["zip_fit", "double loop", "double loop, singles kept"], folder, n, args)
        ratios = [seconds[n][name] / seconds[n]["zip_fit"] for name in ("double loop", "double loop, singles kept")]
        print(f"  ours is {ratios[0]:.1f} times as fast, {ratios[1]:.1f} times if single lengths are kept; largest "
              f"difference of a score {largest_difference(folder, f'double loop-{n}', f'zip_fit-{n}'):.1e}", flush=True)
    print(f"  growth of zip_fit: log-log slope {slope(args.texts, [s['zip_fit'] for s in seconds.values()]):.2f}")


def kl_reductions(draws=20, share=.2):
    """Print how far the KL reductions of what both hashes draw are apart, by a third hash, over `draws` of each kind.

    Of the published texts with 100 tokens, as data-selection's default has it. Each draw is another hash: the fast one
    by its seed, sha256 by its number of buckets."""
    import numpy as np
    from scipy.stats import sem, t

    from selectbench.core.selection import gumbel_top_k
    from selectbench.data.importance import HashedNgrams, kl_reduction, log_importance
    from selectbench.pools.text import gsm8k
    texts, target, judge = source(), gsm8k().questions, HashedNgrams(2, 9973, "sha256")
    bags, goal = judge(texts), judge.counts(target)
    long = judge.sums(texts, np.zeros(judge.buckets))[1] >= 100
    k, total = round(share * long.sum()), lambda rows: np.asarray(bags[rows].sum(0)).ravel()
    raw = total(np.arange(len(texts)))
    reach = lambda weight: np.mean([kl_reduction(goal, raw, total(gumbel_top_k(weight, k, s)[0])) for s in range(10)])
    of = lambda features: reach(np.where(long, log_importance([texts], target, features=features), -np.inf))
    kinds = {"fast": [HashedNgrams(seed=i) for i in range(draws)],
             "sha256": [HashedNgrams(2, 9000 + 100 * i, "sha256") for i in range(draws)]}
    found = {name: np.array([of(features) for features in some]) for name, some in kinds.items()}
    gap, width = found["fast"] - found["sha256"], t.ppf(.975, draws - 1)
    scale, chance = found["sha256"].mean(), reach(np.where(long, 0, -np.inf))
    print(f"KL reduction of {k:,} drawn of {long.sum():,} with 100 tokens, {draws} hashes of each kind: fast "
          f"{found['fast'].mean():.4f}, sha256 {scale:.4f}, random {chance:.4f}; difference {gap.mean() / scale:+.2%} "
          f"± {width * sem(gap) / scale:.2%}; between hashes of a kind {found['sha256'].std(ddof=1) / scale:.2%}",
          flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=50, help="megabytes of the pool for DSIR")
    parser.add_argument("--texts", type=int, nargs="+", default=[250, 1000, 4000], help="pool sizes for ZIP-FIT")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of data-selection")
    parser.add_argument("--rounds", type=int, default=3, help="times each contender runs")
    parser.add_argument("--peers", help="a folder with data-selection 1.0.3 and nltk")
    parser.add_argument("--only", choices=["dsir", "zip_fit", "kl"])
    for hidden in ("--one", "--folder"): parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers: sys.path.append(str(Path(args.peers).resolve()))
    if args.one: return child(args.one, Path(args.folder), args.n)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.only in (None, "dsir"): dsir(folder, args)
        if args.only in (None, "kl"): kl_reductions()
        write_pool(folder, 10)
        if args.only in (None, "zip_fit"): zip_fits(folder, args)


if __name__ == "__main__":
    main()
