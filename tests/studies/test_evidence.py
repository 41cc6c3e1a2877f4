"""Tables of rows; and best_practices.md and evidence.md: no digits in their text that the runs do not give."""

import json
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.budget import FROZEN
from benchmarks.tune import PARTS
from compare_methods import BEST_PRACTICES, DATA_SETS, EVIDENCE, RESULTS, ROOT
from finetuning.comparison.baselines import NAME
from finetuning.comparison.collected import Study, read_study, study_names
from finetuning.comparison.over_sets import ROPE, SECONDS, grid_of, mean_of_sets
from finetuning.comparison.pairs import compare_rows
from finetuning.comparison.report import ALL_STUDIES
from finetuning.comparison.statistics import LEVEL, interval_over_sets
from finetuning.flags import from_flags
from finetuning.settings import DEFAULT_LEARNING_RATES
from finetuning.storage import read_json
from studies import decisions, evidence, rare_classes
from studies.evidence import COLUMNS, TABLES, Block, evidence_tables, rows_table, shown_p
from tests.synthetic_runs import two_studies


@pytest.fixture
def found(tmp_path: Path) -> list[Study]:
    return two_studies(tmp_path)


def made(found: list[Study], *blocks: Block, columns: Sequence[str] = ()) -> list[list[str]]:
    """The cells of a table of rows."""
    compared = {each.name: compare_rows(each)[0] for each in found}
    return cells(rows_table({each.name: each for each in found}, compared, blocks, columns, "../results"))


def cells(table: str) -> list[list[str]]:
    *lines, empty, measured = table.splitlines()
    assert (empty, measured) == ("", "*Measured: not recorded. Code: commit c0ffee.*")
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_rows_in_the_order_of_the_block(found: list[Study]) -> None:
    head, _, *rows = made(found, ("a", "y x"))
    assert head == ["study", "row", "test accuracy, %", "seeds", "training, s", "peak memory, GiB", "corrected p"]
    assert rows[0] == [
        "[a](../results/a/table.md)", "y", "50.00 (46.91 to 53.09)", "1", "2,000", "1.00", "(reference)",
    ]  # fmt: skip
    assert rows[1][1:] == ["x", "90.50 ± 0.71", "2", "100", "1.00", shown_p(compare_rows(found[0])[0][0].corrected_p)]


def test_columns_that_are_asked_for(found: list[Study]) -> None:
    columns = ("learning rate", "saved", "trained", "validation")
    head, _, first, second = made(found, ("a", "x y"), columns=columns)
    assert head[3:7] == ["learning rate", "saved, MB", "trained parameters", "validation accuracy, %"]
    assert first[3:7] == ["0.001", "", "1,234", "90.00"]
    assert second[4] == "1.9"
    assert made(found, ("a", "x"), columns=tuple(COLUMNS))


def test_a_reference_for_each_block(found: list[Study]) -> None:
    head, _, *rows = made(found, ("a", "x y"), ("b", "x"), ("a", "y x"))
    p = rows[1][-1]
    assert [row[-1] for row in rows] == ["(reference)", p, "", "(reference)", p]
    assert "training, s" in head
    assert rows[2][4:6] == ["", ""]  # not alone on its machine
    head, _, *rows = made(found, ("b", "x broken"), ("a", "x"))
    assert [row[2] for row in rows] == ["80.00 (76.27 to 83.27)", "failed", "90.50 ± 0.71"]
    assert "corrected p" not in head


def test_a_table_needs_all_of_its_studies_and_rows(found: list[Study], monkeypatch: pytest.MonkeyPatch) -> None:
    studies = {each.name: each for each in found}
    assert evidence_tables(studies, {}, "..") == {}
    tables: dict[str, tuple[tuple[str, ...], tuple[Block, ...]]] = {"one": ((), (("a", "x"), ("c", "x")))}
    monkeypatch.setattr(evidence, "TABLES", tables)
    assert evidence_tables(studies, {}, "..") == {}
    tables["two"] = (), (("a", "x"),)
    assert set(evidence_tables(studies, {"a": []}, "..")) == {"two"}
    tables["three"] = (), (("a", "x z"),)
    assert set(evidence_tables(studies, {"a": []}, "..")) == {"two"}


