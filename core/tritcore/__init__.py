"""What tritconv and tritrun share: the format and its codec, GGUF headers, files, the cache, errors, the console."""
