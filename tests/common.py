# mypy: disable-error-code="arg-type"
"""What several test files use: folders of tiny models and reviews, flags, runs as they are left on disk."""

import errno
import functools
import gc
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.slurm_cluster import Cluster, missing_daemon, running_cluster
from benchmarks.tiny import (  # noqa: F401  # the tests import some of it from here
    BAD,
    GOOD,
    INNER,
    LAYERS,
    WIDTH,
    make_tiny_folder,
    packaged_folder,
    tiny_classifier,
    write_reviews,
    write_splits,
    write_study,
)  # fmt: skip
from finetuning.comparison.plan import PlannedRun, read_plan
from finetuning.comparison.study_runs import StudyRuns
from finetuning.config import RunConfig
from finetuning.data.texts import TextData
from finetuning.errors import UserError
from finetuning.flags import from_flags
from finetuning.gpus import visible_cards
from finetuning.materials import find_materials
from finetuning.models.families import FAMILIES
from finetuning.models.int8_products import refused
from finetuning.models.lora import LinearWithLoRA
from finetuning.processor import cpu_name
from finetuning.runs.answers import Answers, Rule
from finetuning.runs.files import PREDICTIONS, read_result, write_result, write_settings
from finetuning.settings import LoRASettings
from finetuning.steps.inputs import Inputs, read_inputs
from local_dataset_utilities import load_texts
from tests.tiny_models import save_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parent.parent
needs_int8 = pytest.mark.skipif(refused() is not None, reason=f"no 8-bit products: {refused()}")
# Most tests try these rows of the table. tests/test_every_family.py tries all of them.
CORE = {name: FAMILIES[name] for name in ("distilbert", "bert", "roberta")}
MADE_HERE = {"cpu": cpu_name(), "gpus": visible_cards()}  # what a run of this machine says of it
T = TypeVar("T")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def process_settings() -> Iterator[None]:
    """Puts back what ``prepare_process`` sets."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def train_only_lora(model: torch.nn.Module) -> None:
    """Freezes all parameters but those of LoRA layers."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LinearWithLoRA):
            module.lora.requires_grad_(True)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder for each family of ``CORE``, with the packaged tokenizer; weights large enough to learn from."""
    folders = {model_type: tmp_path_factory.mktemp(model_type) for model_type in CORE}
    for model_type, folder in folders.items():
        make_tiny_folder(model_type, folder)
    return folders


@pytest.fixture(scope="session")
def distilbert(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["distilbert"]


@pytest.fixture(scope="session")
def bert(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["bert"]


@pytest.fixture(scope="session")
def bases(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny models without a head, as pretrained encoders come: each build draws a head of its own."""
    folders = {}
    for model_type, source in tiny_folders.items():
        folder = tmp_path_factory.mktemp("bases") / model_type
        shutil.copytree(source, folder)
        head = tuple(f"{name}." for name in FAMILIES[model_type].head)
        weights = load_file(folder / "model.safetensors")
        kept = {name: weight for name, weight in weights.items() if not name.startswith(head)}
        assert len(weights) - len(kept) == 4
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        folders[model_type] = folder
    return folders


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: model type -> the folder of its tiny model. A decoder's tokenizer has no padding token."""

    @functools.cache
    def folder(model_type: str) -> Path:
        path = tmp_path_factory.mktemp(model_type)
        model = tiny_model(model_type)
        model.config.id2label, model.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}  # the head stays
        model.save_pretrained(path)
        save_tokenizer(path, decoder=FAMILIES[model_type].last_token)
        return path

    return folder


