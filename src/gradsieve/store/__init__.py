"""Gradients on disk: immutable shards that survive a crash, and views that selectors read."""

from gradsieve.store.gradient_store import GradientStore, StoredGradients, Unit
from gradsieve.store.manifest import Manifest

__all__ = ["GradientStore", "Manifest", "StoredGradients", "Unit"]
