"""One model over file formats: its numbers, its weights by layer, and what says they are the same.

``open_weights`` reads a GGUF file (whole, or a slice of one) or a folder of safetensors; backends
that compute for themselves take arrays from there.  Layout and names are llama.cpp's everywhere.
"""
