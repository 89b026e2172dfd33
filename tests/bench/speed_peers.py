"""The work of ``tests.bench.speed`` as others do it: one process, one peer, one JSON line.

``plain`` is a GPT-2 and a training loop written here in the shape of nanoGPT's: separate modules, one product for
queries, keys and values, all logits at once, torch's AdamW. The others are the libraries' own models and loops. All of
them read the token ids that llmkit has prepared. Times are those of whole steps, data included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RATE, DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0
PAD, MASK = 0, 1  # ids that stand in for both: what they are has no influence on the speed


class PlainBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.first, self.second = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class PlainGPT(nn.Module):
    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        d_model, vocab = sizes["d_model"], sizes["vocab"]
        self.tokens, self.positions = nn.Embedding(vocab, d_model), nn.Embedding(sizes["seq_len"], d_model)
        self.blocks = nn.ModuleList(PlainBlock(d_model, sizes["n_heads"]) for _ in range(sizes["n_layers"]))
        self.norm = nn.LayerNorm(d_model)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    sizes, windows = work["sizes"], work["windows"]
    model = PlainGPT(sizes).to(args.device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
    network = torch.compile(model) if args.compile else model
    autocast = torch.autocast(args.device, torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    seconds, loss = [], torch.zeros(())
    for step in range(args.steps):
        started = time.perf_counter()
        rows = [windows[(step * sizes["batch"] + i) % len(windows)] for i in range(sizes["batch"])]
        batch = torch.tensor(rows).to(args.device)
        with autocast:
            loss = network(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "tokens": [sizes["batch"] * sizes["seq_len"]] * args.steps, "loss": loss.item()}


class Clock:
    """Seconds and tokens of Trainer's steps: from batch to batch."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Marks(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.times.append(time.perf_counter())

            def on_train_end(self, *_: Any, **__: Any) -> None:
                clock.times.append(time.perf_counter())

        return Marks()

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def train(args: argparse.Namespace, model: Any, rows: list[Any], collate: Any, clock: Clock, **more: Any) -> float:
    """Transformers' Trainer over ``rows``, fused AdamW as it has it; the last loss."""
    import tempfile

    import transformers

    kind = more.pop("trainer", transformers.Trainer)
    settings = more.pop("settings", transformers.TrainingArguments)
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=model,
            args=settings(
                folder, max_steps=args.steps, learning_rate=RATE, weight_decay=DECAY, adam_beta1=BETAS[0],
                adam_beta2=BETAS[1], max_grad_norm=CLIP, bf16=args.bf16, use_cpu=args.device == "cpu", report_to=[],
                save_strategy="no", logging_steps=1, disable_tqdm=True, torch_compile=args.compile,
                remove_unused_columns=False, lr_scheduler_type="constant", **more,
            ),
            train_dataset=rows, data_collator=collate, callbacks=[clock.callback()],
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[-1])