def test_differences_are_from_the_reference(found: list[Study]) -> None:
    blocks = ("a", "x y"), ("b", "broken"), ("a", "y x")
    head, _, *rows = made(found, *blocks, columns=("points", "GiB"))
    assert head[3:5] == ["difference, points", "difference, GiB"]
    assert [row[3:5] for row in rows] == [["", ""], ["-40.50", "+0.00"], ["", ""], ["", ""], ["+40.50", "+0.00"]]


# --- docs/best_practices.md and docs/evidence.md

ADVICE, RUNS = (page.read_text(encoding="utf8") for page in (BEST_PRACTICES, EVIDENCE))
PAGES = ADVICE + RUNS
CHANCE = "reached 50 %, which is chance"
SEEDS = {"one": 1, "three": 3}


@cache
def study(name: str) -> Study:
    return read_study(name, RESULTS)


@cache
def scores() -> dict[str, dict[str, Any]]:
    rows = json.loads((RESULTS / "summary.json").read_text(encoding="utf8"))
    return {f"{row['study']}/{row['row']}": row for row in rows}


@cache
def p_values(name: str) -> dict[frozenset[str], str]:
    return {frozenset((c.first, c.second)): shown_p(c.corrected_p) for c in compare_rows(study(name))[0]}


def baseline_of(benchmark: str, kind: str) -> dict[tuple[str, int], float]:
    """Data set and training texts -> the mean accuracy of a baseline in %."""
    found: dict[tuple[str, int], list[float]] = {}
    for record in read_json(harness.RESULTS / f"{benchmark}.json")["measurements"]:
        if record["baseline"] == kind:
            found.setdefault((record["set"], record["texts"]), []).append(100 * record["accuracy"])
    return {place: fmean(values) for place, values in found.items()}


def prose(text: str) -> str:
    """What no table is made of, no command and no address."""
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"```bash\n.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^\d\. ", "", text, flags=re.MULTILINE)  # numbers of a list
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


def wrong_scores(text: str) -> list[str]:
    """Scores and p values in ``text`` that are not those of the runs."""
    wrong = []
    for name, said in re.findall(r"`(\w+/[\w.+-]+)` (\d+\.\d+) %", text):
        if name not in scores() or f"{100 * scores()[name]['accuracy_mean']:.2f}" != said:
            wrong.append(f"{name} {said}")
    for name, first, second, p in re.findall(
        r"`(\w+)/([\w.+-]+)` and `\w+/([\w.+-]+)`: corrected p ((?:< )?[\d.]+)", text
    ):
        if p_values(name).get(frozenset((first, second))) != p:
            wrong.append(f"{name}/{first} and {second}: {p}")
    return wrong


def unchecked_numbers(text: str) -> list[str]:
    """What is left of ``text`` with a digit in it, without all that a test compares with runs, code or flags."""
    text = re.sub(r"`\w+/[\w.+-]+` \d+\.\d+ %", "", text)
    text = re.sub(r"`\w+/[\w.+-]+` and `\w+/[\w.+-]+`: corrected p (?:< )?[\d.]+", "", text)
    for span in re.findall(r"`([^`]*)`", text):
        if re.search(r"\d", span) and (span in scores() or span.startswith("--")):
            text = text.replace(f"`{span}`", "")
    parameters = scores()["methods/full"]["trainable"]  # all of the model's
    (expected,) = re.findall(r"<!-- sets_baselines:begin -->.*?<!-- sets_baselines:end -->", ADVICE, flags=re.DOTALL)
    *_, fewer, most = sorted(map(int, re.findall(r"^\| \w+ \| (\d+) \|", expected, flags=re.MULTILINE)))
    checked = (
        CHANCE, f"{LEVEL:g} or more", f"{parameters / 1e6:.1f} M parameters", f"{fewer} and {most} classes",
        f"probability {100 * decisions.SURE:g} %", f"at least {100 * decisions.LIKELY:g} %",
    )  # fmt: skip
    for known in ("macro F1", "micro F1", "bf16", "95 % interval", *checked):
        text = text.replace(known, "")
    return [word for word in text.split() if re.search(r"\d", word)]


