"""Into a transformers model and out of it again: families, structure, hooks, answers, checkpoints.

Knows transformers; what happens to tokens is left to `pruning`.
"""
