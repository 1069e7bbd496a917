"""Launchers with absl flags: `python -m experiments.NAME --flags`."""
