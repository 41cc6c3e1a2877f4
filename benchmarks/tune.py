"""What a search gains, and what it survives: ``python -m benchmarks.tune --data_dir PATH``, hours of work.

* ``gain``: test score of the winner minus the default's, two searches for each of six data sets.
* ``samplers``: best validation score over time, by random search, TPE, and TPE with pruning, of short trials.
* ``speed``: trials an hour of a search with two jobs, and of the same trials one after another, a process each.
* ``kills``: eight workers on one folder, killed at random: is a trial lost, or a file torn?
* ``repeat``: the same search twice: are trials, scores and the winner's weights the same?

All searches are kept in ``runs/tune``, so that the same command goes on after an interruption. What is measured is
written to ``benchmarks/results/tune.json`` and to docs/data_sets.md; with ``--seeds`` or ``--sets`` a part of it, next
to what is there.
"""

import itertools
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Record
from compare_methods import DATA_SETS, ROOT
from finetuning.comparison.over_sets import difference_cell
from finetuning.comparison.plots import COLORS, new_figure, png_of
from finetuning.errors import UserError
from finetuning.pages import Table, dated, renew_tables
from finetuning.runs.files import BEST_RUN, read_result
from finetuning.storage import read_json, write_bytes, write_json
from finetuning.tuning.plan import SEARCH, SUMMARY, TRIALS
from finetuning.tuning.texts import trial_name
from finetuning.tuning.trials import COMPLETE, Trial, Trials

FOLDER, OUTPUT = ROOT / "runs" / "tune", harness.RESULTS / "tune.json"
PICTURE = harness.RESULTS / "tune_samplers.png"
SETS = {
    "trec6": "--dataset text", "emotion": "--dataset text", "customer_reviews": "--dataset text",
    "financial_phrasebank": "--dataset financial_phrasebank", "twitter_financial_news": "--dataset text",
    "banking77": "--dataset text",
}  # fmt: skip
SAMPLED, SAMPLED_TEXTS = ("trec6", "twitter_financial_news"), 500  # so that there are many trials on any processor
SEEDS, TEXTS = 2, 2000
KINDS = {
    "random": "--sampler random --prune False", "TPE": "--prune False", "TPE with pruning": "",
}  # fmt: skip
SHORT = "--limit_train 400 --epochs 2 --prune False"  # trials of ``speed`` and ``kills``


@dataclass(frozen=True)
class Conditions:
    """What the flags ask for."""

    data_dir: Path
    minutes: float
    jobs: int
    texts: int  # most training texts
    quick: bool
    sets: Sequence[str]
    seeds: int  # searches of each data set

    @property
    def folder(self) -> Path:
        return FOLDER / "quick" if self.quick else FOLDER

    def words(self, name: str, seed: int, more: str) -> list[str]:
        """The flags of a search on a data set."""
        line = f"{SETS[name]} --model_name packaged-bert --limit_train {self.texts} --seed {seed} {more}"
        return [*line.split(), "--data_dir", str(self.data_dir / name)]


def searched(folder: Path, words: Sequence[str]) -> Path:
    """The folder of a finished search, which is begun, continued, or only looked up."""
    if not (folder / SUMMARY).exists():
        flags = ["--resume"] if (folder / SEARCH).exists() else words
        _, failed = harness.in_process(["compare_methods.py", "tune", *flags, "--output_dir", str(folder)], show=True)
        if failed:
            raise UserError(f"{folder}: the search has failed: {failed}")
    return folder


def timed_search(asked: Conditions, name: str, kind: str, seed: int) -> Path:
    more = f"{KINDS[kind]} --minutes {asked.minutes} --jobs {asked.jobs}"
    place = f"{name}-{kind.replace(' ', '_')}-{seed}-{asked.minutes:g}min-{asked.jobs}jobs"
    place += "" if asked.texts == TEXTS else f"-{asked.texts}texts"
    return searched(asked.folder / place, asked.words(name, seed, more))


def ended_trials(folder: Path) -> list[Trial]:
    return Trials(folder / TRIALS, read_json(folder / SUMMARY)["monitor"]).all()


