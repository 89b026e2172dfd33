"""What the engine's ``auto`` settings become on this machine, each with the reason that is shown.

Speed is measured where no name tells it: a few products of matrices at the start of a run, a fraction of a second. A
choice changes the last bits of a run. So checkpoints carry the choices, and a resumed run takes theirs; and what was
measured is kept in the cache, so that the same run makes the same choices when it is started again on the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkit.commands.doctor import compiler, cpu_name
from llmkit.engine.device import device_name, set_threads
from llmkit.engine.files import write_atomic
from llmkit.models.attention import WRITTEN_OUT_LIMIT, attend_written_out, use_written_out
from llmkit.settings import EngineConfig

Choice = tuple[Any, str]  # a value and its reason

CHOICES = ("precision", "fp32_matmul", "attention", "compile")
WORTH_A_TYPE = 1.3  # how much faster bf16 has to be, for its rounding
WORTH_A_KERNEL = 1.1  # and another kernel, for the noise of the measurement
LARGEST_ERROR = 2e-6  # of fp32 products, relative: twice that of sums in fp32
SHORT_RUN_FLOPS = 1e13  # some minutes of a laptop: kernels are not worth a measurement, nor two runs that differ
NOT_MEASURED = "the run is too short for a measurement to pay"
COMPILE_MINUTES = {"cpu": 30.0, "cuda": 5.0}  # how long a run has to be to repay torch.compile's minute
SHARE_OF_PEAK = 0.5  # of the speed of large products that training is taken to reach
ROWS, INNER, OUTER = 512, 512, 1024  # of the products that are timed
ROUNDS = 5
TIMED_SCORES = 2**20  # attention scores of the shape that is timed
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger("llmkit.engine")


@dataclass(frozen=True)
class Workload:
    """What a run computes, as far as the choices depend on it."""

    flops: float  # of the whole run on one process, forward and backward
    attention: tuple[int, int, int] | None  # heads, tokens of a row, width of a head; None: no such layer
    can_compile: bool


def settle(
    engine: EngineConfig, device: torch.device, workload: Workload, *, state: Mapping[str, Any], cache: Path
) -> EngineConfig:
    """``engine`` without ``auto``: as configured, as the checkpoint's ``state`` has it, or measured, now or before."""
    set_threads(engine.n_threads)
    saved = state.get("choices", {})
    for name in CHOICES:
        if getattr(engine, name) != "auto":
            continue
        if name in saved:
            value, reason = saved[name], "as the run began"
        else:
            value, reason = _CHOOSE[name](engine, device, workload, cache / "measured")
        log.info("engine.%s=%s: %s", name, str(value).lower(), reason)
        engine = replace(engine, **{name: value})
    return engine


def apply(engine: EngineConfig, model: Any) -> None:
    """Set the process and the model to a settled ``engine``."""
    torch.set_float32_matmul_precision(engine.fp32_matmul)
    use_written_out(engine.attention == "matmul")
    if engine.memory == "low":
        model.set_activation_checkpointing(True)
    if engine.compile:
        model.compile_blocks()


def attention_shape(config: Any, seq_len: int) -> tuple[int, int, int] | None:
    """Heads, tokens and width of a head of a model's self-attention; None for models without, or of other libraries."""
    heads, width = getattr(config, "n_heads", None), getattr(config, "head_width", None)
    return None if heads is None or width is None else (heads, seq_len, width)


def race(candidates: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a busy moment meets all of them; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, work in candidates.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def remembered(measure: Callable[[], float], folder: Path, device: torch.device, *facts: object) -> float:
    """What was measured of ``facts`` on this machine, with this torch and these threads; else it is measured now."""
    machine = cpu_name() if device.type == "cpu" else device_name(device)
    key = json.dumps([machine, torch.__version__, torch.get_num_threads(), *facts])
    file = folder / f"{facts[0]}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return float(json.loads(file.read_text()))
    found = round(measure(), 3)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start a measurement
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(found).encode())
    return found


