"""Fine-tuning on chosen examples: the recipe, the run, and the gradient surgery that selection is compared with."""

from gradsieve.train.finetune import Checkpoint, Trained, finetune
from gradsieve.train.recipe import Recipe

__all__ = ["Checkpoint", "Recipe", "Trained", "finetune"]
