import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetuning import processes
from finetuning.processes import STOP_SIGNALS, busy_cores, fast_imports, handled, interruptible, share_processors
from tests.common import ROOT, some

SPINNING = "while True: pass"


@contextmanager
def another_process(code: str) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            yield
        finally:
            process.kill()


def test_variables_that_would_stop_libraries_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "", "WORLD_SIZE": "x", "LOCAL_RANK": "-1", "NODE_RANK": "1", "MPLBACKEND": "Qt4Agg"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    processes.settle_process()
    expected = dict.fromkeys(given) | {"NODE_RANK": "1", "MPLBACKEND": "agg"}
    assert {name: os.environ.get(name) for name in given} == expected


def test_a_closed_terminal_asks_to_stop_but_not_after_nohup() -> None:
    with handled([signal.SIGHUP], signal.SIG_DFL):
        assert processes.stop_signals() == [*STOP_SIGNALS, signal.SIGHUP]
    with handled([signal.SIGHUP], signal.SIG_IGN):
        assert processes.stop_signals() == list(STOP_SIGNALS)
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    with handled([signal.SIGHUP], signal.SIG_DFL), pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGHUP)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_a_process_that_spins_is_seen_and_this_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with another_process(SPINNING):
        time.sleep(0.5)  # it starts
        assert busy_cores(0.5) > processes.BUSY
    before = some(processes.processor_seconds())
    end = time.process_time() + 0.2
    while time.process_time() < end:  # however little of a processor it gets
        pass
    after = some(processes.processor_seconds())
    assert after[1] - before[1] > 0.1, "what this process takes is counted apart"
    assert 0 < some(processes.processor_seconds(usable=True))[0] <= some(processes.processor_seconds())[0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set())
    assert some(processes.processor_seconds(usable=True))[0] == 0, "cores of other jobs do not count"


@pytest.mark.parametrize(
    ("busy", "given", "expected"),
    [
        (1.0, {}, "100"),
        (0.1, {}, "30000"),
        (1.0, {"GOMP_SPINCOUNT": "7"}, "7"),
        (1.0, {"OMP_WAIT_POLICY": "active"}, None),
    ],
    ids=["busy", "idle", "a number of spins", "a policy"],
)
def test_threads_sleep_next_to_a_busy_process_unless_the_user_says_otherwise(
    busy: float, given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "busy_cores", lambda _: busy)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    share_processors()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_a_character_that_the_terminal_lacks_is_spelled() -> None:
    code = "from finetuning.processes import settle_process; settle_process(); print('l\u00e4uft')"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("l\\xe4uft\n", "")


def test_signals_act_like_ctrl_c_in_any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(number)
    assert signal.getsignal(signal.SIGTERM) == before


IMPORTING = """
import gc, sys
from finetuning.processes import fast_imports
with fast_imports():
    assert not gc.isenabled()
    import torchmetrics
loaded = [name for name in ("scipy.signal", "scipy.stats") if name in sys.modules]
print(gc.isenabled(), gc.get_freeze_count() > 0, loaded)
import scipy.signal
print(scipy.signal.get_window("hann", 4).tolist())
"""


def test_libraries_are_loaded_without_the_garbage_collector_and_without_scipys_signals() -> None:
    pytest.importorskip("scipy")
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("True True []\n[0.0, 0.5, 1.0, 0.5]\n", "")
    before = gc.get_freeze_count()
    with fast_imports():  # torch is loaded here
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
