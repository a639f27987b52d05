"""How exact the engine is: its numbers on two short examples against one float64 `backward()` each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsieve.gradients.directions import References
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.parameters import Site, choose_parameters
from gradsieve.gradients.settings import Batch, Block, EngineSettings
from ways import fill

END = {"embedding": "embedding", "head": "lm_head"}


class Truth:
    """Two short examples, their whole gradients by a float64 loop, and a float64 copy of the model."""

    def __init__(self, model: Any, spec: str) -> None:
        rng = torch.Generator().manual_seed(1)
        self.examples = [fill([length], model.config.vocab_size, rng, str(model.device)) for length in (40, 64)]
        self.twin = copy.deepcopy(model).double().eval()
        sites = choose_parameters(self.twin, spec)
        self.tied = self.twin.get_input_embeddings().weight is self.twin.get_output_embeddings().weight
        self.ends = {END[site.kind]: site.name for site in sites if site.kind in END}
        untied = copy.deepcopy(self.twin) if self.tied else self.twin
        if self.tied:
            untied.get_output_embeddings().weight = nn.Parameter(untied.get_output_embeddings().weight.detach().clone())
        self.gradients = [self._loop(untied, single, sites) for single in self.examples]

    @staticmethod
    def _loop(twin: Any, single: Batch, sites: Sequence[Site]) -> dict[str, Tensor]:
        """One float64 backward with a loss of its own: gradient [d_out, d_in] per site; a tied weight's parts stay apart."""
        twin.requires_grad_(True)
        logits = twin(input_ids=single.input_ids, use_cache=False).logits[0, :-1]
        torch.autograd.backward(nn.functional.cross_entropy(logits, single.labels[0, 1:]))
        gradients = {}
        for site in sites:
            g = twin.get_parameter(site.name).grad
            gradients[site.name] = g.T.clone() if site.kind == "transposed" else g.clone()
        twin.zero_grad(set_to_none=True)
        return gradients


def largest_error(engine: GradientEngine, settings: EngineSettings, references: References | None, truth: Truth) -> float:
    """The largest relative error of an engine; mean and sd relative to the root mean square, max and min to the larger."""
    with GradientEngine(truth.twin, EngineSettings(settings.params, settings.sketch, norms=False, signals=False)) as exact:
        sketches = [exact.block(single).sketch.double() for single in truth.examples]
    with engine:
        blocks = [engine.block(single) for single in truth.examples]
    errors = []
    for block, sketch, every in zip(blocks, sketches, truth.gradients, strict=True):
        errors.append(float((block.sketch.double() - sketch).norm() / sketch.norm()))
        gradients = {site.name: every[site.name] for site in engine.sites}
        errors += column_errors(block, gradients, engine.sites, settings, references, truth.tied)
        if settings.signals:
            for end, parameter in truth.ends.items():
                errors += statistic_errors(block, end, every[parameter])
    return max(errors)


def column_errors(
    block: Block,
    gradients: dict[str, Tensor],
    sites: Sequence[Site],
    settings: EngineSettings,
    references: References | None,
    tied: bool,
) -> list[float]:
    ends = {site.kind: site.name for site in sites if site.kind in ("embedding", "head")}
    square = sum(float(g.square().sum()) for g in gradients.values())
    if len(ends) == 2 and tied:
        square += 2 * float((gradients[ends["embedding"]] * gradients[ends["head"]]).sum())
    errors = []
    if settings.norms:
        errors.append(abs(float(block.columns["norm"][0]) / square**0.5 - 1))
    for name, g in gradients.items() if settings.layers != "none" else ():
        errors += statistic_errors(block, name, g)
    for i, name in enumerate(references.names if references else ()):
        assert references is not None
        value = sum(float((g * references.tensors[key][i]).sum()) for key, g in gradients.items())
        errors.append(abs(float(block.columns[f"dot/{name}"][0]) - value) / square**0.5)
    return errors


def statistic_errors(block: Block, group: str, g: Tensor) -> list[float]:
    """The errors of one group's columns; mean and sd relative to the root mean square, max and min to the larger."""
    rms, extreme = float(g.square().mean().sqrt()), float(g.abs().max())
    truth = {
        "norm": (float(g.norm()), float(g.norm())),
        "mean": (float(g.mean()), rms),
        "sd": (float(g.std(correction=0)), rms),
        "max": (float(g.max()), extreme),
        "min": (float(g.min()), extreme),
    }
    columns = {name: f"{name}/{group}" for name in truth if f"{name}/{group}" in block.columns}
    return [abs(float(block.columns[column][0]) - truth[name][0]) / truth[name][1] for name, column in columns.items()]
