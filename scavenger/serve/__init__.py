"""The OpenAI-compatible server: HTTP in one file, the thread that owns the model in another."""
