"""Gradients on disk: immutable shards that survive a crash, and views that selectors read."""

from gradsieve.store.checkpoints import CheckpointGradients, finite_rows
from gradsieve.store.gradient_store import GradientStore, StoredGradients, Unit
from gradsieve.store.manifest import Manifest

__all__ = ["CheckpointGradients", "GradientStore", "Manifest", "StoredGradients", "Unit", "finite_rows"]
