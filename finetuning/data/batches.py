"""Batches of nearly equal length under a token budget: their plan, their order in each epoch, ranks and collation.

Training examples, sorted from longest to shortest, are cut into batches once, at set-up; that plan depends on the
lengths alone, so every epoch and every rank has the same number of batches. An epoch then decides by chance which
examples of equal length come first, mixes neighbouring batches (a *block*) and shuffles the optimizer steps::

    sorted lengths   |512 512 ... 512|511 498 ... 470|470 466 ... | ... 12|
    batches           b0 | b1 | b2 | b3   b4 | b5 | ...
    steps             s0: world_size * accumulate consecutive batches, nearly equal in length
    in a step         batch a * world_size + r belongs to rank r, accumulation index a

So one process that accumulates 2 batches makes the same steps as two processes that accumulate none.
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
BLOCK_BATCHES = 4  # batches whose examples mix: more means more chance and more padding
EVALUATION_FACTOR = 4  # without gradients, batches may be this much larger
EVALUATION_BATCH_SIZE = 256


@dataclass(frozen=True)
class BatchPlan:
    """Where batches begin in the examples sorted from longest to shortest."""

    cuts: np.ndarray  # (batches + 1,) first position of each batch, and the number of examples
    blocks: np.ndarray  # (examples,) the block that each sorted position belongs to, ascending

    @property
    def sizes(self) -> np.ndarray:
        """Examples in each batch, (batches,)."""
        return np.diff(self.cuts)


def plan_batches(lengths: np.ndarray, batch_tokens: int, batch_size: int, shards: int) -> BatchPlan:
    """Cut examples into batches of at most ``batch_tokens`` tokens, padding included, and ``batch_size`` examples.

    The number of batches is a multiple of ``shards``. Whichever examples of a block come together, both bounds hold.

    Args:
        lengths: (examples,) tokens, descending, none above ``batch_tokens``; at least ``shards`` of them.
        batch_tokens: largest batch, in tokens.
        batch_size: largest batch, in examples.
        shards: batches in one optimizer step, over all processes.

    Raises:
        UserError: batches of one example, and a number of examples that ``shards`` does not divide.
    """
    sizes: list[int] = []
    blocks: list[int] = []  # of each batch
    start, total = 0, len(lengths)
    while start < total:
        capacity = max(1, min(batch_size, batch_tokens // int(lengths[start])))
        left, group = total - start, BLOCK_BATCHES * shards
        if left - group * capacity >= shards:
            group_sizes = [capacity] * group
        else:  # what remains, split evenly
            count = shards * -(-left // (shards * capacity))
            if count > left:
                raise UserError(
                    f"{total} training texts, one per batch, do not divide into steps of {shards} batches: "
                    f"give a larger --batch_size or --batch_tokens, another --accumulate, or --limit_train"
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
    """One batch before it is collated."""

    examples: np.ndarray  # (B,) positions in the split
    loss_weight: float


class TokenBatchSampler(Sampler[BatchIndices]):
    """One rank's training batches. Their order depends on ``seed`` and ``epoch`` only; see the top of this file.

    It has state: ``state_dict`` after k batches, loaded into another sampler, makes that one give the rest of the
    epoch. Lightning calls ``set_epoch`` before each epoch's first batch, but after ``iter``; therefore nothing is
    decided before the first batch is asked for.

    Args:
        lengths: (examples,) tokens of each example, in the split's order.
        batch_tokens: largest batch, in tokens, padding included.
        batch_size: largest batch, in examples.
        seed: what the order depends on, besides the epoch.
        accumulate: batches of one rank in one optimizer step.
        rank: this process, from 0.
        world_size: all processes.

    Raises:
        UserError: fewer examples than one step needs.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_tokens: int,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.shards = world_size * accumulate
        if len(lengths) < self.shards:
            raise UserError(
                f"{len(lengths)} training texts are fewer than the {self.shards} batches of one step "
                f"({world_size} processes x --accumulate {accumulate}): lower --accumulate or --devices"
            )
        self.lengths, self.seed = lengths, seed
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.plan = plan_batches(np.sort(lengths)[::-1], batch_tokens, batch_size, self.shards)
        self.epoch = 0
        self.position = 0  # batches given in this epoch
        self._resume_at = 0

    @property
    def steps(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.plan.sizes) // self.shards

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, also when it resumes in the middle of one."""
        return self.steps * self.accumulate

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; another epoch than before starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resume_at = epoch, 0, 0

    def epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples in the plan's order, (examples,), and the steps in the epoch's order, (steps,)."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))  # so that chance decides between equal lengths
        order = order[np.argsort(-self.lengths[order], kind="stable")]
        order = order[np.lexsort((random.random(len(order)), self.plan.blocks))]
        return order, random.permutation(self.steps)

    def __iter__(self) -> Iterator[BatchIndices]:
        first, self._resume_at = self._resume_at, 0
        self.position = first
        order, steps = self.epoch_order(self.epoch)
        cuts = self.plan.cuts
        for position in range(first, len(self)):
            step = int(steps[position // self.accumulate]) * self.shards
            batch = step + position % self.accumulate * self.world_size + self.rank
            step_examples = int(cuts[step + self.shards] - cuts[step])
            self.position = position + 1
            yield BatchIndices(order[cuts[batch] : cuts[batch + 1]], self.shards / step_examples)

    def state_dict(self) -> dict[str, int]:
        """Where this epoch stands; equal on all ranks."""
        return {"epoch": self.epoch, "position": self.position, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were given when ``state`` was taken.

        Raises:
            UserError: the state belongs to other batches.
        """
        if state["batches"] != len(self):
            raise UserError(
                f"--resume: the interrupted run had {state['batches']} batches per epoch, this one has {len(self)}: "
                f"data, --batch_tokens, --batch_size, --accumulate, --devices and --num_nodes must be the same"
            )
        self.epoch = state["epoch"]
        self.position = self._resume_at = state["position"]

    def padding_fraction(self) -> float:
        """Share of padding in all ranks' batches of the current epoch."""
        order, _ = self.epoch_order(self.epoch)
        longest = np.maximum.reduceat(self.lengths[order], self.plan.cuts[:-1])
        return 1 - float(self.lengths.sum() / (longest * self.plan.sizes).sum())


