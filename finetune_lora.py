"""Fine-tunes a text classifier: ``python finetune_lora.py FLAGS``, see ``--help`` or README.md.

Exit status: 0 finished, 1 failed, 2 input refused, 130 interrupted.
"""

import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuning.config import RunConfig, check_data_dir, check_trackers, continued
from finetuning.errors import Interrupted, UserError, first_line, not_installed
from finetuning.flags import given_flags
from finetuning.processes import is_helper, share_directory, share_processors, shared_directory
from finetuning.processor import limit_libraries
from finetuning.runs.directory import (
    check_directory,
    default_directory,
    has_checkpoint,
    interrupted_settings,
    open_directory,
)
from finetuning.runs.files import BEST_CHECKPOINT, LAST_CHECKPOINT, REPORT, RESULT
from finetuning.runs.records import (
    NOT_ASKED_FOR,
    command_line,
    headline,
    summary,
    test_record,
    train_record,
)
from finetuning.storage import write_json

if TYPE_CHECKING:  # functions import torch themselves, so that a wrong flag fails before torch is loaded
    import lightning.pytorch as pl

    from finetuning.data.texts import TextData
    from finetuning.data.tokens import TokenizedSplit
    from finetuning.models.classifier import Classifier
    from finetuning.training.callbacks import GracefulStop, Meter
    from finetuning.training.hardware import Hardware
    from finetuning.training.module import FineTuning
    from finetuning.training.trackers import Trackers

DESCRIPTION = "Fine-tune a DistilBERT, BERT or RoBERTa text classifier: LoRA, QLoRA, the last layers or all weights."
EXIT_STATUS = {"finished": 0, "failed": 1, "interrupted": 130}


def main(argv: Sequence[str] | None = None, defaults: dict[str, Any] | None = None) -> int:
    """The command. Returns the exit status.

    Args:
        argv: the flags; ``None`` takes them from ``sys.argv``.
        defaults: defaults that replace the usual ones, for example those of DistilRoberta.
    """
    helper = is_helper()
    if helper:  # until its own handlers are installed: the first process stops all processes at the same step
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
    try:
        config = read_settings_of(sys.argv[1:] if argv is None else argv, defaults or {})
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


def read_settings_of(argv: Sequence[str], defaults: dict[str, Any]) -> RunConfig:
    """The configuration for these flags. With ``--resume``, it comes from the run in ``--output_dir``."""
    given = given_flags(argv, DESCRIPTION, defaults)
    if not (given.get("resume") and "output_dir" in given):
        return RunConfig.from_settings(**{**defaults, **given})
    directory = given["output_dir"]
    config = continued(interrupted_settings(directory), given)
    if has_checkpoint(directory):
        return config
    if not is_helper():
        print(f"{directory} has no checkpoint yet: starting over", flush=True)
    return config.changed(resume=False, overwrite=True)


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
                classifier, setup.splits, setup.pad_id, training, hardware, config.hardware.frozen_cache_gb
            )
    except torch.OutOfMemoryError:
        advice = f"lower --batch_tokens ({training.batch_tokens}), or use --gradient_checkpointing True"
        raise UserError(f"--estimate: the GPU has too little memory for one step of this run: {advice}") from None
    print(f"{setup.headline()}\n\n{estimate_table(record, weight_bytes, training.epochs)}")


