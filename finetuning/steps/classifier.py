"""The classifier of a run: built, counted and printed."""

import lightning.pytorch as pl

from finetuning.errors import say
from finetuning.models.classifier import Classifier
from finetuning.models.counting import count_parameters, module_table, parameter_record, parameter_table
from finetuning.processes import is_helper
from finetuning.runs.measurements import environment_record
from finetuning.runs.records import BuiltRecord
from finetuning.steps.claim import Claim
from finetuning.steps.folds import Folds
from finetuning.steps.inputs import Inputs
from finetuning.training.hardware import kernels_used, prepare_process
from finetuning.training.trainer import quiet_lightning


def build_model(claim: Claim, inputs: Inputs, folds: Folds | None) -> tuple[Classifier, BuiltRecord]:
    """Builds the classifier with its LoRA layers, and prints settings and parameter counts."""
    stop = None if folds is None else folds.record["epochs"]
    hardware, run = inputs.hardware, claim.config.run
    prepare_process(hardware)
    with quiet_lightning():
        pl.seed_everything(claim.config.training.seed, verbose=False)
    environment = environment_record()
    classifier = inputs.build()
    groups = count_parameters(classifier)
    base = None
    if not is_helper():
        base = {"precision": hardware.precision, "sha256": inputs.base.file_hashes}
        say(f"{inputs.headline(classifier, stop)}\nrun     {claim.directory}\n\n{parameter_table(groups)}\n")
        if run.verbose:
            say(module_table(classifier.model))
    return classifier, BuiltRecord(
        environment=environment | {"cpu_kernels": kernels_used(classifier, claim.config.hardware, hardware)},
        model={"type": classifier.family.model_type, "efficient_path": classifier.efficient},
        parameters=parameter_record(groups),
        base_model=base,
    )
