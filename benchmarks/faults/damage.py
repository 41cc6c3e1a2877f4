"""Files are damaged between two commands: truncated, a bit flipped, emptied, or replaced by a folder."""

import functools
import random
import shutil
from pathlib import Path

import compare_methods
from benchmarks.faults import runs
from benchmarks.faults.crowd import finished_study, study_words
from benchmarks.faults.interruptions import chosen_run
from benchmarks.faults.runs import Commands, Outcome, Signals, Undisturbed, in_process, refused_in_one_line, require
from finetuning.comparison.packed import RUNS
from finetuning.runs.files import (
    ADAPTER,
    ADAPTER_CONFIG,
    BEST_CHECKPOINT,
    LAST_CHECKPOINT,
    PREDICTIONS,
    PREVIOUS_CHECKPOINT,
    RESULT,
    SETTINGS,
    TRAINED_WEIGHTS,
)
from finetuning.storage import sum_holds

KINDS = ("truncated", "bit flipped", "emptied", "folder instead")


def damage(path: Path, kind: str, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()
    if kind == "folder instead":
        path.mkdir()
        return
    if kind == "bit flipped":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content[: {"truncated": generator.randrange(len(content)), "emptied": 0}.get(kind, len(content))])


def kind_of(directory: Path) -> str:
    """The trials take the kinds of damage in turn."""
    return KINDS[runs.number_of(directory) % len(KINDS)]


