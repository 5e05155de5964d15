"""From checkpoints to GGUF files with balanced-ternary weights."""

__version__ = "0.1.0"
