"""Triton runs through its interpreter where there is no CUDA device; it asks when it is imported."""

from __future__ import annotations

from penstock.testing.interpreter import interpret_triton

interpret_triton()
