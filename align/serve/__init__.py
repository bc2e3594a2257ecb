"""The OpenAI-compatible server of a checkpoint and its LoRA adapters."""

TOKEN_VARIABLE = "ALIGN_SERVE_TOKEN"
"""Environment variable with the bearer token of a server."""
