"""The methods: a `Problem` and a `Budget` go in, a `Selection` comes out.

One paper, one file, one frozen dataclass whose fields are its hyper-parameters, command-line flags and YAML keys, and
whose docstring is their help. Beside `needs` and `select` (see `gradsieve.types.Selector`) each class states, for the report
and the table that `gradsieve methods` prints:

    title     the name as its authors spell it
    picks_by  what it goes by, to end the sentence "GrADS picks by …"
    reads     what it looks at, in words
    cost      its order in n candidates, m targets, d sketch size, k chosen, c checkpoints
    source    the paper it comes from

What methods share lives beside them: `reading` (what must be there before anything is computed), `ranking` (orders, ties,
strata, the end of the budget), `directions` (unit sketches with exact products), `dense` (sketches as one matrix), `density`
(of one number per example), `graph` (nearest neighbours), `omp` (matching pursuit; `refit`: its weights).
"""

from __future__ import annotations

from gradsieve.selectors.bm25 import BM25
from gradsieve.selectors.curiosity import Curiosity
from gradsieve.selectors.embedding import Embedding
from gradsieve.selectors.g2is import G2IS
from gradsieve.selectors.gradmatch import GradMatch
from gradsieve.selectors.grads import GrADS
from gradsieve.selectors.ifd import IFD
from gradsieve.selectors.length import Length
from gradsieve.selectors.less import LESS
from gradsieve.selectors.metadata import Metadata
from gradsieve.selectors.ogs import OGS
from gradsieve.selectors.ogs_static import OGSStatic
from gradsieve.selectors.orth_only import OrthOnly
from gradsieve.selectors.perplexity import Perplexity
from gradsieve.selectors.pgm import PGM
from gradsieve.selectors.rds import RDS
from gradsieve.selectors.uniform import Random
from gradsieve.types import Selector

SELECTORS: dict[str, type[Selector]] = {
    "random": Random,
    "length": Length,
    "metadata": Metadata,
    "perplexity": Perplexity,
    "ifd": IFD,
    "bm25": BM25,
    "embedding": Embedding,
    "grads": GrADS,
    "ogs": OGS,
    "ogs-static": OGSStatic,
    "orth-only": OrthOnly,
    "less": LESS,
    "rds": RDS,
    "g2is": G2IS,
    "gradmatch": GradMatch,
    "pgm": PGM,
    "curiosity": Curiosity,
}

__all__ = [
    "BM25",
    "G2IS",
    "IFD",
    "LESS",
    "OGS",
    "PGM",
    "RDS",
    "SELECTORS",
    "Curiosity",
    "Embedding",
    "GrADS",
    "GradMatch",
    "Length",
    "Metadata",
    "OGSStatic",
    "OrthOnly",
    "Perplexity",
    "Random",
]
