"""The command line answers at once, and bare imports stay light."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = {"torch", "matplotlib", "transformers", "pandas", "sklearn", "numba"}


def run(*command, **env):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | env)


def selectbench(*args, **env): return run("-c", "from selectbench.report.cli import main; main()", *args, **env)


@pytest.mark.parametrize("what", ["import selectbench", "from selectbench.report.cli import app; app(['list'], "
                                  "standalone_mode=False)", "from selectbench import methods; list(methods)"])
def test_loads_nothing_heavy(what):
    done = run("-c", f"{what}\nimport sys; print('loaded', sorted({HEAVY!r} & set(sys.modules)))")
    assert done.stdout.strip().endswith("loaded []"), done.stdout[-300:] + done.stderr


def test_list_takes_under_a_second():
    took = []
    for _ in range(3):
        start = time.perf_counter(); done = selectbench("list"); took.append(time.perf_counter() - start)
        assert done.returncode == 0 and "facility_location" in done.stdout
    assert min(took) < 1, took


def test_unknown_names_say_what_is_near():
    done = selectbench("show", "facility_locaton")
    assert done.returncode == 2 and "facility_location" in done.stderr


def test_check_fails_with_exit_code_one_for_no_method_and_passes_for_a_good_one():
    done = selectbench("check", "random")
    assert done.returncode == 0 and "ok" in done.stdout


def test_cite_gives_bibtex():
    assert selectbench("cite", "vote_k").stdout.startswith("@misc{vote-k,")


def test_cache_commands_carry_results(tmp_path):
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    make = ("from selectbench.core.cache import cached\nimport selectbench.core.study as s\n"
            "from sklearn.datasets import load_wine\nfrom sklearn.linear_model import LogisticRegression\n"
            "from selectbench import Study, Task\n"
            "t = Task.from_dataset(load_wine(return_X_y=True), LogisticRegression(max_iter=500))\n"
            "print(Study(t, [], [5], 1).run()['cached'].tolist())")
    assert "False" in run("-c", make, SELECTBENCH_CACHE=here).stdout
    listed = selectbench("cache", "ls", SELECTBENCH_CACHE=here)
    assert "study_cell" in listed.stdout and "2 entries" in listed.stdout
    archive = str(tmp_path / "a.tar")
    assert "2 entries" in selectbench("cache", "export", archive, SELECTBENCH_CACHE=here).stdout
    assert "2 entries" in selectbench("cache", "import", archive, SELECTBENCH_CACHE=there).stdout
    assert run("-c", make, SELECTBENCH_CACHE=there, SELECTBENCH_CACHE_MODE="readonly").stdout.strip() == "[True, True]"
    assert "removed 2" in selectbench("cache", "gc", "0", SELECTBENCH_CACHE=there).stdout
    assert list(Path(there).glob("selectbench*/*")) == []
