"""Batches of nearly equal length under a token budget: their plan, their order in each epoch, ranks and collation.

At set-up, training examples are sorted from longest to shortest and cut into batches. This plan depends only on the
lengths, so every epoch and every rank has the same number of batches. Each epoch then shuffles three things: the
order of examples of equal length, the examples of neighbouring batches (a *block*), and the optimizer steps::

    sorted lengths   |512 512 ... 512|511 498 ... 470|470 466 ... | ... 12|
    batches           b0 | b1 | b2 | b3   b4 | b5 | ...
    steps             s0: world_size * accumulate consecutive batches, nearly equal in length
    in a step         batch a * world_size + r belongs to rank r, accumulation index a

So one process that accumulates 2 batches takes the same steps as two processes that do not accumulate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finetuning.data.tokens import TokenizedSplit
from finetuning.errors import UserError
from finetuning.settings import TrainingSettings

Batch = dict[str, Any]  # tensors, and ``padded``
BLOCK_BATCHES = 4  # batches whose examples are mixed; a larger number means more randomness and more padding
EVALUATION_FACTOR = 4  # evaluation batches are this much larger, because they keep no activations for gradients
EVALUATION_BATCH_SIZE = 256
CPU_TOKENS = 6144  # in an evaluation batch: on a CPU, larger ones leave its caches and are slower


@dataclass(frozen=True)
class BatchPlan:
    """Where each batch begins in the examples, sorted from longest to shortest."""

    cuts: np.ndarray  # (batches + 1,) first position of each batch; the last entry is the number of examples
    blocks: np.ndarray  # (examples,) block of each sorted position, ascending

    @property
    def sizes(self) -> np.ndarray:
        """Number of examples in each batch, (batches,)."""
        return np.diff(self.cuts)


def plan_batches(
    lengths: np.ndarray,
    batch_tokens: int,
    batch_size: int,
    shards: int,
    windows: np.ndarray | None = None,
    advice: str = "raise --batch_size or --batch_tokens, or change --accumulate or --limit_train",
) -> BatchPlan:
    """Cuts examples into batches of at most ``batch_tokens`` tokens, including padding, and ``batch_size`` examples.

    The number of batches is a multiple of ``shards``. Both limits hold for every mix of a block's examples.

    Args:
        lengths: (examples,) tokens of each example, descending, each at most ``batch_tokens``; at least ``shards``
            examples.
        batch_tokens: largest batch, in tokens.
        batch_size: largest batch, in examples.
        shards: batches in one optimizer step, over all processes.
        windows: (examples,) equally long windows of each example, descending. They are padded to the longest window of
            a batch. Default: one.
        advice: what helps if the examples cannot be shared.

    Raises:
        UserError: each batch contains one example, and ``shards`` does not divide the number of examples.
    """
    sizes: list[int] = []
    blocks: list[int] = []  # of each batch
    start, total = 0, len(lengths)
    while start < total:
        capacity = max(1, min(batch_size, batch_tokens // int(lengths[start])))
        left, group = total - start, BLOCK_BATCHES * shards
        if windows is not None:  # examples with fewer windows may have longer ones
            candidates = slice(start, start + group * capacity)
            longest = windows[start] * (lengths[candidates] // windows[candidates]).max()
            capacity = max(1, min(batch_size, batch_tokens // int(longest)))
        if left - group * capacity >= shards:
            group_sizes = [capacity] * group
        else:  # the last batches share the remaining examples evenly
            count = shards * -(-left // (shards * capacity))
            if count > left:
                raise UserError(
                    f"{total} texts, of which a batch has one: must be a multiple of {shards}, the batches per step:"
                    f" {advice}"
                )
            group_sizes = [left // count + (i < left % count) for i in range(count)]
        first_block = blocks[-1] + 1 if blocks else 0
        for block, members in enumerate(np.array_split(group_sizes, -(-len(group_sizes) // BLOCK_BATCHES))):
            blocks += [first_block + block] * len(members)
        sizes += group_sizes
        start += sum(group_sizes)
    return BatchPlan(np.concatenate([[0], np.cumsum(sizes)]), np.repeat(blocks, sizes))


@dataclass(frozen=True)
class BatchIndices:
    """One batch before collation."""

    examples: np.ndarray  # (B,) positions in the split
    loss_weight: float


class TokenBatchSampler(Sampler[BatchIndices]):
    """One rank's training batches. Their order depends only on ``seed`` and ``epoch``, see the top of this file.

    To continue an epoch after k batches, load the ``state_dict`` taken then into a new sampler. Lightning calls
    ``set_epoch`` after ``iter`` but before the first batch, so the order is chosen only at the first batch.

    Args:
        lengths: (examples,) tokens of each example, in the split's order.
        training: the largest batch in tokens, with padding, and in examples; the seed of the order, together with the
            epoch; the batches of one rank in one optimizer step.
        rank: index of this process, from 0.
        world_size: number of processes.
        windows: (examples,) equally long windows of each example. Default: one.

    Raises:
        UserError: there are fewer examples than one step needs.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        training: TrainingSettings,
        rank: int = 0,
        world_size: int = 1,
        windows: np.ndarray | None = None,
    ) -> None:
        self.shards = world_size * training.accumulate
        if len(lengths) < self.shards:
            raise UserError(
                f"{len(lengths)} training texts: must be at least {self.shards}, the batches per step "
                f"({world_size} processes x --accumulate {training.accumulate}): lower --accumulate or --devices"
            )
        self.lengths, self.windows, self.seed = lengths, windows, training.seed
        self.accumulate, self.rank, self.world_size = training.accumulate, rank, world_size
        order = np.argsort(-lengths, kind="stable")
        sorted_windows = None if windows is None else windows[order]
        limits = training.batch_tokens, training.batch_size
        self.plan = plan_batches(lengths[order], *limits, self.shards, sorted_windows)
        self.epoch = 0
        self.position = 0  # batches given in this epoch
        self._resume_at = 0

    @property
    def steps(self) -> int:
        return len(self.plan.sizes) // self.shards

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, even if it resumes in the middle of one."""
        return self.steps * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch. If it changes, the next batch is the epoch's first one."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resume_at = epoch, 0, 0

    def epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples in the order of the plan, (examples,), and steps in the order of the epoch, (steps,)."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))  # shuffles examples of equal length
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        order = order[np.lexsort((random.random(len(order)), self.plan.blocks))]
        return order, random.permutation(self.steps)

    def __iter__(self) -> Iterator[BatchIndices]:
        first, self._resume_at = self._resume_at, 0
        self.position = first
        for position, batch in enumerate(self._batches(self.epoch, first, len(self)), first + 1):
            self.position = position
            yield batch

    def first_batches(self, count: int) -> Iterator[BatchIndices]:
        """The first ``count`` batches of the first epoch; it may have fewer."""
        return self._batches(0, 0, min(count, len(self)))

    def _batches(self, epoch: int, first: int, stop: int) -> Iterator[BatchIndices]:
        """The batches of an epoch from position ``first`` to ``stop``."""
        order, steps = self.epoch_order(epoch)
        cuts = self.plan.cuts
        for position in range(first, stop):
            step = int(steps[position // self.accumulate]) * self.shards
            batch = step + position % self.accumulate * self.world_size + self.rank
            step_examples = int(cuts[step + self.shards] - cuts[step])
            yield BatchIndices(order[cuts[batch] : cuts[batch + 1]], self.shards / step_examples)

    def state_dict(self) -> dict[str, int]:
        """The position in this epoch, equal on all ranks."""
        return {"epoch": self.epoch, "position": self.position, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues after the batches that were done when ``state`` was taken, and refuses a state of other batches."""
        if state["batches"] != len(self):
            raise UserError(
                f"--resume: the interrupted run had {state['batches']} batches per epoch, this one has {len(self)}: "
                f"use the same data, --batch_tokens, --batch_size, --accumulate, --devices and --num_nodes"
            )
        self.epoch = state["epoch"]
        self.position = self._resume_at = state["position"]

    def padding_fraction(self) -> float:
        """Fraction of padding tokens in the current epoch, over all ranks."""
        order, _ = self.epoch_order(self.epoch)
        return 1 - float(self.lengths.sum() / self.padded_tokens(order).sum())

    def padded_tokens(self, order: np.ndarray) -> np.ndarray:
        """Tokens of each batch of an epoch's order, including padding, (batches,)."""
        starts = self.plan.cuts[:-1]
        windows = np.ones_like(order) if self.windows is None else self.windows[order]
        return np.maximum.reduceat(self.lengths[order] // windows, starts) * np.add.reduceat(windows, starts)


class _Batches(Dataset[Batch]):
    """Turns a batch's indices into tensors, padded to the longest window of the batch."""

    def __init__(self, split: TokenizedSplit, pad_id: int) -> None:
        self.split, self.pad_id = split, pad_id

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, batch: BatchIndices) -> Batch:
        split, examples = self.split, batch.examples
        starts, lengths = split.window_spans(examples)
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]  # (windows, T)
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = split.tokens[(starts[:, None] + columns)[mask]]
        tensors = {
            "input_ids": torch.from_numpy(input_ids),  # (windows, T)
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),  # (windows, T)
            "labels": torch.from_numpy(split.labels[examples]),  # (B,) or (B, names)
            "rows": torch.from_numpy(split.rows[examples]),  # (B,)
            "examples": torch.from_numpy(examples),  # (B,)
            "loss_weight": torch.tensor(batch.loss_weight),  # ()
            "padded": bool(lengths.min() < lengths.max()),  # known here; a GPU would have to be asked and waited for
        }
        if split.second_positions is not None:
            begins = split.second_positions[examples]
            begins = begins if split.windows is None else np.repeat(begins, split.windows[examples])
            types = mask & (columns >= begins[:, None])
            tensors["token_type_ids"] = torch.from_numpy(types.astype(np.int64))  # (windows, T)
        if split.windows is not None:
            tensors["windows"] = torch.from_numpy(split.windows[examples])  # (B,)
        return tensors