def sections() -> dict[str, str]:
    """Heading and text of each advice."""
    parts = re.split(r"^## (.+)\n", RUNS, flags=re.MULTILINE)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    found.pop("How the scores were made")
    return found


def rows_of(text: str) -> list[str]:
    """``study/row`` of each line of the tables of ``text``."""
    return [f"{name}/{row}" for name, row in re.findall(r"^\| \[(\w+)\]\([^)]*\) \| ([^ ]+) \|", text, re.MULTILINE)]


def test_every_number_in_the_text_is_that_of_the_runs() -> None:
    assert wrong_scores(prose(PAGES)) == []
    assert unchecked_numbers(prose(PAGES)) == []


def test_a_wrong_or_unchecked_number_would_be_seen() -> None:
    right = f"`methods/lora` {100 * scores()['methods/lora']['accuracy_mean']:.2f} %"
    p = p_values("methods")[frozenset(("lora", "full"))]
    right += f" (`methods/lora` and `methods/full`: corrected p {p}), `--lora_r 8`, `best/full-epochs3`"
    assert (wrong_scores(right), unchecked_numbers(right)) == ([], [])
    wrong = ["methods/lora 99.99", "methods/none 88.61"]
    assert wrong_scores("`methods/lora` 99.99 %, `methods/none` 88.61 %") == wrong
    assert wrong_scores("`methods/lora` and `methods/full`: corrected p 0.01") == ["methods/lora and full: 0.01"]
    assert unchecked_numbers("by 2 points, 93 s, `r 8`, 0.05, p < 0.01") == ["2", "93", "8`,", "0.05,", "0.01"]


def test_flags_with_values_in_the_text_are_accepted() -> None:
    spans = re.findall(r"`(--\w+ [^`]+)`", prose(PAGES))
    assert spans
    for span in spans:
        from_flags(shlex.split(span))


def test_what_the_text_says_of_seeds() -> None:
    for heading, text in sections().items():
        seeds = {name: scores()[name]["seeds"] for name in rows_of(text)}
        said = " ".join(text.split())
        for number, only in re.findall(r"(?i)\b(one|three) seeds? each(?: in `(\w+)`)?", said):
            counted = {count for name, count in seeds.items() if name.startswith(only)}
            assert counted == {SEEDS[number.lower()]}, heading
        if "up to three seeds" in said:
            assert max(seeds.values()) == 3, heading
        assert "seed" in said or heading.startswith("Start"), heading


