"""Measures how close a training step comes to what the machine's products allow, and what takes the rest.

A step's operations are counted by formula (``flops.py``). The machine's rate is measured with plain products that have
the shapes of the model's frozen linears, weighted by how often a step has them, before and after the steps of the same
run. The least time of a step is its operations divided by this rate. With 8-bit products the frozen linears have the
rate of 8-bit products, and all else the rate of bf16. The share is the least time divided by the time taken. ``make
roofline`` runs it.
"""

import contextlib
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.contestants import Suite
from benchmarks.flops import FORMULAS, Size, products, step_flops
from benchmarks.harness import Record
from benchmarks.peers import place
from benchmarks.workload import RANK, TARGETS, Job, prepared, read_split, some_batches
from finetuning.models.int8 import ROWS_AT_ONCE
from finetuning.models.int8_products import multiply, refused
from finetuning.pages import Table, dated
from finetuning.runs.measurements import environment_record
from finetuning.training.optimization import make_optimizer

PLAN = (
    Job("suite", "minilm", "qv", 256),
    Job("suite", "minilm", "all", 256),
    Job("suite", "minilm", "all", 512),
    Job("suite", "minilm", "all", 16),  # short texts: questions have about as many tokens
    Job("suite", "base", "all", 256),
    Job("suite", "minilm", "all", 256, "int8"),
    Job("suite", "minilm", "all", 512, "int8"),
    Job("suite", "minilm", "all", 16, "int8"),
    Job("suite", "base", "all", 256, "int8"),
)
PROFILED_STEPS = 6
KINDS = {  # kind of operator -> its names in the profiler; the first match counts
    "products": r"aten::(mm|addmm|linear|matmul|_int_mm)|mkldnn::_linear_pointwise",
    "8 bits": r"_FrozenInt8(Backward)?",
    "attention": r"(_?(Chunked)?Attention|Mixture|JoinHeads)(Backward)?"
    r"|aten::(bmm|baddbmm|_?softmax.*|_scaled_dot_product.*)",
    "activation": r"(_Gelu|_Gated)(Backward)?|aten::(gelu|relu|tanh|threshold|silu).*",
    "norms": r"AddNorm(Backward)?|aten::(native_)?layer_norm.*",
    "clipping and optimizer": r"Optimizer\..*|aten::(_fused_.*|_foreach_.*|linalg_vector_norm)",
    "elementwise and copies": r"aten::(add|sub|mul|div|neg|copy|fill|zero|cat|_?to_copy|to|clone|constant_pad_nd|pad"
    r"|contiguous|block_diag|slice_backward|select_backward|empty.*|zeros.*|ones.*|index.*|embedding|sum|stack|new_.*)_?",
}


# --- rates


def product_rate(size: Size, batch: int, length: int, dtype: torch.dtype, seconds_per_shape: float) -> float:
    """Operations per second of the frozen linears of one step, forward and backward, one after the other and alone."""
    flops = seconds = 0.0
    for product, count in Counter(products(size, batch, length)).items():
        weight = _random(product.outputs, product.inputs, dtype)
        pairs = [(_random(product.rows, product.inputs, dtype), weight.t())]
        if product.input_gradient:
            pairs.append((_random(product.rows, product.outputs, dtype), weight))
        flops += count * product.base_flops
        seconds += count * sum(_seconds(partial(_multiply, x, w), seconds_per_shape) for x, w in pairs)
    return flops / seconds


def _random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, columns)
    return (20 * x).to(dtype) if dtype == torch.int8 else x.to(dtype)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> None:
    """The product; 8-bit ones in blocks of rows whose sums stay in the cache, which is fastest."""
    if x.dtype != torch.int8:
        x @ weight
        return
    sums = torch.empty(min(ROWS_AT_ONCE, len(x)), weight.shape[1], dtype=torch.int32)
    for start in range(0, len(x), ROWS_AT_ONCE):
        multiply(x[start : start + ROWS_AT_ONCE], weight, sums)


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


# --- one work


