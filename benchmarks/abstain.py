"""Whether ``predict.py --abstain_risk`` keeps its word: ``python -m benchmarks.abstain --data_dir PATH``.

Each data set is split ten times at random (``--data_seed``). Each time a classifier is trained, a threshold is taken
from validation for each risk, and the test texts above it are answered. Validation and test are drawn from the same
texts, which the guarantee needs: files for training and test may differ.
"""

import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import TRAINING_FLAGS, Record
from compare_methods import ROOT
from finetuning.errors import UserError
from finetuning.pages import Table, dated
from finetuning.runs.abstention import LEVEL, checkpoints_compared, least_confidence
from finetuning.runs.answers import read_answers
from finetuning.runs.calibration import fit_temperature
from finetuning.runs.files import read_result

PAGE = ROOT / "docs" / "guide.md"
SETS = ("ag_news", "subj", "twitter_financial_news", "emotion")  # folders below --data_dir
KEPT_ENVIRONMENT = ("cpu", "threads", "versions", "git", "date")
RISKS = (0.01, 0.02, 0.05, 0.1)
FLAGS = (
    "--dataset text --model_name packaged-distilbert --split stratified --limit_train 1500 --limit_validation 950"
    f" --max_length 128 --epochs 2 {TRAINING_FLAGS} --accelerator cpu --baseline False --report False"
)
COLUMNS = (
    "data set, accuracy", "wrong asked, at most", "splits with a threshold", "answered, % (median)",
    "wrong, % (median)", "wrong, % (highest)", "wrong at most as asked",
)  # fmt: skip


def measure(folder: Path, seed: int) -> Record:
    """Trains on one split, and answers the test texts with each threshold: ``UserError`` if the run fails."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        where = ["--data_dir", str(folder), "--output_dir", str(run), "--data_seed", str(seed)]
        _, error = harness.in_process([str(ROOT / "finetune_lora.py"), *FLAGS.split(), *where])
        if error is not None:
            raise UserError(f"{folder.name}, --data_seed {seed}: {error}")
        result, answers = read_result(run), read_answers(run)
    temperature = fit_temperature(answers["validation"]) or 1.0
    validation, test = (answers[name].cooled(temperature) for name in ("validation", "test"))
    candidates, found = checkpoints_compared(result), []
    for risk in RISKS:
        chosen = least_confidence(validation, risk, candidates)
        answered = test.confidence >= (float("inf") if chosen is None else chosen.least)
        record = {"risk": risk, "least": None if chosen is None else chosen.least, "answered": int(answered.sum())}
        found.append(record | {"wrong": int((answered & ~test.right).sum())})
    return {
        "sizes": {name: len(part.rows) for name, part in answers.items()},
        "accuracy": result["test"]["accuracy"],
        "temperature": temperature,
        "found": found,
        "environment": {name: result["environment"][name] for name in KEPT_ENVIRONMENT},
    }


def record_line(record: Record) -> str:
    """A measurement in one line of output."""
    shares = (f"{each['risk']:g}: {each['wrong']} of {each['answered']}" for each in record["found"])
    return f"{record['set']} {record['seed']} accuracy {record['accuracy']:.4f}; wrong with {', '.join(shares)}"


def table(result: Record) -> str:
    """Markdown: a row for each data set and risk."""
    records: list[Record] = result["measurements"]
    rows, kept, asked = [], 0, 0
    for name in dict.fromkeys(record["set"] for record in records):
        runs = [record for record in records if record["set"] == name]
        accuracy = 100 * statistics.fmean(run["accuracy"] for run in runs)
        for place, risk in enumerate(RISKS):
            found = [(run["found"][place], run["sizes"]["test"]) for run in runs]
            answering = [(each, texts) for each, texts in found if each["answered"]]
            shares = [100 * each["wrong"] / each["answered"] for each, _ in answering]
            coverage = [100 * each["answered"] / texts for each, texts in answering]
            good = sum(share <= 100 * risk for share in shares)
            kept, asked = kept + good, asked + len(shares)
            cells = [""] * 4
            if shares:
                middle = f"{statistics.median(coverage):.1f}", f"{statistics.median(shares):.2f}"
                cells = [*middle, f"{max(shares):.2f}", f"{good} of {len(shares)}"]
            given = sum(each["least"] is not None for each, _ in found)
            rows.append((f"{name}, {accuracy:.1f} %", f"{100 * risk:g} %", f"{given} of {len(runs)}", *cells))
    sizes = sorted({record["sizes"]["validation"] for record in records})
    validation = f"{sizes[0]:,}" + (f" to {sizes[-1]:,}" if len(sizes) > 1 else "")
    conditions = (
        f"MiniLM, LoRA on all linears, 1,500 training texts, 2 epochs; {validation} validation texts;"
        f" confidence of the statement {100 * LEVEL:g} %.\nIn all, the share on test was at most as asked in {kept} of"
        f" {asked}."
    )
    return f"{conditions}\n\n{dated(Table(COLUMNS, rows), (record['environment'] for record in records))}"


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Prints the table, writes JSON and renews docs/guide.md. Returns the exit status.

    Raises:
        UserError: a data set is not known or not there, or a run failed.
    """
    parser = harness.make_parser("Measure whether --abstain_risk keeps its word.")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with a folder for each data set")
    parser.add_argument("--sets", help=f"only these data sets, separated by commas, of {', '.join(SETS)}")
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="number of splits (default: 10)")
    options = parser.parse_args(argv)
    harness.require_positive(options, "seeds")
    sets = harness.chosen_sets(options, SETS)
    journal = harness.start_journal("abstain", options, {}, show=record_line)
    for name in sets:
        for seed in range(options.seeds):
            journal.measured(partial(measure, options.data_dir.absolute() / name, seed), set=name, seed=seed)
    partly = tuple(sets) != SETS or options.seeds != parser.get_default("seeds")
    harness.publish("abstain", journal, table, partly, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
