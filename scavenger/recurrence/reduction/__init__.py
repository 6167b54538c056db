"""From the taps of filters to poles and residues: numerics only, batched, float64, no modules and no transformers.

One file for each method, each with one function: `reduce(taps, tolerance=…)` or `reduce(taps, state_size=…)`.
"""
