"""What texts and models say about a search, by the inputs of a run with the default flags. Reading them loads torch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from finetuning.config import RunConfig
from finetuning.errors import UserError
from finetuning.materials import find_materials
from finetuning.processes import fast_imports
from finetuning.settings import DataSettings
from finetuning.tuning.parameters import MODEL
from finetuning.tuning.space import Facts

if TYPE_CHECKING:
    from finetuning.steps.inputs import Inputs

FEWEST_VALIDATION_TEXTS = 50
PERCENTILES = (50, 75, 90, 99)
LENGTH_STEP, SHORTEST, LONGEST = 32, 64, 512  # tokens; below SHORTEST a limit saves next to nothing
UNCUT = 2**20  # tokens, more than a text has
LEAST_CUT = 0.01  # share of the texts that a limit cuts; below it, it changes next to nothing
SAMPLE = 1000  # texts whose uncut lengths are looked at


def read_facts(config: RunConfig, models: Sequence[str] = ()) -> Facts:
    """Reads texts and models as a run does, so that what a run would refuse is refused now. Fills the cache of tokens.

    Args:
        config: the suite's default with the given flags.
        models: all base models of the search; empty if there is only the config's.

    Raises:
        UserError: a run would be refused, or validation has too few texts.
    """
    own = config.model.model_name
    found = {}
    for name in dict.fromkeys((own, *models)):
        try:
            materials = find_materials(of_model := config.changed(model_name=name))
            _check_validation(len(materials.texts.splits["validation"].texts), config.data)
            with fast_imports():
                from finetuning import steps
            found[name] = _facts_of(steps.read_inputs(of_model, materials))
        except UserError as error:  # names the flag of a run
            flag = f"--{MODEL} {name}"
            raise UserError(str(error).replace(flag, f"--models {name}") if models else str(error)) from None
    return replace(
        found[own],  # whose tokens count the lengths
        layers=min(facts.layers for facts in found.values()),
        fuses=any(facts.fuses for facts in found.values()),
        check=lambda run: found[run.model.model_name].check(run),
    )


def _check_validation(texts: int, data: DataSettings) -> None:
    """Refuses a search with fewer validation texts than it can choose by."""
    if texts >= FEWEST_VALIDATION_TEXTS:
        return
    table = f"a table of {10 * FEWEST_VALIDATION_TEXTS}, of which a tenth validates"
    if data.group_column is not None:  # whole groups are not exactly a tenth
        table = "a larger table"
    way = f"a validation file of that size, or {table}"
    raise UserError(
        f"tune: validation has {texts} texts, and a search needs {FEWEST_VALIDATION_TEXTS}, because it chooses by them"
        f" (it has no cross-validation): give {way if data.limit_validation is None else 'a larger --limit_validation'}"
    )


def _facts_of(inputs: "Inputs") -> Facts:
    with fast_imports():
        from finetuning.data.tokens import encode
        from finetuning.models.base_model import check_fits, load_tokenizer
        from finetuning.training.tasks import make_task
    train = inputs.texts.splits["train"]
    lengths = inputs.splits["train"].lengths
    longest = int(min(LONGEST, inputs.base.longest_input))
    data, splits = inputs.config.data, inputs.texts.splits
    if lengths.max() >= data.longest:  # some are cut
        one = {"windows": 1, "window_overlap": 0, "window_pooling": "mean"}
        uncut = inputs.config.changed(max_length=UNCUT, batch_tokens=UNCUT, **one).data
        places = np.random.default_rng(0).permutation(len(train.texts))[:SAMPLE]
        texts, pairs = ([column[i] for i in places] if column else None for column in (train.texts, train.pairs))
        lengths = np.diff(encode(texts or [], pairs, load_tokenizer(inputs.base), uncut).offsets)
    layers = getattr(inputs.base.config, inputs.base.family.settings.get("layer_count", ""), 0)
    labels = {name: split.labels for name, split in splits.items()}

    def check(run: RunConfig) -> None:
        check_fits(inputs.base, run)
        make_task(labels, inputs.texts.label_names, run.training)

    training, sizes = inputs.config.training, {name: len(of_texts) for name, of_texts in labels.items()}
    useful = useful_lengths(lengths, data.max_length, longest)
    fused, own_texts = bool(inputs.base.family.fused), inputs.texts.sha256
    return Facts(training.epochs, training.batch_size, useful, layers, fused, sizes, own_texts, check)


def useful_lengths(lengths: np.ndarray, default: int, longest: int) -> tuple[int, ...]:
    """The values of ``--max_length`` that make a difference for texts of these lengths, and the default.

    Args:
        lengths: (texts,) tokens, uncut.
        default: ``--max_length`` of the default.
        longest: the largest value that is tried.
    """

    def cuts(length: int) -> bool:
        return bool((lengths > length).mean() >= LEAST_CUT)

    steps = (int(-(-np.percentile(lengths, at) // LENGTH_STEP)) * LENGTH_STEP for at in PERCENTILES)
    limits = {min(step, longest) for step in steps}
    found = {default} | {limit for limit in limits if limit >= SHORTEST and cuts(limit)}
    return tuple(sorted(found | {max(limits)} if cuts(default) else found))
