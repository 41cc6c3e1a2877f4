"""Fine-tunes a text classifier: ``python finetune_lora.py FLAGS``, see ``--help`` or README.md.

``run`` and ``carry_out`` are the story of a run. Its steps are in ``finetuning/steps/``, which is loaded once the flags
are good and the model's folder and the texts have been found, because torch takes seconds to load.

Exit status: 0 finished, 1 failed, 2 input refused, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.caches import cache_table, clear_caches
from finetuning.config import RunConfig, resumed_config
from finetuning.errors import exit_status
from finetuning.flags import given_flags, split_command
from finetuning.processes import fast_imports, is_helper, settle_process, share_processors, stoppable
from finetuning.processor import limit_libraries
from finetuning.runs.directory import run_directory, settings_to_run
from finetuning.runs.files import REPORT, read_settings
from finetuning.runs.recording import recorded
from finetuning.settings import check_data_dir

if TYPE_CHECKING:
    from finetuning.steps.inputs import Inputs

DESCRIPTION = "Fine-tune a text classifier, an encoder or a decoder: LoRA, QLoRA, the last layers or all weights."
EXIT_STATUS = {"finished": 0, "failed": 1, "interrupted": 130}


def main(argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None) -> int:
    """The command. Returns the exit status.

    Args:
        argv: the flags; ``None`` takes them from ``sys.argv``.
        defaults: defaults that replace the usual ones, for example those of DistilRoberta.
    """
    settle_process()
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: command(words, defaults or {}), "interrupted before training")


@stoppable()
def command(argv: Sequence[str], defaults: dict[str, Any]) -> int:
    """Does what the flags ask for, or refuses it. Returns the exit status."""
    instead, given = split_command(given_flags(argv, DESCRIPTION, defaults))
    config = settings_to_run(given, defaults)
    if config is None:
        print("the run in --output_dir has finished: nothing to do", flush=True)
        if not is_helper():
            restore_report(given)
        return 0
    instead.check(config.hardware, config.run)
    if instead.cache_info or instead.cache_clear:
        print(clear_caches() if instead.cache_clear else cache_table())
        return 0
    check_data_dir(config.data.data_dir)
    config.run.check_trackers()
    limit_libraries()
    share_processors()
    if instead.prefetch or instead.estimate:
        from finetuning.instead import instead_of_run

        print(instead_of_run(config, instead.estimate))
        return 0
    status = run(config)["status"]
    # If another process ends with another status, Lightning and srun kill the first one while it may still write.
    return 0 if is_helper() and status == "interrupted" else EXIT_STATUS[status]


def run(config: RunConfig) -> dict[str, Any]:
    """Does one run, from its flags to ``result.json``, and returns what that got. Refused input writes nothing."""
    directory = run_directory(config.run, config.data, config.name)

    from finetuning.materials import find_materials  # loads pandas, but no torch

    materials = find_materials(config)

    with fast_imports():
        from finetuning import steps  # loads torch

    return carry_out(directory, steps.read_inputs(config, materials))


def carry_out(directory: Path, inputs: "Inputs") -> dict[str, Any]:
    """Does a run whose inputs are known: claim of the directory, classifier, training, evaluation.

    Raises:
        UserError: the directory is refused, and nothing was written.
    """
    from finetuning import steps

    claim = steps.claim_directory(directory, inputs)
    trackers = steps.trackers_of(claim)
    with claim.lock:
        with recorded(directory, claim.config.to_dict()) as record:
            folds = steps.cross_validate(claim, inputs, carry_out)
            classifier, record.built = steps.build_model(claim, inputs, folds)
            with steps.watched(claim, inputs.hardware.on_gpu, trackers) as watch:
                record.cost = watch.cost
                training = steps.prepare_training(claim, inputs, classifier, record.built.kernels, watch, folds)
                record.data, record.train = training.data, training.measured
                record.trained = steps.train(training)
                record.test = steps.evaluate(training)
                record.compared = steps.compare_with_baseline(training, record.trained)
        steps.present(directory, record.written, claim.config.run, inputs.texts.splits)
        trackers.close(record.written)
    return record.written


def restore_report(given: dict[str, Any]) -> None:
    """Writes the report of a finished run, if a kill or a full disk has prevented it."""
    directory = given["output_dir"]
    config = resumed_config(read_settings(directory), given | {"overwrite": False})
    if config.run.report and not (directory / REPORT).exists():
        from finetuning import steps

        steps.restore_report(directory, config.model.model_name, config.data, config.run)


if __name__ == "__main__":
    sys.exit(main())
