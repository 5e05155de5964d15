"""The gptq method."""
