"""Where models come from: checkpoints of the transformers library, from a folder or the hub, and GGUF files."""
