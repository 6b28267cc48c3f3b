"""Tokens of a batch laid end to end: how they attend, and what a stage makes of them."""
