"""Leaving PyTorch: a model as a graph that other runtimes run, each image with its own number of tokens still."""
