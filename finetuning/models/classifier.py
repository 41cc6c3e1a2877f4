"""A classifier: token ids -> logits, the weights it saves, and the layer outputs it keeps from epoch to epoch."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from finetuning.models.encoder import classify, classify_means, count_frozen_layers
from finetuning.models.families import ModelFamily
from finetuning.models.frozen_outputs import FrozenBatch, FrozenOutputs
from finetuning.models.products import without_autocast
from finetuning.models.rows import last_places, take
from finetuning.storage import cache_dir

if TYPE_CHECKING:
    from finetuning.data.tokens import TokenizedSplit

SHORT = 192  # tokens; up to here, on a CPU, the plain formula of attention trains faster than torch's fused one


class Classifier(nn.Module):
    """Token ids -> logits, with Hugging Face's forward or the efficient one.

    Attributes:
        model: the Hugging Face classifier. With LoRA or 4 bits, some of its linears are replaced.
        family: names of the model's modules and settings.
        dtype: the precision of the products.
        efficient: whether ``encoder.classify`` runs the model, instead of Hugging Face's own forward. Only for families
            that have this path.
        checkpointing: whether backward computes layers again, so that their activations are not kept.
        compiled: whether ``torch.compile`` compiles the forward, during its first calls and once for all lengths.
        window_pooling: how the logits of a text's windows become the text's: ``mean`` or ``max``.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        dtype: torch.dtype,
        efficient: bool,
        checkpointing: bool = False,
        compiled: bool = False,
        window_pooling: str = "mean",
    ) -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.dtype = dtype
        self.efficient = efficient and family.is_efficient(model.config)
        self.checkpointing = checkpointing
        self.window_pooling = window_pooling
        if checkpointing and not self.efficient:
            # newer versions of transformers have the first name, older ones only the second
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._attention = getattr(model.config, "_attn_implementation", None)  # chosen by Hugging Face
        self._compiled = torch.compile(self._forward, dynamic=True) if compiled else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        frozen: FrozenBatch | None = None,
        padded: bool | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, classes)`` in fp32 for ids and mask ``(B, T)``; other arguments as in ``classify``.

        ``token_types`` is left out if the model does not tell the texts of a pair apart by their types.
        """
        types = token_types if getattr(self.model.config, "type_vocab_size", 0) > 1 else None
        return (self._compiled or self._forward)(input_ids, attention_mask, frozen, padded, types)

    def logits(self, batch: dict[str, Any], outputs: FrozenOutputs | None = None) -> Tensor:
        """``(B, classes)`` for a loader's batch; ``outputs`` keeps the frozen layers' outputs of its split."""
        frozen = None if outputs is None else FrozenBatch(outputs, batch["examples"].cpu().numpy())
        logits: Tensor = self(
            batch["input_ids"], batch["attention_mask"], frozen, batch.get("padded"), batch.get("token_type_ids")
        )
        return logits if "windows" not in batch else pool_windows(logits, batch["windows"], self.window_pooling)

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        frozen: FrozenBatch | None,
        padded: bool | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        if self.efficient:
            return classify(
                self.model, self.family, input_ids, attention_mask, self.dtype, self.checkpointing, frozen, padded,
                token_types=token_types,
            )  # fmt: skip
        types = {} if token_types is None else {"token_type_ids": token_types}
        if self._compiled is None:
            self._choose_attention(input_ids)
        mixed = self.dtype != torch.float32
        with torch.autocast(input_ids.device.type, dtype=self.dtype if mixed else None, enabled=mixed):
            # other types compute their own means, with a head of their own
            means = self.family.efficient and getattr(self.model.config, "classifier_pooling", None) == "mean"
            if not (self.family.last_token or means):
                return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits.float()
            # Hugging Face's classifier looks for the last token that is no padding token. That is the wrong one where
            # padding and end of text are one token.
            base = self.model.get_submodule(self.family.base)
            more = types if means else {"use_cache": False}
            hidden = base(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        if means:
            return classify_means(self.model, self.family, hidden, attention_mask)
        (head,) = self.family.head
        with without_autocast(hidden.device):  # also of a trainer with 16 bits
            return self.model.get_submodule(head)(take(hidden, last_places(attention_mask)).float())

    def _choose_attention(self, input_ids: Tensor) -> None:
        """Sets how Hugging Face's own forward computes attention for this batch. Results are equal up to rounding."""
        short = input_ids.device.type == "cpu" and input_ids.shape[1] <= SHORT
        wanted = "eager" if short and torch.is_grad_enabled() and self._attention == "sdpa" else self._attention
        model: Any = self.model
        if wanted != getattr(model.config, "_attn_implementation", None):
            model.set_attn_implementation(wanted)

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters, by name, that turn the base model into this classifier: all trained ones, LoRA and head.

        With LoRA on the head, the head itself is frozen. It is saved because it is drawn from the run's seed, so no
        base model contains it.
        """
        head = {name for name, _ in self.family.head_parameters(self.model)}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or name in head or ".lora." in name
        }

    def frozen_outputs(self, splits: "Mapping[str, TokenizedSplit]", memory_gb: float) -> dict[str, FrozenOutputs]:
        """Stores for the outputs of frozen layers, one per split; empty if no layer is frozen.

        Only a model without dropout on the efficient path has them.

        Args:
            splits: those that the run reads more than once.
            memory_gb: GiB of memory for all splits together. A split that does not fit is kept in a file.
        """
        if not self.efficient:
            return {}
        count = count_frozen_layers(self.model, self.family)
        names = ("dropout", "embedding_dropout", "attention_dropout")
        drops = any(self.family.setting(self.model, name, 0.0) for name in names)
        if count == 0 or memory_gb == 0 or drops:
            return {}
        whole = count == self.family.setting(self.model, "layer_count")
        width = int(self.model.config.hidden_size)  # type: ignore[union-attr, arg-type]
        left, kept = int(memory_gb * 2**30), {}
        for name, split in splits.items():
            windows = np.ones_like(split.lengths) if split.windows is None else split.windows
            rows = windows if whole else split.lengths
            try:
                kept[name] = FrozenOutputs(rows, width, self.dtype, left, cache_dir())
            except OSError as error:
                warnings.warn(f"frozen layers are computed in every epoch: {error}", stacklevel=2)
                break
            left -= 0 if kept[name].on_disk else kept[name].bytes
        return kept


def pool_windows(logits: Tensor, windows: Tensor, pooling: str) -> Tensor:
    """The logits of texts, ``(B, classes)``, from the logits of their windows.

    Args:
        logits: ``(windows, classes)``, the windows of one text together.
        windows: ``(B,)`` windows of each text.
        pooling: ``mean`` or ``max``.
    """
    return torch.segment_reduce(logits, pooling, lengths=windows, unsafe=True)  # safe: a GPU would wait for its check
