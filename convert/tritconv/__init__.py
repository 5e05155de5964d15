"""From checkpoints to GGUF files with balanced-ternary weights."""
