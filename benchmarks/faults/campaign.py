"""Breaks runs many times and shows what is left: ``make campaign``, or ``python -m benchmarks.faults --help``.

Each trial has a number that seeds its choices, so it can be repeated alone. A campaign that was stopped goes on with
the trials that it has not done. The faults are in ``plan.py``.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.faults.plan import FAULTS
from benchmarks.faults.runs import Broken, Commands, Fault, Seen, Undisturbed
from benchmarks.tiny import make_tiny_folder, write_splits
from finetuning.pages import renew_tables
from finetuning.runs.measurements import git_commit

TABLE = "faults"  # in the markers of the page
DRAWS = 8  # of a trial, until its fault disturbs something
COMMAND = "make campaign CAMPAIGN_FLAGS='--seed {seed} --only \"NAME\"'"


@dataclass
class Campaign:
    """The trials of some faults, and those that have been done with the same seed."""

    commands: Commands
    faults: Sequence[Fault]
    seed: int = 0
    retry_broken: bool = False
    done: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """One line for each trial that was done."""
        return self.commands.folder / "trials.jsonl"

    def run(self, show: Callable[[str], object] = print) -> None:
        """Does the trials that have not been done."""
        if self.file.exists():
            for line in self.file.read_text(encoding="utf8").splitlines():
                record = json.loads(line)
                if record.get("seed") == self.seed:  # trials of an earlier version have none, and are done anew
                    self.done.setdefault(record["fault"], {})[record["number"]] = record
        for fault in self.faults:
            for number in range(fault.times):
                earlier = self.done.setdefault(fault.name, {}).get(number)
                again = earlier is None or (self.retry_broken and not earlier["kept"])
                if again and fault.missing() is None:
                    record = self.trial(fault, number)
                    self.done[fault.name][number] = record
                    if not record["kept"]:
                        show(f"{fault.name} {number}: {record['seen']}")

    def trial(self, fault: Fault, number: int) -> dict[str, Any]:
        """Does one trial, notes it, and keeps its directory if a promise was broken."""
        directory = self.commands.folder / f"{fault.name.replace(' ', '_')}-{number}"
        began = time.monotonic()
        generator = random.Random(f"{self.seed} {fault.name} {number}")
        found, kept = Seen(f"nothing was disturbed in {DRAWS} draws", {}), False
        for _ in range(DRAWS):
            shutil.rmtree(directory, ignore_errors=True)
            try:
                told, kept = fault.trial(self.commands, generator, directory), True
                found = told if isinstance(told, Seen) else Seen(told, {})
                shutil.rmtree(directory, ignore_errors=True)
            except Undisturbed:
                continue
            except Exception as reason:  # a broken promise, or what a check found instead of a result
                kind = "" if isinstance(reason, Broken) else f"{type(reason).__name__}: "
                found = Seen(f"{kind}{reason}", {})
            break
        seconds = round(time.monotonic() - began, 2)
        record = {"fault": fault.name, "number": number, "seed": self.seed, "kept": kept, "seen": found.text}
        record |= {"disturbed": found.disturbed, "seconds": seconds, "commit": code_of_trials()}
        record["date"] = date.today().isoformat()
        with self.file.open("a", encoding="utf8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    @property
    def broken(self) -> list[dict[str, Any]]:
        """The trials in which a promise was broken."""
        return [r for fault in self.faults for r in self.done.get(fault.name, {}).values() if not r["kept"]]

    def report(self) -> str:
        """Markdown tables: what was tried and seen, and, of some faults, how often each thing was disturbed."""
        lines = ["| fault | trials | kept | must | seen |", "|---|---|---|---|---|"]
        for fault in self.faults:
            records = self.done.get(fault.name, {}).values()
            seen = Counter(record["seen"] if record["kept"] else "broken" for record in records)
            shown = [f"{count} {text}" for text, count in seen.most_common()] or [fault.missing() or "not tried"]
            kept = sum(record["kept"] for record in records)
            lines.append(f"| {fault.name} | {len(records)} | {kept} | {fault.promise} | {shown[0]} |")
            lines += [f"| | | | | {more} |" for more in shown[1:]]
        return "\n".join([*lines, "", *self.disturbed(), self.trials_of_commits()])

    def disturbed(self) -> list[str]:
        """The lines of a table of what the trials disturbed; none if no trial tells."""
        lines = []
        for fault in self.faults:
            counts: dict[str, Counter[str]] = {}
            for record in self.done.get(fault.name, {}).values():
                for what, names in record.get("disturbed", {}).items():
                    counts.setdefault(what, Counter()).update(names)
            for what, names in counts.items():
                lines += [f"| {fault.name} | {what} | {name} | {count} |" for name, count in names.most_common()]
        return ["| fault | what | which | how often |", "|---|---|---|---|", *lines, ""] if lines else []

    def trials_of_commits(self) -> str:
        """How many trials each commit of the code did and when, and the command that repeats a line."""
        records = [record for fault in self.faults for record in self.done.get(fault.name, {}).values()]
        whens = Counter(f"commit {record['commit']}, {record.get('date', 'date not recorded')}" for record in records)
        tried = "; ".join(f"{count} of {when}" for when, count in whens.items()) or "none"
        command = COMMAND.format(seed=self.seed)
        return f"Trials: {tried}.\nThe command of a line, with its first column as NAME: `{command}`."


def code_of_trials() -> str:
    """The commit of the files now, which the trials' processes load, with a plus sign if some differ from it."""
    found = git_commit()
    return found["commit"][:7] + "+" * found["modified"] if found else "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0 if every promise was kept."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.faults", description="Breaks runs many times and shows what is left."
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/campaign"), help="where trials are noted")
    parser.add_argument("--only", nargs="*", choices=[fault.name for fault in FAULTS], help="only these faults")
    parser.add_argument("--times", type=int, help="at most N trials of each fault")
    parser.add_argument("--seed", type=int, default=0, help="another seed does all trials anew, with other choices")
    parser.add_argument("--retry_broken", action="store_true", help="do trials again whose promise was broken")
    parser.add_argument("--page", type=Path, help="a page with markers, such as docs/faults.md, whose table is renewed")
    options = parser.parse_args(argv)
    if options.page is not None and (options.only or options.times is not None):
        parser.error("--page: needs all trials of all faults, so leave out --only and --times")
    if options.times is not None and options.times < 1:
        parser.error(f"--times {options.times}: must be at least 1")
    folder = options.folder.resolve()
    model, data = folder / "model", folder / "data"
    if not data.exists():
        make_tiny_folder("distilbert", model)
        write_splits(data, train=200, validation=40, test=40)
    chosen = [
        replace(fault, times=min(fault.times, options.times or fault.times))
        for fault in FAULTS
        if not options.only or fault.name in options.only
    ]
    campaign = Campaign(Commands(folder, model, data), chosen, options.seed, options.retry_broken)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that disks are unmounted and daemons stopped
    campaign.run()
    print(campaign.report())
    if options.page is not None:
        renew_tables(options.page, {TABLE: campaign.report()})
    return int(bool(campaign.broken))
