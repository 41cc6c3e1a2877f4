"""The end of a search: the best run in ``DIR/best``, the summary in ``tune.json``, and the page ``tune.html``."""

import shlex
import shutil
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from finetuning.comparison.collection import read_test_predictions
from finetuning.comparison.plan import shown_command
from finetuning.comparison.predictions import Predictions
from finetuning.comparison.statistics import Difference, pooled_difference, seed_spread
from finetuning.errors import counted
from finetuning.flags import flag_words
from finetuning.html import render
from finetuning.pages import Table
from finetuning.runs.abstention import checkpoints_compared
from finetuning.runs.files import BEST_RUN, PREDICTIONS, check_unchanged, read_result, read_status, write_result
from finetuning.runs.finished import FinishedRun, read_finished
from finetuning.runs.messages import called
from finetuning.storage import read_json, write_json, write_text
from finetuning.tuning.plan import ENDING, FINAL, SUMMARY, TRIALS, Budget, Plan
from finetuning.tuning.plots import draw_plots, score_label, shown_score
from finetuning.tuning.search import last_places
from finetuning.tuning.space import space_table
from finetuning.tuning.texts import shown_values, trial_name
from finetuning.tuning.trials import END, TRIAL, Place, Trial, Trials

REPORT, TEMPLATE = "tune.html", Path(__file__).parent / "tune.html.j2"
LOOK_AGAIN_SECONDS = 1.0


def finish(folder: Path, plan: Plan, final: dict[str, Any]) -> dict[str, Any] | None:
    """Writes best run, summary and page, unless another worker does; then it waits for them.

    Args:
        final: the trials that were trained again, and their seeds.

    Returns:
        The content of ``tune.json``; ``None`` if no last run has finished, or if meanwhile another worker has added
        minutes or trials: then it goes on.
    """
    while True:
        same = False
        with Place(folder / ENDING).claim() as lock:
            if (folder / SUMMARY).exists():
                return read_json(folder / SUMMARY)
            with suppress(FileNotFoundError):
                same = read_json(folder / FINAL) == final
            if lock is not None and not same:
                return None
            if lock is not None:
                return _finish(folder, plan, final)
        time.sleep(LOOK_AGAIN_SECONDS)


def _finish(folder: Path, plan: Plan, final: dict[str, Any]) -> dict[str, Any] | None:
    places = last_places(folder, final)
    runs: dict[int, list[FinishedRun]] = {number: [] for number in final["trials"]}
    for (number, _), place in places.items():
        if read_status(place.directory) == "finished":
            runs[number].append(read_finished(place.directory))
    missing = {number: len(final["seeds"]) - len(finished) for number, finished in runs.items()}
    trials, sign = Trials(folder / TRIALS, plan.monitor), -1 if plan.minimize else 1
    default = trials.place(0).directory
    if 0 not in runs and read_status(default) == "finished":  # there was no time to train it again
        runs[0] = [read_finished(default)]
    if not any(runs.values()):
        print(f"failed: no last run has finished, see {next(iter(places.values())).log}", file=sys.stderr)
        return None

    def score(run: FinishedRun) -> float:
        return sign * float(run.result["validation"][plan.monitor])

    def rank(number: int) -> tuple[int, float]:
        scores = [score(run) for run in runs[number]]  # whose runs fail more often cannot win
        mean = round(statistics.fmean(scores), 6) if scores else 0.0  # float32: equal ones differ after it
        return -missing.get(number, 0), mean

    winner = max(sorted(runs), key=rank)  # a tie: the default
    copy_run(max(runs[winner], key=score).directory, folder / BEST_RUN)  # of equal ones the first
    note_comparisons(folder / BEST_RUN, trials.all(), [run for number in final["trials"] for run in runs[number]])
    summary = make_summary(plan, trials, runs, winner, missing)
    summary["minutes"] = Budget.read(folder).seconds / 60
    write_text(folder / REPORT, make_page(folder.resolve().name, plan, trials.all(), summary))
    summary["minutes"] = Budget.read(folder).seconds / 60
    write_json(folder / SUMMARY, summary)  # last: it says that the search has finished
    return summary


