"""Greedy generation for tests; `dataclasses.replace` what a test is about."""

from llmkit.settings import GenerationConfig

GREEDY = GenerationConfig(
    max_new_tokens=64,
    temperature=0.0,
    top_k=None,
    top_p=None,
    repetition_penalty=1.0,
    no_repeat_ngram_size=None,
    n_beams=1,
    length_penalty=1.0,
    stop=[],
    seed=0,
    use_cache=True,
)
