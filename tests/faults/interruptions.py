"""A run is interrupted at any moment: SIGKILL, signals, and the death of one of two processes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from finetuning.runs.files import LAST_CHECKPOINT
from tests.faults.runs import METHODS, ROOT, Broken, Commands, Outcome, Signals, require, require_same

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def chosen_run(commands: Commands, generator: random.Random) -> tuple[str, str]:
    """A method and a precision; with bf16 also the compiled kernels, which are in the common cache."""
    precision = generator.choice(["fp32", "fp32", "auto"])
    method = generator.choice(list(METHODS))
    commands.whole(method, precision)
    return method, precision


def random_moment(
    commands: Commands, generator: random.Random, method: str, precision: str, numbers: tuple[int, ...]
) -> Signals:
    """A random time, or a random file operation: most moments of danger are next to one."""
    _, whole, seconds = commands.whole(method, precision)
    if generator.random() < 0.5:
        return Signals(numbers, seconds=generator.uniform(0.05, seconds))
    return Signals(numbers, operation=generator.randint(1, whole.operations))


def killed(commands: Commands, generator: random.Random, directory: Path) -> str:
    """SIGKILL, in a third of the trials a second time in the continued run; half of the fp32 runs must tokenize."""
    method, precision = chosen_run(commands, generator)
    words = commands.flags(directory, method, precision)
    cache = directory.with_name("own cache") if precision == "fp32" and generator.random() < 0.5 else None
    if cache:
        shutil.rmtree(cache, ignore_errors=True)
    times = 0
    for _ in range(generator.choice([1, 1, 2])):
        moment = random_moment(commands, generator, method, precision, (signal.SIGKILL,))
        outcome = commands.run([*words, "--resume", "auto"], moment, cache)
        require(outcome.status in (0, -signal.SIGKILL), "killed", outcome)
        times += outcome.status != 0
    last = commands.run([*words, "--resume", "auto"], cache=cache)
    require(last.status == 0, "continued", last)
    require_same(directory, commands.whole(method, precision)[0])
    return f"{times or 'no'} kill{'s' * (times != 1)}, identical"


def signalled(commands: Commands, generator: random.Random, directory: Path) -> str:
    """One or two signals at a random moment."""
    method, precision = chosen_run(commands, generator)
    words = commands.flags(directory, method, precision)
    numbers = tuple(generator.choices(SIGNALS, k=generator.choice([1, 2])))
    outcome = commands.run(words, random_moment(commands, generator, method, precision, numbers))
    require(outcome.status in (0, 130), "signalled", outcome)
    require(outcome.status == 0 or any("interrupted" in line for line in outcome.lines), "no word", outcome)
    require("Traceback" not in outcome.printed, "traceback", outcome)
    last = commands.run([*words, "--resume", "auto"])
    require(last.status == 0, "continued", last)
    require_same(directory, commands.whole(method, precision)[0])
    return f"status {outcome.status}, identical"


def rank_killed(commands: Commands, generator: random.Random, directory: Path) -> str:
    """One of two processes of a run with DDP is killed, at a random time after the first checkpoint."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FINETUNE_LORA_CACHE": str(commands.folder / "cache")}
    words = [sys.executable, "finetune_lora.py", *commands.flags(directory, "lora"), "--epochs", "12"]
    words += ["--devices", "2", "--strategy", "ddp", "--accumulate", "1"]
    output = subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
    while not (directory / LAST_CHECKPOINT).exists():
        if process.poll() is not None:
            raise Broken(f"did not start: {process.communicate()[0][-300:]}")
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf8").split()
    ranks = [process.pid, next(int(pid) for pid in children if _is_run(int(pid)))]
    time.sleep(generator.uniform(0, 2))
    number = generator.randrange(2)
    began = time.monotonic()
    os.kill(ranks[number], signal.SIGKILL)
    try:
        printed = process.communicate(timeout=60)[0]  # both hold the pipe
    except subprocess.TimeoutExpired:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        raise Broken(f"rank {1 - number} did not end within 60 s of the death of rank {number}") from None
    seconds = time.monotonic() - began
    outcome = Outcome(process.returncode, printed)
    require(sum(line.startswith("failed:") for line in outcome.lines) <= 1, "more than one line", outcome)
    done = subprocess.run([*words, "--resume", "auto"], cwd=ROOT, env=environment, capture_output=True, text=True)
    require(done.returncode == 0, "continued", Outcome(done.returncode, done.stdout + done.stderr))
    return f"the other ended within {10 * (int(seconds) // 10 + 1)} s, continued"


def _is_run(pid: int) -> bool:
    return b"finetune_lora.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
