"""Peak memory of opening a checkpoint: resident memory over that of the imports, and how much is not weights.

    python -m tests.bench.load_memory                      # a model of the sizes of SmolLM2-135M, random weights
    python -m tests.bench.load_memory --init <folder>      # any model folder

Each line is a fresh process. The baseline is taken after the imports and one small matrix product; the peak is the
kernel's high-water mark (VmHWM) of what the process has resident, mapped files included. ``over`` is peak - baseline -
weights in the type they are loaded as.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MB = 1e6
REPO = Path(__file__).resolve().parents[2]
SMOLLM2_135M = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    **{"rope_theta": 100000.0, "tie_word_embeddings": True, "hidden_act": "silu"},
}


def status(key: str) -> int:
    """Bytes of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Open the folder in this process."""
    import torch

    from llmkit.models.hf import load_config, load_model

    torch.set_num_threads(1)
    torch.ones(64, 64) @ torch.ones(64, 64)
    load_config(folder).build  # noqa: B018  (the modules of the model are imported by it)
    with torch.device("meta"):
        load_config(folder).build()
    baseline = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    begin = time.perf_counter()
    model = load_model(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - begin
    peak = status("VmHWM")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    return {"baseline": baseline, "weights": weights, "largest": largest, "peak": peak - baseline, "seconds": seconds}


def in_a_process(folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.load_memory", "--init", str(folder), "--measure", dtype]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return values


def write_smollm2(folder: Path, dtype: str, shard: str) -> Path:
    """By transformers, in a process of its own."""
    script = (
        "import sys, torch, transformers, json;"
        "torch.manual_seed(0);"
        "config = transformers.LlamaConfig(**json.loads(sys.argv[1]));"
        "model = transformers.LlamaForCausalLM(config).to(getattr(torch, sys.argv[3]));"
        "model.save_pretrained(sys.argv[2], max_shard_size=sys.argv[4])"
    )
    command = [sys.executable, "-c", script, json.dumps(SMOLLM2_135M), str(folder), dtype, shard]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def row(name: str, dtype: str, values: dict[str, float]) -> str:
    over = values["peak"] - values["weights"]
    sizes = " | ".join(f"{values[key] / MB:.0f}" for key in ("baseline", "weights", "peak", "largest"))
    return f"| {name} | {dtype} | {sizes} | {over / MB:.0f} | {values['seconds']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--init", type=Path)
    parser.add_argument("--measure")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.init, options.measure)))
        return
    print(
        "| files | loaded as | imports, MB | weights, MB | peak over imports, MB | largest tensor, MB | over, MB | s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    if options.init:
        print(row(options.init.name, "float32", in_a_process(options.init, "float32")))
        return
    kinds = [("float32", "5GB"), ("float32", "100MB"), ("bfloat16", "5GB"), ("float16", "5GB")]
    for kind, shard in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_smollm2(Path(scratch), kind, shard)
            name = f"{kind}, {len(list(folder.glob('*.safetensors')))} file(s)"
            for dtype in sorted({"float32", "bfloat16"} & {kind, "float32"}, reverse=True):
                print(row(name, dtype, in_a_process(folder, dtype)), flush=True)


if __name__ == "__main__":
    main()
