"""The transfer gate: does a Navigator rank examples as the model does that will be trained?

Two models that read the same text agree to some degree before either has learnt anything: format, length and shared words are
in the gradients of random weights too. So the Navigator must agree with the model better than an untrained copy of itself does.

OUT/transfer.json   ρ, the copy's ρ, their intervals and the cosines of all three, example by example
OUT/transfer.svg    Navigator against model
OUT/navigator, OUT/model, OUT/untrained    the gradients, so that a killed run goes on
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsieve.atomic import write_atomically
from gradsieve.clock import Progress, silent
from gradsieve.data import Format, read_examples
from gradsieve.demo import demo_set, is_demo
from gradsieve.errors import InvalidArgument
from gradsieve.models import DType, find_model, resolve_device, resolve_dtype, untrained
from gradsieve.pipeline import select
from gradsieve.selectors.ranking import spearman
from gradsieve.selectors.reading import cosines
from gradsieve.types import Example

WARN_BELOW = 0.5
FEWEST = 200
"""Examples below which a note says that the interval is wide (METHODS works with 200 to 500)."""


@dataclass(frozen=True)
class Transfer:
    """Compare how two models see examples push against an anchor: may the smaller one choose for the larger?

    Attributes:
        navigator: The model that is to do the scoring: a folder, a hub id, or `demo`.
        model: The model that is to be trained.
        pool: Files of examples to draw from, or `demo`.
        anchor: Files of general examples, or `demo`.
        examples: How many are drawn at random, at least 3; 200 to 500 are enough.
        out: Folder for the results.
        override: Accept a Navigator whose ranking may have nothing to do with the model's.
        resamples: Of the bootstrap, at least 100.
        format: Shape of the examples: messages, prompt-completion, alpaca, sharegpt; auto looks.
        category_field: Field of an anchor's example that names its ability.
        max_length: Tokens per example; the rest is cut off at the end.
        params: Parameters the gradient is taken over, as in `select`.
        dtype: Compute type; auto is bfloat16 where the hardware has it, else float32.
        device: auto, cpu, cuda, cuda:N.
        batch_tokens: Tokens in one batch; lower it if memory runs out.
        seed: Of the draw and the bootstrap.
    """

    navigator: str
    model: str
    pool: tuple[str, ...]
    anchor: tuple[str, ...]
    examples: int = 300
    out: str = "transfer-out"
    override: bool = False
    resamples: int = 2000
    format: Format = "auto"
    category_field: str = "category"
    max_length: int = 1024
    params: str = "auto"
    dtype: DType = "auto"
    device: str = "auto"
    batch_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 3:
            raise InvalidArgument(f"examples must be at least 3, got {self.examples}; 200 to 500 are enough")
        if self.resamples < 100:
            raise InvalidArgument(f"resamples must be at least 100, got {self.resamples}")
        for name in ("navigator", "model"):
            if not getattr(self, name):
                raise InvalidArgument(f"--{name} must name a folder, a hub id or `demo`, got none")


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the comparison found.

    Attributes:
        rho: Spearman's rank correlation of cos(g_z, g_ref) under the two models.
        interval: Its 95 % bootstrap interval over the examples.
        ids: The examples that both models can use.
        untrained: ρ of the Navigator's form with fresh weights and the model.
        gain: 95 % interval of `rho` - `untrained`, over the same resamples.
        cosines: float64 [n] per model, `navigator`, `model` and `untrained`.
        notes: What the user must know.
    """

    rho: float
    interval: tuple[float, float]
    untrained: float
    gain: tuple[float, float]
    ids: Sequence[str]
    cosines: Mapping[str, Tensor]
    notes: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether nothing shows that the Navigator ranks as the model does, or better than fresh weights in its place."""
        return not (self.interval[0] > 0 and self.gain[0] > 0)


def transfer(settings: Transfer, progress: Progress = silent) -> Verdict:
    """Compares cos(g_z, g_anchor) (Eq. OGS-1) of the two models on random examples, and writes the results.

    The anchor's mean gradient is each model's own; the products are exact. An untrained copy of the Navigator is compared too.

    Raises:
        InvalidArgument: The verdict is to refuse and `override` is not set, after the results are written.
        GradsieveError: Whatever else the user can mend.
    """
    sample, notes = _sample(settings)
    anchor = _read("anchor", settings.anchor, settings)
    out = Path(settings.out)
    found: dict[str, dict[str, float]] = {}
    for role, (model, tokenizer) in _models(settings).items():
        result = select(
            "orth-only",
            model=model,
            tokenizer=tokenizer,
            pool=sample,
            anchor=anchor,
            budget="100%",
            store=str(out / role),
            progress=progress,
            **{name: getattr(settings, name) for name in ("max_length", "params", "dtype", "device", "batch_tokens", "seed")},
        )
        cosine = cosines(result.pool, "anchor")
        found[role] = {id: c for id, c in zip(result.pool.ids, cosine.tolist(), strict=True) if not math.isnan(c)}
        notes += [f"{role}: {note}" for note in (*result.notes, *result.selection.notes)]
    verdict = judge(found, settings.resamples, settings.seed, notes)
    _write(verdict, settings, out)
    if verdict.refused and not settings.override:
        (low, high), (least, most) = verdict.interval, verdict.gain
        raise InvalidArgument(
            f"navigator must rank examples as the model does, got a rank correlation of {verdict.rho:.2f} with a 95% interval "
            f"of [{low:.2f}, {high:.2f}], where fresh weights in its place reach {verdict.untrained:.2f} (it is better by "
            f"[{least:.2f}, {most:.2f}]); take a Navigator of the model's family, more --examples, or pass --override True"
        )
    return verdict


def _models(settings: Transfer) -> dict[str, tuple[Any, Any]]:
    """Returns by role what `select` takes as model and tokenizer; the untrained copy is an object."""
    source = find_model(settings.navigator)
    device = resolve_device(settings.device)
    copy = untrained(source, settings.seed, resolve_dtype(settings.dtype, device), device)
    return {
        "navigator": (settings.navigator, None),
        "model": (settings.model, None),
        "untrained": (copy, source.tokenizer),
    }


def judge(found: Mapping[str, Mapping[str, float]], resamples: int, seed: int, notes: Sequence[str]) -> Verdict:
    """Returns the verdict on the cosines of `navigator`, `model` and `untrained`, each by example id.

    Raises:
        InvalidArgument: They share fewer than 3 examples.
    """
    ids = sorted(set.intersection(*(set(side) for side in found.values())))
    if len(ids) < 3:
        raise InvalidArgument(f"all models must be able to use at least 3 of the same examples, got {len(ids)}; give others")
    sides = {role: torch.tensor([side[id] for id in ids], dtype=torch.float64) for role, side in found.items()}
    trained, fresh = (spearman(sides[role], sides["model"]) for role in ("navigator", "untrained"))
    values, null = (resampled(sides[role], sides["model"], resamples, seed) for role in ("navigator", "untrained"))
    interval, gain = percentiles(values), percentiles(values - null)
    said = [
        *notes,
        f"fresh weights in the navigator's place reach {fresh:.2f}: what format, length and shared words give alone",
    ]
    if len(ids) < FEWEST:
        said.append(f"only {len(ids)} examples were compared, so the interval is wide; 200 to 500 are recommended")
    if not interval[0] > 0:
        said.append("nothing shows that the navigator ranks examples as the model does: the interval is not above 0")
    elif not gain[0] > 0:
        said.append(
            "nothing shows that the navigator ranks examples better than fresh weights in its place: it is better by "
            f"[{gain[0]:.2f}, {gain[1]:.2f}]"
        )
    elif trained < WARN_BELOW:
        said.append(f"the navigator ranks examples only roughly as the model does: ρ is below {WARN_BELOW}")
    return Verdict(trained, interval, fresh, gain, ids, sides, tuple(said))


def resampled(a: Tensor, b: Tensor, resamples: int, seed: int) -> Tensor:
    """Returns Spearman's ρ of resampled pairs, float64 [resamples]: the same rows for any a and b of one length.

    A resample in which one side is constant has no ρ and counts as 0: it shows no agreement. NaN where a side is constant.
    """
    if math.isnan(spearman(a, b)):
        return torch.full((resamples,), math.nan, dtype=torch.float64)
    rng = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(a), (len(a),), generator=rng) for _ in range(resamples))
    return torch.tensor([spearman(a[rows], b[rows]) for rows in draws], dtype=torch.float64).nan_to_num(0.0)


def percentiles(values: Tensor) -> tuple[float, float]:
    """Returns the 95 % percentile interval."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _read(role: str, files: Sequence[str], settings: Transfer) -> list[Example]:
    if not files:
        raise InvalidArgument(f"--{role} must name examples, got none; pass a JSONL, or `--{role} demo`")
    if len(files) == 1 and is_demo(files[0]):
        return demo_set(role, files[0], settings.seed)
    return list(read_examples(files, format=settings.format, category_field=settings.category_field).examples)


