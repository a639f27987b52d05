"""What metrics are measured in, whether more of them is better, and what gain is of them: the only place that says so."""

from __future__ import annotations

LOWER_IS_BETTER = frozenset(
    {"loss", "nll", "key_loss", "kl", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
)
"""Metrics of which less is better, unless their name says otherwise; of all others more is."""

_LOWER, _HIGHER = " (lower is better)", " (higher is better)"

UNITS = {
    **dict.fromkeys(("loss", "key_loss", "kl"), "nats per token"),
    **dict.fromkeys(("nll", "loglikelihood"), "nats"),
    "tokens": "tokens",
    **dict.fromkeys(("key_accuracy", "number_accuracy", "choice", "choice_norm", "exact_number", "stopped"), "share"),
    "bleu": "0 to 100",
    **dict.fromkeys(("meteor", "meteor_nosyn", "rouge1", "rouge2", "rougeL"), "0 to 1"),
    **dict.fromkeys(("acc", "acc_norm", "exact_match"), "share"),  # of lm-evaluation-harness
    "bits_per_byte": "bits per byte",
}
"""By metric; others have none that we know of."""


def lower_is_better(metric: str) -> bool:
    """Says whether less of a metric is better; of `METRIC,FILTER` it is as of `METRIC`."""
    return metric.endswith(_LOWER) or (not metric.endswith(_HIGHER) and metric.partition(",")[0] in LOWER_IS_BETTER)


def directed(metric: str, higher: bool | None) -> str:
    """Returns a metric's name, which says what is better where its task declares what nobody would take it for."""
    if higher is None or higher != lower_is_better(metric):
        return metric
    return metric + (_HIGHER if higher else _LOWER)


def unit(metric: str) -> str:
    """Returns what a metric is measured in, empty where that is not known; `METRIC,FILTER` is measured as `METRIC` is."""
    return UNITS.get(metric.partition(",")[0], "")


def with_unit(name: str, metric: str) -> str:
    """Returns `gain (nats per token)`."""
    return f"{name} ({unit(metric)})" if unit(metric) else name


def gain_words(metric: str) -> str:
    """Returns what gain is: `Gain: fall of loss on the target tests, nats per token`."""
    return _said(f"Gain: {'fall' if lower_is_better(metric) else 'rise'} of {metric} on the target tests", metric)


def forgetting_words(metric: str) -> str:
    """Returns what forgetting is: `Forgetting: KL to the untouched model on the general tests, nats per token`."""
    if metric == "kl":
        return _said("Forgetting: KL to the untouched model on the general tests", metric)
    return _said(f"Forgetting: {'rise' if lower_is_better(metric) else 'fall'} of {metric} on the general tests", metric)


def _said(text: str, metric: str) -> str:
    return f"{text}, {unit(metric)}" if unit(metric) else text
