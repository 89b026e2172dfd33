"""GGUF files, the format of llama.cpp, in and out: Llama, Qwen2 and Qwen3. Needs the extra ``gguf``."""

from llmkit.models.gguf.load import load_gguf, load_gguf_config
from llmkit.models.gguf.save import save_gguf

__all__ = ["load_gguf", "load_gguf_config", "save_gguf"]
