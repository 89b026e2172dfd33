"""Text to ids: SentencePiece models that llmkit trains, and ``tokenizer.json`` files that others made."""
