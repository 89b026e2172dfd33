"""Text to ids: SentencePiece and WordPiece vocabularies that llmkit trains, and files that others made."""
