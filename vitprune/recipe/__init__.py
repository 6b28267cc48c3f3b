"""What can be asked for: the recipe's schema, its values, and reading it from YAML with good messages.

Knows nothing of models, data or torch; importing it is light. What a recipe's keys do is left to the rooms that do it.
"""
