"""How extraction copes with too little memory, end to end."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsieve as gs
from gradsieve import cli
from gradsieve.compute import ComputeSettings, form_note, token_batches, with_form
from gradsieve.data import TokenSet, read_examples
from gradsieve.data.corrupt import corrupt
from gradsieve.gradients.engine import GradientEngine
from gradsieve.gradients.settings import EngineSettings
from gradsieve.gradients.sketch import SketchPlan
from gradsieve.models import find_model
from gradsieve.references import Contrast, UnitMean, contrast, linked, measure_references
from gradsieve.terminal import print_result

Write = Callable[..., Path]
SMALL: dict[str, Any] = {"dim": 256, "dtype": "float32", "unit_tokens": 400, "batch_tokens": 200, "budget": "25%"}


def cosines(result: gs.Result, name: str) -> Tensor:
    columns = result.pool.columns
    return columns[f"dot/{name}"] / columns["norm"]


def test_references_that_do_not_fit_are_wide_sketches_and_it_is_said(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    common = {"model": str(tiny_model), **data, **SMALL}
    exact = gs.select("ogs-static", store=str(tmp_path / "exact"), **common)
    wide = gs.select("ogs-static", store=str(tmp_path / "wide"), reference_memory=0, **common)
    note = "more than --reference-memory 0: products with them are estimated from sketches of 65536 numbers"
    assert [note in text for text in wide.notes].count(True) == 1
    assert not any(note in text for text in exact.notes)
    for folder, products in (("exact", "exact"), ("wide", "wide sketch")):
        manifest = json.loads((tmp_path / folder / "pool" / "store.json").read_text())["settings"]
        assert manifest["reference_products"] == products
        assert "batch_tokens" not in manifest
    for name in exact.references:
        error = cosines(wide, name) - cosines(exact, name)
        assert 1e-7 < error.square().mean().sqrt() < 0.01, name  # a hundred cosines that share a direction
        assert wide.references[name].count == exact.references[name].count
        assert wide.references[name].norm == pytest.approx(exact.references[name].norm, rel=0.1)
        assert wide.references[name].split_half is None
        assert -1 <= (exact.references[name].split_half or -2) <= 1
    with pytest.raises(gs.StoreMismatch, match="reference_products exact in the store, wide sketch asked for"):
        gs.select("ogs-static", store=str(tmp_path / "exact"), reference_memory=0, **common)
    gs.select("random", store=str(tmp_path / "wide"), **common)  # reads no product


def test_the_halves_of_a_reference_make_up_its_mean_and_those_of_a_contrast_their_differences(
    data: dict[str, str], tiny_model: Path
) -> None:
    source = find_model(tiny_model)
    compute = ComputeSettings(EngineSettings("linear", SketchPlan(4096, 0)), torch.float32, "cpu", 100, batch_tokens=200)
    sets = {name: list(read_examples([data[name]]).examples) for name in ("target", "anchor")}
    target = TokenSet.of("target", sets["target"], source.tokenizer, max_length=100)
    pairs, _ = contrast(corrupt(sets["anchor"], "numbers"), "anchor", source, compute, None)
    model = source.load(torch.float32, "cpu")
    with GradientEngine(model, compute.engine) as engine:

        def mean(side: TokenSet) -> Tensor:
            blocks = [engine.block(batch) for batch, _ in token_batches(side.tokens, 200, "cpu")]
            return torch.cat([block.sketch for block in blocks]).mean(0)

        sought = {"target": mean(target), "contrast": mean(pairs.right) - mean(pairs.wrong), "unit": None}
    sources = {"target": target, "contrast": pairs, "unit": UnitMean(target)}
    found = measure_references(model, compute, sources)
    assert list(found.halves) == list(sources)
    assert len(target.kept) == len(pairs.right.kept) == 6  # halves of three
    for name, whole in sought.items():
        for split in found.halves[name]:
            if whole is not None:
                assert torch.allclose(split.mean(0), whole, atol=1e-5)
    unit = measure_references(model, compute, {"unit": UnitMean(target)}).facts["unit"].norm
    assert float(found.halves["unit"][0].mean(0).norm()) == pytest.approx(unit, rel=0.05)
    turned = TokenSet.of("target", sets["target"][::-1], source.tokenizer, max_length=100)
    assert torch.allclose(
        measure_references(model, compute, {"target": turned}).halves["target"], found.halves["target"], atol=1e-6
    )


def test_pairs_that_exchanged_their_answers_are_not_torn_apart(data: dict[str, str], tiny_model: Path) -> None:
    source = find_model(tiny_model)
    compute = ComputeSettings(EngineSettings("linear", SketchPlan(4096, 0)), torch.float32, "cpu", 100)
    examples = list(read_examples([data["anchor"]]).examples)
    one_of_two = [
        dataclasses.replace(one, messages=(*one.messages[:-1], {"role": "assistant", "content": ("Yes.", "No.")[i % 2]}))
        for i, one in enumerate(examples)
    ]
    exchanged, _ = contrast(corrupt(examples, "exchange"), "anchor", source, compute, None)
    answers = [[example.messages[-1]["content"] for example in side.examples] for side in (exchanged.right, exchanged.wrong)]
    units = linked(exchanged)
    assert sorted(i for unit in units for i in unit) == list(range(6))
    assert 1 < len(units) < 6
    for unit in units:
        assert sorted(answers[0][i] for i in unit) == sorted(answers[1][i] for i in unit)  # nothing of another unit
    numbers, _ = contrast(corrupt(examples, "numbers"), "anchor", source, compute, None)
    assert sorted(linked(numbers)) == [[i] for i in range(6)]
    five = [side.restricted("anchor", range(5)) for side in (exchanged.right, exchanged.wrong)]
    units, model = linked(Contrast(*five)), source.load(torch.float32, "cpu")
    found, sides = measure_references(model, compute, {"contrast/anchor": Contrast(*five)}), []
    with GradientEngine(model, compute.engine) as engine:
        for side in five:
            blocks = [engine.block(batch).sketch for one in side.tokens for batch, _ in token_batches([one], 200, "cpu")]
            sides.append(torch.cat(blocks).double())
    pairs, (first, second) = sides[0] - sides[1], found.halves["contrast/anchor"][0].double()
    whole, groups, sizes = (
        pairs.mean(0),
        torch.stack([pairs[unit].mean(0) for unit in units]),
        torch.tensor(list(map(len, units))),
    )
    assert len(set(sizes.tolist())) > 1
    more = (len(units) + 1) // 2  # in the first half
    assert torch.allclose((more * first + (len(units) - more) * second) / len(units), whole, atol=1e-4 * float(whole.norm()))
    noise = float((sizes * (groups - whole).square().sum(1)).sum()) / (len(units) - 1) / len(pairs)
    fact = found.facts["contrast/anchor"]
    assert (1 - fact.signal_share) * fact.norm**2 == pytest.approx(noise, rel=0.1)  # the sketch tells 5 %
    negated, said = contrast(corrupt(one_of_two, "negate"), "anchor", source, compute, None)
    assert not said
    assert sorted(linked(negated)) == [[i] for i in range(6)]  # equal answers that nobody exchanged are no link
    alike, said = contrast(corrupt(one_of_two, "exchange"), "anchor", source, compute, None)
    assert "all 6 pairs of the contrast of anchor share answers" in said[0]
    assert not measure_references(model, compute, {"contrast/anchor": alike}).halves


def test_the_memory_of_exact_references_is_that_of_whole_gradients_in_the_models_precision(tiny_model: Path) -> None:
    source = find_model(tiny_model)
    linear = [name for name, _ in source.skeleton().named_parameters() if "proj" in name]
    each = 4 * sum(source.skeleton().get_parameter(name).numel() for name in linear)
    wide = ComputeSettings(EngineSettings("linear"), torch.float32, "cpu", 100, reference_memory=1, form="wide sketch")
    most = (1 << 20) // each
    assert most > 1
    assert with_form(source, wide, 0).form == with_form(source, wide, most).form == "exact"
    assert with_form(source, wide, most + 1).form == "wide sketch"
    half, double = (dataclasses.replace(wide, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    assert with_form(source, half, 2 * most).form == "exact"
    assert with_form(source, double, most).form == "wide sketch"
    assert f"of {4 * most} references take {4 * most * each >> 20} MiB" in form_note(source, wide, 4 * most)


def test_a_skeleton_has_the_parameters_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source = find_model(tiny_model)
    whole = source.load(torch.float32, "cpu")
    skeleton = source.skeleton()
    shapes = {name: p.shape for name, p in skeleton.named_parameters()}
    assert shapes == {name: p.shape for name, p in whole.named_parameters()}
    assert all(p.is_meta for p in skeleton.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for the old name
        get_peft_model(whole, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)  # type: ignore[arg-type]
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(tiny_model)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapted = find_model(tmp_path).skeleton()
    assert sum("lora_" in name for name, _ in adapted.named_parameters()) == 4


def test_a_model_of_which_only_small_batches_fit_is_used_with_a_note(
    data: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    source = find_model(tiny_model)
    common = {"tokenizer": source.tokenizer, **data, **SMALL, "batch_tokens": 600, "unit_tokens": 1000}
    free = gs.select("ogs-static", model=source.load(torch.float32, "cpu"), store=str(tmp_path / "free"), **common)
    longest = max(max(part.lengths) for part in free.sets.values())
    tight = source.load(torch.float32, "cpu")

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[0] * args[0].shape[1] > longest:
            torch.empty(1 << 60)  # more than there is: the allocator itself refuses

    tight.model.layers[1].mlp.register_forward_pre_hook(hook)  # type: ignore[union-attr, index]
    result = gs.select("ogs-static", model=tight, store=str(tmp_path / "tight"), **common)
    assert any("did not fit in memory and was split" in note for note in result.notes)
    assert any("batches of the references did not fit in memory" in note for note in result.notes)
    assert [e.id for e in result.examples] == [e.id for e in free.examples]
    for name, column in free.pool.columns.items():
        assert torch.allclose(result.pool.columns[name], column, rtol=1e-3, atol=1e-5), name


def test_checkpointing_changes_no_number(data: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    found = [
        gs.select("ogs-static", model=str(tiny_model), store=str(tmp_path / str(on)), checkpointing=on, **data, **SMALL)
        for on in (False, True)
    ]
    for name, column in found[0].pool.columns.items():
        assert torch.allclose(found[1].pool.columns[name], column, rtol=1e-3, atol=1e-5), name


def test_every_reason_for_leaving_an_example_out_reaches_the_ledger_and_the_others_go_on(
    write_data: Write, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(id: str, prompt: str, answer: dict[str, Any]) -> str:
        return json.dumps({"id": id, "messages": [{"role": "user", "content": prompt}, {"role": "assistant", **answer}]})

    pool = tmp_path / "pool.jsonl"
    lines = [line(f"good-{i}", f"what is {i}?", {"content": f"It is {i}."}) for i in range(6)]
    lines.insert(1, line("damaged", "what is ~?", {"content": "It is ~."}))
    lines.insert(3, line("silent", "what is it?", {"content": "It is it.", "weight": 0}))
    lines.insert(5, line("long", "x" * 500, {"content": "never reached"}))
    pool.write_text("\n".join(lines) + "\n")
    source = find_model(tiny_model)
    model: Any = source.load(torch.float32, "cpu")
    with torch.no_grad():
        model.model.embed_tokens.weight[source.tokenizer("~")["input_ids"][-1]] = torch.inf
    model.save_pretrained(tmp_path / "model")
    source.tokenizer.save_pretrained(tmp_path / "model")
    common = {"model": str(tmp_path / "model"), "pool": str(pool), "target": str(write_data("target", 4)), "max_length": 300}
    common |= {"anchor": str(write_data("anchor", 6)), "store": str(tmp_path / "store"), **SMALL, "budget": "2"}
    flags = [word for key, value in common.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    assert cli.run(["extract", *flags]) == 0
    assert f"3 could not be used; {tmp_path / 'store' / 'excluded.jsonl'} says why" in capsys.readouterr().out
    result = gs.select("orth-only", out=tmp_path / "out", **common)
    print_result(result, tmp_path / "out")
    assert "orth-only chose 2 of 6 examples, 3 could not be used." in capsys.readouterr().out
    for folder in ("store", "out"):
        ledger = [json.loads(row) for row in (tmp_path / folder / "excluded.jsonl").read_text().splitlines()]
        assert [(row["id"], row["row"], row["reason"].partition(":")[0]) for row in ledger] == [
            ("damaged", 1, "its gradient is not finite (NaN or infinite)"),
            ("silent", 3, "no completion tokens"),
            ("long", 5, "no completion tokens after truncation"),
        ]
    assert sorted(result.pool.ids) == [f"good-{i}" for i in range(6)]
    assert len(result.examples) == 2
