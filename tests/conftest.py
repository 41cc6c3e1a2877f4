"""What pytest loads first. A process that only hands all tests out to others loads no torch, and starts them sooner."""

import os

import pytest

# Each worker of pytest-xdist has one thread, and so have the processes that tests start. Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest.register_assert_rewrite("tests.common")  # the conftest.py of a folder that is named imports it before


def pytest_configure(config: pytest.Config) -> None:
    hands_out = config.getoption("numprocesses", 0) and not config.getoption("collectonly")
    if not hands_out or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("tests.common")
