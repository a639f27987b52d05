"""How well single scores tell planted faults from sound rows, from a study's gradients and the data.

    python studies/scores.py --data DATA/law --store RUNS/law-small/stores/KEY/pool

A score is the cosine of a row's gradient with one of the directions that the store has exact products with (`target` is
utility, `contrast/…` that of sound against corrupted answers), its loss, or its length. AUC is the chance that a row of a kind
scores lower than a sound one (higher, for loss), one half where it says nothing; the mean over pools, with the smallest and the
largest.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from gradsieve.data import TokenSet, read_examples, row_fields
from gradsieve.models import find_model
from gradsieve.selectors.ranking import spearman
from gradsieve.selectors.reading import cosines
from gradsieve.store import GradientStore
from gradsieve.types import Gradients

KINDS = ("swapped", "off-domain", "near-duplicate", "false-arithmetic", "mixed-numbers")


def auc(score: Tensor, faulty: Tensor, sound: Tensor) -> float:
    """Returns the chance that a faulty row has the lower score, ties counted half."""
    known = faulty | sound
    return float(roc_auc_score(faulty[known].numpy(), -score[known].numpy()))


def scores(pool: Gradients) -> dict[str, Tensor]:
    """Returns every score of a pool's rows, float64 [n], lower where a row is more suspect."""
    directions = sorted(name.removeprefix("dot/") for name in pool.columns if name.startswith("dot/"))
    found = {f"cosine with {name}": cosines(pool, name) for name in directions}
    return found | {"loss": -pool.columns["loss"], "length": pool.columns["completion_tokens"]}


def table(pool: Gradients, kinds: Sequence[str]) -> dict[tuple[str, str], float]:
    """Returns the AUC of every score for every kind, and its rank correlation with the rows' lengths."""
    where = {kind: torch.tensor([own == kind for own in kinds]) for kind in (*KINDS, "clean")}
    found = {}
    for name, score in scores(pool).items():
        for kind in KINDS:
            found[name, kind] = auc(score, where[kind], where["clean"])
        found[name, "length"] = spearman(score, pool.columns["completion_tokens"])
    return found


def lines(tables: Sequence[Mapping[tuple[str, str], float]]) -> list[list[str]]:
    """Returns the rows of a Markdown table, one per score."""
    rows = []
    for name in dict.fromkeys(name for name, _ in tables[0]):
        cells = [[one[name, column] for one in tables] for column in (*KINDS, "length")]
        rows.append([name, *(f"{mean(cell):.2f} ({min(cell):.2f}…{max(cell):.2f})" for cell in cells)])
    return rows


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a domain's folder that prepare.py wrote")
    parser.add_argument("--store", type=Path, required=True, help="the pool's part of a store of gradients of its pools")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="demo", help="the model the gradients are of, for its tokenizer")
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    store, tables = GradientStore.open(options.store), []
    tokenizer = find_model(options.model).tokenizer
    for seed in options.seeds:
        examples = read_examples(options.data / f"pool-{seed}.jsonl").examples
        tokens = TokenSet.of("pool", examples, tokenizer, max_length=options.max_length)
        kinds = [str(row_fields(examples[i])["planted"]) for i in tokens.kept]
        tables.append(table(store.view(tokens.ids, tokens.keys), kinds))
    for row in (["score", *KINDS, "rank correlation with length"], ["---"] * 7, *lines(tables)):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
