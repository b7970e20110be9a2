"""The command line: answers at once, imports stay light, exit codes, JSON for scripts, interruption, completion."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import selectbench as package
from selectbench import methods
from selectbench.report import cli

HEAVY = {"torch", "matplotlib", "transformers", "pandas", "sklearn", "numba"}
ROOT = Path(package.__path__[0]).parent
MAIN = "from selectbench.report.cli import main; main()"
COMMANDS = ["list", "show", "cite", "atlas", "check", "validate", "new-method", "run", "run tour", "lab", "docs",
            "cache", "cache ls", "cache gc", "cache export", "cache import"]


def run(*command, **env):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | env)


def selectbench(*args, **env): return run("-c", MAIN, *args, **env)


# Light and quick


@pytest.mark.parametrize("what", ["import selectbench", "from selectbench.report.cli import app; app(['list'], "
                                  "standalone_mode=False)", "from selectbench import methods; list(methods)"])
def test_loads_nothing_heavy(what):
    done = run("-c", f"{what}\nimport sys; print('loaded', sorted({HEAVY!r} & set(sys.modules)))")
    assert done.stdout.strip().endswith("loaded []"), done.stdout[-300:] + done.stderr


def test_the_atlas_loads_pandas_at_most():
    done = run("-c", "from selectbench.report.cli import app; app(['atlas', 'disco'], standalone_mode=False)\n"
               f"import sys; print('loaded', sorted({HEAVY!r} & set(sys.modules)))")
    assert done.stdout.strip().endswith("loaded ['pandas']"), done.stdout[-300:] + done.stderr


@pytest.mark.parametrize(("args", "said"), [(["list"], "facility_location"),
                                            (["atlas", "--status", "works"], "vote-k")])
def test_takes_under_a_second(args, said):
    "Of processor time, which on a machine that is not busy is what one waits."
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = selectbench(*args)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and said in done.stdout
    assert min(took) < 1, took


# Help, completion, exit codes


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    done = selectbench(*command.split(), "--help")
    text = done.stdout
    assert done.returncode == 0 and "Examples" in text and f"$ selectbench {command}" in " ".join(text.split())


def test_the_list_of_commands_is_whole():
    names = {c.name or c.callback.__name__.replace("_", "-") for c in cli.app.registered_commands}
    assert names | {"run", "cache"} == {c for c in COMMANDS if " " not in c}


def test_the_shell_completes_commands_names_families_and_keys():
    script = "import sys; sys.argv[0] = 'selectbench'; " + MAIN
    def offered(words):
        env = {"_SELECTBENCH_COMPLETE": "complete_bash", "COMP_WORDS": f"selectbench {words}",
               "COMP_CWORD": str(len(words.split()))}
        return run("-c", script, **env).stdout.split()
    assert offered("vali") == ["validate"]
    assert offered("show k_cen") == [n for n in methods.names() if n.startswith("k_cen")]
    assert offered("list --family mo") == ["model", "moe"]
    assert "vote-k" in offered("new-method vote")


def test_unknown_names_say_what_is_near():
    for command in ("show", "cite", "check", "validate"):
        done = selectbench(command, "facility_locaton")
        assert done.returncode == 2 and "facility_location" in done.stderr and done.stdout == ""


@pytest.mark.parametrize("args", [["show"], ["list", "--famly", "data"], ["list", "--family", "x"], ["nonsense"],
                                  ["atlas", "--status", "x"], ["atlas", "--needs", "x"],
                                  ["run", "tour", "--jobs", "0"]])
def test_wrong_usage_exits_with_two_and_says_so_on_standard_error(args):
    done = selectbench(*args)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr


def test_check_fails_with_exit_code_one_for_a_bad_method_and_passes_for_a_good_one():
    done = selectbench("check", "random")
    assert done.returncode == 0 and "ok" in done.stdout
    bad = ("import numpy as np; from selectbench.core.registry import method; from selectbench.core.selection import "
           "Selection\n@method('data', paper='none')\n"
           "def bad(n, k, *, seed=0): return Selection(np.random.permutation(n)[:k], n=n)\n")
    done = run("-c", bad + MAIN, "check", "random", "bad", "--json")
    good, wrong = json.loads(done.stdout)
    assert done.returncode == 1 and good["ok"] and not wrong["ok"] and "no_global_random" in wrong["failed"]


def test_cite_gives_bibtex():
    assert selectbench("cite", "vote_k").stdout.startswith("@misc{vote-k,")


# JSON


def test_json_is_the_only_thing_on_standard_output(tmp_path):
    read = lambda *args: json.loads(selectbench(*args, "--json", SELECTBENCH_CACHE=str(tmp_path)).stdout)
    assert {c["name"] for c in read("list", "--family", "moe")} == {c["name"] for c in methods.cards()
                                                                    if c["family"] == "moe"}
    assert read("show", "k_center")["signals"] == ["embeddings"]
    rows = read("atlas", "--family", "evals", "--status", "works")
    assert rows and all(r["family"] == "evals" and r["methods"] for r in rows)
    assert read("atlas", "nothing-is-called-this") == []
    assert read("cache", "ls")["entries"] == []
    assert read("check", "random") == [{"method": "random", "ok": True, "failed": {}, "exempt": {}}]


def test_the_atlas_is_searched_by_words_and_told_in_full_where_one_is_left():
    many, one = selectbench("atlas", "mixture", "of", "experts").stdout, selectbench("atlas", "vote-k").stdout
    assert "papers" in many and "algorithm" not in many.split("\n")[0]
    assert "key        vote-k" in one and "works" in one and "new-method" not in one


# Validating


def test_validate_runs_conformance_and_the_notebook():
    done = selectbench("validate", "random", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["ok"] and told["notebook"]["path"] == "nbs/core/baselines.ipynb"
    assert told["notebook"]["exit_code"] == 0 and told["notebook"]["seconds"] > 0


def test_validate_fails_where_the_notebook_does(monkeypatch, capsys):
    wrong = {"path": "x.ipynb", "exit_code": 1, "seconds": 0.1, "error": "AssertionError: planted"}
    monkeypatch.setattr(cli, "_run_notebook", lambda root, notebook: wrong)
    with pytest.raises(cli.typer.Exit) as stop: cli.validate("random", as_json=True)
    out, err = capsys.readouterr()
    assert stop.value.exit_code == 1 and not json.loads(out)["ok"] and "planted" in err


def test_a_failing_notebook_is_seen():
    from nbformat import v4
    path = ROOT / "nbs" / "core" / ".failing.ipynb"
    assert not path.exists()
    try:
        path.write_text(v4.writes(v4.new_notebook(cells=[v4.new_code_cell("assert 1 == 2, 'planted'")])))
        told = cli._run_notebook(ROOT, str(path))
    finally: path.unlink(missing_ok=True)
    assert told["exit_code"] == 1 and "planted" in told["error"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The package alone, as it is where a wheel was installed."
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "selectbench", folder / "selectbench", ignore=shutil.ignore_patterns("__pycache__"))
    return str(folder)


@pytest.mark.parametrize("args", [["validate", "random"], ["lab"], ["docs"], ["docs", "--build", "--print"],
                                  ["new-method", "disco-of-nobody"]])
def test_what_needs_a_checkout_says_so_without_one(installed, args):
    done = run("-c", f"import sys; sys.path.insert(0, {installed!r}); {MAIN}", *args)
    assert (done.returncode, done.stdout) == (2, "") and ("checkout" in done.stderr or "atlas" in done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, "a sentence, no traceback"


def test_lab_and_docs_show_what_they_would_run():
    assert selectbench("lab", "--print").stdout.split() == [sys.executable, "-m", "jupyterlab", str(ROOT / "nbs")]
    shown = selectbench("docs", "--build", "--print").stdout.splitlines()
    assert shown == [f"{sys.executable} {ROOT / 'docs/build.py'} site", (ROOT / "_docs/index.html").as_uri()]


# Running


STUDY = """
import numpy as np
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from selectbench import Study, Task
import selectbench.report.tour as t

