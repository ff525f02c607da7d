"""The ``pyagent-node`` command line.

It talks to the daemon of this machine through ``pyagent_node.node.client`` and edits the node's
home where no daemon is needed.  Verbs are imported when they are used, and what a verb needs when
it runs, so that ``--help`` is instant.
"""
