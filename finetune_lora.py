"""Fine-tunes a text classifier: ``python finetune_lora.py FLAGS``, see ``--help`` or README.md.

One run, from data to ``result.json``. Exit status: 0 finished, 1 failed, 2 input refused, 130 interrupted.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetuning.flags import from_flags, without_switches
from finetuning.runs.records import (
    Prepared,
    command_line,
    cpu_kernels_used,
    data_record,
    headline,
    summary,
    test_record,
    train_record,
)
from finetuning.settings import RunConfig, UserError, check_data_dir, not_installed

DESCRIPTION = "Fine-tune a DistilBERT, BERT or RoBERTa text classifier with LoRA, QLoRA, selectively or in full."
EXIT_STATUS = {"finished": 0, "failed": 1, "interrupted": 130}
DIRECTORY_VARIABLE = "FINETUNE_LORA_RUN_DIRECTORY"  # how processes that Lightning starts learn their run's directory


def main(argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None) -> int:
    """The command. Returns the exit status.

    Args:
        argv: the flags; those of the process if not given.
        defaults: settings that a thin entry wants where a flag was not given.
    """
    helper = _is_helper()
    if helper:  # until it listens to them: the first process hears them too, and stops all at the same step
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    try:
        config = from_flags(sys.argv[1:] if argv is None else argv, DESCRIPTION, defaults)
        check_data_dir(config)
        if config.prefetch:
            prefetch(config)
            return 0
        if config.estimate:
            print_estimate(config)
            return 0
        status = run(config)["status"]
        # Lightning and srun kill the first process, which may still write, when another ends with anything but 0.
        return 0 if helper and status == "interrupted" else EXIT_STATUS[status]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(not_installed(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before training: nothing was written", file=sys.stderr)
        return EXIT_STATUS["interrupted"]


def _is_helper() -> bool:
    """Whether Lightning, srun or torchrun started this process beside the first one, which writes the results."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def prefetch(config: RunConfig) -> None:
    """Fills the caches with model and data, on a machine that has a network."""
    from finetuning.models.pretrained import find_model
    from local_dataset_utilities import prefetch_texts

    print(f"model: {find_model(config)}")
    prefetch_texts(config)
    print("data: in the cache; runs with the same --model_name and --dataset need no network now")


def print_estimate(config: RunConfig) -> None:
    """Says what the run would take; writes nothing but tokens into the cache."""
    import torch

    from finetuning.training.estimate import estimate, estimate_table
    from finetuning.training.module import quiet_lightning

    prepared = prepare(config)
    try:
        with quiet_lightning():
            record = estimate(
                prepared.config, prepared.hardware, prepared.model_folder, prepared.splits, prepared.pad_id,
                prepared.texts.label_names,
            )  # fmt: skip
    except torch.OutOfMemoryError:
        advice = f"lower --batch_tokens ({prepared.config.batch_tokens}), or use --gradient_checkpointing True"
        raise UserError(f"--estimate: the GPU has too little memory for a step of this run: {advice}") from None
    shown = headline(prepared).rpartition("\n")[0]  # without the run directory, which is not made
    print(f"{shown}\n\n{estimate_table(record, prepared.config)}")


def run(config: RunConfig) -> dict[str, Any]:
    """One run. Returns what ``result.json`` in its directory holds.

    Raises:
        UserError: input that is refused; nothing was written.
    """
    from finetuning.training.callbacks import Interrupted

    prepared = prepare(config)
    config, directory = prepared.config, prepared.directory
    result: dict[str, Any] = {"status": "failed", "config": config.to_dict(), "command": command_line(sys.argv)}
    try:
        train(prepared, result)
        result["status"] = "finished"
    except (Interrupted, KeyboardInterrupt, SystemExit) as error:  # Lightning turns a second Ctrl-C into SystemExit
        result["status"] = "interrupted"
        if not _is_helper():
            print(_interruption(directory, at_once=not isinstance(error, Interrupted)), file=sys.stderr)
    except Exception as error:
        result |= {"error": _one_line(error), "traceback": traceback.format_exc()}
    if not _is_helper():
        _write_result(directory, result)
    if result["status"] == "failed":
        print(f"failed: {result['error']}", file=sys.stderr)
        if config.verbose:
            print(result["traceback"], file=sys.stderr)
    return result


