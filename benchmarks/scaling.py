"""How fast both scaling laws are fitted, against the authors' own code on the same published curves, in one run.

    SELECTBENCH_DATA=... python benchmarks/scaling.py                                   # ours alone
    SELECTBENCH_DATA=... python benchmarks/scaling.py --authors PATH_TO_CHECKOUT        # and theirs

The checkout is that of github.com/linhaowei1/Fine-tuning-Scaling-Law (Apache-2.0), whose `src/fit_law.py` is imported
as it is. Both fit the 14 sizes above 0 of 30 models on FLAN, WMT19 and Gigaword: 90 curves. Theirs go one by one, as
their programs do; their random starts are seeded here. One thread each, medians of `--rounds` (theirs: once).
"""
import argparse
import os
import random
import statistics
import sys
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ[_name] = "1"

import numpy as np  # noqa: E402

from selectbench.model.scaling import fit_rectified, fit_vanilla  # noqa: E402
from selectbench.pools.published import rectified_scaling_law  # noqa: E402


def theirs(checkout, x, losses):
    "law -> (seconds, RMSD of the log loss of every curve) with the authors' code."
    sys.path.insert(0, str(Path(checkout) / "src"))
    import fit_law
    random.seed(0)
    out = {}
    for law, fit, predict in (("rectified", fit_law.fit_our_law, fit_law.our_law_transform),
                              ("vanilla", fit_law.fit_vanilla_law, fit_law.vanilla_law_transform)):
        start = time.perf_counter()
        fits = [fit(x, y)[0] for y in np.log(losses)]
        seconds = time.perf_counter() - start
        out[law] = seconds, [np.sqrt(np.mean((predict(x, *p) - y) ** 2)) for p, y in zip(fits, np.log(losses),
                                                                                        strict=True)]
    return out


def ours(sizes, losses, rounds):
    "law -> (median seconds, RMSD of the log loss of every curve)."
    out = {}
    for law, fit in (("rectified", fit_rectified), ("vanilla", fit_vanilla)):
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            table = fit(sizes, losses)
            seconds.append(time.perf_counter() - start)
        out[law] = statistics.median(seconds), table.rmsd
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authors", help="checkout of the authors' repository")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pools = [rectified_scaling_law(t) for t in ("flan", "wmt19", "gigaword")]
    sizes, losses = pools[0].sizes[1:], np.concatenate([p.loss_curves[:, 1:] for p in pools])
    mine = ours(sizes, losses, args.rounds)
    other = theirs(args.authors, np.log(sizes), losses) if args.authors else {}
    for law, (seconds, rmsd) in mine.items():
        line = f"{law:9s}  ours {seconds:7.3f} s, mean RMSD {np.mean(rmsd):.5f}"
        if law in other:
            line += f"   theirs {other[law][0]:7.2f} s, {np.mean(other[law][1]):.5f}   {other[law][0] / seconds:.0f} x"
        print(line)


if __name__ == "__main__": main()
