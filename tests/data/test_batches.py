"""Batch plans, epoch orders, ranks, collation, and what a real Lightning trainer makes of them."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from finetuning.config import RunConfig
from finetuning.data.batches import (
    EVALUATION_BATCH_SIZE,
    EVALUATION_FACTOR,
    TokenBatchSampler,
    check_batches,
    evaluation_loader,
    plan_batches,
    train_loader,
)
from finetuning.data.tokens import TokenizedSplit
from finetuning.errors import UserError
from tests.common import check_refusal, refusal_of, some

PAD = 99


def make_split(lengths: np.ndarray) -> TokenizedSplit:
    """Sequence i is i + 1, repeated; its row is 1000 + i."""
    n = len(lengths)
    return TokenizedSplit(
        tokens=np.repeat(np.arange(1, n + 1), lengths).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.arange(n) % 2,
        rows=np.arange(n) + 1000,
    )


def test_pairs_have_types_and_single_texts_have_no_tensor_for_them() -> None:
    single = make_split(np.array([5, 3]))
    training = RunConfig.from_settings(max_length=8, batch_size=2).training
    (batch,) = train_loader(single, training, PAD)
    assert "token_type_ids" not in batch
    (batch,) = train_loader(replace(single, second_positions=np.array([2, 1])), training, PAD)
    types = dict(zip(batch["examples"].tolist(), batch["token_type_ids"].tolist(), strict=True))
    assert types == {0: [0, 0, 1, 1, 1], 1: [0, 1, 1, 0, 0]}  # padding has type 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shards", [1, 3])
def test_windows_keep_the_bounds_of_a_batch_with_their_padding(seed: int, shards: int) -> None:
    lengths = review_lengths(997, seed, 4 * 64)
    windows = -(-lengths // 64)
    lengths = -(-lengths // windows) * windows  # the windows of a text are equally long
    batches = sampler(lengths, seed, batch_tokens=512, accumulate=shards, windows=windows)
    assert len(np.unique(windows)) == 4
    assert batches.plan.sizes.max() <= 16
    for number in range(3):
        order, _ = batches.epoch_order(number)
        padded = batches.padded_tokens(order)
        members = np.split(order, batches.plan.cuts[1:-1])
        assert padded.tolist() == [windows[m].sum() * (lengths[m] // windows[m]).max() for m in members]
        assert padded.max() <= 512
    assert 1 - lengths.sum() / padded.sum() < 0.25


def test_a_batch_has_a_row_for_each_window() -> None:
    windows = np.array([1, 3, 2])
    split = replace(make_split(np.array([5, 12, 6])), windows=windows, second_positions=np.array([2, 1, 3]))
    split.tokens[5:17] = np.repeat([11, 12, 13], 4)
    training = RunConfig.from_settings(max_length=8, windows=3, batch_size=3).training
    (batch,) = train_loader(split, training, PAD)
    order = batch["examples"].tolist()
    assert batch["windows"].tolist() == [windows[i] for i in order]
    rows = {0: [[1] * 5], 1: [[n] * 4 + [PAD] for n in (11, 12, 13)], 2: [[3] * 3 + [PAD] * 2] * 2}
    types = {0: [[0, 0, 1, 1, 1]], 1: [[0, 1, 1, 1, 0]] * 3, 2: [[0] * 5] * 2}
    assert batch["input_ids"].tolist() == [row for i in order for row in rows[i]]
    assert batch["token_type_ids"].tolist() == [row for i in order for row in types[i]]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
    taken = split.taken(np.array([2, 1]))
    assert some(taken.windows).tolist() == [2, 3]


def review_lengths(n: int, seed: int, longest: int = 256) -> np.ndarray:
    """Lengths as reviews have them: many at the limit, a tail of short ones."""
    return np.clip(np.random.default_rng(seed).lognormal(5.4, 0.6, n), 8, longest).astype(np.int64)


def sampler(
    lengths: np.ndarray,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    windows: np.ndarray | None = None,
    **training: Any,
) -> TokenBatchSampler:
    settings = RunConfig.from_settings(**{"batch_tokens": 1024, "batch_size": 16, "seed": seed} | training)
    return TokenBatchSampler(lengths, settings.training, rank, world_size, windows)


def epoch(batches: TokenBatchSampler, number: int) -> list[list[int]]:
    batches.set_epoch(number)
    return [batch.examples.tolist() for batch in batches]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_plan_keeps_both_bounds_whichever_examples_of_a_block_meet(seed: int, shards: int) -> None:
    lengths = np.sort(review_lengths(997, seed))[::-1]
    plan = plan_batches(lengths, 1024, 16, shards)
    assert plan.cuts[0] == 0
    assert plan.cuts[-1] == len(lengths)
    assert plan.sizes.min() >= 1
    assert plan.sizes.max() <= 16
    assert len(plan.sizes) % shards == 0
    for block in np.unique(plan.blocks):
        positions = np.flatnonzero(plan.blocks == block)
        inside = (plan.cuts[:-1] >= positions[0]) & (plan.cuts[:-1] <= positions[-1])
        assert plan.sizes[inside].sum() == len(positions), "a block ends where a batch ends"
        assert lengths[positions[0]] * plan.sizes[inside].max() <= 1024


@pytest.mark.parametrize("total", range(3, 60))
def test_last_group_is_even_and_never_empty(total: int) -> None:
    plan = plan_batches(np.full(total, 10), 1000, 4, 3)
    assert len(plan.sizes) % 3 == 0
    assert plan.sizes.sum() == total
    assert plan.sizes.min() >= 1
    assert set(plan.sizes[-3:]) <= {plan.sizes[-1], plan.sizes[-1] + 1}


def test_texts_that_cannot_be_shared_are_named_with_what_helps() -> None:
    with pytest.raises(UserError, match=r"^5 texts, .* multiple of 2, the batches per step: raise --batch_size or"):
        plan_batches(np.full(5, 100), 100, 4, 2)
    assert len(plan_batches(np.full(6, 100), 100, 4, 2).sizes) == 6
    split = make_split(np.full(5, 100))
    training = RunConfig.from_settings(batch_tokens=100, max_length=100).training
    with pytest.raises(UserError, match=r"^5 texts, .*: raise --batch_tokens, lower --devices, or .*--limit_test"):
        evaluation_loader(split, replace(training, batch_tokens=25), 0, 0, 2, pin_memory=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_example_once_per_epoch_over_all_ranks(seed: int, world_size: int) -> None:
    lengths = review_lengths(501, seed)
    ranks = [sampler(lengths, seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    for number in range(3):
        orders = [epoch(rank, number) for rank in ranks]
        assert [len(order) for order in orders] == [len(ranks[0])] * world_size, "the length is the same every epoch"
        assert sorted(i for order in orders for batch in order for i in batch) == list(range(501))


def test_order_depends_on_seed_and_epoch_only() -> None:
    lengths = review_lengths(300, 0)
    assert epoch(sampler(lengths), 1) == epoch(sampler(lengths), 1)
    assert epoch(sampler(lengths), 1) != epoch(sampler(lengths), 2)
    assert epoch(sampler(lengths, 1), 1) != epoch(sampler(lengths, 2), 1)
    again = sampler(lengths)
    for number in (2, 0, 1):
        order = epoch(again, number)
    assert order == epoch(sampler(lengths), 1), "epochs that came before leave no trace"
    assert [batch.examples.tolist() for batch in again] == order, "without set_epoch the same epoch starts again"


def test_composition_of_batches_changes_and_ties_mix() -> None:
    lengths = np.full(640, 64)
    batches = sampler(lengths)
    first, second = ({frozenset(batch) for batch in epoch(batches, number)} for number in range(2))
    assert not first & second
    labels = np.arange(640) >= 320  # a file sorted by class, like IMDb's
    mixed = [0 < labels[batch].sum() < len(batch) for batch in epoch(batches, 0)]
    assert np.mean(mixed) > 0.95


def test_accumulation_makes_the_steps_of_as_many_processes() -> None:
    lengths = review_lengths(333, 5)
    one = sampler(lengths, accumulate=4)
    two = [sampler(lengths, accumulate=2, rank=rank, world_size=2) for rank in range(2)]
    four = [sampler(lengths, rank=rank, world_size=4) for rank in range(4)]
    assert one.steps == two[0].steps == four[0].steps
    for number in range(2):
        alone = epoch(one, number)
        pairs = [epoch(rank, number) for rank in two]
        quads = [epoch(rank, number) for rank in four]
        for step in range(one.steps):
            expected = alone[4 * step : 4 * step + 4]
            assert [pairs[i % 2][2 * step + i // 2] for i in range(4)] == expected
            assert [quads[i][step] for i in range(4)] == expected


def test_batches_of_a_step_are_nearly_equal_in_length() -> None:
    lengths = review_lengths(4000, 0)
    ranks = [epoch(sampler(lengths, rank=rank, world_size=4), 0) for rank in range(4)]
    longest = np.array([[lengths[batch].max() for batch in order] for order in ranks])
    assert np.mean(longest.max(0) - longest.min(0)) < 4


def test_loss_weight_gives_the_mean_over_the_whole_step() -> None:
    """Lightning divides by accumulate, DDP averages over ranks: what is left must be the mean over all examples."""
    lengths, losses = review_lengths(211, 2), np.random.default_rng(0).random(211)
    world_size, accumulate = 2, 3
    ranks = [list(sampler(lengths, accumulate=accumulate, rank=rank, world_size=world_size)) for rank in (0, 1)]
    for first in range(0, len(ranks[0]), accumulate):
        step = [batch for rank in ranks for batch in rank[first : first + accumulate]]
        seen = np.concatenate([batch.examples for batch in step])
        gradient = sum(batch.loss_weight * losses[batch.examples].sum() / accumulate / world_size for batch in step)
        assert gradient == pytest.approx(losses[seen].mean())


@pytest.mark.parametrize("lengths", [np.full(5, 20), np.full(1, 7)])
def test_fewer_examples_than_a_step_needs(lengths: np.ndarray) -> None:
    check_refusal(r"--accumulate 3.*--devices", sampler, lengths, accumulate=3, world_size=2)


def test_batches_that_no_step_can_be_made_of_are_refused_before_a_model_is_there() -> None:
    splits = {name: make_split(np.full(5, 20)) for name in ("train", "validation")}
    check_batches(splits, RunConfig.from_settings(batch_size=1).training, processes=1)
    with pytest.raises(UserError, match="texts"):
        check_batches(splits, RunConfig.from_settings(batch_size=1, accumulate=6).training, processes=1)
    with pytest.raises(UserError, match=r"^validation has 1 texts, fewer than the 2 processes: lower --devices"):
        check_batches({"validation": make_split(np.full(1, 20))}, RunConfig.from_settings().training, processes=2)


def test_training_batches_hold_the_right_tokens() -> None:
    split = make_split(review_lengths(120, 3, longest=40))
    config = RunConfig.from_settings(batch_tokens=256, batch_size=8).training
    loader = train_loader(split, config, PAD)
    rows, real, padded = [], 0, 0
    for batch in loader:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert batch.pop("padded") is not bool(mask.all())
        assert {key: value.dtype for key, value in batch.items()} == {
            **dict.fromkeys(("input_ids", "attention_mask", "labels", "rows", "examples"), torch.int64),
            "loss_weight": torch.float32,
        }
        assert batch["loss_weight"].ndim == 0
        assert batch["rows"].tolist() == split.rows[batch["examples"]].tolist()
        assert ids.numel() <= 256
        assert len(ids) <= 8
        assert mask.sum(1).max() == ids.shape[1], "padded to the batch's own longest"
        for i, row in enumerate(batch["rows"].tolist()):
            length = int(split.lengths[row - 1000])
            assert mask[i].tolist() == [1] * length + [0] * (ids.shape[1] - length)
            assert ids[i].tolist() == split.sequence(row - 1000).tolist() + [PAD] * (ids.shape[1] - length)
            assert batch["labels"][i] == split.labels[row - 1000]
        rows += batch["rows"].tolist()
        real, padded = real + int(mask.sum()), padded + ids.numel()
    assert sorted(rows) == split.rows.tolist()
    assert loader.tokens_per_epoch == real
    assert loader.token_batches.padding_fraction() == pytest.approx(1 - real / padded)
    assert loader.steps_per_epoch == len(loader)


def test_padding_is_small_at_imdbs_size() -> None:
    for longest in (256, 512):
        training = RunConfig.from_settings(max_length=longest, batch_size=64, batch_tokens=6144).training
        loader = train_loader(make_split(review_lengths(20_000, 0, longest)), training, PAD)
        assert loader.token_batches.padding_fraction() < 0.015


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_example_once(world_size: int) -> None:
    split, config = make_split(review_lengths(700, 1)), RunConfig.from_settings(batch_tokens=1024).training
    loaders = [evaluation_loader(split, config, PAD, rank, world_size) for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1, "a rank with fewer batches would be waited for"
    batches = [batch for loader in loaders for batch in loader]
    assert sorted(torch.cat([batch["rows"] for batch in batches]).tolist()) == split.rows.tolist()
    assert max(batch["input_ids"].numel() for batch in batches) <= EVALUATION_FACTOR * 1024
    assert max(len(batch["labels"]) for batch in batches) <= EVALUATION_BATCH_SIZE
    assert sum(float(batch["loss_weight"]) * len(batch["labels"]) for batch in batches) == pytest.approx(1)
    for loader in loaders:
        widths = [batch["input_ids"].shape[1] for batch in loader]
        assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(
    ("batch_tokens", "on_cpu", "on_gpu"), [(1024, 4096, 4096), (2048, 6144, 8192), (8192, 8192, 32768)]
)
def test_evaluation_batches_of_a_cpu_stay_in_its_caches(batch_tokens: int, on_cpu: int, on_gpu: int) -> None:
    split = make_split(np.full(1024, 128))
    training = RunConfig.from_settings(max_length=128, batch_tokens=batch_tokens).training
    for pinned, limit in ((False, on_cpu), (True, on_gpu)):
        sampler = evaluation_loader(split, training, PAD, pin_memory=pinned).sampler
        assert max(128 * len(batch.examples) for batch in sampler) == min(limit, 128 * EVALUATION_BATCH_SIZE)


# --- state


def test_state_resumes_with_exactly_the_remaining_batches() -> None:
    lengths = review_lengths(200, 0)
    whole = epoch(sampler(lengths), 2)
    for taken in (0, 1, len(whole) // 2, len(whole)):
        before = sampler(lengths)
        before.set_epoch(2)
        batches = iter(before)
        for _ in range(taken):
            next(batches)
        after = sampler(lengths)
        after.load_state_dict(before.state_dict())
        after.set_epoch(2)  # the same epoch: nothing is lost
        assert len(after) == len(whole)
        assert after.state_dict() == before.state_dict()
        assert [batch.examples.tolist() for batch in after] == whole[taken:]
        assert epoch(after, 3) == epoch(sampler(lengths), 3), "the next epoch begins at its first batch"


def test_state_of_other_batches_is_refused() -> None:
    state = sampler(review_lengths(200, 0)).state_dict()
    assert "--resume" in refusal_of(sampler(review_lengths(200, 0), batch_size=3).load_state_dict, state)


class Interrupted(Exception):
    pass


class Recorder(L.LightningModule):
    """Trains one number and notes which rows came, and what the optimizer saw."""

    def __init__(self, loader: Any, validation: Any) -> None:
        super().__init__()
        self.loader, self.validation = loader, validation
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["rows"].tolist()))
        return self.weight * batch["rows"].sum() * batch["loss_weight"]

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("loss", self.weight * 0, batch_size=len(batch["rows"]))

    def train_dataloader(self) -> Any:
        return self.loader

    def val_dataloader(self) -> Any:
        return self.validation if self.validation is not None else []

    def on_train_start(self) -> None:
        # configure_optimizers has made Lightning set up its loader before it knew of a checkpoint; it does not load
        # the loader's state again by itself.
        self.trainer.fit_loop._load_combined_loader_states()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches == 3 * self.loader.steps_per_epoch
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(Callback):
    """Saves a checkpoint in one hook when ``seen`` batches have come, and interrupts the run there."""

    def __init__(self, hook: str, seen: int, path: Path) -> None:
        self.seen, self.path = seen, path
        setattr(self, hook, self.stop)

    def stop(self, trainer: L.Trainer, module: Recorder, *args: Any) -> None:
        if len(module.seen) == self.seen and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise Interrupted


def fit(module: Recorder, *callbacks: Callback, resume: Any = None) -> None:
    L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(module, ckpt_path=resume)


LENGTHS = review_lengths(60, 0)
CONFIG = RunConfig.from_settings(batch_tokens=1024, max_length=256, batch_size=4).training
INTERRUPTIONS = [  # hook in which the checkpoint is saved, whole epochs and batches before it
    ("on_train_batch_end", 0, 1),
    ("on_train_batch_end", 1, 5),
    ("on_train_batch_end", 1, 0),  # the last batch of the first epoch
    ("on_train_epoch_end", 1, 0),
    ("on_train_epoch_end", 2, 0),
]


def loaders(validate: bool) -> tuple[Any, Any]:
    split = make_split(LENGTHS)
    return train_loader(split, CONFIG, PAD), evaluation_loader(split, CONFIG, PAD) if validate else None


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and validation
@pytest.mark.parametrize(
    ("validate", "hook", "epochs_before", "batches_before"),
    [*((validate, *place) for validate in (False, True) for place in INTERRUPTIONS), (True, "on_validation_end", 2, 0)],
)
def test_lightning_resumes_with_the_rows_of_an_uninterrupted_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, validate: bool, hook: str, epochs_before: int, batches_before: int
) -> None:
    caplog.set_level(logging.ERROR, logger="lightning.pytorch")
    whole = Recorder(*loaders(validate))
    fit(whole)
    batches = len(whole.loader)
    assert [number for number, _ in whole.seen] == sorted([0, 1, 2] * batches)
    expected = [
        (number, [1000 + i for i in batch])
        for number in range(3)
        for batch in epoch(TokenBatchSampler(LENGTHS, CONFIG), number)
    ]
    assert whole.seen == expected, "each epoch has its own order, from its first batch on"

    taken = epochs_before * batches + batches_before
    first = Recorder(*loaders(validate))
    with pytest.raises(Interrupted):
        fit(first, StopAt(hook, taken, tmp_path / "last.ckpt"))
    second = Recorder(*loaders(validate))
    fit(second, resume=tmp_path / "last.ckpt")
    assert first.seen + second.seen == whole.seen
    torch.testing.assert_close(second.weight, whole.weight)


@pytest.mark.parametrize("count", [0, 5, 10_000])
def test_a_continued_run_knows_the_batches_of_its_first_epoch(count: int) -> None:
    """Outputs of frozen layers come from these batches, so they must be the same ones in the same order."""
    lengths = review_lengths(200, 1)
    whole = epoch(sampler(lengths), 0)
    later = sampler(lengths)
    later.load_state_dict({"epoch": 2, "position": 3, "batches": len(later)})
    assert [batch.examples.tolist() for batch in later.first_batches(count)] == whole[:count]
    assert later.state_dict()["position"] == 3


def test_what_is_taken_keeps_rows_and_labels() -> None:
    taken = make_split(np.array([5, 12, 6])).taken(np.array([2, 1]))
    assert (taken.rows.tolist(), taken.labels.tolist()) == ([1002, 1001], [0, 1])
