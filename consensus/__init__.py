"""Agreement: the replicated state machine, the ``Consensus`` port, its engines, the log store."""
