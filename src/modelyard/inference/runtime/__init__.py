"""Engines: a bundle's graph made to compute."""

from modelyard.inference.runtime._base import Engine, RowByRow, open_engine

__all__ = ["Engine", "RowByRow", "open_engine"]
