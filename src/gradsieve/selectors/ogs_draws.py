"""What each cluster of the pool can give, draw by draw: the action space of OGS.

The source says that the next batch comes from the chosen cluster, not which of its rows. **[choice]** A cluster gives its
rows in a fixed order. Then draw j of a cluster is the same set of rows in every episode, what the simulator predicted is
what is emitted, and the policy decides how far into each cluster to go and when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsieve.selectors.ogs_threshold import LARGEST_PENALTY
from gradsieve.selectors.ranking import best_first


@dataclass(frozen=True, eq=False)
class Draws:
    """The draws of K clusters, numbered by their smallest id; J is the largest number of draws that one can give.

    Attributes:
        rows: Per cluster all its rows in the order they are drawn, int64.
        index: int64 [n], c·J + j for a row in draw j of cluster c; -1 for rows that no episode can reach.
        size: float64 [K, J], rows of each draw, 0 where there is none.
        price: float64 [K, J], what each draw costs of the budget (examples or tokens).
        left: float32 [K, J + 1, 7], what the cluster still holds before draw j: mean Orth, sd of Orth, mean risk, share at
            risk, mean utility, mean loss, share left. Means are counted in standard deviations of the pool from its mean.
        batch: Rows of a full draw.
        budget: What an episode may spend.
    """

    rows: tuple[Tensor, ...]
    index: Tensor
    size: Tensor
    price: Tensor
    left: Tensor
    batch: int
    budget: float

    @property
    def steps(self) -> float:
        """How many draws the budget pays for, at the mean price of a draw."""
        return self.budget / float(self.price.sum() / (self.size > 0).sum())


def arrange(
    labels: Tensor,
    order: Tensor,
    by_id: Tensor,
    price: Tensor,
    features: tuple[Tensor, Tensor, Tensor, Tensor],
    batch: int,
    budget: float,
) -> Draws:
    """Cuts each cluster into the draws it will give; O(n log n).

    Args:
        labels: int64 [n], the cluster of each row, -1 for rows left out. The numbering carries no information.
        order: int64, the rows that have a cluster, in the order in which each cluster gives its own.
        by_id: Rows sorted by id.
        price: float64 [n], examples (1) or tokens.
        features: Orth, risk, utility and loss, float64 [n] each.
        batch: Rows of a draw; a cluster's last one may have fewer.
        budget: What an episode may spend, in the unit of `price`.
    """
    names = dict.fromkeys(labels[by_id][labels[by_id] >= 0].tolist())
    clusters = tuple(order[labels[order] == name] for name in names)
    reach = []
    for rows in clusters:
        before = price[rows].cumsum(0) - price[rows]
        reach.append(-(-int((before < budget).sum()) // batch))  # a draw may begin while anything is left to spend
    J = max(reach)
    index = torch.full((len(labels),), -1)
    for c, (rows, draws) in enumerate(zip(clusters, reach, strict=True)):
        rows = rows[: draws * batch]
        index[rows] = c * J + torch.arange(len(rows)) // batch
    inside = torch.cat(clusters)
    inside = inside[index[inside] >= 0]
    shape = (len(clusters), J)
    size = grouped_sum(torch.ones_like(price), index, inside, len(clusters) * J).view(shape)
    cost = grouped_sum(price, index, inside, len(clusters) * J).view(shape)
    pool = by_id[labels[by_id] >= 0]
    left = torch.stack([_left(f, batch, J) for f in _standardised(features, pool, clusters)])
    return Draws(clusters, index, size, cost, left.float(), batch, budget)


def grouped_sum(values: Tensor, labels: Tensor, rows: Tensor, count: int) -> Tensor:
    """Returns Σ values over each label, adding up in the order of `rows`: float64 [count]."""
    return torch.zeros(count, dtype=torch.float64).index_add_(0, labels[rows], values[rows])


def _standardised(features: tuple[Tensor, ...], pool: Tensor, clusters: tuple[Tensor, ...]) -> list[Tensor]:
    orth, risk, utility, loss = features
    values = torch.stack([orth, risk, utility, loss], dim=1)
    centre, spread = values[pool].mean(0), values[pool].std(0, correction=0)
    values = (values - centre) / torch.where(spread > 0, spread, 1.0)
    values = torch.cat([values, (risk > 0).double()[:, None]], dim=1)
    return [values[rows] for rows in clusters]


def _left(values: Tensor, batch: int, draws: int) -> Tensor:
    """Returns `Draws.left` of one cluster from its rows' Orth, risk, utility, loss and whether at risk: [draws + 1, 7]."""
    n = len(values)
    values = torch.cat([values, values[:, :1].square(), torch.ones(n, 1, dtype=torch.float64)], dim=1)
    tail = torch.cat([values.flip(0).cumsum(0).flip(0), torch.zeros(1, values.shape[1], dtype=torch.float64)])
    tail = tail[(torch.arange(draws + 1) * batch).clamp(max=n)]  # nothing is left after n rows
    count = tail[:, -1]
    orth, risk, utility, loss, at_risk, square, _ = (tail / count.clamp(min=1)[:, None]).unbind(1)
    sd = (square - orth.square()).clamp(min=0).sqrt()  # rounding may go below 0
    return torch.stack([orth, sd, risk, at_risk, utility, loss, count / n], dim=1)


def threshold_scores(
    utility: Tensor, cost: Tensor, bound: float, by_id: Tensor, take: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float | None]:
    """Returns utility - λ·cost, and λ: the smallest λ ≥ 0 at which the best rows within the budget cost at most `bound`.

    Up to one row it solves max Σ a_i x_i with Σ c_i x_i ≤ bound, Σ x_i = k, 0 ≤ x ≤ 1 (Eq. OGS-8, with a signed cost). If no λ
    up to 10⁶ meets the bound, the scores are -cost and λ is None.

    Args:
        utility: float64 [n], NaN for rows left out.
        cost: float64 [n].
        bound: On the sum of the costs of the chosen.
        by_id: Rows sorted by id.
        take: Cuts an order of rows where the budget ends.
    """
    scale = float(cost[~utility.isnan()].abs().max()) or 1.0  # so that λ and its limit are free of units

    def scores(penalty: float) -> Tensor:
        return utility - penalty / scale * cost

    def meets(penalty: float) -> bool:
        return float(cost[take(best_first(scores(penalty), by_id))].sum()) <= bound

    if meets(0.0):
        return utility, 0.0
    low, high = 0.0, 1.0
    while not meets(high):
        low, high = high, 2 * high
        if high > LARGEST_PENALTY:
            return torch.where(utility.isnan(), torch.nan, -cost), None
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return scores(high), high / scale
