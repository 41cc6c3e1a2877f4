"""Memory runs out in a step of a run: the process may not take more addresses than it has (RLIMIT_AS)."""

import contextlib
import ctypes
import functools
import importlib
import random
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Commands, Seen, Undisturbed, continued, empty_cache, number_of, require, require_same
from finetuning.runs.checkpoints import has_checkpoint

M_MMAP_THRESHOLD = -3  # of mallopt(3)
SMALL_BYTES = 1 << 15  # larger blocks come from the system, so that a limit acts at once
PLACES = {  # a function, and the number of its call
    "tokenizing": ("finetuning.steps.inputs", "tokenize", 1),
    "building": ("finetuning.steps.inputs", "build_classifier", 1),
    "step 1": ("finetuning.training.module", "FineTuning.training_step", 1),
    "step 50": ("finetuning.training.module", "FineTuning.training_step", 50),
    "evaluation": ("finetuning.training.module", "FineTuning.test_step", 1),
}
NO_THREAD_LOCAL_DATA = 127  # glibc's own end, with one line, if a thread's variables find no memory
KILLED = (-signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV, NO_THREAD_LOCAL_DATA)  # C++ code without memory aborts


@dataclass(frozen=True)
class LittleMemory:
    """From the n-th call of a function on, the process may take only a few bytes more."""

    place: str
    spare: int

    def install(self, watched: tuple[str, ...]) -> None:
        module, path, number = PLACES[self.place]
        *outer, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        original, calls, held = getattr(owner, name), 0, list[bytearray]()

        @functools.wraps(original)  # Lightning looks at the arguments
        def limited(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                held.extend(take_all_but(self.spare))
            return original(*arguments, **named)

        setattr(owner, name, limited)


def take_all_but(spare: int) -> list[bytearray]:
    """Limits the process to the addresses that it has and ``spare`` bytes.

    Returns:
        What holds the large blocks that were free; otherwise a small run could live on them.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL_BYTES)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf8").split()[0])
    present, (_, most) = pages * resource.getpagesize(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (present, most))
    held = []
    with contextlib.suppress(MemoryError):
        while True:
            held.append(bytearray(SMALL_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (present + spare, most))
    return held


def memory_runs_out(commands: Commands, generator: random.Random, directory: Path) -> Seen:
    """The limit comes in one step of the run; without it, the run continues."""
    place = list(PLACES)[number_of(directory) % len(PLACES)]
    method = generator.choice(["lora", "full"])
    whole, _, _ = commands.whole(method)
    words = [*commands.flags(directory, method), "--resume", "auto"]
    cache = empty_cache(directory) if place == "tokenizing" else None
    outcome = commands.run(words, LittleMemory(place, generator.choice([0, 1 << 18, 1 << 21])), cache)
    if outcome.status == 0:
        raise Undisturbed
    line = runs.refused_in_one_line(outcome) and "memory" in outcome.lines[-1]
    require(line or outcome.status in KILLED, f"no memory: {place}", outcome)
    last, how = continued(has_checkpoint(directory), outcome, lambda: commands.run(words, cache=cache))
    require(last.status == 0, "with memory", last)
    require_same(directory, whole)
    end = "killed" if outcome.status in KILLED else "one line"
    return Seen(f"{end}, {how}, identical", {"without memory in": [place]})
