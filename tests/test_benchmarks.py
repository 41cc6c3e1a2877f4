"""What all benchmarks share, and the tables that they leave on the pages."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import finetune_lora
from benchmarks import (
    abstain,
    accuracy,
    budget,
    equality,
    families,
    gpu,
    harness,
    headline,
    int8,
    peers,
    plain_path,
    prediction,
    roofline,
    sets_baselines,
    tune,
    variants,
    workload,
)
from compare_methods import ACCURACY, DATA_SETS, README, RESULTS, ROOT, SPEED
from finetuning.comparison.packed import Record, change_records
from finetuning.errors import UserError
from finetuning.pages import with_table
from finetuning.runs.measurements import environment_record
from finetuning.storage import read_json
from tests.common import refusal_of
from tests.tiny_models import save_tokenizer, tiny_model


def test_benchmarks_import_no_tests() -> None:
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) tests\b", path.read_text(encoding="utf8"), re.MULTILINE), path


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (peers.main, "--contestants nobody", "--contestants nobody: allowed are suite"),
        (peers.main, "--contestants tutorial_fp32 --max_length 128", "nothing to measure"),
        (peers.main, "--repeats 0", "--repeats"),
        (peers.main, "--max_length 99", "--max_length"),
        (prediction.main, "--rounds 0", "error: --rounds"),
        (prediction.main, "--texts 0", "error: --texts"),
        (prediction.main, "--data_dir nowhere", "error: --data_dir"),
        (prediction.main, "--contestant x", "error: --contestant"),
        (gpu.main, "--parts nothing", "--parts nothing: allowed are folder, environment"),
        (abstain.main, "--data_dir .", "has no folder ag_news"),
        (abstain.main, "--data_dir . --sets mine", "--sets mine: must be one of ag_news, subj"),
        (accuracy.main, "--data_dir . --sets nothing", "--sets nothing: must be one of trec6, emotion"),
        (accuracy.main, "--data_dir . --sets trec6", "has no folder trec6"),
        (accuracy.main, "--data_dir . --sets rte --seeds a", "--seeds a: must be whole numbers"),
        (accuracy.main, "--data_dir . --unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    main: Callable[..., int], words: str, message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "rte").mkdir()
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def whole_run(seed: int, seconds: float | None, accuracy: float) -> dict[str, Any]:
    return {
        "study": {"run": f"lora-seed{seed}", "row": "lora", "seed": seed},
        "status": "finished",
        "config": {"epochs": 2, "max_length": 512},
        "data": {"sizes": {"train": 1000, "test": 500}},
        "environment": {"cpu": "A CPU", "threads": 2, "alone": True, "git": {"commit": "0123456789"}},
        "process_seconds": seconds,
        "test": {"accuracy": accuracy},
    }


def test_the_headline_extrapolates_the_tutorial_script_to_as_many_texts(tmp_path: Path) -> None:
    collected = (whole_run(1, 66.0, 0.9), whole_run(0, 60.0, 0.92), whole_run(10, 72.0, 0.91))
    change_records(tmp_path, [Record.made(tmp_path, run, None) for run in collected])
    runs = headline.read_row(tmp_path, "lora")
    assert [run["study"]["seed"] for run in runs] == [0, 1, 10]
    work = {"contestant": "tutorial_fp32", "model": "minilm", "targets": "qv", "max_length": 512}
    measured = [work | {"train_examples": 10, "train_seconds": seconds} for seconds in (9.9, 9.9, 50.0)]
    others = [work | {"max_length": 256, "train_examples": 1, "train_seconds": 1.0}, work | {"error": "no memory"}]
    environment = {"cpu": "A CPU", "threads": 2, "git": {"commit": "ab", "modified": True}, "date": "2026-11-25"}
    result = {"environment": environment, "measurements": [*measured, *others]}
    lines = headline.table(runs, result).splitlines()
    assert lines[0] == "1,000 training and 500 test texts, 2 epochs, up to 512 tokens; A CPU, 2 threads."
    assert lines[-4:] == [
        "| this suite, the whole command (3 seeds) | 1.10 (1.00 to 1.20) | 91.00 ± 1.00 |",
        "| tutorial script, fp32, training only, extrapolated from 30 texts | 33 (30 times as long) | not measured |",
        "",
        "*Measured: 2026-11-25, some not recorded. Code: 2 commits, 0123456 to ab with changes.*",
    ]
    assert "lora-seed7: was not alone" in refusal_of(headline.table, [whole_run(7, None, 0.9)], result)
    with pytest.raises(UserError, match="different machines"):
        headline.table(runs, result | {"environment": {"cpu": "Another", "threads": 2}})
    assert "--row full" in refusal_of(headline.read_row, tmp_path, "full")


def test_the_headline_takes_what_was_measured_on_the_machine_of_its_runs(tmp_path: Path) -> None:
    files = [tmp_path / "peers.json", tmp_path / "missing.json", tmp_path / "headline.json"]
    for path, cpu, seconds in ((files[0], "Another", 1.0), (files[2], "A CPU", 2.0)):
        measured = [{"contestant": name, "train_seconds": seconds} for name in ("suite", "tutorial_bf16")]
        path.write_text(json.dumps({"environment": {"cpu": cpu, "threads": 2}, "measurements": measured}))
    runs = [whole_run(0, 60.0, 0.9)]
    wanted = [{"contestant": "tutorial_bf16", "train_seconds": 2.0}]
    assert headline.measured_on_same_machine(runs, files)["measurements"] == wanted
    assert "has not run on A CPU" in refusal_of(headline.measured_on_same_machine, runs, files[:2])


def test_both_paths_are_trained_in_turns_and_compared_by_their_seconds(
    distilbert: Path, review_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(words: list[str]) -> tuple[str, str | None]:
        return "", f"exit status {status}" if (status := finetune_lora.main(words[1:])) else None

    monkeypatch.setattr(harness, "in_process", in_this_process)
    journal = harness.Journal(tmp_path / "journal.json", {})
    inputs = f"--model_name {distilbert} --dataset text --data_dir {review_folder}"
    plain_path.measure(1, f"{inputs} --epochs 1 --limit_train 8 --limit_validation 8 --max_length 16", journal)
    runs = journal.records
    assert [(run["round"], run["efficient"]) for run in runs] == [(0, True), (0, False)]
    runs += copy.deepcopy(runs)  # as if of another round
    assert all(run["config"]["efficient"] == run["efficient"] for run in runs)
    for run, seconds in zip(runs, (10.0, 30.0, 20.0, 40.0), strict=True):
        run["train"]["seconds"], run["validation"]["accuracy"] = seconds, 0.5
    lines = plain_path.table(journal.result).splitlines()
    assert "8 texts, 1 epochs, up to 16 tokens, 1 round(s); " in lines[0]
    assert lines[4].startswith("| plain path (`--efficient False`) | 35.00 (30.00 to 40.00) | 50.0 | ")
    assert lines[5].startswith("| efficient path | 15.00 (10.00 to 20.00) | 50.0 | ")
    assert lines[6] == "| plain / efficient | 2.50 (2.00 to 3.00) | | |"
    assert "--limit_train 0" in refusal_of(plain_path.measure, 2, "--limit_train 0", journal)


def stored(name: str) -> dict[str, Any]:
    return read_json(harness.RESULTS / f"{name}.json")


def test_the_variants_equal_those_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("distilbert", 30_000, n_layers=6, max_position_embeddings=512).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, decoder=False)
    monkeypatch.setattr(workload, "PACKAGED_DISTILBERT", str(tmp_path))
    monkeypatch.setattr(equality, "TEXTS", 2)
    monkeypatch.setattr(equality, "LENGTH", 8)
    for record in equality.differences():
        assert max(record[kind] for kind in ("logits", "gradients", "merged weight")) < 1e-5, record


def test_a_work_whose_instructions_the_processor_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "instructions", lambda: {"avx512_vnni", "avx512_bf16"})
    works = int8.possible()
    assert [work.processor for work in int8.PLAN if work not in works] == ["avx2_vnni"]
    result = {"environment": environment_record(), "rounds": 1, "measurements": [], "works": list(map(asdict, works))}
    assert "\nNot measured: fp32, a processor with AVX2-VNNI.\n" in int8.table(result)
    monkeypatch.setattr(int8, "instructions", lambda: {"avx512_vnni", "avx_vnni"})
    assert int8.possible() == list(int8.PLAN)


def test_the_table_of_variants_compares_within_rounds() -> None:
    common = {"trainable_parameters": 5, "peak_bytes": 2**20}
    records = [
        common | {"variant": name, "round": i, "train_tokens_per_second": rate}
        for name, rate in (("lora", 30), ("dora", 20))
        for i in range(2)
    ]
    result = {"environment": environment_record(), "rounds": 2, "measurements": records}
    assert "| dora | `--lora_variant dora` | 1.50 | 1.00 | 20 | 1 | 5 |" in variants.table(result)
    assert "| pissa | `--lora_variant pissa` |  |  |  |  |  |" in variants.table(result)


def headline_table() -> str:
    runs = headline.read_row(RESULTS / "earlier_work", "lora")
    return headline.table(runs, headline.measured_on_same_machine(runs))


@pytest.mark.parametrize(
    ("page", "marker", "table"),
    [
        (SPEED, "peers", lambda: peers.table(stored("peers"))),
        (README, "speed_short", lambda: headline.short_table(*map(stored, headline.PARTS))),
        (SPEED, "headline", headline_table),
        (SPEED, "plain_path", lambda: plain_path.table(stored("plain_path"))),
        (SPEED, "families", lambda: families.table(stored("families"))),
        (SPEED, "int8_speed", lambda: int8.table(stored("int8_speed"))),
        (SPEED, "variants", lambda: variants.table(stored("variants"))),
        (SPEED, "variants_equality", lambda: variants.equality_table(stored("variants_equality"))),
        (SPEED, "prediction", lambda: prediction.table(stored("prediction"))),
        (SPEED, "roofline", lambda: roofline.table(stored("roofline"))),
        (ACCURACY, "accuracy", lambda: accuracy.table(*accuracy.load(harness.RESULTS))),
        (budget.PAGE, "steps", budget.steps_table),
        (budget.PAGE, "patience", budget.patience_table),
        (budget.GUIDE, "rare_labels", budget.rare_labels_table),
        (budget.PAGE, "defaults", lambda: budget.defaults_table(RESULTS / "defaults")),
        (budget.PAGE, "defaults_methods", lambda: budget.defaults_table(RESULTS / "defaults_methods")),
        *(
            (page, name, lambda name=name: sets_baselines.table_of(name)(stored(name)))
            for name, page in sets_baselines.STUDIES.values()
        ),
        (DATA_SETS, "crossing", lambda: sets_baselines.crossing(stored("sets_baselines"))),
        (budget.PAGE, "few_texts", lambda: budget.few_texts_table(stored("few_texts"))),
        *(
            (DATA_SETS, f"tune_{name}", lambda name=name, table=table: table(stored("tune")[name]))
            for name, (_, table) in tune.PARTS.items()
        ),
    ],
)
def test_the_pages_have_the_tables_of_the_committed_results(page: Path, marker: str, table: Callable[[], str]) -> None:
    text, content = page.read_text(encoding="utf8"), table()
    assert f"<!-- {marker}:begin -->" in text
    assert with_table(text, marker, content) == text, "run the benchmark, or make tables"
    assert re.search(r"^\*Measured: .* Code: .*[0-9a-f]{7}", content, re.MULTILINE)


def test_a_benchmark_that_was_interrupted_goes_on_if_the_conditions_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    options, made = peers.make_parser().parse_args(["--quick"]), []

    def journal(threads: int, flags: Any = options) -> harness.Journal:
        return harness.start_journal("it", flags, {"threads": threads}, show=lambda record: f"round {record['round']}")

    def measure() -> dict[str, Any]:
        made.append(1)
        return {"seconds": 2.0}

    assert journal(2).measured(measure, round=0) == {"seconds": 2.0, "round": 0}
    again = journal(2)
    assert [again.measured(measure, round=number)["round"] for number in range(2)] == [0, 1]
    assert len(made) == 2
    assert capsys.readouterr().err == "round 0\nround 1\n"
    assert journal(1).records == journal(2, peers.make_parser().parse_args([])).records == []
    harness.publish("it", again, lambda _: "a table", partly=True)
    assert "a table" in capsys.readouterr().out
    assert read_json(tmp_path / "runs" / "it.json") == again.result == {"threads": 2, "measurements": again.records}
    assert journal(2).records == [], "what is done is measured anew"


def test_a_benchmark_goes_on_the_next_day_but_not_on_another_machine(tmp_path: Path) -> None:
    def journal(cpu: str, date: str) -> harness.Journal:
        return harness.Journal(tmp_path / "journal.json", {"environment": {"cpu": cpu, "date": date}, "rounds": 3})

    journal("one", "2026-11-27").keep({"round": 0})
    assert journal("one", "2026-11-28").records == [{"round": 0}]
    assert journal("two", "2026-11-28").records == []