@pytest.fixture(scope="session")
def review_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir for ``--dataset text``: 120 training, 40 validation and 40 test reviews."""
    return write_splits(tmp_path_factory.mktemp("reviews"), train=120, validation=40, test=40)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share the cluster run in one worker. They and whole runs come first: so both workers end together."""
    cluster = [item for item in items if "cluster" in getattr(item, "fixturenames", ())]
    for item in cluster:
        item.add_marker(pytest.mark.xdist_group("cluster"))
    items.sort(key=lambda item: (item not in cluster, item.path.parent.name != "tests"))  # stable: else as collected
    gc.collect()
    gc.freeze()  # the libraries stay, so that collections of garbage, a third of a second each, need not look at them


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests write tokens to a folder of their own. The workers of a session share it, so kernels are compiled once."""
    base = tmp_path_factory.getbasetemp()
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_LORA_CACHE", str(session / "cache"))
        yield


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for one test alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FINETUNE_LORA_CACHE", str(folder))
    return folder


def inputs_of_flags(model: Path, data_dir: Path, line: str) -> Inputs:
    """What a run with these flags on a CPU reads before it trains; the texts are those of a folder."""
    config = config_of_flags(f"--accelerator cpu --model_name {model} --dataset text --data_dir {data_dir} {line}")
    return read_inputs(config, find_materials(config))


def some(value: T | None) -> T:
    """The value, which must be there."""
    assert value is not None
    return value


def each_once(first: Iterable[Any], second: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs of parameters that do not interact: each of the first, and each of the second, with the other's first."""
    ours, theirs = list(first), list(second)
    return [*((one, theirs[0]) for one in ours), *((ours[0], other) for other in theirs[1:])]


