"""Numbers of speed and memory against values worked out by hand."""

from __future__ import annotations

import pytest

from llmkit.engine.throughput import (
    mfu,
    peak_bytes_of_rusage,
    peak_bytes_of_status,
    peak_flops,
    peak_memory_gib,
    process_peak_bytes,
    tokens_per_second,
)


def test_tokens_per_second() -> None:
    assert tokens_per_second(4096, 2.0) == 2048.0
    assert tokens_per_second(4096, 0.0) == 0.0


def test_mfu_of_palm_540b() -> None:
    """PaLM, table 3 and appendix B: 238,300 tokens/s on 6,144 TPU v4 of 275 TFLOP/s peak are 46.2 % with attention.

    Per token: 6 * 540.35e9 + 12 * 118 layers * 48 heads * 256 wide * 2048 long.
    """
    flops_per_token = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    assert mfu(flops_per_token, 238_300, 275e12, 6144) == pytest.approx(0.462, abs=0.001)


def test_mfu_falls_with_the_number_of_devices() -> None:
    assert mfu(6e9, 1000.0, 100e12, 1) == pytest.approx(0.06)
    assert mfu(6e9, 1000.0, 100e12, 4) == pytest.approx(0.015)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "fp16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H20", "bf16", 148),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "fp16", 65),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("AMD Instinct MI250X", "bf16", 191.5),
    ],
)
def test_peaks_of_known_devices(name: str, precision: str, tflops: float) -> None:
    assert peak_flops(name, precision) == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "bf16"),
        ("mps", "fp32"),
        ("Tesla T4", "bf16"),  # no such units
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GeForce RTX 4090 D", "bf16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16"),
        ("NVIDIA RTX A1000", "bf16"),
        ("NVIDIA RTX A4000", "bf16"),
        ("Quadro RTX 4000", "bf16"),
        ("", "fp32"),
    ],
)
def test_no_peak_is_better_than_a_wrong_one(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_units_of_the_operating_systems() -> None:
    assert peak_bytes_of_status("VmPeak:\t  9 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n") == 2 * 2**20
    assert peak_bytes_of_rusage(2048, "linux") == 2 * 2**20
    assert peak_bytes_of_rusage(2048, "darwin") == 2048
    with pytest.raises(ValueError):
        peak_bytes_of_status("Name:\tpython\n")


def test_peak_memory_sees_an_allocation_and_does_not_fall() -> None:
    before = process_peak_bytes()
    block = bytearray(before + 64 * 2**20)  # zeros are not resident until touched
    block[::4096] = b"x" * len(range(0, len(block), 4096))
    size = len(block)
    del block
    after = process_peak_bytes()
    assert size * 0.99 < after < before + size * 1.5
    assert peak_memory_gib("cpu") == pytest.approx(after / 2**30, rel=0.01)