class TokenBatchLoader(DataLoader[Batch]):
    """Training batches, and the sizes of an epoch before it runs. Lightning stores its state in checkpoints.

    Each batch is a dict of

    * ``input_ids`` and ``attention_mask``: (B, T) int64, or (windows, T) if texts have windows
    * ``labels``: (B,) int64, or (B, names) int8 for multi-label data
    * ``rows`` (in the source) and ``examples`` (positions in the split): (B,) int64
    * ``padded``: bool, whether the mask has a 0
    * ``token_type_ids``: like ``input_ids``, 1 in the second text; only for pairs of texts
    * ``windows``: (B,) int64, how many of the rows of ``input_ids`` are of each text; only with ``--windows``
    * ``loss_weight``: () float32, world_size * accumulate / examples in the optimizer step

    Call backward on the *sum* of the batch's losses times ``loss_weight``. Lightning then divides by ``accumulate``,
    and DDP averages over ranks, so the gradient is the mean over all examples of the step.

    Do not read ``trainer.estimated_stepping_batches`` before ``on_train_start``, for example in
    ``configure_optimizers``: Lightning then sets up the loader too early and never loads this state from the
    checkpoint. Use ``steps_per_epoch`` instead.
    """

    def __init__(self, split: TokenizedSplit, sampler: TokenBatchSampler, pad_id: int, **options: Any) -> None:
        # batch_size=None turns off automatic batching: the sampler gives whole batches, and Lightning finds its
        # set_epoch. Workers would not help, because collating is one copy out of a flat array.
        super().__init__(_Batches(split, pad_id), batch_size=None, sampler=sampler, **options)
        self.token_batches = sampler
        self.tokens_per_epoch = int(split.lengths.sum())  # of all ranks, without padding
        self.steps_per_epoch = sampler.steps  # optimizer steps

    def part_of_largest(self, texts: int) -> tuple[Batch, float]:
        """Some texts of the batch that needs most memory, and how many times as large that batch is."""
        order, _ = self.token_batches.epoch_order(0)
        cuts = self.token_batches.plan.cuts
        largest = int(np.argmax(self.token_batches.padded_tokens(order)))
        batch = order[cuts[largest] : cuts[largest + 1]]
        part = batch[np.argsort(-self.token_batches.lengths[batch], kind="stable")][:texts]
        return self.dataset[BatchIndices(part, 1.0)], len(batch) / len(part)

    def first_batches(self, count: int) -> Iterator[Batch]:
        """The first ``count`` batches of the first epoch; it may have fewer."""
        return (self.dataset[batch] for batch in self.token_batches.first_batches(count))

    def state_dict(self) -> dict[str, int]:
        return self.token_batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.token_batches.load_state_dict(state)


