"""Turn a Transformer into a Hyena student, and the student into a recurrence."""

__version__ = "0.2.0"
