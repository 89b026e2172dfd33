"""llmkit trains and fine-tunes language models from YAML recipes. Importing it imports nothing heavy."""

__version__ = "0.1.0"