def train_loader(
    split: TokenizedSplit,
    training: TrainingSettings,
    pad_id: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> TokenBatchLoader:
    """The training batches of one rank. The trainer must have ``use_distributed_sampler=False``.

    Raises:
        UserError: there are fewer texts than one optimizer step needs.
    """
    sampler = TokenBatchSampler(split.lengths, training, rank, world_size, split.windows)
    return TokenBatchLoader(split, sampler, pad_id, pin_memory=pin_memory)


def check_batches(splits: dict[str, TokenizedSplit], training: TrainingSettings, processes: int) -> None:
    """Checks that all batches of a run can be made, before the model is loaded.

    Args:
        splits: the tokens of each split.
        training: batches and accumulation.
        processes: number of processes on all nodes.

    Raises:
        UserError: there are fewer texts than processes, or than one optimizer step needs.
    """
    for name, split in splits.items():
        if name != "train" and len(split) < processes:
            raise UserError(
                f"{name} has {len(split)} texts, fewer than the {processes} processes: lower --devices, or give more"
                " texts"
            )
        make = train_loader if name == "train" else evaluation_loader
        make(split, training, pad_id=0, world_size=processes)


def evaluation_loader(
    split: TokenizedSplit,
    training: TrainingSettings,
    pad_id: int,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """One rank's part of a split to evaluate. The longest texts come first, so that memory peaks at the start.

    Over all ranks, each text appears exactly once. All ranks have the same number of batches, because DDP
    synchronizes buffers in a forward and a rank with one more batch would wait for ever. ``loss_weight`` is
    1 / texts in the split: the sum of all losses times it, over all batches and ranks, is the mean loss.

    Args:
        split, training, pad_id, rank, world_size: as in ``train_loader``.
        pin_memory: whether a GPU evaluates. It gets larger batches.
    """
    order = np.argsort(-split.lengths, kind="stable")
    batch_tokens = EVALUATION_FACTOR * training.batch_tokens
    if not pin_memory:
        batch_tokens = max(min(batch_tokens, CPU_TOKENS), training.batch_tokens)
    windows = None if split.windows is None else split.windows[order]
    advice = "raise --batch_tokens, lower --devices, or change --limit_validation or --limit_test"
    plan = plan_batches(split.lengths[order], batch_tokens, EVALUATION_BATCH_SIZE, world_size, windows, advice)
    batches = [BatchIndices(examples, 1 / len(split)) for examples in np.split(order, plan.cuts[1:-1])]
    return DataLoader(
        _Batches(split, pad_id), batch_size=None, sampler=batches[rank::world_size], pin_memory=pin_memory
    )
