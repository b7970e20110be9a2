"""How fast the selective scan is on a processor, against named peers on the same input, in one run.

    python benchmarks/scan.py                       # ours, transformers' reference path and the floor
    python benchmarks/scan.py --peers ../peers      # and mambapy, from a folder made by
        pip install --no-deps --target ../peers mambapy==1.2.0

Batch 8, inner width 256, state 16, single precision. A *layer* is transformers' MambaMixer (hidden size 128), forward
and backward; its scan is the reference path, mambapy (`use_mambapy=True`) or ours (`fast_scan`). The *bare scan* is the
recurrence alone, forward and backward to all inputs: mambapy's `pscan` with what it needs around it (the exponentials
and products that make its inputs, the read-out), or `selective_scan`. The reference path is quadratic in length and
runs to length 256 only, twice. All contenders of a length take turns, `--rounds` times over, in one process. The
Mamba-2's layer (8 heads of 32, the same state) runs on transformers' chunked form in PyTorch or on `fast_scan`. The
machine may be busy: the smallest wall time and the smallest processor time over the rounds are shown, and ratios are of
processor time.

The floor of the bare scan is what must be done at least: every input read and every output and gradient written once,
at this machine's measured speed of copying, and one exponential for each step, channel and number of state, forward and
again in the backward pass, at the measured speed of our exponential on data in the nearest cache. Peak memory is
measured in a fresh process each, above the inputs.
"""
import argparse
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent: del sys.path[0]

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numba import njit

from selectbench.nn import scan as kernels
from selectbench.nn.scan import fast_scan, selective_scan

BATCH, WIDTH, STATE = 8, 256, 16
LENGTHS, REFERENCE = (64, 128, 256, 512, 1024, 2048), 256
_load, _store, _exp = kernels._load, kernels._store, kernels._exp


def inputs(length, dtype=torch.float32):
    "u, delta, A, B, C, D as a Mamba layer gives them to its scan."
    draw = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)
    A = -torch.arange(1.0, STATE + 1).expand(WIDTH, -1).to(dtype)
    made = (r(BATCH, WIDTH, length), F.softplus(r(BATCH, WIDTH, length) - 3), A.contiguous(),
            r(BATCH, length, STATE).transpose(1, 2), r(BATCH, length, STATE).transpose(1, 2), r(WIDTH))
    return [x.requires_grad_() for x in made]


def mambapy_scan(u, delta, A, B, C, D):
    "The scan as mambapy's block does it, from the same layout."
    from mambapy.pscan import pscan
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    decay = torch.exp(delta[..., None] * A)
    states = pscan(decay, delta[..., None] * B[:, :, None] * u[..., None])
    return ((states @ C[..., None])[..., 0] + D * u).transpose(1, 2)


def ours(*args): return selective_scan(*args)[0]


def gradients(scan, args):
    "Output and gradients of one bare scan."
    y = scan(*args)
    return y.detach(), *torch.autograd.grad(y, args, torch.ones_like(y))