# ---------------------------------------------------------------------------------------------------------------------
# one run


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs before it builds the model. All checks of the input are done."""

    config: RunConfig
    directory: Path
    hardware: "Hardware"
    model_folder: Path
    texts: "TextData"
    splits: "dict[str, TokenizedSplit]"
    pad_id: int

    def data_record(self) -> dict[str, Any]:
        """The source of the texts, and the numbers of texts and tokens, for ``result.json``."""
        texts = self.texts
        return {
            "source": texts.source,
            "columns": texts.columns,
            "label_names": texts.label_names,
            "sizes": {name: len(split.texts) for name, split in texts.splits.items()},
            "tokens": {name: int(split.lengths.sum()) for name, split in self.splits.items()},
            "leaks_dropped": texts.leaks_dropped,
            "notes": texts.notes,
        }

    def kernels(self) -> str:
        """Whether the run uses the compiled CPU kernels, or why not."""
        import torch

        from finetuning.models.compiled import library

        settings, hardware = self.config.hardware, self.hardware
        if hardware.int8:
            return library(without_bf16=True)[1]
        used = not hardware.on_gpu and hardware.dtype == torch.bfloat16 and settings.efficient and not settings.compile
        return library()[1] if used else NOT_ASKED_FOR

    def headline(self) -> str:
        """The text that the run prints before training."""
        return headline(self.config, self.data_record(), self.hardware.described, self.kernels())


def run(config: RunConfig) -> dict[str, Any]:
    """Does one run: data, model, training, evaluation, record. Returns the content of ``result.json``.

    Raises:
        UserError: input is refused, and nothing was written.
    """
    setup = prepare(config)
    trackers = trackers_of(setup)
    with recorded(setup) as result:
        classifier = build_model(setup, result)
        with watched(setup, result, trackers) as (meter, stop):
            trainer, module = train(setup, classifier, meter, stop, result)
            evaluate(setup, trainer, module, stop, result)
    present(setup, result, trackers)
    return result


def prepare(config: RunConfig) -> Setup:
    """Data: does all checks, reads and tokenizes the texts, and then opens the run directory."""
    from finetuning.data.batches import check_batches
    from finetuning.models.pretrained import load_tokenizer
    from finetuning.models.quantization import try_four_bits
    from finetuning.training.hardware import fastest_precision, resolve_hardware
    from finetuning.training.trainer import quiet_lightning
    from local_dataset_utilities import load_texts, tokenize
    from local_model_utilities import find_base_model

    directory = config.run.output_dir or shared_directory() or default_directory(config.data.dataset, config.name)
    config = config.changed(output_dir=directory)
    writes = not is_helper() and not config.run.estimate
    if writes:
        check_directory(directory, config.run.resume, config.run.overwrite)
    with quiet_lightning():
        if config.hardware.precision == "fast":
            precision, why = fastest_precision(config.hardware, config.excludes_int8)
            config = config.changed(precision=precision)
            if not is_helper():
                print(f"--precision fast: {precision} ({why})", flush=True)
        hardware = resolve_hardware(config.hardware)
    if config.lora is not None and config.lora.q_lora and not is_helper():  # who would take memory on the first GPU
        try_four_bits(hardware.device, hardware.dtype)
    folder = find_base_model(config)
    tokenizer = load_tokenizer(config.model.model_name, folder)
    texts = load_texts(config.data, config.run.offline)
    splits = tokenize(texts, tokenizer, config.data, config.run.test)
    check_batches(splits, config.training, config.hardware.devices * config.hardware.num_nodes)
    if writes:
        open_directory(directory, config.to_dict(), config.run.resume, config.run.overwrite)
        share_directory(directory)
    return Setup(config, directory, hardware, folder, texts, splits, int(tokenizer.pad_token_id))


def build_model(setup: Setup, result: dict[str, Any]) -> "Classifier":
    """Model: builds the classifier with its LoRA layers, and prints settings and parameter counts."""
    import lightning.pytorch as pl

    from finetuning.runs.measurements import environment_record
    from finetuning.training.hardware import prepare_process
    from finetuning.training.trainer import quiet_lightning
    from local_model_utilities import (
        build_classifier,
        count_parameters,
        module_table,
        parameter_record,
        parameter_table,
    )

    config = setup.config
    prepare_process(setup.hardware)
    with quiet_lightning():
        pl.seed_everything(config.training.seed, verbose=False)
    result["environment"] = environment_record() | {"cpu_kernels": setup.kernels()}
    classifier = build_classifier(config, setup.model_folder, setup.texts.label_names, setup.hardware.dtype)
    groups = count_parameters(classifier)
    result["parameters"] = parameter_record(groups)
    if not is_helper():
        print(f"{setup.headline()}\nrun     {setup.directory}\n\n{parameter_table(groups)}\n", flush=True)
        if config.run.verbose:
            print(module_table(classifier.model), flush=True)
    return classifier


def train(
    setup: Setup, classifier: "Classifier", meter: "Meter", stop: "GracefulStop", result: dict[str, Any]
) -> "tuple[pl.Trainer, FineTuning]":
    """Training: fits the classifier, loads the best checkpoint and saves its weights."""
    from finetuning.data.batches import evaluation_loader, train_loader
    from finetuning.models.lora import lora_modules
    from finetuning.runs.history import plot_learning_curve
    from finetuning.runs.weights import save_trained
    from finetuning.training.module import FineTuning
    from finetuning.training.trainer import make_trainer

    config, directory, splits, hardware = setup.config, setup.directory, setup.splits, setup.hardware
    trainer = make_trainer(config.training, config.hardware, hardware, directory, [meter, stop])
    ranks = loader_shares(trainer, hardware)
    training = train_loader(splits["train"], config.training, setup.pad_id, **ranks)
    validation = evaluation_loader(splits["validation"], config.training, setup.pad_id, **ranks)
    result["data"] = setup.data_record() | {"padding_fraction": training.padding_fraction}
    repeated = {name: splits[name].lengths for name in ("train", "validation")}
    keeps = config.training.epochs > 1 and not hardware.on_gpu  # a GPU recomputes outputs as fast as it copies them
    frozen = classifier.frozen_outputs(repeated, config.hardware.frozen_cache_gb) if keeps else {}
    steps = config.training.epochs * training.steps_per_epoch
    module = FineTuning(classifier, config.training, len(setup.texts.label_names), steps, frozen)
    checkpoint = directory / LAST_CHECKPOINT if config.run.resume else None
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
        saved = save_trained(
            directory, classifier.saved_parameters(), config.lora, config.model.model_name, targets,
            classifier.family.head,
        )  # fmt: skip
        result["files"] = {path.name: path.stat().st_size for path in (saved, directory / LAST_CHECKPOINT)}
        optimizer = f"{config.training.optimizer}, {config.training.learning_rate:g}"
        title = f"{setup.texts.source}: {config.method.method}, {optimizer}"
        plot_learning_curve(directory, meter.rows, config.training.monitor, title)
    return trainer, module


def loader_shares(trainer: "pl.Trainer", hardware: "Hardware") -> dict[str, Any]:
    """The loaders' arguments that give this process its part of the batches."""
    return {"rank": trainer.global_rank, "world_size": trainer.world_size, "pin_memory": hardware.on_gpu}


