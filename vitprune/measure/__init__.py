"""Quality, speed and memory of a pruned model beside the dense one. One stopwatch, which times models in turn."""
