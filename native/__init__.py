"""The Rust module under Python: hashing, sampling, the llama.cpp tap, the private-net cipher."""
