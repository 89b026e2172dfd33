"""Small configurations of every objective with every family that it trains, as overrides of ``llmkit pretrain``."""

from __future__ import annotations

BPE = ["tokenizer=bpe", "tokenizer.vocab_size=320"]
WORDPIECE = ["tokenizer=wordpiece", "tokenizer.vocab_size=90"]
T5_TOKENS = ["tokenizer=bpe", "tokenizer.vocab_size=380", "tokenizer.n_sentinels=30"]
FIM_TOKENS = [*BPE, "tokenizer.extra_symbols=[<fim_prefix>,<fim_suffix>,<fim_middle>]"]
MASK_TOKENS = [*BPE, "tokenizer.extra_symbols=[<mask>]"]
TRANSFORMER = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2"]
LSTM = ["model.d_model=32", "model.n_layers=1"]
BERT = ["model=bert", *TRANSFORMER, *WORDPIECE]

PAIRS = {
    "causal_lm-gpt2": ["model=gpt2", *TRANSFORMER, *BPE],
    "causal_lm-lstm": ["model=lstm", *LSTM, *BPE],
    "fill_in_the_middle-llama": ["model=llama", "objective=fill_in_the_middle", *TRANSFORMER, *FIM_TOKENS],
    "masked_lm-bert": [*BERT, "objective=masked_lm", "model.pooler=false"],
    "masked_lm-modern_bert": [
        *("model=modern_bert", *TRANSFORMER, "model.local_window=8"),
        *("objective=masked_lm", "objective.whole_word=true", *MASK_TOKENS),
    ],
    "next_sentence-bert": [*BERT, "objective=next_sentence"],
    "next_sentence-alone": [*BERT, "objective=next_sentence", "objective.masked_lm=false"],
    "sentence_order-albert": [*BERT, "objective=sentence_order", "model.share_layers=true"],
    "span_corruption-t5": ["model=t5", "objective=span_corruption", *TRANSFORMER, *T5_TOKENS],
    "span_corruption-lstm": ["model=lstm_seq2seq", "objective=span_corruption", *LSTM, *T5_TOKENS],
    "prefix_lm-bart": ["model=bart", "objective=prefix_lm", *TRANSFORMER, *BPE],
}
