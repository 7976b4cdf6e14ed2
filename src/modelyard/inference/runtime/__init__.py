"""Engines: a bundle's graph made to compute."""
