"""gradsieve chooses the fine-tuning examples that teach a language model a domain without making it forget.

    import gradsieve as gs
    result = gs.select("ogs-static", model="…", pool="pool.jsonl", target="dev.jsonl", anchor="general.jsonl", budget="5%")
    result.save("out/")

Names are loaded when they are first used: importing gradsieve imports neither torch nor transformers nor datasets.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsieve.errors import DataError as DataError
    from gradsieve.errors import GradsieveError as GradsieveError
    from gradsieve.errors import InvalidArgument as InvalidArgument
    from gradsieve.errors import MemoryLimit as MemoryLimit
    from gradsieve.errors import MissingExtra as MissingExtra
    from gradsieve.errors import ModelError as ModelError
    from gradsieve.errors import StoreCorrupt as StoreCorrupt
    from gradsieve.errors import StoreError as StoreError
    from gradsieve.errors import StoreMismatch as StoreMismatch
    from gradsieve.job import Job as Job
    from gradsieve.pipeline import Result as Result
    from gradsieve.pipeline import select as select
    from gradsieve.selectors import BM25 as BM25
    from gradsieve.selectors import G2IS as G2IS
    from gradsieve.selectors import IFD as IFD
    from gradsieve.selectors import LESS as LESS
    from gradsieve.selectors import OGS as OGS
    from gradsieve.selectors import PGM as PGM
    from gradsieve.selectors import RDS as RDS
    from gradsieve.selectors import SELECTORS as SELECTORS
    from gradsieve.selectors import Curiosity as Curiosity
    from gradsieve.selectors import Embedding as Embedding
    from gradsieve.selectors import GradMatch as GradMatch
    from gradsieve.selectors import GrADS as GrADS
    from gradsieve.selectors import Length as Length
    from gradsieve.selectors import Metadata as Metadata
    from gradsieve.selectors import OGSStatic as OGSStatic
    from gradsieve.selectors import OrthOnly as OrthOnly
    from gradsieve.selectors import Perplexity as Perplexity
    from gradsieve.selectors import Random as Random
    from gradsieve.types import ArrayGradients as ArrayGradients
    from gradsieve.types import Budget as Budget
    from gradsieve.types import Example as Example
    from gradsieve.types import Gradients as Gradients
    from gradsieve.types import Problem as Problem
    from gradsieve.types import Reference as Reference
    from gradsieve.types import Selection as Selection
    from gradsieve.types import Selector as Selector
    from gradsieve.types import Warmup as Warmup

__version__ = "0.1.0"

_HOME = {
    "gradsieve.errors": (
        "DataError", "GradsieveError", "InvalidArgument", "MemoryLimit", "MissingExtra", "ModelError",
        "StoreCorrupt", "StoreError", "StoreMismatch",
    ),
    "gradsieve.job": ("Job",),
    "gradsieve.pipeline": ("Result", "select"),
    "gradsieve.selectors": (
        "BM25", "Embedding", "IFD", "G2IS", "LESS", "OGS", "PGM", "RDS", "SELECTORS", "Curiosity", "GrADS", "GradMatch",
        "Length", "Metadata", "OGSStatic", "OrthOnly", "Perplexity", "Random",
    ),
    "gradsieve.types": (
        "ArrayGradients", "Budget", "Example", "Gradients", "Problem", "Reference", "Selection", "Selector",
        "Warmup",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gradsieve' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