def small():
    task = Task.from_dataset(load_wine(return_X_y=True), LogisticRegression(max_iter=500))
    return Study(task, [{method}], [5], {seeds})

t.STUDIES = {{"data": small}}
"""


def tour(cache, folder, seeds, *args, method="", popen=False):
    "`selectbench run tour` of a small study, finished or still running."
    command = [sys.executable, "-c", STUDY.format(seeds=seeds, method=method) + MAIN, "run", "tour", "--folder",
               str(folder), *args]
    how = dict(text=True, env=os.environ | {"SELECTBENCH_CACHE": str(cache)})
    if not popen: return subprocess.run(command, capture_output=True, **how)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background is born deaf to Ctrl-C
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard, **how)


def test_a_run_is_quiet_off_a_terminal_and_says_where_its_results_are(tmp_path):
    done = tour(tmp_path / "cache", tmp_path / "runs", 4, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["failed_cells"] == 0 and len(found["results"]) == 1
    assert all(Path(p).is_file() for p in [found["report"], *found["results"], *found["figures"]])
    again = tour(tmp_path / "cache", tmp_path / "runs", 4)
    assert (again.returncode, again.stderr) == (0, "") and "report.html" in again.stdout


def test_failed_cells_are_told_and_exit_with_one(tmp_path):
    done = tour(tmp_path / "cache", tmp_path / "runs", 2, "--json", method="'dsir'")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["failed_cells"] == 2 and "2 cells failed" in done.stderr


def test_an_interrupted_run_keeps_its_cells_and_says_how_to_go_on(tmp_path):
    import pandas as pd
    cells = lambda: len(list((tmp_path / "cache").glob("*study_cell*/*/meta.json")))
    seeds = 40
    first = tour(tmp_path / "cache", tmp_path / "runs", seeds, popen=True)
    end = time.monotonic() + 120
    while cells() < 5 and first.poll() is None and time.monotonic() < end: time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    kept = cells()
    assert first.returncode == 130 and 5 <= kept < 2 * seeds, (first.returncode, kept, err)
    assert "Traceback" not in err and "run tour --folder" in err and "goes on from there" in err
    assert len(err.strip().splitlines()) == 1
    second = tour(tmp_path / "cache", tmp_path / "runs", seeds, "--json")
    table = pd.read_parquet(json.loads(second.stdout)["results"][0])
    assert second.returncode == 0 and table["cached"].sum() == kept and len(table) == 2 * seeds


def test_an_interrupted_run_without_a_cache_does_not_promise_one(monkeypatch, capsys):
    monkeypatch.setenv("SELECTBENCH_CACHE_MODE", "off")
    with pytest.raises(cli.typer.Exit) as stop, cli._resumable("selectbench run tour"): raise KeyboardInterrupt
    assert stop.value.exit_code == 130 and "nothing was kept" in capsys.readouterr().err


# The cache


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
    rows = json.loads(selectbench("cache", "ls", "--json", SELECTBENCH_CACHE=here).stdout)["entries"]
    assert len(rows) == 2 and all(r["bytes"] > 0 for r in rows)
    archive = str(tmp_path / "a.tar")
    assert "2 entries" in selectbench("cache", "export", archive, SELECTBENCH_CACHE=here).stdout
    assert "2 entries" in selectbench("cache", "import", archive, SELECTBENCH_CACHE=there).stdout
    assert run("-c", make, SELECTBENCH_CACHE=there, SELECTBENCH_CACHE_MODE="readonly").stdout.strip() == "[True, True]"
    assert "removed 2" in selectbench("cache", "gc", "0", SELECTBENCH_CACHE=there).stdout
    assert list(Path(there).glob("selectbench*/*")) == []
    missing = selectbench("cache", "import", str(tmp_path / "none.tar"), SELECTBENCH_CACHE=there)
    assert missing.returncode == 1 and "none.tar" in missing.stderr
