"""Measures which share of the machine's rate of bf16 products a training step reaches, and what takes the rest.

A step's rate is its operations, counted by formula (``flops.py``), divided by its wall-clock time. The machine's rate
is measured with plain bf16 products that have the shapes of the model's frozen linears, weighted by how often a step
has them, before and after the steps of the same run. The share is the first rate divided by the second. ``make
roofline`` runs it.
"""

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import Suite
from benchmarks.flops import FORMULAS, Size, products, step_flops
from benchmarks.peers import PLACES
from benchmarks.workload import MODELS, RANK, TARGETS, Job, prepare, read_split, some_batches
from finetuning.errors import UserError
from finetuning.flags import OneLineParser, parse_bool
from finetuning.pages import ROOT, SPEED, renew_tables
from finetuning.runs.measurements import environment_record
from finetuning.storage import write_json
from finetuning.training.optimization import make_optimizer

OUTPUT = Path(__file__).resolve().parent / "results" / "roofline.json"
PARTIAL_OUTPUT = ROOT / "runs" / "roofline.json"
PLAN = (("minilm", "qv", 256), ("minilm", "all", 256), ("minilm", "all", 512), ("base", "all", 256))
PROFILED_STEPS = 6
KINDS = {  # kind of operator -> its names in the profiler; the first match counts
    "products": r"aten::(mm|addmm|linear|matmul)|mkldnn::_linear_pointwise",
    "attention": r"(_?(Chunked)?Attention|Mixture)(Backward)?"
    r"|aten::(bmm|baddbmm|_?softmax.*|_scaled_dot_product.*)",
    "activation": r"_Gelu(Backward)?|aten::(gelu|relu|tanh|threshold|silu).*",
    "norms": r"AddNorm(Backward)?|aten::(native_)?layer_norm.*",
    "clipping and optimizer": r"Optimizer\..*|aten::(_fused_.*|_foreach_.*|linalg_vector_norm)",
    "elementwise and copies": r"aten::(add|sub|mul|div|neg|copy|fill|zero|cat|_?to_copy|to|clone|constant_pad_nd|pad"
    r"|contiguous|block_diag|slice_backward|select_backward|empty.*|zeros.*|ones.*|index.*|embedding|sum|stack|new_.*)_?",
}


# ---------------------------------------------------------------------------------------------------------------------
# rates


def product_rate(size: Size, batch: int, length: int, dtype: torch.dtype, seconds_per_shape: float) -> float:
    """FLOP/s of the frozen linears of one step, forward and backward, done one after the other and alone."""
    flops = seconds = 0.0
    for product, count in Counter(products(size, batch, length)).items():
        x = torch.randn(product.rows, product.inputs).to(dtype)
        weight = torch.randn(product.outputs, product.inputs).to(dtype)
        taken = _seconds(lambda x=x, w=weight: x @ w.t(), seconds_per_shape)  # type: ignore[misc]
        if product.input_gradient:
            gradient = torch.randn(product.rows, product.outputs).to(dtype)
            taken += _seconds(lambda g=gradient, w=weight: g @ w, seconds_per_shape)  # type: ignore[misc]
        flops += count * product.base_flops
        seconds += count * taken
    return flops / seconds


def _seconds(call: Callable[[], Any], limit: float) -> float:
    """The median time of a call, repeated for ``limit`` seconds. Two calls before that do not count."""
    call()
    call()
    times: list[float] = []
    end = time.perf_counter() + limit
    while (began := time.perf_counter()) < end or len(times) < 3:
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---------------------------------------------------------------------------------------------------------------------
# one work


