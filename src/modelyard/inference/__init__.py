"""Runs and serves bundles on a light install; never torch."""
