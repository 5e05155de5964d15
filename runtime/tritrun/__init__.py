"""tritrun: chat with TRIT and other GGUF models, and measure them, on llama.cpp."""
