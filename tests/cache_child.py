"""Cached functions that tests of the cache run here and in other processes, and the ways in which those die."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from selectbench.core.cache import cached


@cached
def table(n):
    "A result with two payloads."
    return {"rows": np.arange(n, dtype=float), "name": "table", "squares": np.arange(n) ** 2}


@cached
def counted(n, folder):
    "Writes one line per computation, and takes its time."
    with open(Path(folder) / "ran", "a") as f: f.write("ran\n")
    time.sleep(0.7)
    return n


def die(): os.kill(os.getpid(), signal.SIGKILL)


def half(path, raw):
    "Leave half of a file, and die."
    with open(path, "wb") as f: f.write(raw[:len(raw) // 2]); f.flush(); os.fsync(f.fileno())
    die()


def _save(f, x, **_): f.write(x.tobytes()[:len(x.tobytes()) // 2]); f.flush(); die()


def _write_text(path, text): half(path, text.encode())


def kill_at(owner, name, number, instead=None, after=False):
    "Die in the `number`-th call of owner.name: before it, after it, or within it (`instead`)."
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) != number: return real(*args, **kwargs)
        if instead: return instead(*args, **kwargs)
        if after: real(*args, **kwargs)
        return die()
    setattr(owner, name, call)


KILLS = {
    "before_the_first_payload": lambda: kill_at(np, "save", 1),
    "within_the_first_payload": lambda: kill_at(np, "save", 1, _save),
    "within_the_second_payload": lambda: kill_at(np, "save", 2, _save),
    "before_the_structure": lambda: kill_at(Path, "write_text", 1),
    "within_the_structure": lambda: kill_at(Path, "write_text", 1, _write_text),
    "within_the_meta_data": lambda: kill_at(Path, "write_text", 2, _write_text),
    "before_the_first_sync": lambda: kill_at(os, "fsync", 1),
    "between_syncs": lambda: kill_at(os, "fsync", 3),
    "before_the_rename": lambda: kill_at(os, "rename", 1),
    "just_after_the_rename": lambda: kill_at(os, "rename", 1, after=True),
    "at_the_last_sync": lambda: kill_at(os, "fsync", 6),
}

if __name__ == "__main__":
    import cache_child  # under the name that tests know
    what, *args = sys.argv[1:]
    if what == "kill": KILLS[args[0]](); cache_child.table(1000)
    if what == "rewrite": KILLS[args[0]](); cache_child.table.lazy(1000).fetch()
    if what == "count": print(json.dumps(cache_child.counted.lazy(5, args[0]).fetch()[1].hit))