def _write_result(directory: Path, result: dict[str, Any]) -> None:
    """Writes ``result.json``; where that is not possible, the run has failed, for the reason it had or for this."""
    from finetuning.runs.files import BEST_CHECKPOINT, RESULT, write_json

    try:
        write_json(directory / RESULT, result)
        if result["status"] == "finished":  # its weights are saved; until here a killed run can still go on
            (directory / BEST_CHECKPOINT).unlink()
    except OSError as error:
        reason = f"{RESULT} cannot be written: {error.strerror}"
        earlier = f"{result['error']}; " if "error" in result else ""
        result |= {"status": "failed", "error": earlier + reason}
        result.setdefault("traceback", traceback.format_exc())


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _interruption(directory: Path, at_once: bool) -> str:
    """What was kept of an interrupted run, and the command that goes on from there."""
    from finetuning.runs.files import LAST_CHECKPOINT

    if not (directory / LAST_CHECKPOINT).exists():
        return f"interrupted before the first checkpoint; start again with: {_command_with(directory, '--overwrite')}"
    note = "\nit was stopped at once: the last checkpoint is that of an earlier epoch" if at_once else ""
    return f"interrupted; continue with: {_command_with(directory, '--resume')}{note}"


def _command_with(directory: Path, flag: str) -> str:
    words = [*without_switches(sys.argv, "--resume", "--overwrite"), flag]
    if not any(word.split("=")[0] == "--output_dir" for word in words):
        words[-1:-1] = ["--output_dir", str(directory)]
    return command_line(words)


# ---------------------------------------------------------------------------------------------------------------------
# before training


def prepare(config: RunConfig) -> Prepared:
    """Checks all that can be checked, reads and tokenizes the data, and opens the run directory at last."""
    from finetuning.runs.directory import check_directory, default_directory, in_slurm_step, open_directory
    from finetuning.training.module import quiet_lightning, resolve_hardware, resolve_learning_rate

    first = not _is_helper()
    inherited = os.environ.get(DIRECTORY_VARIABLE) if not first else None
    alike = first or inherited or in_slurm_step()  # Lightning's launcher and srun let processes know of each other
    if config.output_dir is None and ("TORCHELASTIC_RUN_ID" in os.environ or not alike):
        raise UserError("--output_dir: is needed where torchrun or several hosts start the processes of a run")
    directory = config.output_dir or Path(inherited or default_directory(config))
    # Complete before it is compared with the run that --resume continues.
    config = replace(config, learning_rate=resolve_learning_rate(config), output_dir=directory)
    writes = first and not config.estimate
    if writes:
        check_directory(directory, config)

    from finetuning.data.batches import check_batches
    from finetuning.models.pretrained import find_model, load_tokenizer
    from local_dataset_utilities import load_texts, tokenize
    from local_model_utilities import import_bitsandbytes

    with quiet_lightning():
        hardware = resolve_hardware(config)
    if config.q_lora:
        import_bitsandbytes()
    folder = find_model(config)
    tokenizer = load_tokenizer(config.model_name, folder)
    texts = load_texts(config)
    splits = tokenize(texts, tokenizer, config)
    prepared = Prepared(config, directory, hardware, folder, texts, splits, int(tokenizer.pad_token_id))
    check_batches(splits, config)
    if writes:
        open_directory(directory, config)
        os.environ[DIRECTORY_VARIABLE] = str(directory)
    return prepared


# ---------------------------------------------------------------------------------------------------------------------
# training


