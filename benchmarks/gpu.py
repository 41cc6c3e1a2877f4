"""Everything that has to be known of a GPU, part by part: ``python -m benchmarks.gpu``; ``--small`` is for a CPU.

Nothing is needed but the repository: model and texts are made of random numbers. Each part runs in a process of its own
under a time limit. A part that fails, or takes too long, is recorded with its reason, and the others go on.
Writes one JSON file, after each part, and prints one table.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import gpu_parts, gpu_steps, harness
from benchmarks.gpu_parts import METHODS, SMALL, Record, Sizes
from compare_methods import ROOT
from finetuning.errors import UserError, first_line
from finetuning.pages import Table
from finetuning.storage import read_json, write_json

OUTPUT = harness.RESULTS / "gpu.json"
PARTIAL_OUTPUT = ROOT / "runs" / "gpu.json"
SMALL_LIMIT = 60  # seconds, of each part of the small form


@dataclass(frozen=True)
class Part:
    """One part: its name in the record, what is called with folder and sizes, and its time limit."""

    name: str
    call: Callable[[Path, Sizes], Record]
    limit_seconds: float


def plan(sizes: Sizes) -> list[Part]:
    """All parts, in order; of the small form's some are left out that would show nothing new."""
    small = sizes.accelerator == "cpu"
    methods = [name for name in METHODS if not small or name in ("lora", "qlora", "full")]
    runs = [
        Part(f"run {method} {precision}", partial(gpu_parts.one_run, method=method, precision=precision), 180)
        for method in methods
        for precision in sizes.precisions
    ]
    contestants = ("suite_equal_batches", "peft_tuned")
    steps = [
        Part(f"steps {name} {size}", partial(gpu_steps.steps_per_second, name=name, batch_size=size), 120)
        for size in sizes.batch_sizes
        for name in contestants
    ]
    parts = [
        Part("folder", gpu_parts.make_folder, 120),
        Part("environment", gpu_parts.environment, 60),
        Part("tests", gpu_parts.gpu_tests, 900),
        *runs,
        Part("interrupt and resume", gpu_parts.interrupt_and_resume, 300),
        Part("synchronisations", gpu_steps.synchronisations, 120),
        Part("attention", gpu_steps.attention, 180),
        *steps,
        Part("memory", gpu_steps.memory, 240),
        Part("profile", gpu_steps.profile_steps, 120),
    ]
    return [Part(part.name, part.call, SMALL_LIMIT) for part in parts] if small else parts


# --- one part in a process


def run_part(part: Part, folder: Path, sizes: Sizes) -> Record:
    """What the part gives, or ``{"error": its reason in one line}``.

    A forked process needs this one not to have used torch: its threads do not come along.
    """
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    context: Any = multiprocessing.get_context(sizes.start)
    process = context.Process(target=_answer, args=(part, folder, sizes, answer))
    process.start()
    process.join(part.limit_seconds)
    if process.is_alive():
        with suppress(ProcessLookupError):  # it has not made its group yet
            os.killpg(int(process.pid or 0), signal.SIGKILL)
        process.kill()
        process.join()
        return {"error": f"not done after {part.limit_seconds:g} s"}
    if not answer.exists():
        return {"error": f"the process ended with {process.exitcode}"}
    return read_json(answer)


def _answer(part: Part, folder: Path, sizes: Sizes, answer: Path) -> None:
    """The process of a part: writes its record; what it prints goes to a log in the folder."""
    os.setsid()  # so that its own processes end with it
    os.environ["FINETUNE_LORA_CACHE"] = str(folder / "cache")
    log = folder / "log.txt"
    with log.open("a", encoding="utf8") as file, redirect_stdout(file), redirect_stderr(file):
        print(f"--- {part.name}", flush=True)
        try:
            record = part.call(folder, sizes)
        except BaseException as error:
            traceback.print_exc()
            record = {"error": f"{type(error).__name__}: {first_line(error)}"}
    write_json(answer, record)


# --- the table


def table(result: Record) -> str:
    """Markdown: one row a part, with what it gave in short."""
    parts = result["parts"]
    machine = parts.get("environment", {})
    versions = machine.get("versions", {})
    head = f"{machine.get('gpu') or machine.get('cpu', 'unknown machine')}; torch {versions.get('torch', 'unknown')}"
    rows = [(name, f"{record['seconds']:.1f}", in_short(record)) for name, record in parts.items()]
    return f"{head}.\n\n{Table(('part', 'seconds', 'result'), rows).markdown()}"


def in_short(record: Record) -> str:
    """The numbers of a record, in the units that people read."""
    if "error" in record:
        return f"failed: {record['error']}"
    words = []
    for name, value in record.items():
        if isinstance(value, dict) and name == "milliseconds":
            words += [f"{key}: {v:.2f} ms" if isinstance(v, float) else f"{key}: {v}" for key, v in value.items()]
        elif isinstance(value, dict) and name == "peak_bytes":
            words += [f"{key}: {v / 2**20:,.0f} MiB" for key, v in value.items()]
        elif name.endswith("_bytes") and value is not None:
            words.append(f"{name.removesuffix('_bytes')} {value / 2**20:,.0f} MiB")
        elif isinstance(value, float) and name != "seconds":
            words.append(f"{name} {value:,.0f}" if value > 100 else f"{name} {value:.3g}")
        elif isinstance(value, str | int) and name != "watermark":
            words.append(f"{name} {value}")
    return "; ".join(words)


# --- the command


def chosen(parts: list[Part], names: str | None) -> list[Part]:
    """The parts that ``--parts`` asks for, refused if there is none of such a name; model and texts are always made."""
    if names is None:
        return parts
    wanted = tuple(names.split(","))
    for name in wanted:
        if not any(part.name.startswith(name) for part in parts):
            raise UserError(f"--parts {name}: allowed are {', '.join(part.name for part in parts)}")
    return [part for part in parts if part.name == "folder" or part.name.startswith(wanted)]


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Runs all parts and prints the table. Returns the exit status: 0, 1 if a part failed, 2 if a flag is refused."""
    parser = harness.make_parser(
        "All measurements of a GPU, each part under a time limit.",
        small="a toy model on a CPU, to see that all parts work",
    )
    parser.add_argument("--parts", help="only parts whose names begin with one of these, separated by commas")
    parser.add_argument("--output", type=Path, help="the JSON file")
    arguments = parser.parse_args(argv)
    sizes = SMALL if arguments.small else Sizes()
    parts = chosen(plan(sizes), arguments.parts)
    if sizes.start == "fork":
        with suppress(ImportError):  # once for all parts; a part that needs what is missing says so
            importlib.import_module("benchmarks.contestants")
        gc.freeze()  # what was imported stays, so that collections of garbage in the parts need not look at it
    partly = arguments.small or arguments.parts
    output = arguments.output or (PARTIAL_OUTPUT if partly else OUTPUT)
    output.parent.mkdir(parents=True, exist_ok=True)
    result: Record = {"small": arguments.small, "parts": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts:
            print(f"{part.name} (at most {part.limit_seconds:g} s)", file=sys.stderr, flush=True)
            began = time.perf_counter()
            record = run_part(part, Path(temporary), sizes)
            result["parts"][part.name] = {**record, "seconds": time.perf_counter() - began}
            write_json(output, result)
    print(table(result))
    return int(any("error" in record for record in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
