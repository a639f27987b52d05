"""A realistic page: definitions of findings with planted faults, scored by a linear rule; and small ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gradsieve.report import Page, Source, Stage
from gradsieve.types import Selection

PARTS = [
    "humerus",
    "radius",
    "ulna",
    "scapula",
    "clavicle",
    "sternum",
    "mandible",
    "maxilla",
    "femur",
    "tibia",
    "fibula",
    "patella",
    "talus",
    "calcaneus",
    "sacrum",
    "atlas",
    "pancreas",
    "spleen",
    "thymus",
    "adrenal-gland",
    "thyroid",
    "parathyroid",
    "retina",
    "cornea",
    "iris",
    "lens",
    "cochlea",
    "stapes",
    "trachea",
    "bronchus",
    "larynx",
    "esophagus",
    "duodenum",
    "jejunum",
    "ileum",
    "colon",
    "bladder",
    "ureter",
    "kidney",
    "liver",
]
FINDINGS = {
    "Hypoplasia": "Underdevelopment of the {0}: fewer cells than usual, so that it stays below the third percentile for age.",
    "Aplasia": "Congenital absence of the {0}.",
    "Hyperplasia": "Enlargement of the {0} through a greater number of cells.",
    "Atrophy": "Wasting of a {0} that had reached its full size, with loss of tissue mass over months or years.",
    "Stenosis": "An abnormal narrowing at the level of the {0}, which obstructs passage and may need dilatation or surgery.",
    "Calcification": "Deposition of calcium salts in the tissue of the {0}, visible as increased density on plain radiographs.",
    "Inflammation": "Redness, swelling and infiltration of the {0} by white cells; acute forms hurt, chronic ones are silent.",
    "Neoplasm": "A tumor of the {0}, that is, an abnormal growth of tissue, benign or malignant.",
    "Duplication": "Presence of a second {0}, complete or partial, beside the regular one.",
    "Malposition": "A {0} that lies outside its regular anatomical site.",
}
KINDS = {"clean": 0.66, "swapped definition": 0.12, "off-domain": 0.08, "near-duplicate": 0.08, "wrong arithmetic": 0.06}
OFF_DOMAIN = [
    ("What is a mortise?", "A hole cut in a piece of wood to receive a tenon."),
    ("What does al dente mean?", "Cooked so as to be firm to the bite, said of pasta."),
    ("Define 'gambit'.", "An opening in chess in which a pawn is offered for an advantage in position."),
]


@pytest.fixture(scope="session")
def medical_page() -> Callable[..., Page]:
    """Returns a function that makes the page of `n` medical definitions, a tenth chosen by utility - 2.3 risk."""

    def make(n: int = 412, **changes: Any) -> Page:
        rng = np.random.default_rng(7)
        names = [(finding, part) for part in PARTS for finding in FINDINGS]
        kinds = rng.choice(list(KINDS), size=n, p=list(KINDS.values()))
        prompts, completions = [], []
        for row in range(n):
            finding, part = names[row * 7 % len(names)]
            text = FINDINGS[finding].format(part)
            prompt = f"What is {finding.lower()} of the {part}?"
            if kinds[row] == "swapped definition":
                text = FINDINGS[list(FINDINGS)[(row * 3 + 1) % len(FINDINGS)]].format(PARTS[row % len(PARTS)])
            elif kinds[row] == "off-domain":
                prompt, text = OFF_DOMAIN[row % len(OFF_DOMAIN)]
            elif kinds[row] == "near-duplicate":
                text = text.replace(".", " .").lower()
            elif kinds[row] == "wrong arithmetic":
                a, b = 12 + row % 31, 7 + row % 17
                prompt = f"A ward has {a} beds and {b} are taken. How many are free? Explain."
                text = f"There are {a} beds. {b} are taken. {a} - {b} = {a - b + 3}. So {a - b + 3} beds are free."
            if row % 29 == 3:
                text += " " + " ".join(FINDINGS[f].format(p) for f, p in names[row : row + 9])
            prompts.append(prompt)
            completions.append(text)
        shift_u = {
            "clean": 0.2,
            "swapped definition": 0.13,
            "off-domain": 0.02,
            "near-duplicate": 0.19,
            "wrong arithmetic": 0.05,
        }
        shift_r = {"clean": 0, "swapped definition": 0.07, "off-domain": 0.01, "near-duplicate": 0.0, "wrong arithmetic": 0.12}
        tokens = np.array([30 + len(p) // 4 + len(c) // 4 for p, c in zip(prompts, completions, strict=True)], dtype=float)
        utility = np.array([shift_u[k] for k in kinds]) + rng.normal(0, 0.055, n) - 0.0003 * (tokens - tokens.mean())
        risk = np.maximum(0, np.array([shift_r[k] for k in kinds]) + rng.normal(0.005, 0.03, n))
        loss = rng.gamma(9, 0.27, n) + np.where(kinds == "swapped definition", 1.0, 0)
        norm = 40 / np.sqrt(tokens) * rng.lognormal(0, 0.3, n)
        scores = utility - 2.3 * risk
        order = np.argsort(-scores, kind="stable")[: n // 10]
        penalties = np.r_[0.0, np.geomspace(0.1, 20, 24), 2.3]
        path = []
        for penalty in penalties:
            rows = np.argsort(-(utility - penalty * risk), kind="stable")[: n // 10]
            path.append((float(penalty), float(risk[rows].mean()), float(utility[rows].mean())))
        steps = np.arange(1, 61)
        settings: dict[str, object] = {
            "form": "top",
            "bound": 25.0,
            "bound_of": "percentile",
            "anchor": "plain",
            "center": False,
            "stratify": "none",
            "bins": 8,
        }
        given: dict[str, Any] = {
            "method": "OGS",
            "picks_by": "agreement of each example’s gradient with the target, minus λ times its conflict with the anchor",
            "source": "OGS, 2026, arXiv 2602.06359",
            "settings": settings,
            "model": "SmolLM2-135M-Instruct",
            "sources": (
                Source("pool", "findings.jsonl", n + 3),
                Source("target", "findings-dev.jsonl", 60),
                Source("anchor", "general.jsonl", 300),
            ),
            "budget": "10%",
            "seed": 0,
            "date": "14 July 2026",
            "version": "0.1.0",
            "ids": [f"finding-{row:05d}" for row in range(n)],
            "prompts": prompts,
            "completions": completions,
            "selection": Selection(
                rows=torch.tensor(order.copy()),
                weights=torch.ones(len(order), dtype=torch.float64),
                scores=torch.tensor(scores),
                trace={
                    "utility": utility.tolist(),
                    "risk": risk.tolist(),
                    "bound": float(np.quantile(risk, 0.25)) + 0.004,
                    "lambda": 2.3,
                    "path": sorted(path),
                    "references": ["target", "anchor"],
                    "length_correlation": {"utility": -0.21, "risk": 0.04},
                    "simulated": {
                        "ogs": {"reward": 0.284, "cost": 0.0091},
                        "threshold": {"reward": 0.271, "cost": 0.0097},
                        "random": {"reward": 0.158, "cost": 0.0213},
                    },
                    "steps": {
                        "reward/simulated": (0.3 * (1 - np.exp(-steps / 20))).tolist(),
                        "reward/navigator": (0.27 * (1 - np.exp(-steps / 24)) + rng.normal(0, 0.006, 60)).tolist(),
                        "λ": np.maximum(0, 3 * np.exp(-steps / 15) * np.cos(steps / 5)).tolist(),
                    },
                },
                per_row=("utility", "risk"),
                notes=(
                    "The risk of 46% of the pool is zero: the anchor says nothing about these examples; try --anchor contrast.",
                ),
            ),
            "columns": {
                "loss": torch.tensor(loss),
                "tokens": torch.tensor(tokens),
                "completion_tokens": torch.tensor(np.array([float(len(c) // 4) for c in completions])),
                "norm": torch.tensor(norm),
            },
            "groups": [str(kind) for kind in kinds],
            "groups_are": "planted kinds",
            "excluded": (
                ("finding-00998", "no completion tokens after truncation to 1024"),
                ("finding-01011", "no completion tokens after truncation to 1024"),
                ("finding-01019", "the gradient is not finite"),
            ),
            "notes": ("The anchor’s direction is uncertain: split-half rank correlation of its scores is 0.64, below 0.7.",),
            "stages": (
                Stage("read and tokenize", 1.9, 2.4, None),
                Stage("gradients of the anchor", 62.3, 118.0, 540_000),
                Stage("gradients of the target", 14.8, 28.2, 410_000),
                Stage("gradients of the pool", 118.4, 229.6, 3_300_000),
                Stage("select", 0.21, 0.2, None),
                Stage("write", 0.4, 0.4, 180_000),
            ),
            "files": (
                ("selected.jsonl", "the chosen examples exactly as they were given, best first"),
                ("scores.parquet", "every number of every example"),
                ("excluded.jsonl", "what could not be used and why"),
                ("run.json", "settings, versions, seeds, hashes and costs of this run"),
            ),
        }
        return Page(**(given | changes))

    return make


@pytest.fixture(scope="session")
def small_page() -> Callable[..., Page]:
    """Returns a function that makes a page of six rows, two of them chosen by score, without anything optional."""

    def make(**changes: Any) -> Page:
        given: dict[str, Any] = {
            "method": "Pick",
            "picks_by": "the largest score",
            "settings": {},
            "model": "tiny",
            "sources": (Source("pool", "pool.jsonl", 6),),
            "budget": "2",
            "seed": 0,
            "date": "1 May 2026",
            "version": "0.1.0",
            "ids": list("abcdef"),
            "prompts": [f"question {c}" for c in "abcdef"],
            "completions": [f"answer {c}" for c in "abcdef"],
            "selection": Selection(
                rows=torch.tensor([4, 1]),
                weights=torch.ones(2, dtype=torch.float64),
                scores=torch.tensor([0.1, 0.8, 0.3, 0.2, 0.9, 0.4], dtype=torch.float64),
            ),
            "columns": {"tokens": torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])},
        }
        return Page(**(given | changes))

    return make
