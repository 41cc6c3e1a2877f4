import io

from finetuning.prediction import progress as module
from finetuning.prediction.progress import Progress
from tests.common import Capture, Patch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: Patch) -> None:
    monkeypatch.setattr(module, "BAR_AFTER", 0.0)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress("predict", 4) as done:
        done(1)
        done.clear()
        done(3)
    assert "predict: 100%" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_a_line_each_minute_elsewhere(monkeypatch: Patch, capsys: Capture) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with Progress("predict", 1000) as known, Progress("check") as unknown:
        for step in range(1, 7):
            now = 20.0 * step
            known(50)
            unknown(50)
            known.clear()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "predict: 150 of 1000 rows,  2.50 rows/s, 05:40 left",
        "check: 150 rows,  2.50 rows/s",
        "predict: 300 of 1000 rows,  2.50 rows/s, 04:40 left",
        "check: 300 rows,  2.50 rows/s",
    ]