def layer(length, use_mambapy=False):
    "(mixer, input) of one Mamba layer."
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=WIDTH // 2, state_size=STATE, num_hidden_layers=1, vocab_size=8,
                                      use_mambapy=use_mambapy)
    mixer = transformers.MambaModel(config).layers[0].mixer
    return mixer, torch.randn(BATCH, length, WIDTH // 2, requires_grad=True)


def second(length):
    "(mixer, input) of one Mamba-2 layer."
    torch.manual_seed(0)
    config = transformers.Mamba2Config(hidden_size=WIDTH // 2, state_size=STATE, num_hidden_layers=1, vocab_size=8,
                                       head_dim=32, num_heads=WIDTH // 32, n_groups=1, chunk_size=64)
    mixer = transformers.Mamba2Model(config).layers[0].mixer
    return mixer, torch.randn(BATCH, length, WIDTH // 2, requires_grad=True)


def layer_step(mixer, x, inside):
    "One training step of a layer, `inside` a context."
    mixer.zero_grad()
    with inside: y = mixer(x)
    y.sum().backward()
    return y.detach(), x.grad, *(p.grad for p in mixer.parameters())


def contenders(length, peers):
    "name -> function without arguments, the layers and the bare scans at one length."
    args, (mixer, x), (heads, z) = inputs(length), layer(length), second(length)
    runs = {"layer, fast_scan": lambda: layer_step(mixer, x, fast_scan(mixer)),
            "scan, ours": partial(gradients, ours, args),
            "Mamba-2, fast_scan": lambda: layer_step(heads, z, fast_scan(heads)),
            "Mamba-2, theirs": lambda: layer_step(heads, z, nullcontext())}
    if peers:
        other, same = layer(length, use_mambapy=True)
        runs["layer, mambapy"] = lambda: layer_step(other, same, nullcontext())
        runs["scan, mambapy"] = partial(gradients, mambapy_scan, args)
    if length <= REFERENCE: runs["layer, reference"] = lambda: layer_step(mixer, x, nullcontext())
    return runs


def timed(run):
    "(wall seconds, processor seconds) of one call."
    start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def race(runs, rounds):
    "name -> (smallest wall seconds, smallest processor seconds), taking turns."
    times = {name: [] for name in runs}
    for k in range(rounds):
        for name, run in runs.items():
            if "reference" not in name or k < 2: times[name].append(timed(run))
    return {name: tuple(min(t) for t in zip(*seen, strict=True)) for name, seen in times.items()}


@njit
def exponentials(x, out, times):
    for _ in range(times):
        for i in range(0, x.size, 16): _store(out, i, _exp(_load(x, i)))


def speeds():
    "(bytes a second of a copy, read and write both counted; exponentials a second), the best of several, one thread."
    big, goal = torch.randn(2**25), torch.empty(2**25)
    x, out = np.linspace(-4, 0, 2048, dtype=np.float32), np.empty(2048, np.float32)
    exponentials(x, out, 1)
    copy = min(timed(lambda: goal.copy_(big))[0] for _ in range(15))
    exp = min(timed(lambda: exponentials(x, out, 1000))[1] for _ in range(15))
    return 2 * 4 * 2**25 / copy, 1000 * len(x) / exp


def floor(length, copied, computed):
    "(seconds for the bytes, seconds for the exponentials) of a bare scan, forward and backward."
    channels, rows = BATCH * WIDTH * length, BATCH * STATE * length
    moved = 4 * ((2 * channels + 2 * rows + channels) + (3 * channels + 2 * rows + 2 * channels + 2 * rows))
    return moved / copied, 2 * channels * STATE / computed


def memory(field):
    "MB of this process: VmRSS now, VmHWM at its peak. Linux only; elsewhere NaN."
    status = Path("/proc/self/status")
    if not status.exists(): return float("nan")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1024


def child(name, length, peers):
    "Peak MB of one contender above what its inputs hold, in this process."
    small = contenders(16, peers)[name]
    small()
    run = contenders(length, peers)[name]
    if Path("/proc/self/clear_refs").exists(): Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    run()
    print(memory("VmHWM") - before)


def peak(name, length, args):
    "Peak MB of one contender in a fresh process."
    command = [sys.executable, __file__, "--child", name, "--length", str(length), "--threads", str(args.threads)]
    if args.peers: command += ["--peers", args.peers]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def agreement(peers):
    "Largest relative difference of ours to double precision, and of mambapy, over the output and all gradients."
    exact = gradients(partial(lambda *a: selective_scan(*a, backend="torch")[0]), inputs(256, torch.float64))
    gap = lambda seen: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(seen, exact, strict=True))
    scans = {"ours": ours} | ({"mambapy": mambapy_scan} if peers else {})
    return {name: gap(gradients(scan, inputs(256))) for name, scan in scans.items()}


def report(name, table, copied, computed):
    "What a contender took at each length, in words."
    for length, times in table.items():
        if name not in times: continue
        wall, cpu = times[name]
        line = f"  {length:5,d}  {name:18s} {wall:8.4f} s wall {cpu:8.4f} s processor"
        own = {"layer": "layer, fast_scan", "scan": "scan, ours", "Mamba-2": "Mamba-2, fast_scan"}[name.split(",")[0]]
        if name != own: line += f"   {cpu / times[own][1]:6.1f} x ours"
        elif name == "scan, ours":
            moved, exps = floor(length, copied, computed)
            line += f"   {cpu / (moved + exps):.2f} x the floor ({1e3 * moved:.1f} ms bytes + {1e3 * exps:.1f} ms exp)"
        print(line)
    rows = [(n, t[name][1]) for n, t in table.items() if name in t]
    print(f"         log-log slope in length from {rows[0][0]} to {rows[-1][0]:,}: "
          f"{np.polyfit(*np.log(np.array(rows)).T, 1)[0]:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a folder with mambapy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peers: sys.path.append(args.peers)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if args.child: return child(args.child, args.length, bool(args.peers))
    copied, computed = speeds()
    print(f"batch {BATCH}, inner width {WIDTH}, state {STATE}, {args.threads} thread(s); copying "
          f"{copied / 1e9:.1f} GB/s, {computed / 1e9:.2f} exponentials a nanosecond")
    for name, gap in agreement(args.peers).items(): print(f"  {name}: {gap:.0e} from double precision")
    table = {}
    for length in LENGTHS:
        runs = contenders(length, bool(args.peers))
        for name, run in runs.items():
            if "reference" not in name: run()  # warm
        table[length] = race(runs, args.rounds)
    for name in table[LENGTHS[0]]: report(name, table, copied, computed)
    for length in (256, 2048):
        names = [name for name in table[length] if "reference" not in name]
        print(f"  peak MB at {length:,}: " + ", ".join(f"{name} {peak(name, length, args):,.0f}" for name in names))


if __name__ == "__main__": main()
