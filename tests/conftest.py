"""One thread a test process (two share the cores), and the table of deviations from the golden
numbers: ``pytest -m golden`` runs what compares with the released code, and prints it."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def parity(record_property):
    """Hold a deviation from the released code's numbers against its tolerance, and record it."""

    def check(group: str, deviation: float, tolerance: float, why: str = "") -> None:
        record_property("parity", [group, float(deviation), float(tolerance)])
        assert deviation <= tolerance, (
            f"{group}: off by {deviation:.2e}, allowed {tolerance:.0e} {why}"
        )

    return check


def pytest_configure(config):
    config.addinivalue_line("markers", "golden: compares with numbers made by the released code")


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    cases: dict[str, int] = {}
    worst: dict[str, tuple[float, float]] = {}
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    for report in reports:
        rows = [row for key, row in getattr(report, "user_properties", []) if key == "parity"]
        if report.when != "call" or not rows:
            continue
        for group in {row[0] for row in rows}:
            cases[group] = cases.get(group, 0) + 1
        for group, deviation, tolerance in rows:
            worst[group] = max(worst.get(group, (-1.0, 0.0)), (deviation, tolerance))
    if cases:
        terminalreporter.write_line("released code's numbers: group, cases, deviation, tolerance")
    for group in sorted(cases):
        deviation, tolerance = worst[group]
        terminalreporter.write_line(
            f"  {group:26s} {cases[group]:4d} {deviation:8.1e} {tolerance:8.0e}"
        )
