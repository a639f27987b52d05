"""A finished selection → files that another trainer reads as they are, with the loss on the tokens that the gradients saw.

trl            `train/` with token ids and labels (TRL uses both unchanged), and `sft.yaml` for `trl sft --config`
llamafactory   `train.json`, `dataset_info.json`, and `train.yaml` for `llamafactory-cli train`
axolotl        `train.jsonl`, and `axolotl.yaml` for `axolotl train`
parquet        `train.parquet`: id, messages, rank, score, weight
hf             `train/`, the same columns, for `datasets.load_from_disk`

What a format cannot hold, so that training would be on less than was chosen, is refused; what is left to do by hand is a note.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from gradsieve.atomic import replacing, require_writable, write_atomically
from gradsieve.data import Format, Tokens, tokenize
from gradsieve.data.files import Row, read_rows
from gradsieve.data.shapes import detect_shape, read_turns
from gradsieve.data.template import read_template, template_arguments
from gradsieve.errors import DataError, InvalidArgument
from gradsieve.models import ModelSource, find_model
from gradsieve.outputs import data_digest, selection_digest
from gradsieve.types import Example

Target = Literal["trl", "llamafactory", "axolotl", "parquet", "hf"]


@dataclass(frozen=True)
class Export:
    """Write a selection for another trainer.

    Attributes:
        run: Folder of a selection (with run.json and selected.jsonl).
        format: trl, llamafactory, axolotl, parquet or hf.
        out: Folder for the files; `export-FORMAT` inside the run by default.
    """

    run: Annotated[Path, tyro.conf.Positional]
    format: Target = "trl"
    out: Path | None = None


@dataclass(frozen=True, eq=False)
class Chosen:
    """A selection as it was written.

    Attributes:
        record: The run.json.
        examples: Chosen examples, best first.
        weights: Theirs, in that order.
        scores: Theirs, in that order; NaN where the method gives none.
    """

    record: Mapping[str, Any]
    examples: Sequence[Example]
    weights: Sequence[float]
    scores: Sequence[float]


def export(command: Export) -> tuple[Path, list[str]]:
    """Writes the files and returns their folder and what the user must know of them.

    Raises:
        DataError: The run's files cannot be read, or do not belong together.
        InvalidArgument: The folder to write to is not empty, or cannot be written to.
    """
    chosen = read_chosen(command.run)
    out = command.out or command.run / f"export-{command.format}"
    require_writable(out)
    if any(out.iterdir()):
        raise InvalidArgument(f"out must be a new or empty folder, got {out} with files in it; name another with --out")
    notes = _WRITERS[command.format](chosen, out)
    weighted = len(set(chosen.weights)) > 1
    if weighted and command.format not in ("parquet", "hf"):
        notes.append(
            f"{chosen.record['method']['name']} gave weights, and {command.format} knows none: every example counts the same "
            "there; `gradsieve compare` honours them"
        )
    return out, notes


def read_chosen(run: Path) -> Chosen:
    """Returns the selection in a run's folder.

    Raises:
        DataError: A file is missing or broken, or the files are not of one and the same run.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        record = json.loads((run / "run.json").read_bytes())
        scores = pq.read_table(run / "scores.parquet", columns=["id", "rank", "weight", "score"]).to_pylist()
        selection, format = record["selection"], record["job"]["format"]
        wanted = selection["digest"], selection.get("content")
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{run}: must be the folder of a selection, got {_line(error)}; name the --out of `select`") from None
    if wanted[1] is None:
        raise DataError(f"{run}: run.json must have the hash of selected.jsonl, got one of an earlier gradsieve; select again")
    ranked = sorted((row for row in scores if row["rank"] is not None), key=lambda row: row["rank"])
    ids, weights = [row["id"] for row in ranked], [row["weight"] for row in ranked]
    rows = list(read_rows(run / "selected.jsonl", []))
    if len(ranked) != len(rows):
        raise DataError(
            f"{run}: scores.parquet must rank the {len(rows)} examples of selected.jsonl, got {len(ranked)}; select again"
        )
    examples = [_example(row, id, format) for row, id in zip(rows, ids, strict=True)]
    found = selection_digest(ids, weights), data_digest(examples)
    for file, mine, recorded in zip(("scores.parquet", "selected.jsonl"), found, wanted, strict=True):
        if mine != recorded:
            raise DataError(f"{run}: {file} must be that of the run in run.json, got another choice; select again")
    return Chosen(record, examples, weights, [row["score"] for row in ranked])


