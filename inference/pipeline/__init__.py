"""A model cut over several nodes: the head, the stages, the links between them, and the planner.

``frames``, ``stage``, ``head``, ``attempt``, ``recovery``, ``detokenizer`` and ``planner`` decide
and do no I/O; ``links``, ``stage_service``, ``engine`` and ``driver`` are the trio shells around
them.
"""
