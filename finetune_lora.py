"""Fine-tunes a text classifier: ``python finetune_lora.py FLAGS``, see ``--help`` or README.md.

Exit status: 0 finished, 1 failed, 2 input refused, 130 interrupted.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from finetuning.caches import cache_table, clear_caches, remove_left_over
from finetuning.config import RunConfig, check_data_dir, check_trackers, continued
from finetuning.errors import UserError, exit_status, say
from finetuning.flags import given_flags
from finetuning.processes import (
    is_helper,
    share_directory,
    share_processors,
    shared_directory,
    show_any_text,
    slurm_job,
    stoppable,
)
from finetuning.processor import limit_libraries
from finetuning.runs.directory import (
    check_directory,
    check_same,
    claimed_directory,
    continuation,
    default_directory,
    settings_to_run,
)
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, read_origin, read_settings
from finetuning.runs.recording import recorded
from finetuning.runs.records import command_line, data_hashes, data_record, test_record, train_record
from finetuning.training.setup import Setup

if TYPE_CHECKING:  # functions import torch themselves, so that a wrong flag fails before torch is loaded
    import lightning.pytorch as pl

    from finetuning.data.texts import TextData
    from finetuning.models.classifier import Classifier
    from finetuning.training.callbacks import GracefulStop, Meter
    from finetuning.training.module import FineTuning
    from finetuning.training.trackers import Trackers

DESCRIPTION = "Fine-tune a text classifier, an encoder or a decoder: LoRA, QLoRA, the last layers or all weights."
EXIT_STATUS = {"finished": 0, "failed": 1, "interrupted": 130}


def main(argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None) -> int:
    """The command. Returns the exit status.

    Args:
        argv: the flags; ``None`` takes them from ``sys.argv``.
        defaults: defaults that replace the usual ones, for example those of DistilRoberta.
    """
    show_any_text()
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: command(words, defaults or {}), "interrupted before training")


@stoppable()
def command(argv: Sequence[str], defaults: dict[str, Any]) -> int:
    """Does what the flags ask for. Returns the exit status.

    Raises:
        UserError: input is refused.
    """
    given = given_flags(argv, DESCRIPTION, defaults)
    config = settings_to_run(given, defaults)
    if config is None:
        print("the run in --output_dir has finished: nothing to do", flush=True)
        if not is_helper():
            restore_report(given)
        return 0
    if config.run.cache_info or config.run.cache_clear:
        print(clear_caches() if config.run.cache_clear else cache_table())
        return 0
    check_data_dir(config.data.data_dir)
    check_trackers(config.run)
    limit_libraries()
    share_processors()
    if config.run.prefetch:
        prefetch(config)
        return 0
    if config.run.estimate:
        print_estimate(config)
        return 0
    status = run(config)["status"]
    # If another process ends with another status, Lightning and srun kill the first one while it may still write.
    return 0 if is_helper() and status == "interrupted" else EXIT_STATUS[status]


def restore_report(given: dict[str, Any]) -> None:
    """Writes the report of a finished run, if a kill or a full disk has prevented it."""
    from finetuning.models.pretrained import load_tokenizer
    from finetuning.report.page import restore
    from local_dataset_utilities import load_texts, tokenize
    from local_model_utilities import find_base_model

    def unchanged_texts() -> "TextData":
        texts = load_texts(config.data, config.run.offline)
        if "data" in read_origin(directory):  # a run of an earlier version recorded no hashes
            tokenizer = load_tokenizer(config.model.model_name, find_base_model(config))
            splits = tokenize(texts, tokenizer, config.data, config.run.test)
            check_same(directory, "data", data_hashes(texts, splits))
        return texts

    directory = given["output_dir"]
    config = continued(read_settings(directory), given | {"overwrite": False})
    restore(directory, config.run, lambda: unchanged_texts().splits)


def prefetch(config: RunConfig) -> None:
    """Downloads model and data into the caches."""
    from local_dataset_utilities import prefetch_texts
    from local_model_utilities import find_base_model

    print(f"model: {find_base_model(config)}")
    prefetch_texts(config.data)
    print("data: in the cache; runs with the same --model_name and --dataset now need no network")


def print_estimate(config: RunConfig) -> None:
    """Prints the memory and time that the run needs. It writes only tokens, into the cache."""
    import torch

    from finetuning.training.estimate import estimate, estimate_table
    from finetuning.training.hardware import prepare_process
    from finetuning.training.trainer import quiet_lightning
    from local_model_utilities import build_classifier, count_parameters

    setup = prepare(config)
    training, hardware = setup.config.training, setup.hardware
    prepare_process(hardware)
    torch.manual_seed(training.seed)
    classifier = build_classifier(setup.config, setup.model_folder, setup.texts.label_names, hardware.dtype)
    weight_bytes = count_parameters(classifier)["total"].bytes
    try:
        with quiet_lightning():
            record = estimate(
                classifier, setup.task, setup.splits, setup.pad_id, training, hardware, config.hardware.frozen_cache_gb
            )
    except torch.OutOfMemoryError:
        advice = f"lower --batch_tokens ({training.batch_tokens}), or use --gradient_checkpointing True"
        raise UserError(f"--estimate: the GPU has too little memory for one step of this run: {advice}") from None
    print(f"{setup.headline(classifier)}\n\n{estimate_table(record, weight_bytes, training.epochs)}")


# ---------------------------------------------------------------------------------------------------------------------
# one run


def run(config: RunConfig) -> dict[str, Any]:
    """Does one run: data, model, training, evaluation, record. Returns the content of ``result.json``.

    Raises:
        UserError: input is refused, and nothing was written.
    """
    from finetuning.report.page import present
    from finetuning.training.trackers import Trackers

    setup = prepare(config)
    trackers = Trackers([] if is_helper() else config.run.trackers, setup.directory)
    with setup.lock:
        with recorded(setup.directory, setup.config) as result:
            classifier = build_model(setup, result)
            with watched(setup, result, trackers) as (meter, stop):
                trainer, module = train(setup, classifier, meter, stop, result)
                evaluate(setup, trainer, module, stop, result)
        if not is_helper():
            present(setup.directory, result, setup.config.run, setup.texts.splits)
        trackers.close(result)
    return result


def prepare(config: RunConfig) -> Setup:
    """Data: does all checks, reads and tokenizes the texts, and then opens the run directory."""
    from torch import get_num_threads

    from finetuning.data.batches import check_batches
    from finetuning.models.base_files import file_hashes
    from finetuning.models.pretrained import check_vocabulary, load_tokenizer
    from finetuning.models.quantization import try_four_bits
    from finetuning.training.hardware import resolve_hardware
    from finetuning.training.tasks import imbalance_advice, make_task
    from finetuning.training.trainer import quiet_lightning
    from local_dataset_utilities import load_texts, tokenize
    from local_model_utilities import adopt_adapter, build_classifier, find_base_model, load_adapter, with_precision

    directory = config.run.output_dir or shared_directory() or default_directory(config.data.dataset, config.name)
    config = config.changed(output_dir=directory)
    writes = not is_helper() and not config.run.estimate
    if writes:
        check_directory(directory, config.run.resume, config.run.overwrite)
    with quiet_lightning():
        hardware = resolve_hardware(config.hardware, config.run.resume)
    if config.lora is not None and config.lora.q_lora and not is_helper():  # who would take memory on the first GPU
        try_four_bits(hardware.device, hardware.dtype)
    folder = find_base_model(config)
    with quiet_lightning():
        config = with_precision(config, folder)
        hardware = resolve_hardware(config.hardware, config.run.resume)  # again: at first "fast" counts as "auto"
    tokenizer = load_tokenizer(config.model.model_name, folder)
    texts = load_texts(config.data, config.run.offline)
    labels = {name: split.labels for name, split in texts.splits.items()}
    task = make_task(labels, texts.label_names, config.training)
    advice = imbalance_advice(task, task.counts(labels["train"]), config.training)
    adapter = None
    if config.lora is not None and config.lora.init_adapter is not None:
        config, adapter = adopt_adapter(config, folder)
        trial = build_classifier(config, folder, texts.label_names, hardware.dtype, adapter.linears)
        load_adapter(trial, adapter, folder)  # what does not fit is refused before anything is written
        del trial
    splits = tokenize(texts, tokenizer, config.data, config.run.test)
    check_vocabulary(config.model.model_name, folder, tokenizer, [split.tokens for split in splits.values()])
    check_batches(splits, config.training, config.hardware.devices * config.hardware.num_nodes)
    lock: AbstractContextManager[object] = nullcontext()
    origin: dict[str, Any] = {}
    if writes:
        threads = None if hardware.on_gpu else get_num_threads()
        adapted = {} if adapter is None else adapter.file_hashes()
        hashes = {"base_model": file_hashes(folder), "data": data_hashes(texts, splits), "adapter": adapted}
        origin = hashes | {"threads": threads, "job": slurm_job(), "command": command_line(sys.argv)}
        lock, config, checkpoint = claimed_directory(directory, config, origin)
        share_directory(directory)
        remove_left_over()
    else:
        config, checkpoint = continuation(config, directory)
    pad_id = int(tokenizer.pad_token_id)
    found = hardware, folder, texts, task, advice, splits, pad_id
    return Setup(config, directory, *found, adapter, checkpoint, lock, origin)


def build_model(setup: Setup, result: dict[str, Any]) -> "Classifier":
    """Model: builds the classifier with its LoRA layers, and prints settings and parameter counts."""
    import lightning.pytorch as pl

    from finetuning.runs.measurements import environment_record
    from finetuning.training.hardware import kernels_used, prepare_process
    from finetuning.training.trainer import quiet_lightning
    from local_model_utilities import (
        build_classifier,
        count_parameters,
        load_adapter,
        module_table,
        parameter_record,
        parameter_table,
    )

    config = setup.config
    prepare_process(setup.hardware)
    with quiet_lightning():
        pl.seed_everything(config.training.seed, verbose=False)
    result["environment"] = environment_record()
    linears = None if setup.adapter is None else setup.adapter.linears
    classifier = build_classifier(config, setup.model_folder, setup.texts.label_names, setup.hardware.dtype, linears)
    if setup.adapter is not None:
        load_adapter(classifier, setup.adapter, setup.model_folder)
    result["environment"]["cpu_kernels"] = kernels_used(classifier, config.hardware, setup.hardware)
    result["model"] = {"type": classifier.family.model_type, "efficient_path": classifier.efficient}
    groups = count_parameters(classifier)
    result["parameters"] = parameter_record(groups)
    if not is_helper():
        precision = str(setup.hardware.dtype).removeprefix("torch.")
        result["base_model"] = {"precision": precision, "sha256": setup.origin["base_model"]}
        say(f"{setup.headline(classifier)}\nrun     {setup.directory}\n\n{parameter_table(groups)}\n")
        if config.run.verbose:
            say(module_table(classifier.model))
    return classifier


def train(
    setup: Setup, classifier: "Classifier", meter: "Meter", stop: "GracefulStop", result: dict[str, Any]
) -> "tuple[pl.Trainer, FineTuning]":
    """Training: fits the classifier, loads the best checkpoint and saves its weights."""
    from finetuning.data.batches import evaluation_loader, train_loader
    from finetuning.models.fused import split_widths
    from finetuning.models.lora import ranks_and_alphas
    from finetuning.runs.history import plot_learning_curve
    from finetuning.runs.weights import save_trained
    from finetuning.training.memory import check_memory
    from finetuning.training.module import FineTuning
    from finetuning.training.tasks import chance_advice, one_answer_advice
    from finetuning.training.trainer import loader_shares, make_trainer

    config, directory, splits, hardware = setup.config, setup.directory, setup.splits, setup.hardware
    trainer = make_trainer(config.training, config.hardware, hardware, directory, [meter, stop])
    ranks = loader_shares(trainer, hardware)
    training = train_loader(splits["train"], config.training, setup.pad_id, **ranks)
    validation = evaluation_loader(splits["validation"], config.training, setup.pad_id, **ranks)
    result["data"] = data_record(setup.texts, splits) | {"padding_fraction": training.padding_fraction}
    repeated = {name: splits[name].lengths for name in ("train", "validation")}
    keeps = config.training.epochs > 1 and not hardware.on_gpu  # a GPU recomputes outputs as fast as it copies them
    frozen = classifier.frozen_outputs(repeated, config.hardware.frozen_cache_gb) if keeps else {}
    steps = config.training.epochs * training.steps_per_epoch
    kernels = result["environment"]["cpu_kernels"]
    module = FineTuning(classifier, config.training, setup.task, steps, frozen, kernels)
    if config.training.epochs and not config.run.force:
        limits = config.data.max_length, config.hardware.devices
        check_memory(classifier, training, config.training, hardware, frozen, *limits)
    try:
        if config.training.epochs:
            trainer.fit(module, training, validation, ckpt_path=setup.checkpoint, weights_only=True)
        else:
            trainer.validate(module, validation, verbose=False)
    finally:
        result["train"] = train_record(trainer, meter, training, len(splits["train"]))
    if config.training.epochs:
        module.load_best(directory / BEST_CHECKPOINT)
    result["task"] = setup.task.record()
    measured = {"examples": len(splits["validation"]), "seconds": meter.validation_seconds}
    result["validation"] = module.record("validation") | measured
    _, labels, logits = module.predictions["validation"]
    found = one_answer_advice(setup.task, logits, config.training) + chance_advice(setup.task, labels, logits)
    result["advice"] = setup.advice + found
    if trainer.is_global_zero:
        saved = save_trained(
            directory, classifier.saved_parameters(), config.lora, config.model.model_name,
            ranks_and_alphas(classifier.model), classifier.family.head_modules, split_widths(classifier.model),
            classifier.family.conv1d,
        )  # fmt: skip
        written = (saved, directory / LAST_CHECKPOINT)
        result["files"] = {path.name: path.stat().st_size for path in written if path.exists()}
        optimizer = f"{config.training.optimizer}, {config.training.learning_rate:g}"
        title = f"{setup.texts.source}: {config.method.method}, {optimizer}"
        plot_learning_curve(directory, meter.rows, config.training.monitor, title)
    return trainer, module


def evaluate(
    setup: Setup, trainer: "pl.Trainer", module: "FineTuning", stop: "GracefulStop", result: dict[str, Any]
) -> None:
    """Evaluation: evaluates the test split once, with the checkpoint that validation chose."""
    from finetuning.data.batches import evaluation_loader
    from finetuning.runs.history import write_predictions
    from finetuning.training.trainer import loader_shares

    stop.check()
    if setup.config.run.test:
        ranks = loader_shares(trainer, setup.hardware)
        test = evaluation_loader(setup.splits["test"], setup.config.training, setup.pad_id, **ranks)
        began = time.perf_counter()
        trainer.test(module, test, verbose=False)
        seconds = time.perf_counter() - began
        result["test"] = test_record(module.record("test"), len(setup.splits["test"]), seconds)
    stop.check()
    if trainer.is_global_zero:
        lengths = {name: split.length_by_row for name, split in setup.splits.items()}
        write_predictions(setup.directory, module.predictions, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# record


@contextmanager
def watched(setup: Setup, result: dict[str, Any], trackers: "Trackers") -> "Iterator[tuple[Meter, GracefulStop]]":
    """Handles signals, and writes memory, time and whether the machine was shared into ``result``."""
    from finetuning.runs.measurements import peak_memory, process_seconds, processor_seconds, was_alone
    from finetuning.training.callbacks import GracefulStop, Meter
    from finetuning.training.trainer import leave_process_group, quiet_lightning

    config = setup.config
    trackers.open(config.to_dict(), resumed=setup.checkpoint is not None)
    started, busy = time.perf_counter(), processor_seconds()
    meter = Meter(setup.directory, on_row=trackers.log if trackers else None)
    stop = GracefulStop(setup.directory, meter, config.run.checkpoint_minutes, config.run.checkpoint_steps)
    with quiet_lightning(), stop.listening():
        try:
            yield meter, stop
        finally:
            result["memory"] = peak_memory(setup.hardware.on_gpu)
            result["seconds"] = meter.run_seconds
            result["process_seconds"] = None if config.run.resume else process_seconds()
            one_process = config.hardware.devices * config.hardware.num_nodes == 1
            alone = was_alone(busy, time.perf_counter() - started) if one_process else None
            result["environment"]["alone"] = alone
    leave_process_group()


if __name__ == "__main__":
    sys.exit(main())
