"""Measures a model on test sets, item by item.

Losses, answer-bearing tokens, KL to the base model, multiple choice, generated text; and any lm-evaluation-harness task.
"""

from gradsieve.evaluate.generation import Generated
from gradsieve.evaluate.harness import TaskResult, harness, task_documents
from gradsieve.evaluate.measure import CHOICES, LOSSES, TEXTS, Metric, measure
from gradsieve.evaluate.network import KeptBase, keep_base
from gradsieve.evaluate.sets import Options, Suite, TestSet

__all__ = [
    "CHOICES",
    "LOSSES",
    "TEXTS",
    "Generated",
    "KeptBase",
    "Metric",
    "Options",
    "Suite",
    "TaskResult",
    "TestSet",
    "harness",
    "keep_base",
    "measure",
    "task_documents",
]
