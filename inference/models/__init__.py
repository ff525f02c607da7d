"""Model files: GGUF, slices, sources, the store, verified chunk transfer."""
