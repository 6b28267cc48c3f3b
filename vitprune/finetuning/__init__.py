"""Fine-tuning within a budget: from beginning to end, one step, what is kept, and what trackers are told."""