def test_what_the_text_says_in_words() -> None:
    def seconds(name: str) -> float:
        return scores()[name]["train_seconds"]

    assert prose(PAGES).lower().count("less than half") == 2  # selective fine-tuning, the encoder
    for slow, fast in (
        ("methods/lora", "methods/selective"),
        ("earlier_work/lora", "earlier_work/selective"),
        ("compute_memory/efficient-false", "compute_memory/base"),
    ):
        assert 2 * seconds(fast) < seconds(slow)
    of_counts = {name: baseline_of(name, NAME) for name in ("sets_baselines", "curves_baselines")}
    leads = []
    for texts in ("trec6", "emotion", "ag_news", "financial"):  # "one to four points more"
        name = texts.replace("financial", "twitter_financial_news")
        rows = f"placement/{name}-all", f"int8/{texts}-bf16"
        few, many_texts = (100 * scores()[row]["accuracy_mean"] for row in rows)
        assert 1 <= round(many_texts - few) <= 4
        counts = of_counts["sets_baselines"][name, 2000], of_counts["curves_baselines"][name, 0]  # 0: all texts
        leads.append((few - counts[0], many_texts - counts[1]))
    assert np.mean(leads, axis=0).round().tolist() == [11, 5]  # "from eleven points to five"
    few_texts, many = grid_of(study("pooling")), grid_of(study("placement"))
    assert few_texts
    assert many
    default = "{}-lora-pooling-first"
    sets = few_texts.shared([default.format(50)])
    gained = [fmean(few_texts.means(default.format(number), sets)) for number in (50, 250)]
    gained.append(fmean(many.means("all", sets)))
    assert (len(sets), *np.diff(gained).round()) == (10, 12, 7)  # "from fifty to two hundred and fifty texts"
    frozen, tfidf = (baseline_of("pooling_baselines", kind) for kind in (FROZEN, NAME))
    for number, method, above in ((50, "{}-lora-pooling-mean", (5, 12)), (250, default, (7, 12))):
        ours = fmean(few_texts.means(method.format(number), sets))
        gains = [ours - fmean(kind[name, number] for name in sets) for kind in (frozen, tfidf)]
        assert tuple(np.round(gains)) == above  # over the ten sets with few classes
    curves = grid_of(study("curves"))
    assert curves
    for row in ("50-lora-all", "250-lora-all"):
        seconds_of_row = mean_of_sets([found[row] for found in curves.runs.values()], *SECONDS) or 0.0
        assert 90 < seconds_of_row < 150  # "about two minutes"
    grid = grid_of(study("methods_on_sets"))
    assert grid
    full, lora = (
        [mean_of_sets([grid.runs[name][method]], "test", "macro_f1") or 0 for name in grid.shared(("full", "lora-all"))]
        for method in ("full", "lora-all")
    )
    least, most = interval_over_sets([a - b for a, b in zip(full, lora, strict=True)])
    assert (len(full), least < 0 < most) == (14, True)  # "by macro F1, too"
    for name, behind in (("trec6", -2.5), ("customer_reviews", 0.1)):  # of LoRA with MiniLM
        head = 100 * scores()[f"base_on_sets/{name}-head-mean"]["accuracy_mean"]
        rows = f"methods_on_sets/{name}-head-mean", f"methods_on_sets/{name}-lora-all"
        small, best = (100 * scores()[row]["accuracy_mean"] for row in rows)
        assert (round(head - small), round(head - best, 1)) == (8, behind)  # "eight points above MiniLM's head"
    assert (decisions.ENOUGH_SETS, ROPE) == (8, 0.5)  # "at least eight data sets", "half a point"
    rates = DEFAULT_LEARNING_RATES
    assert all(10 * rates["full", o] == pytest.approx(rates["lora", o]) for o in ("adam", "adamw"))
    high = [row for name, row in scores().items() if re.match(r"lora_rank_alpha/lora_r(8|16|64)-", name)]
    pairs = p_values("lora_rank_alpha").items()
    assert len(high) == 12
    assert all(float(p) >= LEVEL for pair, p in pairs if not any("r2-" in name for name in pair))


def test_rows_that_the_text_calls_the_same() -> None:
    def results(name: str) -> dict[int, tuple[float, float]]:
        """Accuracy and loss on the test split of each seed."""
        study_name, _, row_name = name.partition("/")
        (row,) = (row for row in study(study_name).rows if row.name == row_name)
        return {run.seed: (run.get("test", "accuracy"), run.get("test", "loss")) for run in row.tested}

    one_run = results("compute_memory/base")
    names = "learning_rates/lora-adamw-learning_rate0.001", "lora_rank_alpha/lora_r8-lora_alpha16", "lora_targets/all"
    for name in names:
        assert results(name) == one_run
    three_runs = results("methods/lora")
    for name in ("optimizers/adamw", "schedulers/linear", "datasets/imdb-lora"):
        assert results(name) == three_runs
    assert one_run.items() < three_runs.items()
    for best, row in {"full": "full", "lora": "lora", "lora-no_warmup": "linear", "lora-onecycle": "onecycle"}.items():
        assert results(f"best/{best}") == results(f"earlier_work/{row}")


