"""Measures a model on test sets, item by item: losses, answer-bearing tokens, KL to the base model, multiple choice."""

from gradsieve.evaluate.measure import CHOICES, LOSSES, Metric, measure
from gradsieve.evaluate.sets import Options, Suite, TestSet

__all__ = ["CHOICES", "LOSSES", "Metric", "Options", "Suite", "TestSet", "measure"]