def environment(folder: Path) -> Record:
    """Where a search was made."""
    return dict(read_result(folder / BEST_RUN)["environment"])


def merged(earlier: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """The records of an earlier call and the new ones, which replace those of the same search."""

    def place(record: Record) -> tuple[object, ...]:
        return tuple(record.get(key) for key in ("set", "kind", "seed"))

    places = {place(record) for record in new}
    return [*(record for record in earlier if place(record) not in places), *new]


def shown(table: Table, records: Sequence[Record]) -> str:
    """A part's table and where it was measured."""
    return dated(table, (record["environment"] for record in records))


def gain(asked: Conditions) -> list[Record]:
    """Winner and default of each search."""
    found = []
    for seed in range(asked.seeds):
        for name in asked.sets:
            folder = timed_search(asked, name, "TPE with pruning", seed)
            summary = read_json(folder / SUMMARY)
            known = {key: summary[key] for key in ("trials", "minutes", "gain")} | {"jobs": asked.jobs}
            known |= {"winner": summary["winner"]["trial"], "new_seeds": len(summary["winner"]["seeds"])}
            found.append({"set": name, "seed": seed, **known, "environment": environment(folder)})
    return found


def gain_table(records: Sequence[Record]) -> str:
    """A row for each search, and the mean of all with its interval over data sets."""
    gains: dict[str, list[float]] = {}  # of the searches whose default did not fail
    rows = []
    for record in sorted(records, key=lambda record: list(SETS).index(record["set"])):
        cells = (record["set"], str(record["seed"]), str(sum(record["trials"].values())), f"{record['minutes']:.1f}")
        winner = trial_name(record["winner"])
        shown_gain = "the default failed"
        if record["gain"]:
            gains.setdefault(record["set"], []).append(100 * record["gain"]["mean"])
            low, high = (100 * end for end in record["gain"]["ci95"])
            shown_gain = f"{gains[record['set']][-1]:+.2f} ({low:+.2f} to {high:+.2f})" if record["winner"] else "0"
        rows.append((*cells, winner, str(record["new_seeds"]), shown_gain))
    if len(gains) > 1:
        means = [statistics.fmean(of_set) for of_set in gains.values()]
        rows.append((f"mean of {len(means)} sets", "", "", "", "", "", difference_cell(means, 2)))
    table = Table(
        ("data", "seed", "trials", "minutes", "winner", "new seeds", "test score minus default's, points"), rows
    )
    planned = [(name, seed) for name in SETS for seed in range(SEEDS)]
    there = len({(record["set"], record["seed"]) for record in records}.intersection(planned))
    return f"{there} of {len(planned)} searches are there.\n\n{shown(table, records)}"


def samplers(asked: Conditions) -> list[Record]:
    """The best validation score so far, after each complete trial and after each third of the time."""
    asked, found = replace(asked, texts=min(asked.texts, SAMPLED_TEXTS)), []
    for name in (name for name in SAMPLED if name in asked.sets):
        for kind in KINDS:
            for seed in range(asked.seeds):
                folder = timed_search(asked, name, kind, seed)
                trials = sorted(ended_trials(folder), key=lambda trial: trial.minutes)
                ends = [(trial.minutes, trial.value or 0.0) for trial in trials if trial.state == COMPLETE]
                best = {}
                for third in (1, 2, 3):
                    until = third * asked.minutes / 3
                    best[f"{until:g}"] = max((value for minutes, value in ends if minutes <= until), default=None)
                known = {"set": name, "kind": kind, "seed": seed, "trials": len(trials), "best": best, "ends": ends}
                known |= {"texts": asked.texts, "jobs": asked.jobs, "environment": environment(folder)}
                found.append(known)
    return found


def samplers_table(records: Sequence[Record]) -> str:
    """A row for each data set and kind, the mean over seeds."""
    times, rows = list(dict.fromkeys(at for record in records for at in record["best"])), []
    for name, kind in dict.fromkeys((record["set"], record["kind"]) for record in records):
        own = [record for record in records if (record["set"], record["kind"]) == (name, kind)]
        scores = [[r["best"][at] for r in own if r["best"].get(at) is not None] for at in times]
        cells = [f"{100 * statistics.fmean(values):.2f}" if len(values) == len(own) else "" for values in scores]
        rows.append((name, kind, str(len(own)), f"{statistics.fmean(r['trials'] for r in own):g}", *cells))
    columns = ("data", "search", "seeds", "trials", *(f"best after {at} min, %" for at in times))
    picture = f"![Best validation score so far]({os.path.relpath(PICTURE, DATA_SETS.parent)})"
    return f"{picture}\n\n{shown(Table(columns, rows), records)}"


def samplers_plot(records: Sequence[Record]) -> bytes:
    """The best validation score so far against minutes: a part for each data set, a line for each search."""
    sets, kinds = (list(dict.fromkeys(record[key] for record in records)) for key in ("set", "kind"))
    with new_figure("", 4.2 * len(sets), 3.6, 1, len(sets)) as (figure, axes):
        for axis, name in zip(axes, sets, strict=True):
            for record in (record for record in records if record["set"] == name and record["ends"]):
                minutes, values = zip(*record["ends"], strict=True)
                best = [100 * value for value in itertools.accumulate(values, max)]
                label = record["kind"] if record["seed"] == 0 else None
                color = COLORS[kinds.index(record["kind"])]
                axis.step(minutes, best, where="post", color=color, label=label)
            axis.set(title=name, xlabel="minutes", ylabel="best validation score so far, %")
        axes[0].legend(loc="lower right", frameon=False)
        return png_of(figure)


def speed(asked: Conditions) -> list[Record]:
    """Seconds of all trials of a search with two jobs, and of the same commands one after another."""
    count = 4 if asked.quick else 20
    words = asked.words("trec6", 0, f"{SHORT} --sampler random --trials {count} --seeds 1 --jobs 2")
    folder = searched(asked.folder / "speed", words)
    together = 60 * max(trial.minutes for trial in ended_trials(folder))
    alone = 0.0
    for path in sorted((folder / TRIALS).glob("*/result.json")):
        command = shlex.split(read_result(path.parent)["command"])
        flags = command[next(i for i, word in enumerate(command) if word.startswith("--")) :]
        flags[flags.index("--output_dir") + 1] = str(asked.folder / "alone")
        began = time.monotonic()
        _, failed = harness.in_process(["finetune_lora.py", *flags, "--overwrite"])
        if failed:
            raise UserError(f"{path.parent}: its command has failed: {failed}")
        alone += time.monotonic() - began
    known = {"trials": count, "seconds_with_two_jobs": together, "seconds_one_by_one": alone}
    return [known | {"environment": environment(folder)}]


def speed_table(records: Sequence[Record]) -> str:
    """Trials an hour."""
    (found,) = records
    rates = [3600 * found["trials"] / found[key] for key in ("seconds_with_two_jobs", "seconds_one_by_one")]
    row = (str(found["trials"]), f"{rates[0]:.0f}", f"{rates[1]:.0f}", f"{rates[0] / rates[1]:.2f}")
    return shown(Table(("trials", "an hour, --jobs 2", "an hour, one process a trial", "ratio"), [row]), records)


def repeat(asked: Conditions) -> list[Record]:
    """The same search twice, from nothing."""
    count, folders = (3 if asked.quick else 12), [asked.folder / f"repeat-{number}" for number in (1, 2)]
    words = asked.words("trec6", 0, f"--limit_train 400 --trials {count} --seeds 1 --jobs 1")
    for folder in folders:
        searched(folder, words)
    trials = [[(t.settings, t.state, t.history) for t in ended_trials(folder)] for folder in folders]
    weights = [
        {path.name: path.read_bytes() for path in (folder / BEST_RUN).glob("*.safetensors")} for folder in folders
    ]
    known = {"trials": count, "same_trials": trials[0] == trials[1], "files_of_weights": len(weights[0])}
    return [known | {"same_weights": weights[0] == weights[1], "environment": environment(folders[0])}]


def repeat_table(records: Sequence[Record]) -> str:
    """Whether two searches were the same."""
    (found,) = records
    words = ["yes" if found[key] else "no" for key in ("same_trials", "same_weights")]
    columns = ("trials", "same flags, ends and scores of all trials", "same weights of the winner")
    return shown(Table(columns, [(str(found["trials"]), *words)]), records)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have started."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    with suppress(OSError):
        own = [int(word) for word in children.read_text(encoding="utf8").split()]
        return [*own, *(other for child in own for other in descendants(child))]
    return []


def kills(asked: Conditions) -> list[Record]:
    """Kills workers, half of them with their runs, and starts others, until all is done."""
    count, planned, workers = (6, 3, 2) if asked.quick else (60, 50, 8)
    folder, done = asked.folder / "kills", 0
    shutil.rmtree(folder, ignore_errors=True)
    words = asked.words("trec6", 0, f"{SHORT} --trials {count} --seeds 1")
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    dice = random.Random(0)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "compare_methods.py", "tune", *words, "--output_dir", str(folder)]
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=sys.stderr)

    running = [start() for _ in range(workers)]
    while not (folder / SUMMARY).exists():
        time.sleep(dice.uniform(1, 15))
        if done < planned:
            victim = running.pop(dice.randrange(len(running)))
            for pid in [*(descendants(victim.pid) if dice.random() < 0.5 else []), victim.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            victim.wait()
            running.append(start())
            done += 1
        elif all(worker.poll() for worker in running):
            raise UserError(f"{folder}: all workers have failed: see above")
    statuses = [worker.wait() for worker in running]
    trials = ended_trials(folder)
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(encoding="utf8"))  # a torn file is an error
    return [
        {
            "workers": workers, "kills": done, "trials": len(trials), "planned": count, "statuses": statuses,
            "complete": sum(trial.state == COMPLETE and len(trial.history) == 2 for trial in trials),
            "environment": environment(folder),
        }
    ]  # fmt: skip


