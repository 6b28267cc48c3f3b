"""What is said: results as values and JSON, and every table, sentence and picture made of them.

Imports no torch; measures nothing.
"""
