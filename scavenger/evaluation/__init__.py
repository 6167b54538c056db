"""What a model kept, what it lost and what it costs: each measurement a file, and `compare` for all of them.

A measurement gives a dict that goes through JSON: `settings`, which must be equal for two models to be compared;
`metrics`, each with the sums over its items that an interval needs (`metrics.Metric`); and what else it has to show.
The commands are in `eval/`; the report of a run calls the same functions.
"""