def trainer_decoder(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """Llama's blocks with a feed-forward layer of 8/3, so that there are as many weights as in GPT-2's."""
    import transformers

    sizes, clock = work["sizes"], Clock()
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab"], hidden_size=sizes["d_model"], num_hidden_layers=sizes["n_layers"],
        intermediate_size=8 * sizes["d_model"] // 3 // 64 * 64, num_attention_heads=sizes["n_heads"],
        max_position_embeddings=sizes["seq_len"], tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    rows = [torch.tensor(window[:-1]) for window in work["windows"]]

    def collate(part: list[Tensor]) -> dict[str, Tensor]:
        ids = torch.stack(part)
        clock.tokens.append(ids.numel())
        return {"input_ids": ids, "labels": ids}

    model = transformers.LlamaForCausalLM(config)
    loss = train(args, model, rows, collate, clock, per_device_train_batch_size=sizes["batch"])
    return {"seconds": clock.seconds(), "tokens": clock.tokens[: args.steps], "loss": loss}


def padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def trainer_encoder(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """A BERT of one sentence a row, 15 % of the tokens masked as the library's collator does it."""
    import transformers

    sizes, clock = work["sizes"], Clock()
    config = transformers.BertConfig(
        vocab_size=sizes["vocab"], hidden_size=sizes["d_model"], num_hidden_layers=sizes["n_layers"],
        num_attention_heads=sizes["n_heads"], intermediate_size=4 * sizes["d_model"],
        max_position_embeddings=sizes["seq_len"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip

    def collate(part: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        texts = [row["input_ids"] for row in part]
        ids, seen = padded(texts, PAD), padded([[1] * len(text) for text in texts], 0)
        chosen = (torch.rand(ids.shape) < 0.15) & (seen == 1)
        kind = torch.rand(ids.shape)
        inputs = ids.masked_fill(chosen & (kind < 0.8), MASK)
        inputs = torch.where(chosen & (kind > 0.9), torch.randint(sizes["vocab"], ids.shape), inputs)
        clock.tokens.append(int(seen.sum()))
        return {"input_ids": inputs, "attention_mask": seen, "labels": ids.masked_fill(~chosen, -100)}

    rows = [{"input_ids": text[: sizes["seq_len"]]} for text in work["texts"]]
    more = {"train_sampling_strategy": "group_by_length"} if args.grouped else {}
    model = transformers.BertForMaskedLM(config)
    loss = train(args, model, rows, collate, clock, per_device_train_batch_size=sizes["batch"], **more)
    return {"seconds": clock.seconds(), "tokens": clock.tokens[: args.steps], "loss": loss}


def trainer_seq2seq(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """A Marian on pairs of sentences."""
    import transformers

    sizes = work["sizes"]
    config = transformers.MarianConfig(
        vocab_size=sizes["vocab"], d_model=sizes["d_model"], encoder_layers=sizes["n_layers"],
        decoder_layers=sizes["n_layers"], encoder_attention_heads=sizes["n_heads"],
        decoder_attention_heads=sizes["n_heads"], encoder_ffn_dim=4 * sizes["d_model"],
        decoder_ffn_dim=4 * sizes["d_model"], max_position_embeddings=sizes["seq_len"], dropout=0.0,
        pad_token_id=PAD, eos_token_id=2, decoder_start_token_id=PAD, forced_eos_token_id=None,
    )  # fmt: skip
    return train_on_pairs(args, work, transformers.MarianMTModel(config))


def trainer_t5(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """A T5 1.1 on pairs of sentences."""
    import transformers

    sizes = work["sizes"]
    config = transformers.T5Config(
        vocab_size=sizes["vocab"], d_model=sizes["d_model"], d_kv=sizes["d_model"] // sizes["n_heads"],
        d_ff=8 * sizes["d_model"] // 3, num_layers=sizes["n_layers"], num_heads=sizes["n_heads"], dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=PAD, eos_token_id=2,
        decoder_start_token_id=PAD,
    )  # fmt: skip
    return train_on_pairs(args, work, transformers.T5ForConditionalGeneration(config))


def train_on_pairs(args: argparse.Namespace, work: dict[str, Any], model: Any) -> dict[str, Any]:
    """Seq2SeqTrainer; tokens are those of both sides."""
    import transformers

    sizes, clock = work["sizes"], Clock()

    def collate(part: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        sources, targets = ([row[name] for row in part] for name in ("input_ids", "labels"))
        labels, seen = padded(targets, -100), padded([[1] * len(source) for source in sources], 0)
        clock.tokens.append(int(seen.sum()) + int((labels != -100).sum()))
        inputs = model.prepare_decoder_input_ids_from_labels(labels)
        return {
            "input_ids": padded(sources, PAD), "attention_mask": seen, "labels": labels, "decoder_input_ids": inputs
        }  # fmt: skip

    rows = [{"input_ids": source, "labels": target} for source, target in work["pairs"]]
    more = {"train_sampling_strategy": "group_by_length"} if args.grouped else {}
    loss = train(
        args, model, rows, collate, clock, per_device_train_batch_size=sizes["batch"],
        trainer=transformers.Seq2SeqTrainer, settings=transformers.Seq2SeqTrainingArguments, **more,
    )  # fmt: skip
    return {"seconds": clock.seconds(), "tokens": clock.tokens[: args.steps], "loss": loss}


def litgpt(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """LitGPT's model in a Fabric loop as its pretraining has it."""
    import lightning
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    sizes, windows = work["sizes"], work["windows"]
    config = Config(
        name="bench", block_size=sizes["seq_len"], vocab_size=sizes["vocab"], padded_vocab_size=sizes["vocab"],
        n_layer=sizes["n_layers"], n_head=sizes["n_heads"], n_embd=sizes["d_model"], rotary_percentage=1.0,
        head_size=sizes["d_model"] // sizes["n_heads"], parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=8 * sizes["d_model"] // 3 // 64 * 64,
    )  # fmt: skip
    fabric = lightning.Fabric(devices=1, accelerator=args.device, precision="bf16-mixed" if args.bf16 else "32-true")
    fabric.launch()
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = sizes["seq_len"]
    network = fabric.setup(torch.compile(model) if args.compile else model)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY, betas=BETAS)
    )
    seconds, loss = [], torch.zeros(())
    for step in range(args.steps):
        started = time.perf_counter()
        rows = [windows[(step * sizes["batch"] + i) % len(windows)] for i in range(sizes["batch"])]
        batch = torch.tensor(rows).to(args.device)
        loss = chunked_cross_entropy(network(batch[:, :-1].contiguous()), batch[:, 1:].contiguous(), chunk_size=0)
        fabric.backward(loss)
        fabric.clip_gradients(network, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "tokens": [sizes["batch"] * sizes["seq_len"]] * args.steps, "loss": loss.item()}


def ceiling(args: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s of the large products of this work, forward and both backward: the median of each, then their mean."""
    import statistics

    sizes, dtype = work["sizes"], torch.bfloat16 if args.bf16 else torch.float32
    rows, inner = sizes["batch"] * sizes["seq_len"], sizes["d_model"]
    found = []
    for outer in (inner, 4 * inner, sizes["vocab"]):
        x, w, g = (
            torch.randn(shape, device=args.device).to(dtype) for shape in ((rows, inner), (outer, inner), (rows, outer))
        )
        for product in _products(x, w, g):
            seconds = []
            for _ in range(args.steps):
                started = time.perf_counter()
                product()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            found.append(2 * rows * inner * outer / statistics.median(seconds[1:]))
    return {"seconds": [], "tokens": [], "loss": 0.0, "gflops": statistics.mean(found) / 1e9}


def _products(x: Tensor, w: Tensor, g: Tensor) -> Iterator[Any]:
    yield lambda: x @ w.t()
    yield lambda: g @ w
    yield lambda: g.t() @ x


PEERS = {
    "plain": plain,
    "trainer_decoder": trainer_decoder,
    "trainer_encoder": trainer_encoder,
    "trainer_seq2seq": trainer_seq2seq,
    "trainer_t5": trainer_t5,
    "litgpt": litgpt,
    "ceiling": ceiling,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--work", type=Path, required=True, help="JSON with sizes and token ids")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--grouped", action="store_true", help="rows of like length in a batch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = PEERS[args.peer](args, json.loads(args.work.read_text()))
    if args.device == "cuda":
        found["peak_device_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
