"""A test that needs a published collection skips, saying SELECTBENCH_DATA; where that is set, the skip is a failure."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before BLAS is loaded: on problems this small its threads only wait

import pytest

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
