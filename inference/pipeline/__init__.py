"""Pipelines: planner, stages, head, sessions."""