def kills_table(records: Sequence[Record]) -> str:
    """What is left after the kills."""
    columns = ("workers", "kills", "planned", "trials", "complete")
    return shown(Table(columns, [tuple(str(record[name]) for name in columns) for record in records]), records)


Part = tuple[Callable[[Conditions], list[Record]], Callable[[Sequence[Record]], str]]
PARTS: dict[str, Part] = {
    "gain": (gain, gain_table),
    "samplers": (samplers, samplers_table),
    "speed": (speed, speed_table),
    "kills": (kills, kills_table),
    "repeat": (repeat, repeat_table),
}


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Measures the parts and prints their tables. Returns the exit status."""
    parser = harness.make_parser(
        "What a search gains, and what it survives.", quick="a minute each, to see that it runs"
    )
    parser.add_argument("--data_dir", type=Path, required=True, metavar="PATH", help="folder with the data folders")
    parser.add_argument("--minutes", type=float, default=15.0, metavar="X", help="of each search (default: 15)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="of each search (default: 1)")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS), metavar="SET", help="of gain, samplers")
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help=f"searches of each set, gain and samplers ({SEEDS})"
    )
    options = parser.parse_args(argv)
    harness.require_positive(options, "minutes", "jobs", "seeds")
    quick = options.quick
    sets, seeds = (list(SETS)[:1], 1) if quick else (options.sets, options.seeds)
    minutes = 1.0 if quick else options.minutes
    asked = Conditions(options.data_dir, minutes, options.jobs, 400 if quick else TEXTS, quick, sets, seeds)
    output = asked.folder / OUTPUT.name if quick else OUTPUT
    result: Record = read_json(output) if output.exists() else {}
    for name in options.only:
        measure, table = PARTS[name]
        result[name] = merged(result.get(name, []), measure(asked))
        write_json(output, result)
        content = table(result[name])
        print(f"{name}\n\n{content}\n", flush=True)
        if not quick:
            renew_tables(DATA_SETS, {f"tune_{name}": content})
        if not quick and name == "samplers":
            write_bytes(PICTURE, samplers_plot(result[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