def measure(job: Job, folder: Path, steps: int, seconds_per_shape: float = 0.3) -> dict[str, Any]:
    """Rates and time shares of the suite at one work; the steps are done by its own trainer.

    Args:
        job: model, LoRA targets and length.
        folder: from ``workload.prepare``.
        steps: number of measured steps, after six for warm-up.
        seconds_per_shape: how long each product is repeated to find its rate.
    """
    split = read_split(folder, "train", job.max_length)
    suite = Suite(job, folder)
    size = Size.from_config(suite.classifier.model.config, RANK, TARGETS[job.targets])
    few, many = (some_batches(suite.batches(split), split.lengths, n) for n in (PROFILED_STEPS, steps))
    suite.train(split, few)
    shapes = [(len(batch), int(split.lengths[batch].max())) for batch in many]  # (B, T)
    median = sorted(shapes, key=lambda shape: shape[0] * shape[1])[len(shapes) // 2]
    rates = [product_rate(size, *median, suite.hardware.dtype, seconds_per_shape)]
    measured = suite.train(split, many)
    rates.append(product_rate(size, *median, suite.hardware.dtype, seconds_per_shape))
    flops: Counter[str] = sum((step_flops(size, *shape) for shape in shapes), Counter())
    per_second, rate = flops.total() / measured.seconds, statistics.mean(rates)
    return {
        "model": job.model,
        "targets": job.targets,
        "max_length": job.max_length,
        "dtype": str(suite.hardware.dtype).removeprefix("torch."),
        "steps": len(measured.ends),
        "seconds": measured.seconds,
        "median_batch": median,
        "flops": dict(flops),
        "flops_per_second": per_second,
        "product_rates_before_and_after": rates,
        "share": per_second / rate,
        "time_shares": time_shares(suite, list(suite.loader(split, few))),
    }


def time_shares(suite: Suite, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Share of a step's time by kind of operator, from torch's profiler; ``other`` includes Python."""
    parameters = [p for p in suite.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, suite.config.training, fused=True)
    suite.model.train()

    def step(batch: dict[str, torch.Tensor]) -> None:
        logits = suite.classifier(batch["input_ids"], batch["attention_mask"])
        (cross_entropy(logits, batch["labels"], reduction="sum") * batch["loss_weight"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, suite.config.training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for batch in batches:
            step(batch)
        seconds = time.perf_counter() - began
    taken: Counter[str] = Counter()
    for event in profiler.key_averages():
        taken[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    shares = {kind: taken[kind] / seconds for kind in KINDS}
    return shares | {"other": 1 - sum(shares.values())}


def kind_of(operator: str) -> str:
    """A key of ``KINDS``, or ``other``."""
    return next((kind for kind, names in KINDS.items() if re.fullmatch(names, operator)), "other")


# ---------------------------------------------------------------------------------------------------------------------
# the table


def table(result: dict[str, Any]) -> str:
    """Markdown: one row for each work, and how operations are counted."""
    environment = result["environment"]
    kinds = [name.replace("clipping and ", "").replace(" and copies", "") for name in KINDS]
    columns = ["model, LoRA on, max_length", "products, GFLOP/s", "step, GFLOP/s", "share", *kinds, "other"]
    lines = [
        f"{environment['cpu']}, {environment['threads']} threads. After the share: where the time goes, in %.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in result["rows"]:
        rate = statistics.mean(row["product_rates_before_and_after"])
        cells = [
            f"{MODELS[row['model']]}, {PLACES[row['targets']]}, {row['max_length']}",
            f"{rate / 1e9:,.0f}",
            f"{row['flops_per_second'] / 1e9:,.0f}",
            f"{row['share']:.0%}",
            *(f"{100 * row['time_shares'][kind]:.0f}" for kind in (*KINDS, "other")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    letters = "n rows of a product, R ranks of all LoRA matrices together, B texts of T tokens, width D, H heads"
    counted = [f"| {part} | {formula} |" for part, formula in FORMULAS.items()]
    return "\n".join(
        [*lines, "", f"Operations of a step ({letters}):", "", "| part | operations |", "|---|---|", *counted]
    )


# ---------------------------------------------------------------------------------------------------------------------
# the command


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = OneLineParser(
        description="Measure which share of the CPU's rate of bf16 products a step reaches.", allow_abbrev=False
    )
    flag: dict[str, Any] = {"type": parse_bool, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
    parser.add_argument("--quick", help="one work and few steps; changes no page", **flag)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes JSON and renews docs/speed.md. Returns the exit status."""
    try:
        arguments = make_parser().parse_args(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    works = PLAN[1:2] if arguments.quick else PLAN
    result: dict[str, Any] = {"environment": environment_record(), "formulas": FORMULAS, "rows": []}
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder = Path(temporary)
        prepare(folder, {model for model, *_ in works}, {max_length for *_, max_length in works})
        for model, targets, max_length in works:
            job = Job("suite", model=model, targets=targets, max_length=max_length)  # type: ignore[arg-type]
            result["rows"].append(measure(job, folder, steps=8 if arguments.quick else 24))
    print(table(result))
    output = PARTIAL_OUTPUT if arguments.quick else OUTPUT
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, result)
    if not arguments.quick:
        renew_tables(SPEED, {"roofline": table(result)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
