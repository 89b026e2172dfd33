"""Speed and memory: how fast a run is, against what its hardware could do. Pure but for the two memory readings."""

from __future__ import annotations

import re
import sys
from pathlib import Path

GIB = 2**30

# Dense peaks in TFLOP/s, as (pattern of torch's device name, bf16, fp16, fp32). The first pattern that fits counts.
# 16-bit: tensor cores with fp32 accumulation, without sparsity. fp32: plain units, no TF32. 0: the device has no such
# units. Source: the makers' data sheets and architecture papers (NVIDIA: A100 2020, Ampere GA102 v2, Ada v2.02,
# H100 v1.03, L4, L40S, T4, V100, H20, H200, Blackwell; AMD: Instinct MI200 and MI300 series; AWS: A10G). Boards that
# come in several builds are told apart by their names.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"\bMIG\b|Laptop|Mobile|Max-Q", 0, 0, 0),  # a share of a GPU, or one with a power limit of its own
    (r"\bGB200\b", 2500, 2500, 80),
    (r"\bB200\b", 2250, 2250, 75),
    (r"\bH200 NVL\b", 835.5, 835.5, 60),
    (r"\bG?H200\b", 989.4, 989.4, 66.9),
    (r"\bH20\b", 148, 148, 44),
    (r"\bH100 NVL\b", 835.5, 835.5, 60),
    (r"\bH100 PCIe\b", 756, 756, 51),
    (r"\bH[18]00\b", 989.4, 989.4, 66.9),
    (r"\bA[18]00\b", 312, 312, 19.5),
    (r"\bA40\b", 149.7, 149.7, 37.4),
    (r"\bA30\b", 165, 165, 10.3),
    (r"\bA10G\b", 70, 70, 35),
    (r"\bA10\b", 125, 125, 31.2),
    (r"\bL40S\b", 362, 362, 91.6),
    (r"\bL40\b", 181, 181, 90.5),
    (r"\bL4\b", 121, 121, 30.3),
    (r"\bT4\b", 0, 65, 8.1),
    (r"\bV100-PCIE", 0, 112, 14),
    (r"\bV100-SXM", 0, 125, 15.7),
    (r"\bRTX 6000 Ada\b", 364.2, 364.2, 91.1),
    (r"\bRTX A6000\b", 154.8, 154.8, 38.7),
    (r"\bRTX 5090(?! \w)", 209.5, 209.5, 104.8),
    (r"\bRTX 4090(?! \w)", 165.2, 165.2, 82.6),
    (r"\bRTX 4080(?! \w)", 97.5, 97.5, 48.7),
    (r"\bRTX 3090(?! \w)", 71, 71, 35.6),
    (r"\bMI3[02][05]X\b", 1307.4, 1307.4, 163.4),
    (r"\bMI250X\b", 191.5, 191.5, 23.9),  # torch sees each of its two dies as a device
    (r"\bMI210\b", 181, 181, 22.6),
)


def tokens_per_second(n_tokens: int, seconds: float) -> float:
    """Tokens of all devices per second of wall time; 0 when no time has passed."""
    return n_tokens / seconds if seconds > 0 else 0.0


def mfu(flops_per_token: float, tokens_per_second: float, peak_flops: float, n_devices: int) -> float:
    """Model FLOPs utilisation, a fraction: FLOP/s that the model needs, over the devices' dense peak.

    ``flops_per_token`` counts forward and backward without recomputation; ``peak_flops`` is one device's, in FLOP/s.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    return flops_per_token * tokens_per_second / (peak_flops * n_devices)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device in FLOP/s by torch's name for it; None when not known, as for any CPU.

    ``precision`` is ``fp32``, ``bf16`` or ``fp16``.
    """
    for pattern, bf16, fp16, fp32 in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return {"bf16": bf16, "fp16": fp16, "fp32": fp32}[precision] * 1e12 or None
    return None


def peak_memory_gib(device_type: str) -> float:
    """Most memory in use so far, in GiB: of torch's allocator on CUDA, of the whole process elsewhere."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated()) / GIB
    return process_peak_bytes() / GIB


def process_peak_bytes() -> int:
    """Most physical memory that this process has held."""
    try:  # Linux: the reading of getrusage starts from the size of the process that started this one
        return peak_bytes_of_status(Path("/proc/self/status").read_text())
    except (OSError, ValueError):
        import resource

        return peak_bytes_of_rusage(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def peak_bytes_of_status(text: str) -> int:
    """``VmHWM`` of Linux's ``/proc/<pid>/status``, which is in KiB. Errors: ``ValueError`` when it is not there."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise ValueError("no VmHWM")
    return int(found.group(1)) * 1024


def peak_bytes_of_rusage(ru_maxrss: int, platform: str) -> int:
    """``ru_maxrss`` is in bytes on macOS and in KiB elsewhere (``getrusage(2)``)."""
    return ru_maxrss if platform == "darwin" else ru_maxrss * 1024
