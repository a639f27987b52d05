"""The embedded default: a real model and real data out of installed packages, without a network.

`demo` (or `demo:N` for N examples) is accepted wherever a model or a data file is.
"""

from gradsieve.demo.model import cache_dir, demo_model_dir
from gradsieve.demo.pool import demo_anchor, demo_general, demo_pool, demo_set, demo_target, demo_test, describe, is_demo

__all__ = [
    "cache_dir",
    "demo_anchor",
    "demo_general",
    "demo_model_dir",
    "demo_pool",
    "demo_set",
    "demo_target",
    "demo_test",
    "describe",
    "is_demo",
]
