"""A run is interrupted at any moment: SIGKILL, signals, and the death of one of two processes."""

import functools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.faults import runs
from benchmarks.faults.runs import Commands, Outcome, Seen, Signals, Undisturbed, continued, require, require_same
from finetuning.errors import counted
from finetuning.runs.checkpoints import has_checkpoint
from finetuning.runs.files import LAST_CHECKPOINT, RESULT
from finetuning.storage import TEMPORARY

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def chosen_run(generator: random.Random) -> tuple[str, str]:
    """A method and a precision; with bf16 also the compiled kernels, which the undisturbed run left in the cache."""
    precision = generator.choice(["fp32", "fp32", "auto"])
    return generator.choice(list(runs.METHODS)), precision


def random_moment(
    commands: Commands, generator: random.Random, method: str, precision: str, numbers: tuple[int, ...]
) -> Signals:
    """A random time, or a random file operation: most moments of danger are next to one."""
    _, whole, seconds = commands.whole(method, precision)
    if generator.random() < 0.5:
        return Signals(numbers, seconds=generator.uniform(0.05, seconds))
    return Signals(numbers, operation=generator.randint(1, whole.operations))


def moment_of(outcome: Outcome, directory: Path, cache: Path | None) -> str:
    """What a killed run was doing, from what it printed and left."""
    if any(directory.glob(TEMPORARY)):
        return "writing a file"
    if "\nrun  " not in outcome.printed:  # of the text before training
        return "tokenizing" if cache is not None and cache.exists() else "set-up"
    if (directory / RESULT).exists():
        return "the report"
    if any(directory.glob("*.safetensors")):
        return "evaluation and results"
    return "training" if outcome.batches else "building the model"


def killed(commands: Commands, generator: random.Random, directory: Path) -> Seen:
    """SIGKILL, in a third of the trials a second time in the continued run; half of the fp32 runs must tokenize."""
    method, precision = chosen_run(generator)
    words = commands.flags(directory, method, precision)
    cache = runs.empty_cache(directory) if precision == "fp32" and generator.random() < 0.5 else None
    earlier, how, moments = Outcome(0, ""), "", list[str]()

    def resumed(moment: Signals | None = None) -> tuple[Outcome, str]:
        return continued(
            has_checkpoint(directory), earlier, lambda: commands.run([*words, "--resume", "auto"], moment, cache)
        )

    for _ in range(generator.choice([1, 1, 2])):
        moment = random_moment(commands, generator, method, precision, (signal.SIGKILL,))
        outcome, how = resumed(moment)
        require(outcome.status in (0, -signal.SIGKILL), "killed", outcome)
        if outcome.status:
            moments.append(moment_of(outcome, directory, cache))
        earlier = Outcome(outcome.status, earlier.printed + outcome.printed)
    if not moments:
        raise Undisturbed
    last, how_at_last = resumed()
    require(last.status == 0, "continued", last)
    require_same(directory, commands.whole(method, precision)[0])
    how = how_at_last if earlier.status else how  # a run that has finished does nothing
    text = f"{counted(len(moments), 'kill')}, {how}, identical"
    return Seen(text, {"method": [method], "killed while": moments})


def signalled(commands: Commands, generator: random.Random, directory: Path) -> Seen:
    """One or two signals at a random moment. A second Ctrl-C stops at once, with the checkpoint of an earlier step."""
    method, precision = chosen_run(generator)
    words = commands.flags(directory, method, precision)
    numbers = tuple(generator.choices(SIGNALS, k=generator.choice([1, 2])))
    outcome = commands.run(words, random_moment(commands, generator, method, precision, numbers))
    before_the_command = -outcome.status in numbers and not outcome.printed and not directory.exists()
    if outcome.status == 0 or before_the_command:
        raise Undisturbed
    require(outcome.status == 130, "signalled", outcome)
    require(sum("interrupted" in line for line in outcome.lines) == 1, "no word", outcome)
    require("Traceback" not in outcome.printed, "traceback", outcome)
    at_once = numbers[1:] == (signal.SIGINT,)
    last, how = continued(
        has_checkpoint(directory) if at_once else (directory / LAST_CHECKPOINT).is_file(),
        outcome,
        lambda: commands.run([*words, "--resume", "auto"]),
        runs.REPEATED if at_once else 0,
    )
    require(last.status == 0, "continued", last)
    require_same(directory, commands.whole(method, precision)[0])
    names = " and ".join(signal.Signals(number).name for number in numbers)
    return Seen(f"status {outcome.status}, {how}, identical", {"method": [method], "signals": [names]})


def rank_killed(commands: Commands, generator: random.Random, directory: Path) -> str:
    """One of two processes of a run with DDP is killed, at a random time after the first checkpoint."""
    whole = undisturbed_ranks(commands)
    words = words_of_ranks(commands, directory)
    process = commands.popen(["finetune_lora.py", *words])
    while not (directory / LAST_CHECKPOINT).exists():
        if process.poll() is not None:
            raise runs.Broken(f"did not start: {process.communicate()[0][-300:]}")
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf8").split()
    other = next(int(pid) for pid in children if b"finetune_lora.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    ranks = [process.pid, other]
    time.sleep(generator.uniform(0, 2))
    if (directory / RESULT).exists():
        process.communicate()
        raise Undisturbed
    number = generator.randrange(2)
    began = time.monotonic()
    os.kill(ranks[number], signal.SIGKILL)
    try:
        printed = process.communicate(timeout=60)[0]  # both hold the pipe
    except subprocess.TimeoutExpired:
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        raise runs.Broken(f"rank {1 - number} did not end within 60 s of the death of rank {number}") from None
    seconds = time.monotonic() - began
    outcome = Outcome(process.returncode, printed)
    # The first process is the one that was started, so of the second one only the line is seen.
    require(outcome.status == (1 if number else -signal.SIGKILL), "the first process", outcome)
    require(len(outcome.lines) == 1 and outcome.lines[0].startswith("failed:"), "not one line", outcome)
    require("Traceback" not in printed, "traceback", outcome)
    done, how = continued(has_checkpoint(directory), outcome, lambda: commands.fresh(words))
    require(done.status == 0, "continued", done)
    require_same(directory, whole)
    return f"the other ended within {10 * (int(seconds) // 10 + 1)} s, {how}, identical"


def words_of_ranks(commands: Commands, directory: Path) -> list[str]:
    """The flags that start or continue a run of two processes, one of which starts the other."""
    ranks = ("--epochs", "12", "--devices", "2", "--strategy", "ddp", "--accumulate", "1", "--resume", "auto")
    return [*commands.flags(directory, "lora"), *ranks]


@functools.cache
def undisturbed_ranks(commands: Commands) -> Path:
    """The directory of an undisturbed run of two processes."""
    directory = commands.folder / "whole-ddp"
    shutil.rmtree(directory, ignore_errors=True)
    outcome = commands.fresh(words_of_ranks(commands, directory))
    require(outcome.status == 0, "the undisturbed run failed", outcome)
    return directory
