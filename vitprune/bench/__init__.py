"""`vitprune bench`: models, cases and settings of a benchmark, and the sweep over all of them."""