def copy_run(source: Path, target: Path) -> None:
    """Copies a run directory; a kill leaves the old copy, none or the new one, never half of one."""
    half = target.with_name(f".{target.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(source, half, ignore=shutil.ignore_patterns(".*", TRIAL, END))
    shutil.rmtree(target, ignore_errors=True)
    half.replace(target)


def note_comparisons(best: Path, trials: list[Trial], last_runs: list[FinishedRun]) -> None:
    """Writes into the copied run how many checkpoints validation has compared, for statements about validation."""
    result = read_result(best)
    epochs = [len(trial.history) for trial in trials] + [checkpoints_compared(run.result) for run in last_runs]
    write_result(best, result | {"checkpoints_compared": sum(epochs)})


def make_summary(
    plan: Plan, trials: Trials, runs: dict[int, list[FinishedRun]], winner: int, missing: dict[int, int]
) -> dict[str, Any]:
    """What the search has found, as ``tune.json`` holds it, without its minutes.

    Args:
        runs: the finished last runs of each trial that was trained again.
        winner: the number of the one that won.
        missing: how many last runs of each have not finished; a default that was not trained again lacks none.
    """
    everything = trials.all()
    found = {n: _record(trials.read(n), own, missing.get(n, 0)) for n, own in runs.items()}
    default = found.get(0) or _record(everything[0], [])
    candidate = max(found)  # the best trial of the search; the default if no trial was better
    tested = {n for n in (winner, candidate) if default["test"] is not None and found[n]["test"] is not None}
    gains = {n: gain_of(runs[0], runs[n]) for n in tested}
    return {
        "monitor": plan.monitor,
        "trials": dict(Counter(trial.state for trial in everything)),
        "default": default,
        "candidate": found[candidate],
        "winner": found[winner],
        "gain": gains.get(winner),
        "candidate_gain": gains.get(candidate),
    }


def _record(trial: Trial, runs: list[FinishedRun], failed: int = 0) -> dict[str, Any]:
    """A trial and its runs with new seeds, of which some more have failed."""
    results = [run.result for run in runs]
    tested = bool(results) and all("test" in result for result in results)
    return {
        "trial": trial.number,
        "flags": trial.settings,
        "command": shown_command(results[0]["command"]) if results else None,
        "pooling": results[0]["config"]["pooling"] if results else None,
        "search_validation": trial.value,  # if chosen as the highest of many, likely too high
        "seeds": [result["config"]["seed"] for result in results],
        "failed": failed,
        "error": trial.error,
        "validation": _means([result["validation"] for result in results]) if results else None,
        "test": _means([result["test"] for result in results]) if tested else None,
        "runs": ["/".join(run.directory.parts[-2:]) for run in runs],
    }


def _means(scores: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name, value in scores[0].items() if isinstance(value, float) and name != "seconds"]
    return {name: statistics.fmean(score[name] for score in scores) for name in names}


def gain_of(default: list[FinishedRun], runs: list[FinishedRun]) -> dict[str, Any]:
    """The mean test score of runs minus the default's, with a 95 % interval over texts and seeds.

    Args:
        default: the runs of the default. Each has read the test split once, and nothing was chosen by it.
        runs: those of a trial. The default itself gains 0, for certain.
    """
    measure = "micro_f1" if default[0].rule.multi_label else "accuracy"
    if runs == default:
        return {"measure": measure, "mean": 0.0, "ci95": [0.0, 0.0], "p": 1.0}

    def predictions(run: FinishedRun) -> Predictions:
        check_unchanged(run.directory / PREDICTIONS)
        return Predictions.of("", read_test_predictions(run.directory, run.rule))

    sides = [[predictions(run) for run in each] for each in (runs, default)]
    first, second = (np.stack([each.counted(measure) for each in side]) for side in sides)
    scores = [[each.score(measure) for each in side] for side in sides]
    found = pooled_difference([(first, second, seed_spread(scores))], score=measure)
    return {"measure": measure, "mean": found.mean, "ci95": [found.low, found.high], "p": found.p}


def summary_lines(folder: Path, summary: dict[str, Any]) -> list[str]:
    won, monitor = summary["winner"], summary["monitor"]
    lines = [f"{'search':<11} {counts_text(summary['trials'])} in {summary['minutes']:.1f} minutes"]
    for record in compared(summary):
        lines.append(f"{trial_name(record['trial']):<11} {_scores_text(record, monitor)}")
    lines.append(f"{'winner':<11} {trial_name(won['trial'])}{': ' if won['flags'] else ''}{flags_text(won['flags'])}")
    if summary["gain"] is not None:
        lines.append(f"{'gain':<11} {gain_text(summary)}")
    lines.append(f"{'best run':<11} {folder / BEST_RUN}")
    lines.append(f"{'report':<11} {folder / REPORT}")
    onnx = ["--onnx"] if won["pooling"] == "mean" else []  # most classes cannot read the mean
    lines.append(f'{"try it":<11} {called("predict", folder / BEST_RUN)} --text "..."')
    lines.append(f"{'export':<11} {called('export', folder / BEST_RUN, 'FOLDER', *onnx)}")
    return lines


def compared(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The default, and the best trial of the search if that is another one."""
    default, candidate = summary["default"], summary["candidate"]
    return [default] if candidate["trial"] == 0 else [default, candidate]


def _scores_text(record: dict[str, Any], monitor: str) -> str:
    """A trial's scores in one line."""
    search, seeds = record["search_validation"], record["seeds"]
    parts = [] if search is None else [f"validation {monitor} {search:.4f} in the search"]
    if seeds:
        score = (record["test"] or {}).get(monitor)  # a test split of one class has no AUROC
        test = "" if score is None else f", test {score:.4f}"
        first = record["runs"][0].startswith(f"{TRIALS}/")
        again = "in its first run" if first else f"with {counted(len(seeds), 'new seed')}"
        parts.append(f"{record['validation'][monitor]:.4f} {again}{test}")
    if record["failed"]:
        parts.append(f"{counted(record['failed'], 'new seed')} failed")
    return "; ".join(parts) or (f"failed: {record['error']}" if record["error"] else "has not finished")


def counts_text(counts: dict[str, int]) -> str:
    """How many trials ended how."""
    return f"{sum(counts.values())} trials ({', '.join(f'{n} {state}' for state, n in counts.items())})"


def gain_text(summary: dict[str, Any]) -> str:
    """The gain over the default, for people."""
    gain, candidate = summary["candidate_gain"], summary["candidate"]["trial"]
    if candidate == 0:
        return "none, no trial was better than the first run of the default, so none was trained again"
    if gain is None:
        return f"none: {trial_name(candidate)} has failed with new seeds"
    difference = Difference(gain["mean"], gain["ci95"][0], gain["ci95"][1], gain["p"])
    text = f"{difference} of test {gain['measure'].replace('_', ' ')} over the default"
    if summary["winner"]["trial"] != 0:
        return text + (", which may be chance" if difference.low <= 0 <= difference.high else "")
    why = "has failed with some of the" if summary["candidate"]["failed"] else "is not better on validation with"
    return f"none: {trial_name(candidate)} {why} new seeds. It has {text}"


def flags_text(settings: dict[str, Any]) -> str:
    """Flags as a command line has them."""
    return shlex.join(flag_words(settings))


# --- the page


def make_page(name: str, plan: Plan, trials: list[Trial], summary: dict[str, Any]) -> str:
    """The page of a search, which needs no other file."""
    won, monitor = summary["winner"], plan.monitor.replace("_", " ")
    said = f"{trial_name(won['trial'])} wins: {monitor} on validation {_cell(plan, won['validation'][plan.monitor])}."
    headline = f"Gain: {gain_text(summary)}." if summary["gain"] else said[0].upper() + said[1:]
    searched = [row.name for row in plan.space.parameters]  # also the model, of which the default has the given one
    return render(
        TEMPLATE,
        name=name,
        headline=headline,
        winner=trial_name(won["trial"]),
        results=result_table(plan, summary),
        summary=summary,
        trial_count=len(trials),
        counts=counts_text(summary["trials"]),
        plots=draw_plots(plan, trials),
        space=space_table(plan.space.parameters).without_empty_columns(),
        given=flags_text({name: value for name, value in plan.given.items() if name not in ("data_dir", *searched)}),
        trials=trial_table(plan, trials),
    )


def result_table(plan: Plan, summary: dict[str, Any]) -> Table:
    """The default next to the best trial: in the search, and trained again."""

    def mean(record: dict[str, Any], split: str) -> str:
        return _cell(plan, record[split] and record[split].get(plan.monitor))

    rows = [
        (
            trial_name(record["trial"]), _cell(plan, record["search_validation"]), ", ".join(map(str, record["seeds"])),
            mean(record, "validation"), mean(record, "test"),
        )
        for record in compared(summary)
    ]  # fmt: skip
    validation, test = score_label(plan), score_label(plan, "test")
    return Table(("", f"in the search: {validation}", "seeds", validation, test), rows)


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
