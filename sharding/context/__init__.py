"""Finding the few pieces of a large context that a question needs."""
