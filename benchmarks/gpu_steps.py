"""The parts of ``benchmarks.gpu`` that measure steps: speed, memory, waits for the device, attention, a profile."""

import gc
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import Sizes
from benchmarks.harness import Record

WARM_UP_STEPS = 3


def _contestant(folder: Path, sizes: Sizes, name: str, batch_size: int) -> tuple[Any, Any, list[Any]]:
    """A contestant, the training texts, and the batches that the Trainer would make of them."""
    from benchmarks.contestants import CONTESTANTS
    from benchmarks.workload import Job, read_split, some_batches
    from finetuning.training.hardware import prepare_process, resolve_hardware

    job = Job(
        name, model="model", targets="all", max_length=sizes.max_length, batch_size=batch_size,
        accelerator=sizes.accelerator, frozen="bf16", precision="auto" if sizes.accelerator == "gpu" else "fp32",
    )  # fmt: skip
    split = read_split(folder, "train", sizes.max_length)
    prepare_process(resolve_hardware(job.config.hardware))  # the same for the peer, which alone would not do it
    peer = CONTESTANTS["peft_tuned"](replace(job, contestant="peft_tuned"), folder)
    batches = some_batches(peer.batches(split), split.lengths, sizes.steps)
    batches = (batches * sizes.steps)[: sizes.steps]  # of large batches there are fewer than steps
    if name == "peft_tuned":
        return peer, split, batches
    del peer  # its model would count as memory of the other; it holds itself, so only the collector frees it
    gc.collect()
    return CONTESTANTS[name](job, folder), split, batches


def steps_per_second(folder: Path, sizes: Sizes, name: str, batch_size: int) -> Record:
    """Real tokens a second of training steps, and the most memory they take; the same batches for everybody."""
    from finetuning.runs.measurements import forget_peak, peak_memory

    on_gpu = sizes.accelerator == "gpu"
    contestant, split, batches = _contestant(folder, sizes, name, batch_size)
    forget_peak(on_gpu)
    measured = contestant.train(split, [*batches[:WARM_UP_STEPS], *batches], skipped=WARM_UP_STEPS)
    warm_up, tokens = (sum(int(split.lengths[b].sum()) for b in of) for of in (batches[:WARM_UP_STEPS], batches))
    return {
        "steps": len(measured.ends),
        "train_tokens_per_second": tokens / measured.seconds,
        "padding_fraction": 1 - (warm_up + tokens) / measured.padded_tokens,
        "peak_bytes": peak_memory(on_gpu)["peak_bytes"],
    }


def memory(folder: Path, sizes: Sizes) -> Record:
    """Most memory of training steps by texts in a batch, for this suite's LoRA and QLoRA."""
    from finetuning.runs.measurements import forget_peak, peak_memory

    record, on_gpu = {}, sizes.accelerator == "gpu"
    for name in ("suite_equal_batches", "suite_qlora_equal_batches"):
        for batch_size in sizes.batch_sizes:
            contestant, split, batches = _contestant(folder, sizes, name, batch_size)
            forget_peak(on_gpu)
            contestant.train(split, batches[:WARM_UP_STEPS])
            record[f"{name}, {batch_size} texts"] = peak_memory(on_gpu)["peak_bytes"]
            del contestant
            gc.collect()
    return {"peak_bytes": record}


def synchronisations(folder: Path, sizes: Sizes) -> Record:
    """How often a training step waits for the GPU, and where; ``None`` on a CPU."""
    import torch

    contestant, split, batches = _contestant(folder, sizes, "suite_equal_batches", sizes.batch_sizes[-1])
    contestant.train(split, batches[:WARM_UP_STEPS])
    on_gpu = sizes.accelerator == "gpu"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            contestant.train(split, batches)
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return {
        "per_step": places.total() / len(batches) if on_gpu else None,
        "places": dict(places.most_common(10)),
        "steps": len(batches),
    }


def attention(_: Path, sizes: Sizes) -> Record:
    """Milliseconds of attention, forward and backward, by length: without a mask and with one, by torch's kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
    from torch.utils.benchmark import Timer

    device = "cuda" if sizes.accelerator == "gpu" else "cpu"
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    kernels |= {"cudnn": SDPBackend.CUDNN_ATTENTION} if sizes.accelerator == "gpu" else {}
    record: Record = {}
    for length in sizes.lengths:
        shape = (max(1, sizes.tokens // length), sizes.heads, length, sizes.width // sizes.heads)
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        gradient = torch.randn(shape, device=device, dtype=torch.bfloat16)
        bias = torch.zeros(shape[0], 1, 1, length, device=device, dtype=torch.bfloat16).expand(*shape[:3], length)
        for name, kernel in kernels.items():
            for masked in (None, bias):

                def call(mask: Any = masked, q: Any = q, k: Any = k, v: Any = v, gradient: Any = gradient) -> None:
                    torch.autograd.grad(scaled_dot_product_attention(q, k, v, mask), (q, k, v), gradient)

                key = f"{length} tokens, {name}, {'without a' if masked is None else 'with a'} mask"
                try:
                    with sdpa_kernel(kernel):
                        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
                        record[key] = 1000 * timer.timeit(sizes.steps).mean
                except RuntimeError as error:  # a kernel that does not take this
                    record[key] = str(error).splitlines()[0][:80]
    return {"milliseconds": record}


def profile_steps(folder: Path, sizes: Sizes) -> Record:
    """Ten steps under torch's profiler: what takes the most time, and the share of the time that the GPU works."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    contestant, split, batches = _contestant(folder, sizes, "suite_equal_batches", sizes.batch_sizes[-1])
    contestant.train(split, batches[:WARM_UP_STEPS])
    on_gpu = sizes.accelerator == "gpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        measured = contestant.train(split, batches[:10])
        if on_gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    kernels = [event for event in events if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(event, name) for event in kernels)
    return {
        "steps": len(measured.ends),
        "seconds": measured.seconds,
        "device_share": total / 1e6 / measured.seconds if on_gpu else None,
        "milliseconds": {event.key[:80]: getattr(event, name) / 1e3 for event in kernels[:20]},
        "launches_per_step": sum(event.count for event in kernels) / len(measured.ends) if on_gpu else None,
    }
