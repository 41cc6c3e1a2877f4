"""The contestants compare equals: same parameters, same logits, same tokens; and the arithmetic is right."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import families, harness, headline, measure, peers, roofline
from benchmarks.contestants import CONTESTANTS, Contestant, Suite, Tutorial
from benchmarks.faults.runs import in_process
from benchmarks.flops import Size, products, step_flops
from benchmarks.workload import LABELS, RANK, TARGETS, Job, read_split, sample, save_split, some_batches
from finetuning.data.tokens import TokenizedSplit
from tests.common import needs_int8
from tests.tiny_models import tiny_model

MAX_LENGTH = 32
INT8 = "suite_int8"  # only of benchmarks.families, where the processor has 8-bit products
DENSE = [name for name in CONTESTANTS if "qlora" not in name and name != INT8]
QLORA = [name for name in CONTESTANTS if "qlora" in name]


def tokens(count: int, seed: int) -> TokenizedSplit:
    """Random sequences without the padding token, every length up to ``MAX_LENGTH``."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, MAX_LENGTH + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random.integers(1, 30522, offsets[-1]).astype(np.int32)
    return TokenizedSplit(ids, offsets, random.integers(0, 2, count), np.arange(count))


@pytest.fixture(scope="module")
def folder(distilbert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``workload.prepare`` writes, with a tiny model."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(distilbert, folder / "tiny")
    names: dict[str, Any] = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {name: i for i, name in enumerate(LABELS)},
    }
    # bitsandbytes' own 4-bit linear, which the peers use, is right on a CPU if the width is a multiple of 64
    tiny_model("distilbert", 30522, dim=64, hidden_dim=128, **names).save_pretrained(folder / "tiny")
    save_split(folder, "train", MAX_LENGTH, tokens(200, seed=1))
    save_split(folder, "validation", MAX_LENGTH, tokens(80, seed=2))
    return folder


def make(name: str, folder: Path, targets: Any = "qv") -> Contestant:
    return CONTESTANTS[name](job(name, targets), folder)


def job(name: str, targets: Any = "qv") -> Job:
    return Job(name, model="tiny", targets=targets, max_length=MAX_LENGTH, precision="fp32")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(20) < torch.tensor([[20], [7], [13]])).long()
    return torch.randint(1, 30522, (3, 20), generator=torch.Generator().manual_seed(0)) * mask, mask


@pytest.mark.parametrize("targets", list(TARGETS))
def test_all_start_from_the_same_logits_and_train_as_many_parameters(folder: Path, targets: str) -> None:
    ours = make("suite", folder, targets)
    expected = ours.logits(*batch())
    assert expected.std() > 1e-3
    for name in DENSE[1:]:
        contestant = make(name, folder, targets)
        assert contestant.trainable_parameters() == ours.trainable_parameters(), name
        torch.testing.assert_close(contestant.logits(*batch()), expected, atol=1e-5, rtol=1e-5)
    quantized = [make(name, folder, targets) for name in QLORA]
    assert {c.trainable_parameters() for c in quantized} == {ours.trainable_parameters()}
    first, *others = (c.logits(*batch()) for c in quantized)
    for other in others:
        torch.testing.assert_close(first, other, atol=1e-4, rtol=1e-4)
    assert (first - expected).abs().max() > 1e-3, "4 bits change the logits"