def evaluate(
    setup: Setup, trainer: "pl.Trainer", module: "FineTuning", stop: "GracefulStop", result: dict[str, Any]
) -> None:
    """Evaluation: evaluates the test split once, with the checkpoint that validation chose."""
    from finetuning.data.batches import evaluation_loader
    from finetuning.runs.history import write_predictions

    stop.check()
    if setup.config.run.test:
        ranks = loader_shares(trainer, setup.hardware)
        test = evaluation_loader(setup.splits["test"], setup.config.training, setup.pad_id, **ranks)
        began = time.perf_counter()
        trainer.test(module, test, verbose=False)
        seconds = time.perf_counter() - began
        result["test"] = test_record(module.scores["test"], len(setup.splits["test"]), seconds)
    stop.check()
    if trainer.is_global_zero:
        lengths = {
            name: dict(zip(split.rows.tolist(), split.lengths.tolist(), strict=True))
            for name, split in setup.splits.items()
        }
        write_predictions(setup.directory, module.predictions, lengths)


# ---------------------------------------------------------------------------------------------------------------------
# record


@contextmanager
def recorded(setup: Setup) -> Iterator[dict[str, Any]]:
    """Record: writes ``result.json``, whether the steps in the context finish, fail or are interrupted."""
    config, directory = setup.config, setup.directory
    result: dict[str, Any] = {"status": "failed", "config": config.to_dict(), "command": command_line(sys.argv)}
    try:
        yield result
        result["status"] = "finished"
        if not is_helper():
            print(summary(directory, result), flush=True)
    except (Interrupted, KeyboardInterrupt, SystemExit) as error:  # Lightning turns a second Ctrl-C into SystemExit
        result["status"] = "interrupted"
        if not is_helper():
            print(_interruption(directory, at_once=not isinstance(error, Interrupted)), file=sys.stderr)
    except Exception as error:
        result |= {"error": first_line(error, name_file=True), "traceback": traceback.format_exc()}
    if not is_helper():
        _write_result(directory, result)
    if result["status"] == "failed":
        print(f"failed: {result['error']}", file=sys.stderr)
        if config.run.verbose:
            print(result["traceback"], file=sys.stderr)


