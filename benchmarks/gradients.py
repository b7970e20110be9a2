"""How fast per-example gradients are computed and projected, against named peers on the same input, in one run.

    python benchmarks/gradients.py                       # ours and the floor
    python benchmarks/gradients.py --peers ../peers      # and what is in a folder made by
        pip install --no-deps --target ../peers traker==0.3.2 dattri==0.3.0

Digits, 1,797 rows, an MLP of 64-136-10 (10,210 weights), to 512 numbers each. The floor is the least that can be done
in plain torch: `vmap` of `grad` over all rows at once, times a sign matrix that was made before the clock started. Ours
holds one batch of gradients at a time and makes its matrix anew in each call. The peers run their own pipelines: traker
`featurize` in single precision with its BasicProjector, dattri `TRAKAttributor.cache`, which solves for the kernel as
well. All contenders take turns, `--rounds` times over, in one process; medians are shown. With `--threads 1` (the
default) wall time is CPU time.
"""
import argparse
import contextlib
import io
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent: del sys.path[0]

import numpy as np
import torch

from selectbench.pools.tables import digits
from selectbench.zoo.classifier import train_classifier

SIZE = 512
GROWTH = (1797, 7188, 28752)


def network():
    "The classifier, its features and labels."
    pool = digits()
    return train_classifier.__wrapped__(pool.features, pool.y, hidden=(136,), epochs=3, seed=0), pool.features, pool.y


def plain(net, X, y):
    "(module, standardised features, labels) as the peers and the floor want them."
    module = torch.nn.Sequential(torch.nn.Linear(64, 136), torch.nn.ReLU(), torch.nn.Linear(136, 10))
    module.load_state_dict(dict(net.weights))
    z = torch.from_numpy(((X - net.mean) / net.scale).astype(np.float32))
    return module.eval(), z, torch.from_numpy(np.asarray(y, dtype=np.int64))


def one_loss(module):
    "The loss of one example as a function of the weights."
    def loss(weights, x, y):
        out = torch.func.functional_call(module, weights, (x[None],))
        return torch.nn.functional.cross_entropy(out, y[None])
    return loss


def floor(net, X, y):
    module, z, labels = plain(net, X, y)
    weights = {k: v.detach() for k, v in module.named_parameters()}
    signs = torch.randint(0, 2, (sum(v.numel() for v in weights.values()), SIZE)).float() * 2 - 1
    gradient = torch.func.vmap(torch.func.grad(one_loss(module)), in_dims=(None, 0, 0))
    return lambda: torch.cat([g.flatten(1) for g in gradient(weights, z, labels).values()], 1) @ signs


def traker(net, X, y, batch):
    from trak import TRAKer
    module, z, labels = plain(net, X, y)

    def run():
        with tempfile.TemporaryDirectory() as folder:
            t = TRAKer(module, "image_classification", len(z), save_dir=folder, device="cpu", proj_dim=SIZE,
                       use_half_precision=False, logging_level=logging.CRITICAL)
            t.load_checkpoint(module.state_dict(), model_id=0)
            start = time.perf_counter()
            for rows in zip(z.split(batch), labels.split(batch), strict=True):
                t.featurize(rows, num_samples=len(rows[0]))
            return time.perf_counter() - start
    return run


def dattri(net, X, y, batch):
    from dattri.algorithm import TRAKAttributor
    from dattri.task import AttributionTask
    module, z, labels = plain(net, X, y)
    loss = one_loss(module)
    chance = lambda w, pair: torch.exp(-loss(w, *pair))
    task = AttributionTask(loss_func=lambda w, pair: loss(w, *pair), model=module, checkpoints=[module.state_dict()])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(z, labels), batch_size=batch, shuffle=False)
    attributor = TRAKAttributor(task=task, correct_probability_func=chance, device="cpu", regularization=1e-3,
                                projector_kwargs={"proj_dim": SIZE, "proj_max_batch_size": 32, "device": "cpu"})
    return lambda: attributor.cache(loader)


def seconds(run):
    "Seconds of one call; what the call itself says if it leaves its setup out."
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()): said = run()
    return said if isinstance(said, float) else time.perf_counter() - start


def contenders(net, X, y):
    "name -> function without arguments; peers that cannot be imported are left out, aloud."
    ours = lambda: net.gradients(X, y, project=SIZE, device="cpu")
    runs = {"floor": floor(net, X, y), "selectbench": ours}
    for make in (traker, dattri):
        for batch in (100, len(X)):
            try: runs[f"{make.__name__}, batches of {batch}"] = make(net, X, y, batch)
            except ImportError as e: print(f"{make.__name__} is left out: {e}"); break
    return runs


def kernel_error(net, X, y):
    "How far inner products of ours are off, in units of what the theory says, on 200 rows: near 1."
    true, ours = net.gradients(X[:200], y[:200]), net.gradients(X[:200], y[:200], project=SIZE)
    T, S = true.astype(np.float64) @ true.T, (true.astype(np.float64) ** 2).sum(1)
    upper = np.triu_indices(200)
    return float(((ours @ ours.T - T) / np.sqrt((np.outer(S, S) + T**2) / SIZE))[upper].std())


def memory(field):
    "MB of this process: VmRSS now, VmHWM at its peak. Linux only; elsewhere NaN."
    status = Path("/proc/self/status")
    if not status.exists(): return float("nan")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1024


def child(n):
    "Seconds and peak MB above the start of the gradients of `n` rows, in this process."
    net, X, y = network()
    X, y = np.resize(X, (n, X.shape[1])), np.resize(y, n)
    net.gradients(X[:50], y[:50], project=SIZE, device="cpu")
    if Path("/proc/self/clear_refs").exists(): Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    print(seconds(lambda: net.gradients(X, y, project=SIZE, device="cpu")), memory("VmHWM") - before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a folder with traker and dattri")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child: return child(args.child)
    if args.peers: sys.path.append(args.peers)
    warnings.filterwarnings("ignore")
    net, X, y = network()
    runs = contenders(net, X, y)
    for run in runs.values(): seconds(run)  # warm
    times = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items(): times[name].append(seconds(run))
    base = statistics.median(times["floor"])
    print(f"{len(X)} x {sum(w.numel() for w in net.weights.values()):,} to {SIZE}, {args.threads} thread(s)")
    for name, t in times.items():
        print(f"  {name:28s} {statistics.median(t):6.3f} s   {statistics.median(t) / base:5.2f} x the floor")
    print(f"  spread of projected inner products: {kernel_error(net, X, y):.3f} of the theory's")
    rows = []
    for n in GROWTH:
        command = [sys.executable, __file__, "--child", str(n), "--threads", str(args.threads)]
        said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
        took, peak = (statistics.median(float(s[i]) for s in said) for i in (0, 1))
        rows.append(took)
        whole, result = n * 10210 * 4 / 2**20, n * SIZE * 4 / 2**20
        print(f"  n = {n:6,d}: {took:6.2f} s, {peak:5.0f} MB above the start "
              f"({whole:,.0f} MB of gradients, {result:.0f} MB of result)")
    print(f"  log-log slope of seconds in n: {np.polyfit(np.log(GROWTH), np.log(rows), 1)[0]:.2f}")


if __name__ == "__main__": main()
