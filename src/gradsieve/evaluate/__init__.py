"""Measures a model on test sets, item by item.

Losses, answer-bearing tokens, KL to the base model, multiple choice, generated text; and any lm-evaluation-harness task.
"""

from gradsieve.evaluate.generation import Generated
from gradsieve.evaluate.harness import TaskResult, check_tasks, harness, task_digest, task_documents
from gradsieve.evaluate.measure import CHOICES, LOSSES, TEXTS, Metric, fits, measure
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
    "check_tasks",
    "fits",
    "harness",
    "keep_base",
    "measure",
    "task_digest",
    "task_documents",
]
