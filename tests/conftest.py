"""A test that needs a published collection skips, saying SELECTBENCH_DATA; where that is set, the skip is a failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before BLAS is loaded: on problems this small its threads only wait

import pytest
from hypothesis import settings

settings.register_profile("house", derandomize=True)  # the same examples in every run, so that green stays green
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))

SAYS = "SELECTBENCH_DATA is set, so this must run: "


def judge(report):
    "The report, failed if it skipped for want of data that is there."
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    if os.environ.get("SELECTBENCH_DATA") and "SELECTBENCH_DATA" in reason and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", SAYS + reason
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call): return judge((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector): return judge((yield))


@pytest.fixture(scope="session")
def pages():
    "The site, built anew where something changed: its folder."
    root = Path(__file__).resolve().parents[1]
    build = [sys.executable, "docs/build.py", "site"]
    done = subprocess.run(build, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "_docs"


def wanting(why):
    "Skip with `why`, or fail where SELECTBENCH_BROWSER says that there must be a browser."
    (pytest.fail if os.environ.get("SELECTBENCH_BROWSER") else pytest.skip)(f"no browser test: {why}")


@pytest.fixture(scope="module")
def browser():
    "A headless chromium."
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None: wanting("there is no chromium; on Debian `make test-browser` installs it")
    try: from playwright.sync_api import sync_playwright
    except ImportError: wanting("playwright is not installed; it comes with the extra `dev`")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        try: yield browser
        finally: browser.close()
