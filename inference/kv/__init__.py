"""KV as blocks: what the pipeline asks of whoever keeps blocks of 64 tokens.

``port`` is the agreement between the two.
"""
