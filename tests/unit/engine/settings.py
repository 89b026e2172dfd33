"""An engine section for tests; `dataclasses.replace` what a test is about."""

from llmkit.settings import EngineConfig

ENGINE = EngineConfig(
    max_steps=10,
    max_tokens=None,
    max_epochs=None,
    max_hours=None,
    micro_batch_size=2,
    grad_accum_steps=1,
    max_grad_norm=1.0,
    precision="fp32",
    device="cpu",
    n_threads=1,
    compile=False,
    fp32_matmul="highest",
    attention="sdpa",
    memory="fast",
    log_every=1,
    eval_every=None,
    eval_batch_size=None,
    save_every=None,
    keep_last=2,
    keep_best=True,
    best_metric=None,
    patience=None,
    on_nonfinite="stop",
    max_skipped_steps=3,
    timeout_minutes=5,
)
