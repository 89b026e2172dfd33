"""Runs programs that a model wrote, where they can reach nothing of the machine, and says whether they passed."""

from llmkit.code_runner.runner import Limits, Verdict, run_tests

__all__ = ["Limits", "Verdict", "run_tests"]
