"""The faults of the campaign: each is done to a run, and its promise is checked."""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import finetune_lora
from finetuning.errors import UserError
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, PREDICTIONS, RESULT, SETTINGS, check_unchanged
from finetuning.settings import FLAGS, Flag
from tests.fault_campaign import METHODS, ROOT, Broken, Commands, Fault, Outcome, Signals, require, require_same

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
    return f"identical after {times} kills"


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


# ---------------------------------------------------------------------------------------------------------------------
# damaged files


def damage(path: Path, generator: random.Random) -> str:
    """Truncates the file, flips a byte, empties it, or replaces it by a folder. Returns which."""
    kind = generator.choice(["truncated", "byte flipped", "emptied", "folder instead"])
    content = bytearray(path.read_bytes())
    path.unlink()
    if kind == "folder instead":
        path.mkdir()
        return kind
    if kind == "byte flipped":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content[: {"truncated": generator.randrange(len(content)), "emptied": 0}.get(kind, len(content))])
    return kind


def refused_in_one_line(outcome: Outcome) -> bool:
    """Whether a command said in one line why it does not go on."""
    last = [line for line in outcome.lines if not line.startswith("warning:")]
    return outcome.status in (1, 2) and len(last) == 1 and last[0].startswith(("error:", "failed:"))