def test_what_the_text_says_of_significance() -> None:
    def significant(name: str, first: str, second: str) -> bool:
        return float(p_values(name)[frozenset((first, second))].removeprefix("< ")) < LEVEL

    assert significant("compute_memory", "base", "max_length-512")
    assert not significant("compute_memory", "max_length-256", "max_length-512")
    assert significant("compute_memory", "base", "q_lora")
    assert significant("schedulers", "cosine", "constant")
    assert significant("schedulers", "linear", "constant")
    assert not significant("methods", "lora", "selective")
    assert significant("earlier_work", "lora", "selective")
    assert not significant("best", "lora-onecycle", "lora-onecycle-5e-4")
    assert significant("lora_rank_alpha", "lora_r8-lora_alpha64", "lora_r2-lora_alpha64")


def test_times_are_of_two_threads() -> None:
    shown = {name.partition("/")[0] for text in sections().values() for name in rows_of(text)}
    assert len(shown) > 5
    for name in shown:  # "the tables of the sections above"; studies over sets have one thread
        measured = [run for row in study(name).rows for run in study(name).measured(row).runs]
        assert {run.get("environment", "threads") for run in measured} <= {2}, name


def test_the_default_rates_are_the_best_of_five_on_validation() -> None:
    curves: dict[tuple[str, str], dict[float, float]] = {}
    for run in study("learning_rates").final:
        key = run.get("config", "method"), run.get("config", "optimizer")
        curves.setdefault(key, {})[run.get("config", "learning_rate")] = run.monitored or 0
    assert len(curves) == 6  # "six curves"
    assert {len(curve) for curve in curves.values()} == {5}
    for key, curve in curves.items():
        best = max(curve, key=lambda rate: curve[rate])
        assert best == DEFAULT_LEARNING_RATES[key]
        assert min(curve) < best < max(curve)
        assert all(curve[rate] == 0.5 for rate in curve if rate > 9 * best)  # CHANCE


def test_each_advice_has_its_row_in_best_practices() -> None:
    rows = re.findall(r"^\| .* \| .*\]\(evidence.md#([\w-]+)\) \| .* \| (sure|likely|open) \|$", ADVICE, flags=re.M)
    said = {}
    for heading, text in sections().items():
        anchor = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        (said[anchor],) = re.findall(r"^\*\*How sure:\*\* (sure|likely|open)\b", text, flags=re.MULTILINE)
        assert len(re.findall(r"```bash\n[^\n]+\n```", text)) == 1, heading
        assert rows_of(text), heading
    assert dict(rows) == said
    assert len(rows) == len(said)


def test_every_study_has_a_place_on_the_page() -> None:
    elsewhere = {"smoke", "own_texts"}  # these have no results
    elsewhere |= {"steps", "few_texts", "defaults", "defaults_methods"}  # docs/budget.md
    shown = {name.partition("/")[0] for text in sections().values() for name in rows_of(text)}
    of_benchmarks = {
        "sets_baselines",
        "curves_baselines",
        "base_baselines",
        "some_classes_baselines",
        "some_classes_few_baselines",
        "crossing",
        "recommend",
        "recommend_unseen",
        *(f"tune_{part}" for part in PARTS),
        rare_classes.NAME,  # more of a study that has its place
    }
    shown |= set(re.findall(r"<!-- (\w+?)(?:_sets|_rows)?:begin -->", DATA_SETS.read_text())) - of_benchmarks
    assert shown >= set(study_names(RESULTS)) - elsewhere
    assert shown == {path.stem for path in (ROOT / "studies").glob("*.toml")} - elsewhere


def test_every_table_has_its_place_on_the_page() -> None:
    for name in (*TABLES, ALL_STUDIES, decisions.NAME):
        assert PAGES.count(f"<!-- {name}:begin -->") == PAGES.count(f"<!-- {name}:end -->") == 1, name
    shown = {(name, row) for _, blocks in TABLES.values() for name, rows in blocks for row in rows.split()}
    assert all(row in {r.name for r in study(name).rows} for name, row in shown)
