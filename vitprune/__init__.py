"""Token pruning for Vision Transformers: each image keeps the tokens it needs.

Importing this package is light: a public name is imported when it is first used (`__init__.pyi` lists them), and the
plug-in through which transformers brings a pruned checkpoint back is registered as soon as transformers' own registry
exists.
"""

import lazy_loader

from vitprune.runtime import import_hook

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

import_hook.register()
