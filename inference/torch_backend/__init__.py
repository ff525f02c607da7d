"""The torch backend: slices on NVIDIA's and Apple's GPUs, and on processors.

Needs the extra ``torch``.  Only a runner process imports what is in here.
"""