def damaged_checkpoint(commands: Commands, generator: random.Random, directory: Path) -> str:
    """An interrupted run whose last, last two, or best checkpoint is damaged."""
    method, precision = chosen_run(generator)
    words = commands.flags(directory, method, precision)
    whole, ended, _ = commands.whole(method, precision)
    while not (directory / LAST_CHECKPOINT).is_file() or (directory / RESULT).exists():
        shutil.rmtree(directory, ignore_errors=True)
        moment = Signals(operation=generator.randint(ended.operations // 3, ended.operations))
        commands.run(words, moment)
    names = generator.choice(
        [(LAST_CHECKPOINT,), (LAST_CHECKPOINT,), (LAST_CHECKPOINT, PREVIOUS_CHECKPOINT), (BEST_CHECKPOINT,)]
    )
    damaged = [directory / name for name in names if (directory / name).is_file()]
    if not damaged:
        raise Undisturbed
    for path in damaged:
        damage(path, kind_of(directory), generator)
    intact = {LAST_CHECKPOINT, PREVIOUS_CHECKPOINT} - {path.name for path in damaged}
    kept = any((directory / name).is_file() for name in intact)
    last, how = runs.continued(kept, Outcome(0, ""), lambda: commands.run([*words, "--resume", "auto"]))
    seen = _identical_or_refused(last, directory, whole)
    if last.status == 0 and kind_of(directory) != "folder instead":
        warnings = [line for line in last.lines if line.startswith("warning:") and "is damaged" in line]
        expected = sum(path.name != BEST_CHECKPOINT for path in damaged) if kept else 0
        require(len(warnings) == expected, f"{expected} lines of warning", last)
        require(kept or "no intact checkpoint: starting over" in last.printed, "no word of the damage", last)
    return seen if last.status else f"{how}, {seen}"


def _identical_or_refused(outcome: Outcome, directory: Path, whole: Path) -> str:
    if outcome.status == 0:
        for folder in directory.glob("*/"):  # that replaced a file which is no longer needed
            folder.rmdir()
        runs.require_same(directory, whole)
        return "identical"
    require(refused_in_one_line(outcome), "after damage", outcome)
    return f"refused, status {outcome.status}"


def damaged_settings(commands: Commands, generator: random.Random, directory: Path) -> str:
    """An interrupted run whose settings are damaged."""
    words = commands.flags(directory, "lora")
    whole, outcome, _ = commands.whole("lora")
    while not (directory / SETTINGS).is_file():
        shutil.rmtree(directory, ignore_errors=True)
        commands.run(words, Signals(operation=generator.randint(1, outcome.operations)))
    damage(directory / SETTINGS, kind_of(directory), generator)
    return _identical_or_refused(commands.run([*words, "--resume", "auto"]), directory, whole)


def damaged_cache(commands: Commands, generator: random.Random, directory: Path) -> str:
    """Tokens or compiled kernels in the cache are damaged."""
    whole = commands.whole("selective", "auto")[0]
    cache = runs.empty_cache(directory)
    shutil.copytree(commands.folder / "cache", cache)
    folder = generator.choice([path for path in cache.iterdir() for _ in range(1 if path.name == "kernels" else 3)])
    path = generator.choice(sorted(folder.iterdir()))
    damage(path, kind_of(directory), generator)
    outcome = commands.run(commands.flags(directory, "selective", "auto"), cache=cache)
    if outcome.status:
        require(refused_in_one_line(outcome), f"damaged {folder.name}", outcome)
        return f"{folder.name}: refused"
    if "no: not built" in outcome.printed:  # it says so, and computes the same with torch's operators
        return f"{folder.name}: not built"
    runs.require_same(directory, whole)
    if not sum_holds(path):  # kernels of another precision
        raise Undisturbed
    return f"{folder.name}: rebuilt, identical"


def damaged_for_predict(commands: Commands, generator: random.Random, directory: Path, file: str) -> str:
    """A file of a finished run is damaged, and the run then used. ``file`` is a pattern of its name."""
    whole, _, _ = commands.whole(generator.choice(list(runs.METHODS)))
    text = ("--text", "a dull film, number 7")
    expected = commands.run(["predict", str(whole), *text])
    shutil.copytree(whole, directory)
    damage(next(directory.glob(file)), kind_of(directory), generator)
    outcome = commands.run(["predict", str(directory), *text])
    if outcome.status == 0:  # for example another kind of space in result.json
        require(_answers(outcome) == _answers(expected), "other predictions", outcome)
        return "same predictions"
    require(refused_in_one_line(outcome), "damaged", outcome)
    return "refused"


def damaged_export(commands: Commands, generator: random.Random, directory: Path) -> str:
    """A file of a finished run is damaged, and then the run is exported: merged, or as an adapter."""
    method, flags = generator.choice([("lora", ()), ("lora", ("--adapter",)), ("full", ())])
    run, out = shutil.copytree(commands.whole(method)[0], directory / "run"), directory / "out"
    names = (ADAPTER, ADAPTER_CONFIG, TRAINED_WEIGHTS, SETTINGS, RESULT, PREDICTIONS)
    path = generator.choice([run / name for name in names if (run / name).exists()])
    damage(path, kind_of(directory), generator)
    outcome = commands.run(["export", str(run), str(out), *flags])
    if outcome.status == 0:  # it does not need this file
        expected = exported(commands, method, flags)
        same = {file.name for file in expected if (out / file.name).read_bytes() == file.read_bytes()}
        require(len(same) == len(expected), f"another export after damage to {path.name}", outcome)
        return f"{path.name}: not needed"
    require(refused_in_one_line(outcome) and not out.exists(), f"damaged {path.name}", outcome)
    return f"{path.name}: refused"


@functools.cache
def exported(commands: Commands, method: str, flags: tuple[str, ...]) -> list[Path]:
    """The weights and settings that an undamaged run is exported to."""
    out = commands.folder / "exported" / f"{method}{''.join(flags)}"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    outcome = commands.run(["export", str(commands.whole(method)[0]), str(out), *flags])
    require(outcome.status == 0, "the undamaged export failed", outcome)
    return [*out.glob("*.safetensors"), *out.glob("*config.json")]


def _answers(outcome: Outcome) -> list[str]:
    return [line for line in outcome.printed.splitlines() if not line.startswith("file operations")]


def damaged_predictions(commands: Commands, generator: random.Random, directory: Path) -> str:
    """Predictions of a study's run are damaged, and then collected."""
    results = directory / "results"
    shutil.copytree(finished_study(commands) / "runs", directory / "runs")
    damage(generator.choice(sorted(directory.glob("runs/*/*/" + PREDICTIONS))), kind_of(directory), generator)
    collect = ["collect", *study_words(commands, directory), "--results", str(results)]
    outcome = in_process(compare_methods.main, collect)
    require(refused_in_one_line(outcome), "damaged", outcome)
    return "refused"


def damaged_collected_run(commands: Commands, generator: random.Random, directory: Path) -> str:
    """The file of collected runs is damaged, and then the report is made."""
    study, results = finished_study(commands), directory / "results"
    collected = study / "results"
    if not collected.exists():
        outcome = in_process(
            compare_methods.main, ["collect", *study_words(commands, study), "--results", str(collected)]
        )
        require(outcome.status == 0, "collect", outcome)
        require(in_process(compare_methods.main, _report(collected)).status == 0, "report", outcome)
    shutil.copytree(collected, results)
    damage(generator.choice(sorted(results.glob(f"*/{RUNS}"))), kind_of(directory), generator)
    outcome = in_process(compare_methods.main, _report(results))
    if outcome.status == 0:
        same = all(path.read_bytes() == (results / path.name).read_bytes() for path in collected.glob("summary.json"))
        require(same, "another report", outcome)
        return "same report"
    require(refused_in_one_line(outcome), "damaged", outcome)
    return "refused"


def _report(results: Path) -> list[str]:
    return ["report", "--results", str(results)]
