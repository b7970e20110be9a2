"""Run notebooks as `nbdev_test` does, two at a time, each in a process of its own: python tests/notebooks.py [PATH...]

The workers of `nbdev_test` take one notebook after another, so that what one registers or defines is found by the next,
or not, as the machine's load has it. Here nothing is left behind. Exit status 1 if a notebook fails."""
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HEAVY = ["torch", "numba", "sklearn", "scipy.stats", "pandas", "matplotlib.pyplot", "ot", "nbdev.test",  # imported once
         "transformers.models.llama.modeling_llama", "transformers.models.mamba.modeling_mamba"]


def run(path, root, skip):
    "Execute the notebook in this process, which ends with status 1 if a cell raises."
    from nbdev.test import test_nb
    passed, _ = test_nb(path, skip_flags=skip, basepath=root)
    sys.exit(0 if passed else 1)


def timed(context, path, *args):
    "(exit status, seconds) of `run` in a fresh process; a status below 0 is the signal that killed it."
    start, child = time.perf_counter(), context.Process(target=run, args=(path, *args))
    child.start()
    child.join()
    return child.exitcode, time.perf_counter() - start


def main(paths):
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    config = get_config()
    paths = [Path(p).resolve() for p in paths or sorted(nbglob(as_path=True))]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda p: timed(context, p, config.config_path, config.tst_flags.split()), paths))
    for (code, seconds), path in sorted(zip(results, paths, strict=True), key=lambda r: (r[0][0] != 0, r[0][1])):
        told = "" if code == 0 else f"  failed ({code})"
        print(f"{seconds:6.1f} s  {os.path.relpath(path)}{told}", flush=True)
    return int(any(code for code, _ in results))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
