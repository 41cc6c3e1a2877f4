"""What pytest loads first. The process that only hands tests out to others loads no torch, and starts them sooner."""

import pytest

pytest.register_assert_rewrite("tests.common")  # a folder's own conftest.py may import it before


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", 0) or hasattr(config, "workerinput"):
        config.pluginmanager.import_plugin("tests.common")
