"""Measuring: swarms of real daemons on this machine, single-process references, benchmarks.

Results are stored as JSON; each is taken side by side with its baseline in the same run.
"""
