"""How thresholds get gradients, in the published way (`masked`) and in the packed one.

Extends the forward of inference, which knows nothing of it.
"""
