"""Fine-tuning on chosen examples: the recipe, the run, and the gradient surgery that selection is compared with.

recipe        settings of a run
plan          which examples each step sees, drawn up before the first
finetune      a run in its folder, in which a killed one goes on
checks        what is refused before a run, and what its outcome depends on
trainer       TRL's, led by the plan
loss          what is trained on
surgery       what is done to a step's gradient that opposes the anchor's
adapters      LoRA as every run has it
lending       a model is given back as it was
navigator     a live model that OGS trains, measures and puts back
"""

from gradsieve.train.finetune import Checkpoint, Trained, finetune
from gradsieve.train.recipe import Recipe

__all__ = ["Checkpoint", "Recipe", "Trained", "finetune"]
