"""From the taps of a filter to poles and residues: numerics only, float64, no modules and no transformers."""
