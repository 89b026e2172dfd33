"""``python -m llmkit``, and so ``torchrun -m llmkit``."""

from llmkit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
