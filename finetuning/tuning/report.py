"""The end of a search: the best run in ``DIR/best``, the summary in ``tune.json``, and the page ``tune.html``."""

import shlex
import shutil
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.comparison.collected import Predictions
from finetuning.comparison.collection import read_test_predictions
from finetuning.comparison.plan import shown_command
from finetuning.comparison.statistics import SCORES, Difference, bootstrap_difference, seed_spread
from finetuning.html import render
from finetuning.pages import Table
from finetuning.runs.answers import positive_of
from finetuning.runs.files import PREDICTIONS, read_result, read_status
from finetuning.runs.records import SCORES as SCORE_NAMES
from finetuning.storage import read_json, write_json, write_text
from finetuning.tuning.plan import BEST, SUMMARY, TRIALS, Budget, Plan, stored_flags
from finetuning.tuning.plots import draw_plots, shown_score
from finetuning.tuning.search import last_places, shown_values
from finetuning.tuning.trials import COMPLETE, Place, Trial, Trials

REPORT, TEMPLATE = "tune.html", Path(__file__).parent / "tune.html.j2"
END, LOOK_AGAIN_SECONDS = "end", 1.0


def finish(folder: Path, plan: Plan, winner: dict[str, Any]) -> dict[str, Any] | None:
    """Writes best run, summary and page, unless another worker does; then it waits for them.

    Args:
        folder: of the search.
        plan: the search.
        winner: the trial that won, and the seeds of the last runs.

    Returns:
        The content of ``tune.json``; ``None`` if no last run has finished.
    """
    while True:
        with Place(folder / END).claim() as lock:
            if (folder / SUMMARY).exists():
                return read_json(folder / SUMMARY)
            if lock is not None:
                return _finish(folder, plan, winner)
        time.sleep(LOOK_AGAIN_SECONDS)


def _finish(folder: Path, plan: Plan, winner: dict[str, Any]) -> dict[str, Any] | None:
    places = last_places(folder, winner).values()
    runs = [place.directory for place in places if read_status(place.directory) == "finished"]
    if not runs:
        print(f"failed: no last run has finished, see {next(iter(places)).log}", file=sys.stderr)
        return None
    sign = -1 if plan.minimize else 1
    best = max(runs, key=lambda run: sign * read_result(run)["validation"][plan.monitor])  # of equal ones the first
    copy_run(best, folder / BEST)
    trials = Trials(folder / TRIALS, plan.monitor)
    summary = make_summary(plan, trials, winner["trial"], runs, Budget.read(folder).seconds / 60)
    write_text(folder / REPORT, make_page(folder.resolve().name, plan, trials.all(), summary))
    summary["minutes"] = Budget.read(folder).seconds / 60
    write_json(folder / SUMMARY, summary)  # last: it says that the search has finished
    return summary