@needs_int8
def test_in_8_bits_as_many_parameters_are_trained_and_logits_are_near(folder: Path) -> None:
    ours, rounded = make("suite", folder, "all"), make(INT8, folder, "all")
    assert rounded.trainable_parameters() == ours.trainable_parameters()
    expected = ours.logits(*batch())
    error = (rounded.logits(*batch()) - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.1


@pytest.mark.parametrize("name", [*DENSE, *QLORA, pytest.param(INT8, marks=needs_int8)])
def test_all_train_on_the_tokens_of_their_batches(folder: Path, name: str) -> None:
    contestant, split = make(name, folder), read_split(folder, "train", MAX_LENGTH)
    batches = contestant.batches(split)
    order = np.concatenate(batches)
    assert len(order) == len(set(order)) > len(split) - 32, "every text once, but for a last batch that is not full"
    before, seen, given = contestant.logits(*batch()), 0, 0

    def count(_: Any, inputs: tuple[torch.Tensor]) -> None:
        nonlocal seen, given
        seen += int((inputs[0] != 0).sum())
        given += inputs[0].numel()

    (embedding,) = (m for n, m in contestant.model.named_modules() if n.endswith("word_embeddings"))
    hook = embedding.register_forward_pre_hook(count)
    measured = contestant.train(split, batches)
    hook.remove()
    assert len(contestant.train(split, batches[:2], skipped=1).ends) == 1
    assert seen == split.lengths[order].sum()
    assert measured.padded_tokens == given
    assert len(measured.ends) == len(batches) > 1
    assert 0 < measured.seconds_per_step < measured.seconds
    assert (contestant.logits(*batch()) - before).abs().max() > 1e-4, "it trains"


def test_the_tutorial_pads_to_the_longest_text_allowed(folder: Path) -> None:
    contestant = make("tutorial_fp32", folder)
    assert isinstance(contestant, Tutorial)
    shapes = {b["input_ids"].shape for b in contestant.padded(tokens(30, seed=3), np.arange(30))}
    assert shapes == {(12, MAX_LENGTH), (6, MAX_LENGTH)}


def test_the_tuned_peer_groups_texts_by_length(folder: Path) -> None:
    split = tokens(3000, seed=3)

    def padding(name: str) -> float:
        batches = make(name, folder).batches(split)
        given = sum(len(b) * split.lengths[b].max() for b in batches)
        return 1 - split.lengths[np.concatenate(batches)].sum() / given

    assert padding("peft_tuned") < 0.05 < 0.3 < padding("peft_defaults")


def test_parts_have_the_lengths_of_the_whole() -> None:
    split = tokens(3000, seed=4)
    for count in (30, 300):
        part = sample(split, count)
        assert len(part) == count == len(set(part.rows))
        assert abs(part.lengths.mean() - split.lengths.mean()) < 0.5
        chosen = int(part.rows[7])
        assert (part.sequence(7) == split.sequence(chosen)).all()
        assert part.labels[7] == split.labels[chosen]
    assert len(sample(split, 10**6)) == len(split)
    by_length = np.array_split(np.argsort(split.lengths), 100)
    some = some_batches(by_length, split.lengths, 10)
    assert len(some) == len({b[0] for b in some}) == 10
    assert abs(split.lengths[np.concatenate(some)].mean() - split.lengths.mean()) < 0.5


def test_one_measurement_from_the_command_to_its_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(words: list[str], *_: Any) -> tuple[str, str | None]:
        outcome = in_process(measure.main, words[2:])
        return outcome.printed, outcome.printed if outcome.status else None

    monkeypatch.setattr(harness, "in_process", in_this_process)
    work = peers.Work("tiny", "all", MAX_LENGTH, ())
    flags = ["--precision=fp32", "--batch_size=16", "--attention=eager"]
    record = peers.measure_one(work, "peft_tuned", flags, folder, seconds=0.01)
    assert record["train_steps"] == measure.FEWEST_STEPS, record
    assert record["batch_size"] == 16
    assert record["train_examples"] == 16 * measure.FEWEST_STEPS
    assert record["train_tokens_per_second"] == pytest.approx(record["train_tokens"] / record["train_seconds"])
    assert 0 < record["padding_fraction"] < 0.5
    assert record["peak_bytes_above_loaded"] == record["peak_bytes"] - record["loaded_bytes"] > 0
    assert record["evaluation_tokens_per_second"] > 0
    assert record["merged_evaluation_tokens_per_second"] > 0
    assert isinstance(record["alone"], bool)


def test_a_process_tells_what_it_measured_or_why_it_failed(tmp_path: Path) -> None:
    (tmp_path / "record").write_text('{"seconds": 2.0}')
    assert harness.measured_in_process(["json.tool", "--compact", str(tmp_path / "record")]) == {"seconds": 2.0}
    record = harness.measured_in_process(["json.tool", "missing"])
    assert list(record) == ["error"]
    assert "missing" in record["error"]
    assert "unrecognized arguments: --unknown" in harness.measured_in_process(["json.tool", "--unknown"])["error"]
    outcome = in_process(measure.main, [])
    assert outcome.status == 2
    assert "required: contestant" in outcome.printed


def test_the_tuned_peer_takes_the_fastest_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TRIAL_TEXTS", measure.TRIAL_BATCHES[1])
    result = measure.choose(job("peft_tuned"), folder)
    chosen, tried = result["chosen"], result["tried"]
    assert chosen.items() <= max(tried, key=lambda trial: trial["train_tokens_per_second"]).items()
    assert len({json.dumps(trial | {"train_tokens_per_second": 0}) for trial in tried}) == len(tried)
    assert {trial["attention"] for trial in tried} == {"sdpa", "eager"}
    assert {trial["frozen"] for trial in tried} == {"fp32", "bf16"}
    sizes = {trial["batch_size"] for trial in tried}
    assert {max(4, chosen["batch_size"] // 2), min(64, chosen["batch_size"] * 2)} <= sizes, "its neighbours are slower"


def record(contestant: str, number: int, train: float, **more: Any) -> dict[str, Any]:
    work = {"model": "minilm", "targets": "qv", "max_length": 256, "contestant": contestant, "round": number}
    rates = {"train_tokens_per_second": train, "evaluation_tokens_per_second": 10 * train}
    return work | rates | {"peak_bytes_above_loaded": 100, "peak_bytes": 3 * 2**20} | more


MEASUREMENTS: list[dict[str, Any]] = [
    {"choice": True, "model": "minilm", "max_length": 256, "chosen": {}},
    record("suite", 0, 300.0),
    record("peft_tuned", 0, 100.0, merged_evaluation_tokens_per_second=1500.0),
    record("suite_equal_batches", 0, 280.0, peak_bytes_above_loaded=50, peak_bytes=2**20),
    record("suite", 1, 280.0),
    record("peft_tuned", 1, 140.0, merged_evaluation_tokens_per_second=1400.0),
    {**{k: v for k, v in record("peft_tuned", 2, 0.0).items() if "second" not in k}, "error": "out of memory"},
    record("suite", 2, 310.0),
]


def test_ratios_are_those_of_the_same_round() -> None:
    (row,) = peers.compare(MEASUREMENTS)
    assert row["train"] == harness.Spread(2.5, 2.0, 3.0)
    assert row["evaluation"] == harness.Spread(2.5, 2.0, 3.0)
    assert row["merged"] == harness.Spread(2.0, 2.0, 2.0)
    assert row["memory"] == harness.Spread(0.5, 0.5, 0.5), "at equal batches"
    assert row["tokens_per_second"] == [300.0, 120.0]
    assert row["errors"] == ["out of memory"]
    assert harness.spread([]) is None


def test_the_table() -> None:
    versions = {"torch": "1", "transformers": "2", "peft": "3"}
    environment = {"cpu": "A CPU", "threads": 2, "versions": versions, "git": None}
    lines = peers.table({"environment": environment, "repeats": 3, "measurements": MEASUREMENTS}).splitlines()
    assert lines[0] == "A CPU, 2 threads; torch 1, transformers 2, peft 3; commit unknown; 3 rounds."
    not_alone = [*MEASUREMENTS, record("tutorial_fp32", 0, 1.0, alone=False)]
    first = peers.table({"environment": environment, "repeats": 3, "measurements": not_alone}).splitlines()[0]
    assert first.endswith("3 rounds. Measurements that were not alone on the machine: 1.")
    work = "| MiniLM, query, value, 256 | PEFT + Trainer, tuned (failed at least once) |"
    ratios = f"{work} 2.50 (2.00 to 3.00) | 2.50 (2.00 to 3.00) | 2.00 | 0.50 |"
    assert lines[-3:] == [f"{work} 300, 120 | 1, 3 |", "", "*Measured: not recorded. Code: commit not recorded.*"]
    assert ratios in lines[: lines.index("The same, measured values:")]


def test_the_short_table_has_medians_of_chosen_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds in bf16 and in 8 bits come from the benchmark that has both; a work that was not measured stays empty."""
    wanted = [
        ("minilm", "qv", 256, "peft_tuned"),
        ("base", "qv", 256, "peft_tuned"),
        ("mpnet", "all", 256, "peft_tuned"),
    ]
    monkeypatch.setattr(headline, "SHORT", wanted)
    environment = {"cpu": "A CPU", "threads": 2}
    work = {"model": "mpnet", "targets": "all", "max_length": 256}
    turns = [
        {"contestant": name, "round": 0, "work": work, "train_tokens_per_second": rate}
        for name, rate in (("dense", 20.0), ("int8", 30.0), ("peft_tuned", 10.0))
    ]
    other = [record("suite", 0, 50.0) | work, record("peft_tuned", 0, 10.0) | work]
    lines = headline.short_table(
        {"environment": environment, "measurements": MEASUREMENTS},
        {"environment": environment, "measurements": other},
        {"environment": environment, "measurements": turns, "works": [work]},
    ).splitlines()
    assert lines[:1] + lines[4:7] == [
        "A CPU, 2 threads.",
        "| PEFT + Trainer, tuned | MiniLM, query, value, 256 | 2.50 |  | 0.50 |",
        "| PEFT + Trainer, tuned | DistilBERT-base's size, query, value, 256 |  |  |  |",
        "| PEFT + Trainer, tuned | MPNet-base, all linears, 256 | 2.00 | 3.00 |  |",
    ]


def test_contestants_take_turns(tmp_path: Path) -> None:
    contestants = ("suite", "peft_tuned", "suite_equal_batches")
    work = peers.Work("minilm", "qv", 256, contestants)
    asked: list[tuple[str, list[str]]] = []

    def measure(_: peers.Work, contestant: str, flags: Any) -> dict[str, Any]:
        asked.append((contestant, list(flags)))
        return {"chosen": {"batch_size": 64}} if "--choose" in flags else {}

    journal = harness.Journal(tmp_path / "journal.json", {})
    peers.measure_all([work, replace(work, targets="all")], 2, measure, True, journal)
    chosen, *rest = asked
    assert chosen == ("peft_tuned", ["--choose"]), "once for both places of LoRA"
    assert [name for name, _ in rest] == [*contestants, "suite", "peft_tuned"] * 2
    assert all(flags == ([] if name == "suite" else ["--batch_size=64"]) for name, flags in rest)
    assert [r["round"] for r in journal.records if "round" in r] == [0, 0, 0, 1, 1] * 2


def test_the_plan_covers_what_is_claimed() -> None:
    works = {(w.model, w.targets, w.max_length): w.contestants for w in peers.plan()}
    for targets in TARGETS:
        assert {n for m, t, n in works if (m, t) == ("minilm", targets)} == {128, 256, 512}
        assert "suite_qlora" in works["minilm", targets, 256]
        assert "peft_tuned" in works["base", targets, 256]
    assert {"peft_defaults", "tutorial_bf16", "tutorial_fp32"} <= set(works["minilm", "qv", 512])
    known = {(*work, name) for work, contestants in works.items() for name in contestants}
    known |= {(work.model, work.targets, work.max_length, "peft_tuned") for work in families.plan()}
    assert set(headline.SHORT) <= known
    assert len(peers.plan(complete=True)) == 12
    assert all(set(w.contestants) == {*DENSE, *QLORA} for w in peers.plan(complete=True))


@pytest.mark.parametrize(("why_not", "measured"), [(None, True), ("bf16 with AMX is faster", False)])
def test_other_families_train_in_8_bits_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch, why_not: str | None, measured: bool
) -> None:
    monkeypatch.setattr(families, "refused", lambda: None)
    monkeypatch.setattr(families, "slow", lambda _widths, without_bf16: why_not if without_bf16 else "")
    assert [INT8 in work.contestants for work in families.plan()] == [measured] * 4


def test_less_than_the_plan_never_replaces_its_results() -> None:
    for flags in ("", "--quick", "--model base", "--contestants suite,peft_tuned"):
        assert peers.chosen_works(peers.make_parser().parse_args(flags.split()))[1] == bool(flags)


@pytest.mark.parametrize("targets", list(TARGETS))
@pytest.mark.parametrize(("B", "T"), [(3, 20), (5, 32)])
def test_operations_by_formula_are_those_that_are_executed(folder: Path, targets: str, B: int, T: int) -> None:
    suite = make("suite", folder, targets)
    assert isinstance(suite, Suite)
    size = Size.from_config(suite.classifier.model.config, RANK, TARGETS[targets])
    ids, mask = torch.randint(1, 30522, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, T // 2 :] = 0

    def in_place(_: Any, a: list[int], b: list[int], **__: Any) -> int:
        """Of ``addmm_``, which the counter does not know; (n, k) by (k, m)."""
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        suite.classifier(ids, mask).sum().backward()
    unseen = (size.layers - 1) * 4 * B * T**2 * size.width  # torch's fused attention for CPUs
    assert counter.get_total_flops() == step_flops(size, B, T).total() - unseen


def test_every_product_is_counted_once() -> None:
    with pytest.raises(ValueError, match="query or value"):
        step_flops(Size(3, 32, 4, 64, 2, 8, ("mlp",)), 2, 8)
    size = Size(2, 64, 4, 128, 2, 8, TARGETS["all"])
    assert len(list(products(size, 4, 16))) == 2 * 4 + 2
    assert roofline.product_rate(size, 4, 16, torch.float32, seconds_per_shape=0.001) > 1e6


def test_the_roofline_of_a_tiny_model(folder: Path) -> None:
    row = roofline.measure(job("suite", "all"), folder, steps=3, seconds_per_shape=0.001)
    assert 0 < row["share"] < 1
    assert sum(row["time_shares"].values()) == pytest.approx(1)
    assert row["time_shares"]["products"] > 0
    assert row["time_shares"]["attention"] > 0
    environment = {"cpu": "A CPU", "threads": 2}
    line = roofline.table({"environment": environment, "measurements": [row | {"model": "minilm"}]}).splitlines()[4]
    assert line.startswith(f"| MiniLM, all linears, 32 | {row['dtype']} | ")
    assert f"| {row['share']:.0%} |" in line


@needs_int8
def test_the_roofline_of_8_bit_products(folder: Path) -> None:
    row = roofline.measure(replace(job("suite", "all"), precision="int8"), folder, steps=3, seconds_per_shape=0.001)
    assert row["dtype"] == "int8"
    assert set(row["product_rates_before_and_after"]) >= {"int8"}
    assert len(row["product_rates_before_and_after"]) == 2
    assert row["time_shares"]["8 bits"] > 0
    assert row["share"] > 0


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "products"), ("aten::_int_mm", "products"), ("aten::bmm", "attention"),
        ("MixtureBackward", "attention"), ("AttentionBackward", "attention"),
        ("aten::gelu_backward", "activation"), ("_Gelu", "activation"), ("AddNormBackward", "norms"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::add_", "elementwise and copies"), ("Optimizer.step#AdamW.step", "clipping and optimizer"),
        ("autograd::engine::evaluate_function: MmBackward0", "other"),
    ],
)  # fmt: skip
def test_operators_by_kind(operator: str, kind: str) -> None:
    assert roofline.kind_of(operator) == kind
