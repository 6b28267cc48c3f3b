"""The verbs of a recipe: apply, evaluate, plan, prefetch; how a run is resumed, and started under a launcher."""