def _sample(settings: Transfer) -> tuple[list[Example], list[str]]:
    pool = sorted(_read("pool", settings.pool, settings), key=lambda example: example.id)
    notes = []
    if len(pool) < settings.examples:
        notes.append(f"the pool has {len(pool)} examples where {settings.examples} were asked for; all are compared")
    rng = torch.Generator().manual_seed(settings.seed)
    drawn = torch.randperm(len(pool), generator=rng)[: settings.examples].sort().values
    return [pool[row] for row in drawn.tolist()], notes


# -- results ------------------------------------------------------------------------------------------------------------


def _write(verdict: Verdict, settings: Transfer, out: Path) -> None:
    record: dict[str, Any] = {
        "navigator": settings.navigator,
        "model": settings.model,
        "rho": verdict.rho,
        "interval": verdict.interval,
        "untrained": verdict.untrained,
        "gain": verdict.gain,
        "notes": verdict.notes,
        "cosines": dict(zip(verdict.ids, zip(*(c.tolist() for c in verdict.cosines.values()), strict=True), strict=True)),
    }
    write_atomically(out / "transfer.json", json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
    write_atomically(out / "transfer.svg", scatter(verdict, settings.navigator, settings.model).encode())


def scatter(verdict: Verdict, navigator: str, model: str) -> str:
    """Returns the plot of one model's cosines against the other's, as SVG."""
    size, edge = 420.0, 56.0
    x, y = (verdict.cosines[name] for name in ("navigator", "model"))
    (left, width), (bottom, height) = ((float(v.min()), float(v.max() - v.min()) or 1.0) for v in (x, y))
    across = (edge + (x - left) / width * size).tolist()
    up = (edge + (1 - (y - bottom) / height) * size).tolist()
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in zip(across, up, strict=True))
    ticks = "".join(
        f'<text x="{edge + share * size:.0f}" y="{edge + size + 18:.0f}" text-anchor="middle">{left + share * width:.2f}</text>'
        f'<text x="48" y="{edge + (1 - share) * size + 4:.0f}" text-anchor="end">{bottom + share * height:.2f}</text>'
        for share in (0.0, 0.5, 1.0)
    )
    whole, middle, (low, high) = size + 2 * edge, edge + size / 2, verdict.interval
    title = f"rank correlation {verdict.rho:.2f} [{low:.2f}, {high:.2f}], {len(x)} examples"
    by, of = (f"cosine to the anchor, {html.escape(name)}" for name in (navigator, model))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole:.0f} {whole:.0f}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{title}"><rect width="100%" height="100%" fill="#fff"/>'
        f'<rect x="{edge}" y="{edge}" width="{size}" height="{size}" fill="none" stroke="#999"/>'
        f'<g fill="#0b62a4" fill-opacity="0.55">{dots}</g><g fill="#333">{ticks}'
        f'<text x="{middle}" y="28" text-anchor="middle" font-size="14">{title}</text>'
        f'<text x="{middle}" y="{edge + size + 40}" text-anchor="middle">{by}</text>'
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{of}</text></g></svg>\n'
    )
