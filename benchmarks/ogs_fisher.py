"""Why the simulated KL divergence is not the measured one: `python benchmarks/ogs_fisher.py [--out fisher-study]`.

Subsets of the demo's pool, most of one size, are trained on (LoRA, AdamW, float32), and the KL divergence to the base model is
measured on anchor examples of the held-out half. Some subsets are trained on again in another order of their rows, which is
noise that no simulator can foresee, and some on their first 4, 8 and 12 rows only. Then ½ δᵀFδ (Eq. OGS-11) is computed from
whole gradients of the adapters, without sketches,

    with δ: the sum of unit gradients (the simulator's), the same with AdamW's momentum and one step size for all numbers,
            AdamW itself on the gradients of the start, and the displacement that really happened
    with F: the empirical Fisher of mean gradients (the simulator's), and that of labels sampled from the model, whose
            gradients are summed over an example's T tokens and divided by √T: the second order of the KL divergence per token;
            of the anchor's reference half, and of the examples that the KL divergence is measured on

All is kept in the folder, so that a second run only prints. Needs 4 GB of memory; an hour on two slow cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from torch import Tensor

from gradsieve.data import IGNORE, Tokens, TokenSet
from gradsieve.demo import demo_set
from gradsieve.evaluate.likelihood import likelihood
from gradsieve.models import find_model
from gradsieve.navigation import make_navigator, split_anchor
from gradsieve.selectors.ranking import spearman
from gradsieve.train.navigator import LoRANavigator, NavigatorSettings

POOL, SIZE, BATCH, CLUSTERS = 120, 16, 2, 6
SUBSETS, AGAIN, SHORTER = 9, 3, 4
MEASURED = 14
"""Shortest examples of the held-out half: what the KL divergence is measured on."""
IN_NATS = ("AdamW, gradients of the start", "as it happened")


@dataclass(frozen=True, eq=False)
class Lab:
    """A Navigator and the places of its adapters that have a gradient at the start (the B of LoRA)."""

    navigator: LoRANavigator
    pool: Sequence[Tokens]
    reference: Sequence[Tokens]
    measured: Sequence[Tokens]

    @property
    def moving(self) -> list[Tensor]:
        return [p for name, p in self.navigator._live.named_parameters() if p.requires_grad and "lora_B" in name]

    def gradient(self, loss: Tensor, keep: bool = False) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.moving, retain_graph=keep)])

    def mean_gradients(self, examples: Sequence[Tokens]) -> Tensor:
        return torch.stack([self.gradient(self.navigator._losses([tokens]).mean()) for tokens in examples])

    def sampled_gradients(self, examples: Sequence[Tokens], samples: int) -> Tensor:
        """Gradients of -log p(ŷ) / √T with ŷ drawn from the model, `samples` an example: F is their mean square."""
        rows = []
        for tokens in examples:
            at = torch.tensor(tokens.labels[1:] != IGNORE).nonzero()[:, 0]
            log_p = self.navigator._live(torch.tensor(tokens.input_ids)[None].long()).logits[0, at].float().log_softmax(1)
            for _ in range(samples):
                drawn = torch.multinomial(log_p.detach().exp(), 1)
                rows.append(self.gradient(-log_p.gather(1, drawn).sum() / len(at) ** 0.5, keep=True))
        return torch.stack(rows)

    def played(self, rows: Tensor) -> tuple[float, Tensor]:
        """Returns the KL divergence after training on these rows, and -δ."""
        self.navigator.reset()
        for part in rows.split(BATCH):
            self.navigator.step(part)
        found = likelihood(self.navigator._live, self.measured, kl=True, batch_tokens=2048)
        assert found.kl is not None
        sums = torch.zeros(len(self.measured), dtype=torch.float64).index_add_(0, found.row, found.kl)
        return float((sums / torch.bincount(found.row)).mean()), torch.cat([p.detach().flatten() for p in self.moving])


def laboratory() -> Lab:
    source = find_model("demo")
    sets = {
        "pool": demo_set("pool", f"demo:{POOL}"),
        "target": demo_set("target", "demo:16"),
        "anchor": demo_set("anchor")[::2],
    }
    tokens = {role: TokenSet.of(role, part, source.tokenizer, max_length=128) for role, part in sets.items()}
    reference, held_out = split_anchor(tokens["anchor"])
    shortest = sorted(sorted(range(len(held_out.kept)), key=lambda i: held_out.lengths[i])[:MEASURED])
    navigator = make_navigator(
        source.load(torch.float32, "cpu"),
        tokens["pool"].tokens,
        tokens["target"],
        held_out,
        source.tokenizer,
        NavigatorSettings(),
    )
    return Lab(navigator, tokens["pool"].tokens, reference.tokens, [held_out.tokens[i] for i in shortest])


def kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    if not file.exists():
        save_file({"rows": make()}, file)
    return load_file(file)["rows"]


def drawn(G: Tensor) -> list[tuple[str, Tensor]]:
    """Returns (kind, rows): uniform draws, some in another order, draws from two of six clusters, and some cut short."""
    U = G / G.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh((U @ U.T).double())
    points = (vectors * values.clamp(min=0).sqrt()).numpy()
    labels = torch.tensor(KMeans(CLUSTERS, n_init=5, random_state=0).fit_predict(points))
    rng, n = torch.Generator().manual_seed(0), len(G)
    plan = [("uniform", torch.randperm(n, generator=rng)[:SIZE]) for _ in range(SUBSETS)]
    plan += [("again", plan[i][1][torch.randperm(SIZE, generator=rng)]) for i in range(AGAIN)]
    while len(plan) < 2 * SUBSETS + AGAIN:
        among = torch.isin(labels, torch.randperm(CLUSTERS, generator=rng)[:2]).nonzero()[:, 0]
        if len(among) >= SIZE:
            plan.append(("two clusters", among[torch.randperm(len(among), generator=rng)[:SIZE]]))
    return plan + [("shorter", plan[i][1][:k]) for i in range(SHORTER) for k in range(SIZE // 4, SIZE, SIZE // 4)]


def adam(steps: Iterable[Tensor], *, scalar: bool) -> Tensor:
    """Returns Σ_t m̂_t / √v̂_t; `scalar` has one v for all numbers, as a simulator in sketch space could."""
    m = v = out = torch.zeros(())
    for t, g in enumerate(steps, 1):
        if not scalar:
            g = g * min(1.0, 1.0 / float(g.norm()))  # the Navigator shortens long gradients
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * (g.square().sum() if scalar else g.square())
        out = out + m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + (0.0 if scalar else 1e-8))
    return out


def displacements(G: Tensor, rows: Tensor, moved: Tensor) -> dict[str, Tensor]:
    parts = rows.split(BATCH)
    means = [G[part].mean(0) for part in parts]
    return {
        "unit gradients": torch.stack([(G[p] / G[p].norm(dim=1, keepdim=True)).mean(0) for p in parts]).sum(0),
        "momentum, one step size": adam(means, scalar=True),
        "AdamW, gradients of the start": NavigatorSettings().learning_rate * adam(means, scalar=False),
        "as it happened": -moved,
    }


def table(plan: Sequence[tuple[str, Tensor]], kl: Tensor, half: dict[tuple[str, str], list[float]]) -> None:
    kinds = [kind for kind, _ in plan]
    for kind in ("uniform", "two clusters"):
        own = kl[[k == kind for k in kinds]]
        print(f"{kind}: {len(own)} subsets, KL {own.mean():.3f} nats a token, sd {own.std() / own.mean():.0%} of it")
    again = kl[[k == "again" for k in kinds]]
    noise = float(((again.log() - kl[:AGAIN].log()).square().mean() / 2).sqrt())
    print(f"the same rows in another order: sd {noise:.0%}")
    print(f"{'rank correlation with the measured KL':76}uniform  two clusters   one size   any size   mean, nats")
    for (path, fisher), values in half.items():
        x, cells = torch.tensor(values, dtype=torch.float64), []
        of_a_size = "uniform", "two clusters", "again"
        same = torch.tensor([k in of_a_size for k in kinds])
        for among in (("uniform",), ("two clusters",), of_a_size, (*of_a_size, "shorter")):
            own = torch.tensor([k in among for k in kinds])
            cells.append(f"{spearman(x[own], kl[own]):5.2f}")
        size = f"{float(x[same].mean()):.3g}" if path in IN_NATS else "no unit"
        print(f"δ {path:30} F {fisher:42}{'       '.join(cells)}      {size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fisher-study"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    lab = laboratory()
    G = kept(out / "pool.safetensors", lambda: lab.mean_gradients(lab.pool))
    torch.manual_seed(0)
    fishers = {
        "empirical, reference half": kept(out / "reference.safetensors", lambda: lab.mean_gradients(lab.reference)),
        "empirical, measured examples": kept(out / "measured.safetensors", lambda: lab.mean_gradients(lab.measured)),
        "sampled labels, measured examples": kept(out / "sampled.safetensors", lambda: lab.sampled_gradients(lab.measured, 3)),
        "sampled labels, reference half": kept(
            out / "sampled-ref.safetensors", lambda: lab.sampled_gradients(lab.reference, 2)
        ),
    }
    plan, kl = drawn(G), []
    half: dict[tuple[str, str], list[float]] = {}
    for i, (kind, rows) in enumerate(plan):
        file = out / f"run-{i}.json"
        if not file.exists():
            found, moved = lab.played(rows)
            save_file({"rows": moved}, out / f"run-{i}.safetensors")
            file.write_text(json.dumps({"kind": kind, "rows": rows.tolist(), "kl": found}))
        kl.append(json.loads(file.read_text())["kl"])
        for path, delta in displacements(G, rows, load_file(out / f"run-{i}.safetensors")["rows"]).items():
            for fisher, F in fishers.items():
                half.setdefault((path, fisher), []).append(0.5 * float((F @ delta).square().mean()))
        print(f"{kind:13} KL {kl[-1]:.4f}", flush=True)
    table(plan, torch.tensor(kl, dtype=torch.float64), half)


if __name__ == "__main__":
    main()
