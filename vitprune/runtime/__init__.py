"""The process: others that it runs with, signals, the Hub's caches, files and folders, and the import hook.

Knows the machine and nothing of pruning.
"""