def copy_run(source: Path, target: Path) -> None:
    """Copies a run directory; a kill leaves the old copy, none or the new one, never half of one."""
    half = target.with_name(f".{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source, half, ignore=shutil.ignore_patterns(".*"))
    shutil.rmtree(target, ignore_errors=True)
    half.replace(target)


def make_summary(plan: Plan, trials: Trials, winner: int, runs: list[Path], minutes: float) -> dict[str, Any]:
    """What the search has found, as ``tune.json`` holds it.

    Args:
        plan: the search.
        trials: all of its trials.
        winner: the number of the trial that won.
        runs: the finished last runs.
        minutes: that the search took.
    """
    everything = trials.all()
    won, results = trials.read(winner), [read_result(run) for run in runs]
    default_run = trials.place(0).directory
    default = read_result(default_run) if everything[0].state == COMPLETE else {}
    tested = all("test" in result for result in (default, *results))
    return {
        "monitor": plan.monitor,
        "trials": dict(Counter(trial.state for trial in everything)),
        "minutes": minutes,
        "default": {"validation": everything[0].value, "test": default.get("test")},
        "winner": {
            "trial": winner,
            "flags": won.settings,
            "command": command_of(results[0]),
            "search_validation": won.value,  # chosen as the highest of many, so likely too high
            "seeds": [result["config"]["seed"] for result in results],
            "validation": _means([result["validation"] for result in results]),
            "test": _means([result["test"] for result in results]) if tested else None,
            "runs": [f"{run.parent.name}/{run.name}" for run in runs],
        },
        "gain": gain_of(default_run, runs, default) if tested else None,
    }


def _means(scores: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name, value in scores[0].items() if isinstance(value, float) and name != "seconds"]
    return {name: statistics.fmean(score[name] for score in scores) for name in names}


def command_of(result: dict[str, Any]) -> str:
    """The command of a run, without the paths of this machine."""
    return shown_command(result["command"])


def gain_of(default: Path, runs: list[Path], result: dict[str, Any]) -> dict[str, Any]:
    """The mean test score of the last runs minus the default's, with a 95 % interval over texts and seeds.

    Args:
        default: the run of the default, which read the test split once and chose nothing by it.
        runs: the last runs.
        result: of the default.
    """
    names = result["data"]["label_names"]
    several = "threshold" in result["task"] and positive_of(result["task"], names) is None
    measure = "micro_f1" if several else "accuracy"

    def counted(run: Path) -> np.ndarray:
        task = read_result(run)["task"]
        frame = read_test_predictions(run / PREDICTIONS, task.get("threshold"), positive_of(task, names)).to_pandas()
        return Predictions.from_frame("", frame).counted(measure)

    first, second = np.stack([counted(run) for run in runs]), counted(default)[None]
    scores = [[float(SCORES[measure](run.sum(axis=0))) for run in method] for method in (first, second)]
    found = bootstrap_difference(first, second, seed_spread(scores), score=measure)
    return {"measure": measure, "mean": found.mean, "ci95": [found.low, found.high], "p": found.p}


def summary_lines(folder: Path, summary: dict[str, Any]) -> list[str]:
    """The search in a few lines."""
    won, monitor = summary["winner"], summary["monitor"]
    lines = [
        f"{'search':<11} {counts_text(summary['trials'])} in {summary['minutes']:.1f} minutes",
        f"{'winner':<11} trial {won['trial']}: {flags_text(won['flags']) or 'the default'}",
        f"{'validation':<11} {monitor} {won['search_validation']:.4f} in the search, {won['validation'][monitor]:.4f}"
        f" on average of {len(won['seeds'])} new seeds" + _of_default(summary["default"]["validation"]),
    ]
    if won["test"] is not None:
        test = summary["default"]["test"].get(monitor)
        lines.append(f"{'test':<11} {monitor} {won['test'][monitor]:.4f}" + _of_default(test))
        lines.append(f"{'gain':<11} {gain_text(summary['gain'])}")
    lines.append(f"{'best run':<11} {folder / BEST}")
    lines.append(f"{'report':<11} {folder / REPORT}")
    return lines


def counts_text(counts: dict[str, int]) -> str:
    """How many trials ended how."""
    return f"{sum(counts.values())} trials ({', '.join(f'{n} {state}' for state, n in counts.items())})"


def _of_default(score: float | None) -> str:
    return "" if score is None else f" (the default: {score:.4f})"


def gain_text(gain: dict[str, Any]) -> str:
    """The gain over the default, for people."""
    difference = Difference(gain["mean"], gain["ci95"][0], gain["ci95"][1], gain["p"])
    return f"{difference} of test {gain['measure'].replace('_', ' ')} over the default"


def flags_text(settings: dict[str, Any]) -> str:
    """Flags as a command line has them."""
    return shlex.join(stored_flags(settings))


# ---------------------------------------------------------------------------------------------------------------------
# the page


def make_page(name: str, plan: Plan, trials: list[Trial], summary: dict[str, Any]) -> str:
    """The page of a search, which needs no other file.

    Args:
        name: of the search.
        plan: the search.
        trials: all of them.
        summary: what ``make_summary`` gives.
    """
    gain, won = summary["gain"], summary["winner"]
    before = summary["default"]["validation"]
    score = f"{plan.monitor.replace('_', ' ')} on validation"
    mean = won["validation"][plan.monitor]
    compared = f"{score}: {_cell(plan, mean)}, the default {_cell(plan, before)}."
    return render(
        TEMPLATE,
        name=name,
        headline=f"{gain_text(gain)}." if gain else compared[0].upper() + compared[1:],
        results=result_table(plan, summary),
        summary=summary,
        trial_count=len(trials),
        counts=counts_text(summary["trials"]),
        plots=draw_plots(plan, trials),
        space=plan.space.table().without_empty_columns(),
        given=flags_text({name: value for name, value in plan.given.items() if name != "data_dir"}),
        trials=trial_table(plan, trials),
    )


def result_table(plan: Plan, summary: dict[str, Any]) -> Table:
    """The default next to the winner: in the search, and trained again."""
    won, default = summary["winner"], summary["default"]
    test = [scores and scores.get(plan.monitor) for scores in (default["test"], won["test"])]
    unit = "" if plan.minimize else ", %"
    seeds = f"winner, mean of {len(won['seeds'])} new seeds"
    rows = [
        ("default, one seed", _cell(plan, default["validation"]), _cell(plan, test[0])),
        ("winner, in the search", _cell(plan, won["search_validation"]), ""),
        (seeds, _cell(plan, won["validation"][plan.monitor]), _cell(plan, test[1])),
    ]
    name = SCORE_NAMES[plan.monitor]
    return Table(("runs", f"validation {name}{unit}", f"test {name}{unit}"), rows)


def trial_table(plan: Plan, trials: list[Trial]) -> Table:
    """A row for each trial, with its values."""
    names = [row.name for row in plan.space.parameters]
    rows = []
    for trial in trials:
        values = shown_values(trial, plan)
        seconds = "" if trial.train_seconds is None else f"{trial.train_seconds:.1f}"
        cells = (str(trial.number), _cell(plan, trial.latest), seconds, trial.error or trial.state or "running")
        rows.append((*cells, *(values.get(name, "") for name in names)))
    return Table(("trial", "score", "training, s", "state", *names), rows)


def _cell(plan: Plan, score: float | None) -> str:
    return "" if score is None else f"{shown_score(plan, score):.{4 if plan.minimize else 2}f}"
