"""The one place that talks to Accelerate about devices, precision and processes.

Accelerate takes settings from environment variables and from a user's config file whenever an argument is left out.
llmkit passes every value, so that the recipe is the only source.
"""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from llmkit.errors import DistributedError, SetupError
from llmkit.settings import EngineConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

# Of mallopt(3): no block is mapped on its own, nothing is trimmed, and the heap grows by 64 MiB.
KEEP_MEMORY = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))
AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then Apple's MPS, then the CPU; any other name must exist on this machine."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SetupError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}",
            where="engine.device",
            fix="engine.device=cpu works everywhere; `llmkit doctor` lists what this machine has",
        ) from error
    return device


def device_name(device: torch.device) -> str:
    """The name under which a GPU's peak is known; plain ``cpu`` or ``mps`` otherwise."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step; True where that could be done.

    It gives blocks above 32 MiB back to the system at once, which then clears them for every step anew: a large share
    of the time of short steps on a CPU. The process stays as large as it once was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in KEEP_MEMORY)


def set_threads(n_threads: int | None) -> None:
    """Intra-op threads of torch; None leaves torch's own choice."""
    if n_threads is not None:
        torch.set_num_threads(n_threads)


def make_accelerator(engine: EngineConfig) -> Accelerator:
    """An Accelerator whose world is the one the launcher promised; of ``engine`` nothing is ``auto`` any more.

    Errors: ``SetupError``, ``DistributedError``.
    """
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
    )

    device = pick_device(engine.device)
    if device.type == "cpu" and engine.memory == "fast":
        keep_freed_memory()
    if engine.precision == "fp16" and device.type == "cpu":
        raise SetupError("fp16 has no gain and no loss scaling on a CPU", where="engine.precision", fix="use bf16")
    set_threads(engine.n_threads)
    # Left alone, Accelerate makes every worker of a CPU launch a process of its own.
    os.environ["ACCELERATE_USE_CPU"] = "true" if device.type == "cpu" else "false"
    # The variable would override the argument below.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "1"
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(engine.precision, engine.precision),
        cpu=device.type == "cpu",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=engine.timeout_minutes)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        dynamo_backend="no",
    )
    promised = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != promised:
        raise DistributedError(
            f"the launcher started {promised} processes, but this one sees {accelerator.num_processes}",
            fix="start with `torchrun --nproc-per-node N -m llmkit ...`",
        )
    return accelerator


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a command that does not train computes."""
    return torch.autocast(device.type, AUTOCAST_DTYPE.get(precision), enabled=precision != "fp32")