@contextmanager
def watched(
    setup: Setup, result: dict[str, Any], trackers: "Trackers | None"
) -> "Iterator[tuple[Meter, GracefulStop]]":
    """Handles signals, and writes memory, time and whether the machine was shared into ``result``."""
    from finetuning.runs.measurements import peak_memory, process_seconds, processor_seconds, was_alone
    from finetuning.training.callbacks import GracefulStop, Meter
    from finetuning.training.trainer import leave_process_group, quiet_lightning

    config = setup.config
    if trackers is not None:
        trackers.open(config.to_dict(), config.run.resume)
    started, busy = time.perf_counter(), processor_seconds()
    meter = Meter(setup.directory, on_row=trackers.log if trackers else None)
    stop = GracefulStop(setup.directory, meter)
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


def trackers_of(setup: Setup) -> "Trackers | None":
    """The trackers of ``--tracker``, in the first process; ``None`` without any."""
    if not setup.config.run.trackers or is_helper():
        return None
    from finetuning.training.trackers import Trackers

    return Trackers(setup.config.run.trackers, setup.directory)


def present(setup: Setup, result: dict[str, Any], trackers: "Trackers | None") -> None:
    """Shows the result: ``report.html`` of a finished run, and the trackers. Whatever fails here, the run stands."""
    from finetuning.report.page import write_report

    config = setup.config
    if config.run.report and result["status"] == "finished" and not is_helper():
        texts = {
            name: dict(zip(split.rows.tolist(), split.texts, strict=True))
            for name, split in setup.texts.splits.items()
            if name != "train"
        }
        try:
            path = write_report(setup.directory, result, texts if config.run.report_texts else None)
            print(f"{'report':<11} {path}", flush=True)
        except (Exception, KeyboardInterrupt) as error:
            print(f"warning: {REPORT} was not written: {first_line(error, name_file=True)}", file=sys.stderr)
    if trackers is not None:
        with suppress(KeyboardInterrupt):  # a tracker may wait for its server
            trackers.close(result)


def _write_result(directory: Path, result: dict[str, Any]) -> None:
    """Writes ``result.json``. If that fails, the run counts as failed."""
    try:
        write_json(directory / RESULT, result)
        if result["status"] == "finished":  # removed last, so that a run killed before this point can continue
            (directory / BEST_CHECKPOINT).unlink()
    except OSError as error:
        reason = f"{RESULT} cannot be written: {error.strerror}"
        earlier = f"{result['error']}; " if "error" in result else ""
        result |= {"status": "failed", "error": earlier + reason}
        result.setdefault("traceback", traceback.format_exc())


def _interruption(directory: Path, at_once: bool) -> str:
    """The message of an interrupted run, with the command that continues it."""
    command = command_line([sys.argv[0], "--resume", "--output_dir", str(directory)])
    if not has_checkpoint(directory):
        return f"interrupted before the first checkpoint; start over with: {command}"
    note = "\nit stopped at once, so the last checkpoint is from an earlier epoch" if at_once else ""
    return f"interrupted; continue with: {command}{note}"


if __name__ == "__main__":
    sys.exit(main())
