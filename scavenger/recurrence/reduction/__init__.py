"""Poles and residues from the taps of filters: only numerics, batched, in float64; no modules, no transformers.

One file per method, each with one function: `reduce(taps, tolerance=…)` or `reduce(taps, state_size=…)`.
"""
