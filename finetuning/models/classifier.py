"""A classifier: token ids -> logits, what of it is trained, and what of it can be kept from epoch to epoch."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetuning.models.encoder import classify, count_frozen_layers
from finetuning.models.families import ModelFamily
from finetuning.models.frozen_outputs import FrozenBatch, FrozenOutputs
from finetuning.storage import cache_dir


class Classifier(nn.Module):
    """Token ids -> logits, on Hugging Face's forward or on the efficient one.

    Attributes:
        model: the Hugging Face classifier, its linears replaced where LoRA or 4 bits are asked for.
        family: the names in it.
        dtype: the precision of the products.
        efficient: whether ``encoder.classify`` runs it, instead of Hugging Face's own forward.
        checkpointing: whether layers are computed again in backward instead of keeping their activations.
        compiled: whether ``torch.compile`` makes the forward faster, at its first calls; once for all lengths.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        dtype: torch.dtype,
        efficient: bool,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.dtype = dtype
        self.efficient = efficient
        self.checkpointing = checkpointing
        if checkpointing and not efficient:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self._compiled = torch.compile(self._forward, dynamic=True) if compiled else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        frozen: FrozenBatch | None = None,
        padded: bool | None = None,
    ) -> Tensor:
        """Logits ``(B, classes)`` in fp32 for ids and mask ``(B, T)``; the rest as ``classify`` takes it."""
        return (self._compiled or self._forward)(input_ids, attention_mask, frozen, padded)

    def logits(self, batch: dict[str, Any], outputs: FrozenOutputs | None = None) -> Tensor:
        """``(B, classes)`` of a loader's batch, with its split's outputs of frozen layers where they are kept."""
        frozen = None if outputs is None else outputs.batch(batch["examples"].cpu().numpy())
        logits: Tensor = self(batch["input_ids"], batch["attention_mask"], frozen, batch.get("padded"))
        return logits

    def _forward(
        self, input_ids: Tensor, attention_mask: Tensor, frozen: FrozenBatch | None, padded: bool | None = None
    ) -> Tensor:
        if self.efficient:
            return classify(
                self.model, self.family, input_ids, attention_mask, self.dtype, self.checkpointing, frozen, padded
            )
        mixed = self.dtype != torch.float32
        with torch.autocast(input_ids.device.type, dtype=self.dtype if mixed else None, enabled=mixed):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """What makes the base model this run's classifier, by name: all that is trained, and the head in any case.

        With LoRA on the head, the head itself is frozen. But it is new, drawn from the run's seed, so no base model
        holds it.
        """
        head = tuple(f"{name}." for name in self.family.head)
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or name.startswith(head)
        }

    def frozen_outputs(self, lengths: dict[str, np.ndarray], memory_gb: float) -> dict[str, FrozenOutputs]:
        """Where the outputs of frozen layers are kept for each split, if there are such layers.

        Only for a model without dropout, on the efficient path.

        Args:
            lengths: split -> (examples,) tokens of each example, for splits that are gone through more than once.
            memory_gb: held in memory up to this many GiB over all splits, beyond that in a file.
        """
        count = count_frozen_layers(self.model, self.family)
        drops = any(self.family.setting(self.model, name) for name in ("dropout", "attention_dropout"))
        if count == 0 or memory_gb == 0 or drops or not self.efficient:
            return {}
        whole = count == self.family.setting(self.model, "layer_count")
        width = int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        left, kept = int(memory_gb * 2**30), {}
        for name, tokens in lengths.items():
            rows = np.ones_like(tokens) if whole else tokens
            try:
                kept[name] = FrozenOutputs(rows, width, self.dtype, left, cache_dir())
            except OSError as error:
                warnings.warn(f"frozen layers are computed in every epoch: {error}", stacklevel=2)
                break
            left -= 0 if kept[name].on_disk else kept[name].bytes
        return kept
