"""Answers of a model, of whichever kind; quality, speed and memory of a pruned one beside the dense one.

One stopwatch, which times models in turn.
"""
