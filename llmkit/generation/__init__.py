"""Text from a decoder or an encoder-decoder: greedy, sampled or searched for, alone, in a batch, or streamed."""

from llmkit.generation.write import generate, generate_from_ids, stream, stream_from_ids

__all__ = ["generate", "generate_from_ids", "stream", "stream_from_ids"]
