"""The path for the next method: a draft says what is known, exports nothing, fails until written, never overwrites."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import selectbench as package
from selectbench import methods
from selectbench.report.atlas import atlas_rows
from selectbench.report.scaffold import write_draft

ROOT = Path(package.__path__[0]).parent
TOOLS = Path(sys.executable).parent
WAITING = next(row for row in atlas_rows() if row["family"] == "data" and "(from memory)" in row["algorithm"]
               and row["key"] not in {c["key"] for c in methods.cards()})


def selectbench(*args):
    "`selectbench new-method` in a process of its own."
    main = "from selectbench.report.cli import main; main()"
    command = [sys.executable, "-c", main, "new-method", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path):
    "A small project of nbdev's with the house's settings, and a draft in it."
    (tmp_path / "settings.ini").write_text((ROOT / "settings.ini").read_text())
    (tmp_path / "selectbench").mkdir()
    draft = write_draft(WAITING["key"], tmp_path / "nbs" / "data", name="next_method")
    return tmp_path, draft


def nbdev(tool, folder, *args):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([TOOLS / tool, *args], cwd=folder, capture_output=True, text=True, env=env, check=False)
    return done.returncode, done.stdout + done.stderr


def sources(path): return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]


def test_a_draft_has_what_the_atlas_knows_in_the_order_of_the_house(project):
    text = sources(project[1])
    assert text[0].startswith(f"# {WAITING['title']}\n> ") and WAITING["algorithm"] in text[2]
    heads = [line for cell in text for line in cell.splitlines() if line.startswith("## ")]
    assert heads == ["## The idea", "## Signals", "## Check", "## On real data", "## Faithfulness"]
    table = next(cell for cell in text if cell.startswith("## Signals"))
    assert "| `soft_predictions` | float32[n, m, c] |" in table and "| `losses` | float32[n] |" in table


def test_a_draft_is_clean_and_exports_nothing_until_its_one_mark_is_gone(project):
    folder, draft = project
    before = draft.read_bytes()
    assert nbdev("nbdev_clean", folder)[0] == 0 and draft.read_bytes() == before
    nbdev("nbdev_export", folder)
    made = lambda: {p.name for p in (folder / "selectbench").rglob("*.py")} - {"__init__.py", "_modidx.py"}
    assert made() == set()
    nb = json.loads(draft.read_text())
    nb["cells"][1]["source"] = "".join(nb["cells"][1]["source"]).splitlines()[-1].removeprefix("# ")
    draft.write_text(json.dumps(nb))
    code, said = nbdev("nbdev_export", folder)
    assert code == 0 and made() == {"next_method.py"}, said
    assert f'key="{WAITING["key"]}"' in (folder / "selectbench/data/next_method.py").read_text()


def test_a_draft_fails_until_its_signals_and_its_check_are_written(project):
    folder, draft = project
    code, said = nbdev("nbdev_test", folder, "--path", str(draft))
    assert code == 1 and "`fill_in` is neither a signal nor a budget" in said
    written = draft.read_text().replace("fill_in, k, *, seed=0", "losses, k").replace("(fill_in, k)", "(losses, k)")
    draft.write_text(written.replace("authors=", "deterministic=True, ranking=True, authors="))
    code, said = nbdev("nbdev_test", folder, "--path", str(draft))
    assert code == 1 and "no check yet" in said and "fill_in" not in said


def test_a_draft_passes_lint(project):
    command = [TOOLS / "ruff", "check", "--config", ROOT / "pyproject.toml", project[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_refusals(tmp_path):
    "Unknown keys (with near ones), registered ones (with their method), and what is there already."
    key = WAITING["key"]
    held = next(c for c in methods.cards() if c["key"])
    for args, words in ((["vote-kk"], "'vote-k'"), ([held["key"]], held["name"]), ([key, "--name", "a b"], "`name`")):
        done = selectbench(*args, "--folder", str(tmp_path))
        assert (done.returncode, done.stdout) == (2, "") and words in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
    first = selectbench(key, "--folder", str(tmp_path))
    path = Path(first.stdout.strip())
    assert first.returncode == 0 and path.parent == tmp_path and path.suffix == ".ipynb"
    path.write_text("mine")
    again = selectbench(key, "--folder", str(tmp_path))
    assert again.returncode == 2 and "there already" in again.stderr and path.read_text() == "mine"
