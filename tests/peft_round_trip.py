# mypy: disable-error-code="arg-type"
"""How exactly adapters pass between this suite and PEFT, as two tables: ``python -m tests.peft_round_trip``.

Largest differences of logits, fp32, tiny random models and the packaged MiniLM. Everything that an adapter trains is
far from its beginning. The tests of ``test_every_family.py`` and ``runs/test_adapters.py`` check the same ways.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetuning.config import RunConfig
from finetuning.models.families import FAMILIES
from finetuning.pages import Table
from finetuning.settings import LORA_TARGETS
from tests import test_every_family as every_family
from tests.common import CORE, make_tiny_folder, packaged_folder
from tests.runs import test_adapters as adapters
from tests.small_classifiers import build, fill, in_peft, save
from tests.tiny_models import save_tokenizer, tiny_model

SCALINGS = ("standard", "rslora", "raw")
MINILM = "MiniLM (bert)"


def largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max())


def ours_in_peft(folder: Path, given: dict[str, Tensor], adapter: Path, **settings: Any) -> tuple[float, float]:
    """An adapter of ours in ``PeftModel.from_pretrained``: the difference, and how far the matrices move the logits."""
    ours = build(folder, lora_r=3, lora_alpha=5.0, **settings)
    untrained = ours(**given)
    fill(ours)
    adapter.mkdir()
    save(adapter, ours, RunConfig.from_settings(lora_r=3, lora_alpha=5.0, **settings))
    expected = ours(**given)
    return largest(in_peft(folder, adapter)(**given).logits, expected), largest(untrained, expected)


def every_placement(place: Path) -> Table:
    """All families, with each placement flag alone, and with all six in each scaling."""
    rows = []
    for model_type in [*FAMILIES, MINILM]:
        if model_type == MINILM:
            folder, given = packaged_folder(), every_family.batch("bert")
        else:
            folder, given = place / model_type, every_family.batch(model_type)
            tiny_model(model_type).save_pretrained(folder)
            save_tokenizer(folder, decoder=FAMILIES[model_type].last_token)
        cases: list[dict[str, Any]] = [{name: name == target for name in LORA_TARGETS} for target in LORA_TARGETS]
        cases += [every_family.ALL | {"lora_scaling": scaling} for scaling in SCALINGS]
        found = [ours_in_peft(folder, given, place / f"{model_type}-{i}", **case) for i, case in enumerate(cases)]
        alone, (standard, rslora, raw) = found[: len(LORA_TARGETS)], found[len(LORA_TARGETS) :]
        shown = (max(difference for difference, _ in alone), standard[0], rslora[0], raw[0])
        rows.append((model_type, *(f"{value:.1e}" for value in shown), f"{min(moved for _, moved in found):.1e}"))
    columns = ("family", "each flag alone", "all, standard", "all, rslora", "all, raw", "least effect of an adapter")
    return Table(columns, rows)


def round_trips(place: Path) -> Table:
    """An adapter that PEFT made, in ``--init_adapter``; moved there, saved, and in PEFT again."""
    rows = []
    for model_type in CORE:
        folder = place / f"base-{model_type}"
        make_tiny_folder(model_type, folder)
        for case, settings in adapters.PEFT_CASES.items():
            theirs, ours = place / f"{model_type}-{case}-peft", place / f"{model_type}-{case}-ours"
            expected = adapters.made_by_peft(folder, theirs, model_type, **settings)
            classifier, config = adapters.adopted(folder, theirs)
            first = largest(adapters.logits(classifier), expected)
            fill(classifier)
            ours.mkdir()
            save(ours, classifier, config)
            trained = adapters.logits(classifier)
            second = largest(adapters.logits_in_peft(folder, ours)[1], trained)
            values = (first, second, largest(trained, expected))
            rows.append((model_type, case, *(f"{value:.1e}" for value in values)))
    return Table(
        ("family", "adapter of PEFT", "PEFT to us", "trained on, back to PEFT", "effect of the training"), rows
    )


def main() -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        print(every_placement(Path(folder)).markdown())
        print()
        print(round_trips(Path(folder)).markdown())


if __name__ == "__main__":
    main()
