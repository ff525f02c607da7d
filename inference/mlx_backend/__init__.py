"""The MLX backend: slices on Apple's GPUs, and on processors under Linux."""