def flags(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """The flags of a run that takes a second or two. It has no report, which would take a third of that."""
    return [
        "--model_name", str(model), "--dataset", "text", "--data_dir", str(data), "--output_dir", str(output),
        "--max_length", "32", "--batch_size", "8", "--accelerator", "cpu", "--learning_rate", "0.003",
        "--epochs", "2", "--patience", "0", "--report", "False", *more,
    ]  # fmt: skip


def config_of_flags(line: str) -> RunConfig:
    """What a command line asks for."""
    return from_flags(line.split())


def lora_of_flags(line: str) -> LoRASettings:
    """Its LoRA settings, of a command line that asks for LoRA."""
    lora = config_of_flags(line).lora
    assert lora is not None
    return lora


def refusal_of(call: Callable[..., object], *arguments: Any, **settings: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


def check_refusal(pattern: str, call: Callable[..., object], *arguments: Any, **settings: Any) -> str:
    """The one line with which a call is refused; the pattern must be found in it."""
    message = refusal_of(call, *arguments, **settings)
    assert re.search(pattern, message), message
    return message


def refusal(line: str) -> str:
    """The one line with which flags are refused."""
    return refusal_of(config_of_flags, line)


def frame(n: int, classes: int = 2, word: str = "train") -> pd.DataFrame:
    return pd.DataFrame({"text": [f"{word} text {i}" for i in range(n)], "label": np.arange(n) % classes})


def text_config(folder: Path, **options: Any) -> RunConfig:
    return RunConfig.from_settings(dataset="text", data_dir=folder, **options)


def texts_of(config: RunConfig) -> TextData:
    """The texts that a run with this configuration gets."""
    return load_texts(config.data, config.run.offline)


def write_texts(folder: Path, content: str, name: str = "train.csv") -> RunConfig:
    (folder / name).write_text(content, encoding="utf-8", errors="surrogateescape")  # "\udcd0" is the byte d0
    return text_config(folder)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if absent := missing_daemon():
        reason = f"{absent}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with running_cluster(tmp_path_factory.mktemp("submit from here")) as cluster:
        yield cluster


@pytest.fixture
def ready(cluster: Cluster, tmp_path: Path) -> Cluster:
    """The cluster with an environment that the script has to activate before it finds its Python."""
    (tmp_path / "my venv" / "bin").mkdir(parents=True)
    activate = f'export PATH="{Path(sys.executable).parent}:$PATH"\n'
    (tmp_path / "my venv" / "bin" / "activate").write_text(activate, encoding="utf8")
    variables = {
        "FINETUNE_VENV": str(tmp_path / "my venv"),
        "FINETUNE_ENTRY": str(ROOT / "finetune_lora.py"),
        "FINETUNE_LORA_CACHE": os.environ["FINETUNE_LORA_CACHE"],
    }
    return Cluster(cluster.environment | variables, cluster.submit_folder)


@pytest.fixture
def jobs_folder(ready: Cluster) -> Path:
    """The folder from which jobs are submitted, with what a job finds in the project's."""
    for name in ("compare_methods.py", "run_DistilBert_gpu.SBATCH"):
        path = ready.submit_folder / name
        if not path.exists():  # the cluster and its folder are those of the session
            path.symlink_to(ROOT / name)
    return ready.submit_folder


def answers_of(labels: Any, given: Any, classes: int = 2, tokens: np.ndarray | None = None) -> Answers:
    """The class of each text, and the one that a run gave, as its answers."""
    truth, logits = np.eye(classes, dtype=bool)[labels], 3.0 * np.eye(classes)[given]
    return Answers(np.arange(len(labels)), truth, logits, tokens)


def predictions_of(run: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """What the run stored for its test split, in the order of the rows, and the logits (n, classes)."""
    stored = pd.read_parquet(run / PREDICTIONS)
    stored = stored[stored["split"] == "test"].sort_values("row")
    return stored, np.stack(stored["logits"].tolist())


def random_answers(n: int, classes: int, seed: int, multi_label: bool = False) -> Answers:
    """Answers whose labels are drawn from the probabilities of random logits, so that the probabilities are true."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(n, classes))
    if multi_label:
        truth = generator.random((n, classes)) < 1 / (1 + np.exp(-logits))
        return Answers(np.arange(n), truth, logits, rule=Rule(0.5))
    labels = (logits + generator.gumbel(size=(n, classes))).argmax(1)
    return Answers(np.arange(n), np.eye(classes, dtype=bool)[labels], logits)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, and of the folders in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_disk(*_: object, **__: object) -> None:
    """What takes the place of a function that writes when the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def one_thread() -> Iterator[None]:
    """A single thread for torch, as processes with ``OMP_NUM_THREADS=1`` have it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- studies: runs as they are left on disk

TUNED = """
[[rows]]
name = "a"
tune = { learning_rate = [0.001, 0.002, 0.003] }
"""
DIVERGED = "the loss is not finite at batch 3: lower --learning_rate, or use another --precision"


def plan(rows: str) -> StudyRuns:
    write_study(Path("tiny.toml"), Path("model"), rows)
    return StudyRuns(read_plan(Path("tiny.toml")), Path("runs/tiny"))


def leave_run(runs: StudyRuns, run: PlannedRun, status: str | None = "finished", **more: Any) -> None:
    """A run directory as a run leaves it; ``status`` None is one that was killed."""
    directory = runs.directory(run)
    directory.mkdir(parents=True, exist_ok=True)
    config = from_flags(run.flags(Path("data"))).to_dict()
    write_settings(directory, config, {"command": None, "data": {"train": "of train", "validation": "of validation"}})
    if status is not None:
        command = f"python {Path.cwd()}/finetune_lora.py {' '.join(run.flags(Path('/home/me/data')))} --output_dir x"
        result = {"status": status, "config": config, "command": command, "seconds": 10.0, "task": {}}
        result |= {"environment": MADE_HERE} | more
        (directory / "metrics.csv").write_text("step,train_loss\n1,0.5\n")
        write_result(directory, result)


def scored(runs: StudyRuns, monitor: str, *scores: float | str | None) -> None:
    """Leaves the runs that tune with these scores; a string is the error of a run that failed."""
    for run, score in zip(runs.study.stage("tune"), scores, strict=True):
        if isinstance(score, str):
            leave_run(runs, run, "failed", error=score)
        elif score is not None:
            leave_run(runs, run, "finished", validation={monitor: score, "other": 1 - score})


def changed_run(run: Path, folder: Path, config: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """A copy of a run, in ``folder``, whose result.json and settings say something else."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    result = read_result(run)
    write_result(folder, result | {"config": result["config"] | (config or {})} | changes)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