def _example(row: Row, id: str, format: Format) -> Example:
    """Returns a line of selected.jsonl as an example; a pool's files may have had a shape each, so every line tells its own."""
    keys = {key for key, value in row.fields.items() if value is not None}
    shape = detect_shape(keys, row.origin) if format == "auto" else format
    return Example(id, read_turns(row.fields, shape, row.origin), row.raw, row.origin)


def _trl(chosen: Chosen, out: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    job, source = chosen.record["job"], _model(chosen)
    tokens = _tokens(chosen.examples, source, job["max_length"], read_template(job["chat_template"]))
    table = pa.table(
        {
            "input_ids": pa.array([t.input_ids for t in tokens], pa.list_(pa.int32())),
            "labels": pa.array([t.labels for t in tokens], pa.list_(pa.int32())),
        }
    )
    (out / "train").mkdir()
    with replacing(out / "train" / "train.parquet") as file:
        pq.write_table(table, file)
    config = {
        "model_name_or_path": str(source.folder),
        "dataset_name": str((out / "train").absolute()),
        "output_dir": str((out / "model").absolute()),
        "max_length": job["max_length"],
        "learning_rate": 2.0e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 16,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": ["all-linear"],
        "seed": job["seed"],
    }
    _write_yaml(out / "sft.yaml", config)
    notes = [f"train with: trl sft --config {out / 'sft.yaml'}"]
    if cut := sum(t.truncated for t in tokens):
        notes.append(f"{cut} of {len(tokens)} examples are longer than {job['max_length']} tokens and are cut at the end")
    return notes


def _model(chosen: Chosen) -> ModelSource:
    """Returns the model that is to be trained.

    Raises:
        InvalidArgument: The run was given a model object, which no file can name.
    """
    if chosen.record["model"]["live"]:
        raise InvalidArgument("the run must name its model's folder, got a model object; export to parquet instead")
    job = chosen.record["job"]
    return find_model(job["model"], trust_remote_code=job["trust_remote_code"])


def _tokens(examples: Sequence[Example], source: ModelSource, max_length: int, template: str | None) -> list[Tokens]:
    """Returns every example's tokens for the model that is to be trained, which a Navigator's tokenizer need not agree with.

    Raises:
        DataError: One has no completion tokens there, or cannot be rendered.
    """
    done = tokenize(examples, source.tokenizer, max_length=max_length, chat_template=template)
    if done.excluded:
        first = done.excluded[0]
        raise DataError(
            f"{len(done.excluded)} of {len(examples)} chosen examples must be usable by {source.name}, which is to be trained, "
            f"got for the first, {first.id}: {first.reason}; select again with a larger --max-length or without them"
        )
    return done.tokens


def _llamafactory(chosen: Chosen, out: Path) -> list[str]:
    source = _model(chosen)
    rows = [{"id": example.id, "messages": _plain(example)} for example in chosen.examples]
    for example in chosen.examples:
        _require_alternation(example)
    write_atomically(out / "train.json", json.dumps(rows, ensure_ascii=False, indent=1).encode())
    entry = {
        "file_name": "train.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }
    write_atomically(out / "dataset_info.json", json.dumps({"gradsieve": entry}, indent=2).encode())
    config = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(source.folder),
        "dataset_dir": str(out.absolute()),
        "dataset": "gradsieve",
        "output_dir": str((out / "model").absolute()),
        "cutoff_len": chosen.record["job"]["max_length"],
        "train_on_prompt": False,
        "mask_history": False,
        "packing": False,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 16,
        "lora_alpha": 32,
        "learning_rate": 2.0e-4,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 16,
    }
    _write_yaml(out / "train.yaml", config)
    return [
        f"train with: llamafactory-cli train {out / 'train.yaml'}",
        "no `template` is set, so that LLaMA-Factory reads the model's own chat template; it tokenises by itself",
        *_template_note(chosen, "save it as chat_template.jinja in a copy of the model's folder, and name that in train.yaml"),
    ]


def _axolotl(chosen: Chosen, out: Path) -> list[str]:
    source, own = _model(chosen), read_template(chosen.record["job"]["chat_template"])
    rows = (json.dumps({"id": e.id, "messages": _plain(e)}, ensure_ascii=False).encode() + b"\n" for e in chosen.examples)
    write_atomically(out / "train.jsonl", b"".join(rows))
    data = {
        "path": str((out / "train.jsonl").absolute()),
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    template = {"chat_template": "jinja", "chat_template_jinja": own} if own else {"chat_template": "tokenizer_default"}
    config = {
        "base_model": str(source.folder),
        **template,
        "datasets": [data],
        "train_on_inputs": False,
        "sequence_len": chosen.record["job"]["max_length"],
        "excess_length_strategy": "truncate",  # as the gradients were taken; longer examples are left out by default
        "sample_packing": False,
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "learning_rate": 2.0e-4,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "optimizer": "adamw_torch",
        "num_epochs": 3,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 16,
        "output_dir": str((out / "model").absolute()),
    }
    _write_yaml(out / "axolotl.yaml", config)
    return [f"train with: axolotl train {out / 'axolotl.yaml'}", "axolotl applies the chat template by itself"]


def _parquet(chosen: Chosen, out: Path) -> list[str]:
    import pyarrow.parquet as pq

    with replacing(out / "train.parquet") as file:
        pq.write_table(_table(chosen), file)
    return _template_note(chosen, "give it to your trainer")


def _hf(chosen: Chosen, out: Path) -> list[str]:
    import datasets

    datasets.Dataset(_table(chosen)).save_to_disk(out / "train")
    return _template_note(chosen, "give it to your trainer")


_WRITERS: dict[Target, Callable[[Chosen, Path], list[str]]] = {
    "trl": _trl,
    "llamafactory": _llamafactory,
    "axolotl": _axolotl,
    "parquet": _parquet,
    "hf": _hf,
}


def _table(chosen: Chosen) -> Any:
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.table(
        {
            "id": pa.array([example.id for example in chosen.examples], pa.string()),
            "messages": pa.array([_plain(example) for example in chosen.examples], pa.list_(turn)),
            "rank": pa.array(range(1, len(chosen.examples) + 1), pa.int64()),
            "score": pa.array(chosen.scores, pa.float64()),
            "weight": pa.array(chosen.weights, pa.float64()),
        }
    )


def _plain(example: Example) -> list[dict[str, str]]:
    """Returns the turns as role and content; what else a turn or its row says would be lost, so it is refused."""
    if beside := template_arguments(example):
        what = ", ".join(sorted(beside))
        raise DataError(
            f"{example.origin}: rows must be turns alone for this format, got {what} for the chat template; "
            "export to trl instead"
        )
    for turn in example.messages:
        more = sorted(key for key, value in turn.items() if key not in ("role", "content") and value is not None)
        if more or not isinstance(turn["content"], str):
            what = ", ".join(more) or "content that is no text"
            raise DataError(f"{example.origin}: turns must be role and text for this format, got {what}; export to trl instead")
    return [{"role": turn["role"], "content": turn["content"]} for turn in example.messages]


def _require_alternation(example: Example) -> None:
    """Refuses a conversation that LLaMA-Factory would skip with a warning: it knows questions with their answers alone."""
    roles = [turn["role"] for turn in example.messages]
    said = roles[1:] if roles[0] == "system" else roles
    if said != ["user", "assistant"] * (len(said) // 2):
        raise DataError(
            f"{example.origin}: turns must alternate between user and assistant, got {', '.join(roles)}, which llamafactory "
            "would skip; export to trl or axolotl instead"
        )


def _template_note(chosen: Chosen, cure: str) -> list[str]:
    """Returns what must be done about a chat template of the run's own, which the format cannot hold."""
    path = chosen.record["job"]["chat_template"]
    return [f"the gradients were taken with the chat template {path}, which is not in these files: {cure}"] if path else []


def _write_yaml(path: Path, config: Mapping[str, Any]) -> None:
    write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
