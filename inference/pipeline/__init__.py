"""A model cut over several nodes: the head, the stages, the links between them, and the planner.

``frames``, ``stage``, ``head``, ``detokenizer`` and ``planner`` decide and do no I/O; ``links``,
``stage_service`` and ``engine`` are the trio shells around them.
"""
