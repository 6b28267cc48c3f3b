"""The idea: which tokens an image needs, and a forward in which the others are dropped or merged.

Tensors only: no transformers, no data, of recipes the policy alone. `reference` is all of it on one page. `forward` is
the fast way, to be read from there down: enter a block, attend, score, select, reduce. `kernels` has the doors to
devices, `learning` what training adds.
"""