def choose_precision(engine: EngineConfig, device: torch.device, workload: Workload, folder: Path) -> Choice:
    """bf16 where the device computes in it: units of a GPU by torch's word, of a CPU by the clock."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU has units for it"
        return "fp32", "the GPU has no units for bf16"
    if device.type != "cpu":
        return "fp32", f"bf16 is not measured on {device.type}"

    def measure() -> float:
        seconds = race({name: _product(TYPES[name]) for name in ("fp32", "bf16")}, rounds=3)
        return seconds["fp32"] / seconds["bf16"]

    gain = remembered(measure, folder, device, "precision")
    if gain >= WORTH_A_TYPE:
        return "bf16", f"its products are {gain:.1f} times as fast as those of fp32 here"
    return "fp32", f"products in bf16 run at {gain:.2f} of its speed here"


def choose_fp32_matmul(engine: EngineConfig, device: torch.device, workload: Workload, folder: Path) -> Choice:
    """``medium`` makes a CPU take oneDNN in place of MKL: where that is faster and as exact."""
    if device.type != "cpu":
        return "highest", "others round the inputs on this device"
    if engine.precision != "fp32":
        return "highest", f"products run in {engine.precision}"
    if workload.flops < SHORT_RUN_FLOPS:
        return "highest", NOT_MEASURED
    with_setting = {name: _under(name, _product(torch.float32)) for name in ("highest", "medium")}
    error = _relative_error(with_setting["medium"]())
    if error > LARGEST_ERROR:
        return "highest", f"medium is off by {error:.0e} here"

    def measure() -> float:
        seconds = race(with_setting)
        return seconds["highest"] / seconds["medium"]

    gain = remembered(measure, folder, device, "fp32_matmul")
    if gain >= WORTH_A_KERNEL:
        return "medium", f"{gain:.2f} times as fast here, with an error of {error:.0e}"
    return "highest", f"medium runs at {gain:.2f} of its speed here"


def choose_attention(engine: EngineConfig, device: torch.device, workload: Workload, folder: Path) -> Choice:
    """Two products and a softmax, or torch's fused kernel: on a CPU whichever is faster forward and backward."""
    if device.type != "cpu" or workload.attention is None:
        return "sdpa", "torch's kernels"
    if workload.flops < SHORT_RUN_FLOPS:
        return "sdpa", NOT_MEASURED
    shape, dtype = workload.attention, TYPES[engine.precision]
    tokens = shape[1]
    if tokens**2 > WRITTEN_OUT_LIMIT:
        return "sdpa", f"the scores of {tokens} tokens would take too much memory"
    facts = ("attention", *shape, engine.precision, engine.fp32_matmul)
    gain = remembered(lambda: _attention_gain(shape, dtype), folder, device, *facts)
    if gain >= WORTH_A_KERNEL:
        return "matmul", f"{gain:.2f} times as fast for {tokens} tokens here"
    return "sdpa", f"two products would run at {gain:.2f} of its speed for {tokens} tokens here"


def choose_compile(engine: EngineConfig, device: torch.device, workload: Workload, folder: Path) -> Choice:
    """Compiling takes about a minute, which only a long run repays."""
    worth = COMPILE_MINUTES.get(device.type)
    if worth is None or not workload.can_compile:
        return False, "this model or device is not compiled unless told"
    if device.type == "cpu" and not compiler():
        return False, "there is no C++ compiler"

    def measure() -> float:
        seconds = race({"product": _product(TYPES[engine.precision], device)})["product"]
        return 2 * ROWS * INNER * OUTER / seconds / 1e9

    gflops = remembered(measure, folder, device, "gflops", engine.precision)
    minutes = workload.flops / (SHARE_OF_PEAK * gflops * 1e9) / 60
    about = f"the run takes about {minutes:,.0f} minutes" if minutes >= 1 else "the run takes less than a minute"
    return minutes >= worth, f"{about}, and it pays from {worth:.0f} on"


def _attention_gain(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """How many times as fast two products are as torch's kernel, forward and backward, on a few rows."""
    heads, tokens, width = shape
    rows = max(1, TIMED_SCORES // (heads * tokens**2))
    q, k, v = (torch.randn(rows, heads, tokens, width, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(rows, heads, tokens, width, dtype=dtype)
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def timed(kernel: Callable[..., Tensor], **more: Any) -> Callable[[], object]:
        return lambda: torch.autograd.grad(kernel(q, k, v, **more), (q, k, v), grad)

    sdpa = timed(F.scaled_dot_product_attention, is_causal=True)
    seconds = race({"sdpa": sdpa, "matmul": timed(attend_written_out, mask=seen)})
    return seconds["sdpa"] / seconds["matmul"]


def _product(dtype: torch.dtype, device: torch.device | str = "cpu") -> Callable[[], Tensor]:
    """A product of matrices, always of the same numbers."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(ROWS, INNER, generator=generator).to(device, dtype)
    b = torch.randn(OUTER, INNER, generator=generator).to(device, dtype)

    def work() -> Tensor:
        result = F.linear(a, b)
        if result.is_cuda:
            torch.cuda.synchronize()
        return result

    return work


def _under(setting: str, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``work`` with torch's setting for fp32 products, which is put back afterwards."""

    def timed() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(setting)
        try:
            return work()
        finally:
            torch.set_float32_matmul_precision(before)

    return timed


def _relative_error(product: Tensor) -> float:
    """Of ``_product`` in fp32, against fp64."""
    exact = _product(torch.float64)()
    return float((product.double() - exact).norm() / exact.norm())


_CHOOSE: dict[str, Callable[[EngineConfig, torch.device, Workload, Path], Choice]] = {
    "precision": choose_precision,
    "fp32_matmul": choose_fp32_matmul,
    "attention": choose_attention,
    "compile": choose_compile,
}