def damaged_checkpoint(commands: Commands, generator: random.Random, directory: Path) -> str:
    """An interrupted run whose last, last two, or best checkpoint is damaged."""
    method, precision = chosen_run(commands, generator)
    words = commands.flags(directory, method, precision)
    _, whole, _ = commands.whole(method, precision)
    while not (directory / LAST_CHECKPOINT).is_file():
        shutil.rmtree(directory, ignore_errors=True)
        moment = Signals(operation=generator.randint(whole.operations // 3, whole.operations))
        commands.run(words, moment)
    names = generator.choice(
        [(LAST_CHECKPOINT,), (LAST_CHECKPOINT,), (LAST_CHECKPOINT, "previous.ckpt"), (BEST_CHECKPOINT,)]
    )
    kinds = [damage(directory / name, generator) for name in names if (directory / name).is_file()]
    return _identical_or_refused(commands, words, directory, commands.whole(method, precision)[0], bool(kinds))


def _identical_or_refused(commands: Commands, words: list[str], directory: Path, whole: Path, damaged: bool) -> str:
    outcome = commands.run([*words, "--resume", "auto"])
    if outcome.status == 0:
        for folder in directory.glob("*/"):  # that replaced a file which is no longer needed
            folder.rmdir()
        require_same(directory, whole)
        return "identical"
    require(damaged and refused_in_one_line(outcome), "after damage", outcome)
    return f"refused, status {outcome.status}"


def damaged_settings(commands: Commands, generator: random.Random, directory: Path) -> str:
    """An interrupted run whose settings are damaged."""
    words = commands.flags(directory, "lora")
    whole, outcome, _ = commands.whole("lora")
    while not (directory / SETTINGS).is_file():
        shutil.rmtree(directory, ignore_errors=True)
        commands.run(words, Signals(operation=generator.randint(1, outcome.operations)))
    damage(directory / SETTINGS, generator)
    return _identical_or_refused(commands, words, directory, whole, damaged=True)


def damaged_cache(commands: Commands, generator: random.Random, directory: Path) -> str:
    """Tokens in the cache are damaged."""
    whole = commands.whole("selective")[0]
    cache = directory.with_name("own cache")
    if not cache.exists():
        commands.run(commands.flags(directory, "selective"), cache=cache)
        shutil.rmtree(directory)
    damage(generator.choice(sorted((cache / "tokens").iterdir())), generator)
    outcome = commands.run(commands.flags(directory, "selective"), cache=cache)
    if outcome.status:
        require(refused_in_one_line(outcome), "damaged tokens", outcome)
        shutil.rmtree(cache)
        return "refused"
    require_same(directory, whole)
    return "rebuilt, identical"


def damaged_run(commands: Commands, generator: random.Random, directory: Path) -> str:
    """Result, weights or predictions of a finished run are damaged, and then used."""
    method = generator.choice(list(METHODS))
    whole, _, _ = commands.whole(method)
    shutil.copytree(whole, directory)
    text = ["predict", str(directory), "--text", "a dull film, number 7"]
    expected = commands.run(["predict", str(whole), *text[2:]])
    (weights,) = directory.glob("*.safetensors")
    path = generator.choice([directory / RESULT, weights, directory / PREDICTIONS])
    kind = damage(path, generator)
    if path.name == PREDICTIONS:
        try:
            if kind != "folder instead":
                check_unchanged(path)
        except UserError:
            return "refused"
        if kind == "folder instead":
            return "refused"
        raise Broken(f"{kind}: the change of {path.name} was not noticed")
    outcome = commands.run(text)
    if outcome.status == 0:  # for example another kind of space in result.json
        require(outcome.printed == expected.printed, f"{path.name} {kind}", outcome)
        return "same predictions"
    require(refused_in_one_line(outcome), f"{path.name} {kind}", outcome)
    return "refused"


# ---------------------------------------------------------------------------------------------------------------------
# disk, processes, environment


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system in memory. Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk_full(commands: Commands, generator: random.Random, directory: Path) -> str:
    """The disk of the run directory is full, at a random size of the disk; then it grows."""
    method = generator.choice(["lora", "full"])
    whole, _, _ = commands.whole(method)
    needed = sum(path.stat().st_size for path in whole.iterdir()) // 1024
    with small_disk(directory, generator.randint(8, 4 * needed)):
        words = commands.flags(directory / "run", method)
        outcome = commands.run(words)
        if outcome.status:
            require(refused_in_one_line(outcome), "full disk", outcome)
            require("space" in outcome.lines[-1], "full disk", outcome)
        subprocess.run(["mount", "-o", "remount,size=100m", str(directory)], check=True)
        last = commands.run([*words, "--resume", "auto"])
        require(last.status == 0, "after the disk grew", last)
        require_same(directory / "run", whole)
    return f"status {outcome.status}, then identical"


def one_cache(commands: Commands, _: random.Random, directory: Path) -> str:
    """Eight runs at once on one empty cache."""
    whole = commands.whole("selective")[0]
    directory.mkdir()
    runs = [directory / str(number) for number in range(8)]
    processes = [
        commands.start(commands.flags(run, "selective"), run.with_suffix(".log"), cache=directory / "cache")
        for run in runs
    ]
    for process in processes:
        process.join()
    for run in runs:
        require_same(run, whole)
    return "all identical"


def one_directory(commands: Commands, _: random.Random, directory: Path) -> str:
    """Four runs at once in one directory: one does it, the others are refused or find it done."""
    whole = commands.whole("selective")[0]
    logs = [directory.with_name(f"{directory.name}-{number}.log") for number in range(4)]
    words = [*commands.flags(directory, "selective"), "--resume", "auto"]
    processes = [commands.start(words, log) for log in logs]
    for process in processes:
        process.join()
    statuses = sorted(process.exitcode or 0 for process in processes)
    printed = [log.read_text(encoding="utf8") for log in logs]
    for log in logs:
        log.unlink()
    if (
        statuses != [0, 2, 2, 2]
        or sum("another run has just started" in p or "is being written by" in p for p in printed) != 3
    ):
        raise Broken(f"statuses {statuses}")
    require_same(directory, whole)
    return "one did it, three were refused"


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
    return f"rank {number}: the other ended within {10 * (int(seconds) // 10 + 1)} s, continued"


def _is_run(pid: int) -> bool:
    return b"finetune_lora.py" in Path(f"/proc/{pid}/cmdline").read_bytes()


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "umask 077": {},
    "HOME unset": {"HOME": ""},
    "TMPDIR gone": {"TMPDIR": "/nonexistent/tmp"},
    "locale C": {"LC_ALL": "C", "LANG": "C"},
    "spaces and umlauts": {},
}


def environment(commands: Commands, _: random.Random, directory: Path) -> str:
    """An unusual environment; the trials take them in turn."""
    name = list(ENVIRONMENTS)[int(directory.name.rpartition("-")[2]) % len(ENVIRONMENTS)]
    whole = commands.whole("selective")[0]
    run = directory / ("läuft gut" if name == "spaces and umlauts" else "run")
    earlier = os.umask(0o077) if name == "umask 077" else None
    try:
        outcome = commands.run(commands.flags(run, "selective"), variables=ENVIRONMENTS[name])
    finally:
        if earlier is not None:
            os.umask(earlier)
    require(outcome.status == 0, name, outcome)
    require_same(run, whole)
    return f"{name}: identical"


# ---------------------------------------------------------------------------------------------------------------------
# command lines


def wrong_value(flag: Flag, generator: random.Random) -> str:
    """A value that the flag does not allow."""
    if flag.kind is bool:
        return generator.choice(["maybe", "2", "None", "tru"])
    if flag.choices:
        return generator.choice(["nothing", flag.choices[0] + "x", "ö"])
    wrong = ["eight", "1e", "--", "nan" if flag.kind is float else "1.5"]
    for word, bound in flag.bounds.items():
        below = word in ("at least", "above")
        wrong.append(str(flag.kind(bound - 1 if below else bound + 1)))
        if word in ("above", "below"):
            wrong.append(str(bound))
    return generator.choice([value for value in wrong if value != "--"])


def wrong_command_lines(commands: Commands, generator: random.Random, directory: Path) -> str:
    """A hundred command lines with one wrong value, or a misspelled flag, among right ones."""
    checked = [flag for flag in FLAGS.values() if flag.kind is bool or flag.choices or flag.kind in (int, float)]
    for _ in range(100):
        flag = generator.choice(checked)
        name, value = flag.name, wrong_value(flag, generator)
        if generator.random() < 0.2:
            name += "x"
        words = [*commands.flags(directory, "lora"), f"--{name}={value}"]
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            status = finetune_lora.main(words)
        lines = printed.getvalue().splitlines()
        if status != 2 or len(lines) != 1 or f"--{name}" not in lines[0] or directory.exists():
            raise Broken(f"--{name}={value}: status {status}, {lines[-3:]}")
    return "100 refused in one line"


FAULTS = (
    Fault("SIGKILL", 200, "continues, bit-identical", killed),
    Fault("signals", 60, "status 130, a checkpoint, continues bit-identical", signalled),
    Fault("damaged checkpoint", 80, "falls back or refused in one line", damaged_checkpoint),
    Fault("damaged settings", 20, "refused in one line", damaged_settings),
    Fault("damaged cache", 40, "rebuilt or refused in one line", damaged_cache),
    Fault("damaged run", 80, "refused in one line, never used", damaged_run),
    Fault("disk full", 40, "status 1 and one line, continues bit-identical", disk_full),
    Fault("one cache", 10, "all end alike", one_cache),
    Fault("one directory", 10, "one writer", one_directory),
    Fault("one of two ranks killed", 20, "the other ends within 60 s, one line, continues", rank_killed),
    Fault("environment", 5, "works", environment),
    Fault("command lines", 20, "status 2, one line that names the flag", wrong_command_lines),
)
