"""Models as Hugging Face folders: ``config.json``, ``model.safetensors`` (or shards) and ``generation_config.json``."""

from llmkit.models.hf.load import load_config, load_model
from llmkit.models.hf.save import save_model

__all__ = ["load_config", "load_model", "save_model"]
