"""The steps of one run, in their order: inputs, claim, folds, classifier, training, evaluation, baseline, report.

``estimate.py`` measures a few of them. ``run`` and ``carry_out`` in ``finetune_lora.py`` call the steps. Each
takes what the earlier ones gave. Training changes the classifier; it and the folds set the task's threshold; nothing
else is changed.
Importing this package loads torch.
"""

from finetuning.report.page import present
from finetuning.steps.baseline import compare_with_baseline
from finetuning.steps.claim import claim_directory
from finetuning.steps.classifier import build_model
from finetuning.steps.folds import cross_validate
from finetuning.steps.inputs import read_inputs
from finetuning.steps.report import restore_report
from finetuning.steps.training import evaluate, prepare_training, train
from finetuning.steps.watch import trackers_of, watched