def measure(job: Job, folder: Path, steps: int, seconds_per_shape: float = 0.3) -> Record:
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
    dense = suite.hardware.precision
    dtypes = {dense: suite.hardware.dtype} | ({"int8": torch.int8} if suite.hardware.int8 else {})
    rates = {name: [product_rate(size, *median, dtype, seconds_per_shape)] for name, dtype in dtypes.items()}
    timed = suite.train(split, many)
    for name, dtype in dtypes.items():
        rates[name].append(product_rate(size, *median, dtype, seconds_per_shape))
    flops: Counter[str] = sum((step_flops(size, *shape) for shape in shapes), Counter())
    mean = {name: statistics.mean(found) for name, found in rates.items()}
    linears = flops["linears"] / mean.get("int8", mean[dense])
    return {
        "model": job.model,
        "targets": job.targets,
        "max_length": job.max_length,
        "dtype": "int8" if suite.hardware.int8 else dense,
        "steps": len(timed.ends),
        "seconds": timed.seconds,
        "median_batch": median,
        "flops": dict(flops),
        "flops_per_second": flops.total() / timed.seconds,
        "product_rates_before_and_after": rates,
        "share": (linears + (flops.total() - flops["linears"]) / mean[dense]) / timed.seconds,
        "time_shares": time_shares(suite, list(suite.loader(split, few))),
    }


def time_shares(suite: Suite, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Share of a step's time by kind of operator, from torch's profiler; ``other`` includes Python."""
    parameters = {name: p for name, p in suite.model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(parameters, suite.config.training, fused=True)
    suite.model.train()

    def step(batch: dict[str, torch.Tensor]) -> None:
        logits = suite.classifier(batch["input_ids"], batch["attention_mask"])
        (cross_entropy(logits, batch["labels"], reduction="sum") * batch["loss_weight"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), suite.config.training.gradient_clip)
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


# --- the table


def table(result: Record) -> str:
    """Markdown: one row for each work, and how operations are counted."""
    kinds = [name.replace("clipping and ", "").replace(" and copies", "") for name in KINDS]
    columns = ("model, LoRA on, tokens", "dtype", "products, G/s", "step, G/s", "share", *kinds, "other")
    rows = []
    for row in result["measurements"]:
        rate = statistics.mean(row["product_rates_before_and_after"][row["dtype"]])
        rows.append(
            (
                place(row["model"], row["targets"], row["max_length"]),
                row["dtype"],
                f"{rate / 1e9:,.0f}",
                f"{row['flops_per_second'] / 1e9:,.0f}",
                f"{row['share']:.0%}",
                *(f"{100 * row['time_shares'][kind]:.0f}" for kind in (*KINDS, "other")),
            )
        )
    letters = "n rows of a product, R ranks of all LoRA matrices together, B texts of T tokens, width D, H heads"
    parts = (
        f"{harness.machine(result['environment'])}. G/s: 10^9 operations per second."
        " After the share: where the time goes, in %.",
        dated(Table(columns, rows), [result["environment"]]),
        f"Operations of a step ({letters}):",
        Table(("part", "operations"), list(FORMULAS.items())).markdown(),
    )
    return "\n\n".join(parts)


# --- the command


@harness.as_main
def main(argv: Sequence[str] | None) -> int:
    """Measures, prints the table, writes JSON and renews docs/speed.md. Returns the exit status."""
    description = "Measure how close a step comes to what the CPU's products allow."
    arguments = harness.make_parser(description, quick="one work and few steps; changes no page").parse_args(argv)
    works = PLAN[1:2] if arguments.quick else [job for job in PLAN if job.precision != "int8" or refused() is None]
    conditions = {"environment": environment_record(), "formulas": FORMULAS}
    journal = harness.start_journal("roofline", arguments, conditions, show=record_line)
    models, lengths = {job.model for job in works}, {job.max_length for job in works}
    with contextlib.redirect_stdout(sys.stderr), prepared(models, lengths) as folder:
        for job in works[len(journal.records) :]:
            journal.keep(measure(job, folder, steps=8 if arguments.quick else 24))
    harness.publish("roofline", journal, table, partly=arguments.quick)
    return 0


def record_line(row: Record) -> str:
    """A measurement in one line of output."""
    return f"{row['model']} {row['targets']} {row['max_length']} {row['dtype']}: {row['share']:.0%}"


if __name__ == "__main__":
    sys.exit(main())