def train(prepared: Prepared, result: dict[str, Any]) -> None:
    """Builds, trains, chooses, saves and tests; ``result`` is filled as things become known."""
    import lightning.pytorch as pl

    from finetuning.models.encoder import keep_freed_memory
    from finetuning.runs.measurements import (
        environment_record,
        peak_memory,
        process_seconds,
        processor_seconds,
        was_alone,
    )
    from finetuning.training.callbacks import GracefulStop, Meter
    from finetuning.training.module import leave_process_group, make_trainer, quiet_lightning
    from local_model_utilities import (
        build_classifier,
        count_parameters,
        module_table,
        parameter_record,
        parameter_table,
    )

    config, hardware, first = prepared.config, prepared.hardware, not _is_helper()
    started, busy = time.perf_counter(), processor_seconds()
    keep_freed_memory()
    with quiet_lightning():
        pl.seed_everything(config.seed, verbose=False)
    result["environment"] = environment_record() | {"cpu_kernels": cpu_kernels_used(prepared)}
    classifier = build_classifier(config, prepared.model_folder, prepared.texts.label_names, hardware.dtype)
    groups = count_parameters(classifier)
    result["parameters"] = parameter_record(groups)
    if first:
        print(f"{headline(prepared)}\n\n{parameter_table(groups)}\n", flush=True)
        if config.verbose:
            print(module_table(classifier.model), flush=True)
    meter = Meter(prepared.directory)
    stop = GracefulStop(prepared.directory, meter)
    with quiet_lightning(), stop.listening():
        trainer = make_trainer(config, hardware, prepared.directory, [meter, stop])
        try:
            _fit_and_test(prepared, trainer, classifier, meter, stop, result)
        finally:
            result["memory"] = peak_memory(hardware.on_gpu)
            result["seconds"] = meter.run_seconds
            result["process_seconds"] = None if config.resume else process_seconds()
            alone = was_alone(busy, time.perf_counter() - started) if trainer.world_size == 1 else None
            result["environment"]["alone"] = alone
    leave_process_group()
    if first:
        print(summary(prepared, result), flush=True)


def _fit_and_test(
    prepared: Prepared, trainer: Any, classifier: Any, meter: Any, stop: Any, result: dict[str, Any]
) -> None:
    """Trains, takes the best checkpoint, saves what it holds, and reads the test split once."""
    from finetuning.data.batches import evaluation_loader, train_loader
    from finetuning.models.lora import lora_modules
    from finetuning.runs.directory import plot_learning_curve, write_predictions
    from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT
    from finetuning.runs.weights import save_trained
    from finetuning.training.module import FineTuning
    from local_model_utilities import frozen_outputs, saved_parameters

    config, directory, splits = prepared.config, prepared.directory, prepared.splits
    shares = {"rank": trainer.global_rank, "world_size": trainer.world_size, "pin_memory": prepared.hardware.on_gpu}
    training = train_loader(splits["train"], config, prepared.pad_id, **shares)
    validation = evaluation_loader(splits["validation"], config, prepared.pad_id, **shares)
    result["data"] = data_record(prepared, training)
    steps = config.epochs * training.steps_per_epoch
    repeated = {name: splits[name].lengths for name in ("train", "validation")}
    # on a GPU, fetching them takes as long as computing them
    frozen = {} if prepared.hardware.on_gpu else frozen_outputs(classifier, repeated, config)
    module = FineTuning(classifier, config, len(prepared.texts.label_names), steps, frozen)
    checkpoint = directory / LAST_CHECKPOINT if config.resume else None
    try:
        trainer.fit(module, training, validation, ckpt_path=checkpoint, weights_only=True)
    finally:
        result["train"] = train_record(trainer, meter, training, len(splits["train"]))
    module.load_best(directory / BEST_CHECKPOINT)
    result["validation"] = module.scores["validation"] | {
        "examples": len(splits["validation"]),
        "seconds": meter.validation_seconds,
    }
    if trainer.is_global_zero:
        targets = [name for name, _ in lora_modules(classifier.model)]
        saved = save_trained(directory, saved_parameters(classifier), config, targets, classifier.family.head)
        result["files"] = {path.name: path.stat().st_size for path in (saved, directory / LAST_CHECKPOINT)}
        title = f"{prepared.texts.source}: {config.method}, {config.optimizer}, {config.learning_rate:g}"
        plot_learning_curve(directory, meter.rows, str(config.monitor), title)
    stop.check()
    if config.test:
        test = evaluation_loader(splits["test"], config, prepared.pad_id, **shares)
        began = time.perf_counter()
        trainer.test(module, test, verbose=False)
        result["test"] = test_record(module.scores["test"], len(splits["test"]), time.perf_counter() - began)
    stop.check()
    if trainer.is_global_zero:
        write_predictions(directory, module.predictions)


if __name__ == "__main__":
    sys.exit(main())
