import pytest

from gradsieve.compare.config import Arm
from gradsieve.compare.stores import reads_store
from gradsieve.needs import asks_for, reads_set
from gradsieve.selectors import SELECTORS

ASKS = {
    "random": "no pass of the model",
    "length": "no pass of the model",
    "metadata": "no pass of the model",
    "perplexity": "forward pass",
    "ifd": "forward pass",
    "bm25": "target; no pass of the model",
    "embedding": "target; no pass of the model",
    "grads": "trains first, gradients",
    "ogs": "target, anchor; gradients",
    "ogs-static": "target, anchor; gradients",
    "orth-only": "anchor; gradients",
    "less": "target; trains first, gradients",
    "rds": "target; forward pass",
    "g2is": "target; trains first, gradients",
    "gradmatch": "target; gradients",
    "pgm": "target; gradients",
    "curiosity": "target; gradients",
}


def test_every_method_says_what_it_asks_for() -> None:
    assert {name: asks_for(kind()) for name, kind in SELECTORS.items()} == ASKS


@pytest.mark.parametrize("name", SELECTORS)
def test_a_comparison_keeps_a_store_for_what_reads_the_model_alone(name: str) -> None:
    assert reads_store(Arm(name, name)) == ("no pass" not in ASKS[name])


@pytest.mark.parametrize(
    ("need", "role"),
    [("targets", "target"), ("hidden/targets", "target"), ("bm25/target", "target"), ("embedding:small/targets", "target"),
     ("dot/anchor", "anchor"), ("dot/anchor:*", "anchor"), ("dot/unit/anchor", "anchor"), ("dot/contrast/anchor:*", "anchor")],
)  # fmt: skip
def test_a_need_of_a_set_is_known_by_its_name(need: str, role: str) -> None:
    assert reads_set(need, role)
    assert not reads_set(need, "anchor" if role == "target" else "target")
    assert not reads_set("sketch", role)
