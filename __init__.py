"""Penstock: a disaggregated prefill/decode inference cluster for large language models."""

__version__ = "0.1.0"
