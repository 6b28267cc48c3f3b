"""Images: opening a data set, its rows, labels and pixels, and batches of them.

Knows nothing of models but their image processor.
"""
