"""A pytest plugin: CPU seconds of every test file, of this process and those it started.

    PYTHONPATH=tests python -m pytest --numprocesses auto --dist worksteal -p cpu_seconds

What a bundle costs is in the file of the test that came first (docs/notes/ci-time.md).
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator

import pytest

NAME = "CPU seconds"
began = 0.0
seconds: Counter[str] = Counter()
tests: Counter[str] = Counter()


def cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    global began
    began = cpu()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Iterator[None]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append((NAME, cpu() - began))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that collects the reports of all."""
    for name, value in report.user_properties:
        if name == NAME:
            file = report.nodeid.partition("::")[0]
            seconds[file] += value
            tests[file] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    line = terminalreporter.write_line
    line(f"{sum(seconds.values()):.0f} CPU seconds in {sum(tests.values())} tests")
    for file, used in seconds.most_common():
        line(f"| {used:.1f} | {tests[file]} | {file} |")
