"""``llmkit doctor``: what this machine offers and what is missing, to read and to paste. Secrets are masked."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import llmkit
from llmkit.data.cache import cache_root
from llmkit.errors import EXIT_OK, ConfigError, SetupError
from llmkit.redact import redact
from llmkit.tracking.wandb_mode import decide_mode

GIB = 1 << 30
PYTHON = ((3, 11), (3, 15))  # from, up to but without

# The floors of pyproject.toml; a test compares them.
REQUIRED = {
    "torch": "2.10",
    "hydra-core": "1.3.8",
    "omegaconf": "2.3",
    "sentencepiece": "0.2",
    "accelerate": "1.15",
    "wandb": "0.22",
    "rich": "13.9",
    "numpy": "1.26",
    "safetensors": "0.4.3",
    "pyyaml": "6",
}
EXTRAS = {
    "hf": ("transformers", "tokenizers", "jinja2"),
    "gguf": ("gguf",),
    "metrics": ("sacrebleu",),
    "parquet": ("pyarrow",),
    "zstd": ("zstandard",),
    "tiktoken": ("tiktoken",),
}

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
# Accelerate reads these; llmkit hands it every value, so they change nothing.
OVERRIDDEN = re.compile(r"(ACCELERATE|FSDP|DEEPSPEED|MEGATRON_LM|PARALLELISM_CONFIG)_\w+")
SHOWN = re.compile(
    r"(LLMKIT|CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|SLURM|HF_HUB|HF_HOME|WANDB|HYDRA)\w*|(LOCAL_)?(RANK|WORLD_SIZE)"
    r"|MASTER_(ADDR|PORT)"
)

Rows = Iterator[tuple[str, str]]


def run(cfg: None, args: argparse.Namespace) -> int:
    """Print the report; 0, or 8 when something that every run needs is missing."""
    if args.overrides:
        raise ConfigError(f"doctor takes no {args.overrides[0]!r:.80}", fix="call it alone: llmkit doctor")
    missing: list[str] = []
    for title, rows in SECTIONS.items():
        print(title)
        for name, value in rows(missing):
            print(f"  {name:<20} {redact({name: value})[name]}")
    if not missing:
        print("everything a run needs is here")
        return EXIT_OK
    print("missing:")
    for line in missing:
        print(f"  {line}")
    return SetupError.exit_code


def versions(missing: list[str]) -> Rows:
    low, high = PYTHON
    if not low <= sys.version_info[:2] < high:
        missing.append(f"Python {low[0]}.{low[1]} or newer, below {high[0]}.{high[1]}")
    yield "llmkit", f"{llmkit.__version__} in {Path(llmkit.__file__).parent}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}) in {sys.prefix}"
    yield "system", platform.platform()
    for name, floor in REQUIRED.items():
        have = installed(name)
        yield name, have or f"absent, needs {floor}"
        if have is None or as_numbers(have) < as_numbers(floor):
            missing.append(f"{name} {floor} or newer: pip install '{name}>={floor}'")


def extras(missing: list[str]) -> Rows:
    for extra, packages in EXTRAS.items():
        have = {name: installed(name) for name in packages}
        found = ", ".join(f"{name} {version}" for name, version in have.items() if version)
        absent = "" if all(have.values()) else f"pip install 'llmkit[{extra}]'"
        yield extra, ", ".join(part for part in (found, absent) if part)


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def as_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.13.0+cpu`` gives ``(2, 13, 0)``."""
    return tuple(int(part) for part in re.split(r"[^\d.]", version)[0].split(".") if part)


def devices(missing: list[str]) -> Rows:
    """Devices and what they compute in, as torch sees them."""
    try:
        import torch
    except Exception as error:  # a broken build raises OSError and others
        missing.append(f"a torch that can be imported: {type(error).__name__}: {str(error).splitlines()[0]}")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if facts.major >= 8 else "no bf16"
        yield f"cuda:{index}", f"{facts.name}, {facts.total_memory / GIB:.1f} GiB, fp16, {bf16}"
    if torch.backends.mps.is_available():
        yield "mps", "Apple GPU, fp16"
    flags = cpu_flags()
    fast = "bf16 in hardware" if {"avx512_bf16", "amx_bf16", "bf16"} & flags else "bf16 emulated, slower than fp32"
    yield "cpu", f"{cpu_name()}; {fast}; {' '.join(flag for flag in CPU_FLAGS if flag in flags) or 'flags unknown'}"
    yield "threads", f"{torch.get_num_threads()} of torch, {cores()} cores for this process, {os.cpu_count()} in all"
    yield "compiler", compiler() or "none: engine.compile=true needs one on a CPU"


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call on a CPU."""
    return shutil.which("g++") or shutil.which("clang++")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def memory(missing: list[str]) -> Rows:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB"
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal():
        yield "limit", f"{int(limit) / GIB:.1f} GiB for this container"


def folders(missing: list[str]) -> Rows:
    """Can runs and prepared data be written, and how much of them."""
    for name, folder in (("run.root", Path("runs")), ("data cache", cache_root(None))):
        place = nearest_folder(folder.absolute())
        refused = refusal(place)
        if refused:
            missing.append(f"a folder for {name} that can be written: {place}: {refused}")
        yield name, f"{folder}: {shutil.disk_usage(place).free / GIB:.1f} GiB free, {refused or 'writable'}"


def nearest_folder(path: Path) -> Path:
    """``path``, or the folder above it in which it would be made."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def refusal(folder: Path) -> str:
    """Why nothing can be written in ``folder``; empty when something was."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"llmkit")
            file.flush()
    except OSError as error:
        return f"not writable: {error.strerror}"
    return ""


def tracking(missing: list[str]) -> Rows:
    decision = decide_mode("auto", os.environ, Path.home(), Path.cwd())
    yield "wandb", f"{decision.mode}{f': {decision.note}' if decision.note else ''}"


def environment(missing: list[str]) -> Rows:
    for name, value in sorted(os.environ.items()):
        if OVERRIDDEN.fullmatch(name):
            yield name, f"{value}  (read by accelerate; the recipe decides instead)"
        elif SHOWN.fullmatch(name):
            yield name, value
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    if (settings := home / "accelerate" / "default_config.yaml").exists():
        yield "accelerate config", f"{settings}  (the recipe decides instead)"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


SECTIONS: Mapping[str, Callable[[list[str]], Rows]] = {
    "versions": versions,
    "extras": extras,
    "devices": devices,
    "memory": memory,
    "folders": folders,
    "tracking": tracking,
    "environment": environment,
}
