"""The vocabulary that every part shares: errors, wire frames, limits, placements and the mesh port.

Nothing in here does I/O or knows a library that does, except ``files``, which writes small files
safely.  It may import nothing else of ours.
"""