class _Batches(Dataset[Batch]):
    """Collates: a batch's indices -> its tensors, padded to its own longest sequence."""

    def __init__(self, split: TokenizedSplit, pad_id: int) -> None:
        self.split, self.pad_id = split, pad_id

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, batch: BatchIndices) -> Batch:
        split, examples = self.split, batch.examples
        starts, lengths = split.offsets[examples], split.lengths[examples]
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]  # (B, T)
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = split.tokens[(starts[:, None] + columns)[mask]]
        return {
            "input_ids": torch.from_numpy(input_ids),  # (B, T)
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),  # (B, T)
            "labels": torch.from_numpy(split.labels[examples]),  # (B,)
            "rows": torch.from_numpy(split.rows[examples]),  # (B,)
            "examples": torch.from_numpy(examples),  # (B,)
            "loss_weight": torch.tensor(batch.loss_weight),  # ()
            "padded": bool(lengths.min() < lengths.max()),  # known here; a GPU would have to be asked and waited for
        }


class TokenBatchLoader(DataLoader[Batch]):
    """Training batches, and what is known of an epoch before it runs. Lightning keeps its state in checkpoints.

    Each batch is a dict of ``input_ids`` and ``attention_mask`` (B, T) int64, ``labels``, ``rows`` (in the source) and
    ``examples`` (positions in the split) (B,) int64 and
    ``padded``, whether the mask has a 0, and
    ``loss_weight`` () float32: world_size * accumulate / examples in the optimizer step. The *sum* of the batch's
    losses times ``loss_weight`` is what to call backward on: after Lightning has divided by ``accumulate`` and DDP
    has averaged over ranks, the gradient is the mean over all examples of the step, however they were dealt.

    Whoever reads ``trainer.estimated_stepping_batches`` before ``on_train_start`` (in ``configure_optimizers``, say)
    makes Lightning set the loader up before it knows the checkpoint's loops, and then it never loads this state:
    call ``trainer.fit_loop._load_combined_loader_states()`` in ``on_train_start``, or count with ``steps_per_epoch``.
    """

    def __init__(self, split: TokenizedSplit, sampler: TokenBatchSampler, pad_id: int, **options: Any) -> None:
        # Without automatic batching (batch_size=None) the sampler gives whole batches, and stands where Lightning
        # looks for set_epoch. No workers: collating is one copy out of a flat array.
        super().__init__(_Batches(split, pad_id), batch_size=None, sampler=sampler, **options)
        self.token_batches = sampler
        self.padding_fraction = sampler.padding_fraction()  # of all ranks, epoch 0; the others differ little
        self.tokens_per_epoch = int(split.lengths.sum())  # real tokens, all ranks
        self.steps_per_epoch = sampler.steps  # optimizer steps

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
    """The training split's batches for one rank; the trainer needs ``use_distributed_sampler=False``.

    Raises:
        UserError: fewer texts than one optimizer step needs.
    """
    sampler = TokenBatchSampler(
        split.lengths,
        training.batch_tokens,
        training.batch_size,
        training.seed,
        training.accumulate,
        rank,
        world_size,
    )
    return TokenBatchLoader(split, sampler, pad_id, pin_memory=pin_memory)


def check_batches(splits: dict[str, TokenizedSplit], training: TrainingSettings, processes: int) -> None:
    """Makes all batches of a run, which needs no model; ``processes`` are those of all nodes.

    Raises:
        UserError: fewer texts than the processes, or one optimizer step, need.
    """
    for name, split in splits.items():
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
    """One rank's share of a split to evaluate, longest texts first, so that memory peaks at once.

    Over all ranks each text comes exactly once, and all ranks have the same number of batches (in a forward, DDP
    synchronizes buffers: a rank with one batch more would wait for ever). ``loss_weight`` is 1 / texts in the split:
    the sum of all losses times it, over all batches and ranks, is the split's mean.

    Raises:
        UserError: fewer texts than processes.
    """
    if len(split) < world_size:
        raise UserError(f"{len(split)} texts to evaluate are fewer than the {world_size} processes: lower --devices")
    order = np.argsort(-split.lengths, kind="stable")
    batch_tokens = EVALUATION_FACTOR * training.batch_tokens
    plan = plan_batches(split.lengths[order], batch_tokens, EVALUATION_BATCH_SIZE, world_size)
    batches = [BatchIndices(examples, 1 / len(split)) for examples in np.split(order, plan.cuts[1:-1])]
    return DataLoader(
        _Batches(split, pad_id), batch_size=None, sampler=batches[rank::world_size], pin_memory=pin_memory
    )
