from __future__ import annotations

import json
import logging
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gradsieve.data import IGNORE, read_examples, template_text, tokenize
from gradsieve.data.spans import CHANGED, UNENDED
from gradsieve.errors import InvalidArgument, ModelError
from gradsieve.types import Example

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
DEFAULT_SYSTEM = (
    """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}""" + CHATML
)
EOS_AFTER = CHATML.replace("{%- endfor %}", "{%- endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
LLAMA3 = """{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
MARKED = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PLAIN = """{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>"]

# name: template, end-of-turn token, whether it trims contents, what it writes between header and content
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", False, ""),
    "default-system": (DEFAULT_SYSTEM, "<|im_end|>", False, ""),
    "eos-after": (EOS_AFTER, "<|im_end|>", False, ""),
    "llama3": (LLAMA3, "<|eot_id|>", True, ""),
    "gemma": (GEMMA, "<end_of_turn>", True, ""),
    "zephyr": (ZEPHYR, "</s>", False, ""),
    "mistral": (MISTRAL, "</s>", False, " "),
    "marked": (MARKED, "<|im_end|>", False, ""),
}
CORPUS = [
    "What is the heart? The heart pumps blood through the body. system user assistant model You are kind. [INST] [/INST]"
] * 4


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # adds BOS when asked
    return backend


def metaspace():
    """As in Llama 2: spaces become ▁, unknown characters become bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<0x00>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def fast(backend, template=None, **fields):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **fields)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.chat_template = template
    return tokenizer


BYTE_LEVEL, METASPACE = byte_level(), metaspace()
TOKENIZERS = {name: fast(BYTE_LEVEL, row[0]) for name, row in TEMPLATES.items()}


def chat(*contents, **fields):
    roles = ("user", "assistant") * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Example("x", tuple(turns), json.dumps(fields).encode(), "f:1")


def with_system(conversation, system="Obey."):
    return Example("x", ({"role": "system", "content": system}, *conversation.messages), b"{}", "f:1")


def labelled_texts(tokens, tokenizer):
    """Returns the text of each run of labelled tokens."""
    runs, before = [], False
    for token, label in zip(tokens.input_ids, tokens.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            runs = runs if before else [*runs, []]
            runs[-1].append(int(token))
        before = label != IGNORE
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]


def one(conversation, tokenizer, **options):
    made = tokenize([conversation], tokenizer, **options)
    assert made.excluded == []
    assert made.kept == [0]
    return made.tokens[0]


# --- what is labelled ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("backend", [BYTE_LEVEL, METASPACE], ids=["byte-level", "metaspace"])
def test_labels_are_the_answers_and_their_ends_and_ids_those_of_the_whole_text(name, backend):
    template, end, trims, lead = TEMPLATES[name]
    tokenizer = fast(backend, template)
    answers = ["The heart pumps.", " two\nlines  ", "\u00e9\U0001f600 \u5fc3"]
    conversation = chat("What?", answers[0], "And?", answers[1], "So?", answers[2])
    tokens = one(conversation, tokenizer)
    assert tokens.input_ids.dtype == tokens.labels.dtype == np.int32
    expected = tokenizer.apply_chat_template(list(conversation.messages), tokenize=True, return_dict=True)["input_ids"]
    assert tokens.input_ids.tolist() == expected
    assert labelled_texts(tokens, tokenizer) == [lead + (a.strip() if trims else a) + end for a in answers]
    assert not tokens.truncated


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("gemma", "mistral")])
def test_a_system_turn_is_prompt(name):
    tokens = one(with_system(chat("q", "an answer")), TOKENIZERS[name])
    assert labelled_texts(tokens, TOKENIZERS[name]) == ["an answer" + TEMPLATES[name][1]]
    assert "Obey." in TOKENIZERS[name].decode(tokens.input_ids[tokens.labels == IGNORE])


WORD = st.sampled_from(
    ["heart", "The", " ", "  ", "\n", "a", ".", "<|im_end|>", "</s>", "<|user|>", "\u00e9", "\U0001f600", "\u5fc3"]
)
CONTENT = st.tuples(st.lists(WORD, max_size=5), st.lists(WORD, max_size=5)).map(lambda w: "".join([*w[0], "x", *w[1]]))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
@example("eos-after", [("q", "x</s>\n")])
@example("llama3", [(" q", "\nx <|eot_id|> \n"), ("q", "x")])
def test_any_conversation_is_labelled_exactly(name, pairs):
    _, end, trims, lead = TEMPLATES[name]
    conversation = chat(*(text for pair in pairs for text in pair))
    tokens = one(conversation, TOKENIZERS[name])
    answers = [lead + (answer.strip() if trims else answer) + end for _, answer in pairs]
    texts = labelled_texts(tokens, TOKENIZERS[name])
    assert [text.lstrip("\n") for text in texts] == [answer.lstrip("\n") for answer in answers]


def test_there_is_one_beginning_of_sequence_token():
    assert BYTE_LEVEL.encode("x").tokens[0] == "<s>"  # the tokenizer would add a second one
    for name, count in (("llama3", 1), ("gemma", 1), ("chatml", 0)):
        tokens = one(chat("q", "a"), TOKENIZERS[name])
        assert (tokens.input_ids == 0).sum() == count


def test_a_token_across_the_border_of_header_and_content_is_labelled():
    backend = Tokenizer(models.BPE({"a": 0, ":": 1, "\n": 2, "\n\n": 3, "x": 4, "q": 5}, [("\n", "\n")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    template = "{% for m in messages %}{{ m.role[0] | replace('u', 'q') + ':\n' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'a:\n' }}{% endif %}"
    tokens = one(chat("q", "\nx"), tokenizer, chat_template=template)
    assert tokens.input_ids.tolist() == [5, 1, 2, 5, 0, 1, 3, 4]
    assert tokens.labels.tolist() == [IGNORE] * 6 + [3, 4]


def test_the_first_token_has_no_label_because_nothing_precedes_it():
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    answer_first = Example("x", ({"role": "assistant", "content": "heart heart"},), b"{}", "f:1")
    tokens = one(answer_first, fast(BYTE_LEVEL, template))
    assert tokens.labels[0] == IGNORE
    assert (tokens.labels[1:] == tokens.input_ids[1:]).all()


def test_turns_of_the_prompt_list_carry_no_loss(tmp_path):
    turns = chat("q", "first", "q", "second").messages
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": turns[:3], "completion": turns[3:]}))
    (read,) = read_examples(tmp_path / "p.jsonl").examples
    for name in ("chatml", "marked"):
        assert labelled_texts(one(read, TOKENIZERS[name]), TOKENIZERS[name]) == ["second<|im_end|>"]


def test_tools_and_template_arguments_of_the_row_reach_the_template():
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}" + CHATML
    tokenizer = fast(BYTE_LEVEL, template)
    tool = {"type": "function", "function": {"name": "pump"}}
    for tools in ([tool], json.dumps([tool])):
        text = tokenizer.decode(one(chat("q", "a", tools=tools, chat_template_kwargs={"style": "terse"}), tokenizer).input_ids)
        assert text.startswith(json.dumps([tool]) + "terse<|im_start|>")
    for nothing in (None, [], ""):
        assert tokenizer.decode(one(chat("q", "a", tools=nothing), tokenizer).input_ids).startswith("<|im_start|>")
    made = tokenize([chat("q", "a", tools="{"), chat("q", "a", chat_template_kwargs=3)], tokenizer)
    assert [e.reason.split(", got")[0] for e in made.excluded] == [
        '"tools" must be a list or JSON',
        '"chat_template_kwargs" must be an object',
    ]


# --- markers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trimmed", [True, False])
def test_a_marked_block_that_ends_in_a_space_does_not_run_on(trimmed):
    # The mask of transformers 5.23 covers the rest of the sequence where offsets are trimmed: no token begins at the space.
    template = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}
{%- generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"""
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    tokenizer = fast(backend, template)
    made = tokenize([chat("q ", "heart ", "q", " blood  ")], tokenizer)
    assert labelled_texts(made.tokens[0], tokenizer) == ["heart ", " blood  "]
    assert made.notes == (f"1 of 1 examples: {UNENDED}",)


@pytest.mark.parametrize("trimmed", [True, False])
def test_a_space_at_the_end_of_a_header_is_not_labelled(trimmed):
    backend = byte_level()
    backend.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    tokenizer = fast(backend, PLAIN.replace("': '", "':  '").replace("assistant: ", "assistant:  "))
    tokens = one(chat("q ", "\nx ", "q", "y"), tokenizer)
    assert labelled_texts(tokens, tokenizer) == ["\nx ", "y"]


def test_markers_inside_a_macro_are_refused():
    template = """{% macro turn(m) %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}
{{- m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endmacro %}
{%- for m in messages %}{{ turn(m) }}{% endfor %}"""
    made = tokenize([chat("q", "a long enough answer to show it")], fast(BYTE_LEVEL, template))
    assert made.kept == []
    assert made.excluded[0].reason == "the template's generation markers do not enclose the assistant's text"


def test_null_content_is_absent_for_a_marked_template_too():
    template = MARKED.replace("message['content'] + ", "(message['content'] if 'content' in message else 'call') + ")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    tokens = one(Example("x", tuple(turns), b"{}", "f:1"), fast(BYTE_LEVEL, template))
    assert labelled_texts(tokens, TOKENIZERS["chatml"]) == ["call<|im_end|>"]


# --- truncation and exclusion -------------------------------------------------------------------------------------------


def test_truncation_keeps_the_start():
    whole = one(chat("q", "The heart pumps blood"), TOKENIZERS["chatml"])
    length = len(whole.input_ids)
    exact = one(chat("q", "The heart pumps blood"), TOKENIZERS["chatml"], max_length=length)
    assert not exact.truncated
    cut = one(chat("q", "The heart pumps blood"), TOKENIZERS["chatml"], max_length=length - 3)
    assert cut.truncated
    assert cut.input_ids.tolist() == whole.input_ids.tolist()[:-3]
    assert cut.labels.tolist() == whole.labels.tolist()[:-3]


def test_a_prompt_that_fills_the_length_is_excluded_with_both_numbers():
    whole = one(chat("q", "a"), TOKENIZERS["chatml"])
    prompt = int((whole.labels != IGNORE).argmax())
    made = tokenize([chat("q", "a")], TOKENIZERS["chatml"], max_length=prompt)
    assert (made.tokens, made.kept) == ([], [])
    (excluded,) = made.excluded
    assert (excluded.position, excluded.id) == (0, "x")
    expected = f"no completion tokens after truncation: the prompt takes {prompt} tokens, max_length is {prompt}"
    assert excluded.reason == expected
    assert tokenize([chat("q", "a")], TOKENIZERS["chatml"], max_length=prompt + 1).kept == [0]


def test_an_example_without_trained_turns_is_excluded():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    made = tokenize([Example("x", tuple(turns), b"{}", "f:1")], TOKENIZERS["chatml"])
    assert made.excluded[0].reason == 'no completion tokens: the "weight" of every assistant turn is 0'


def test_a_template_that_fails_on_some_examples_excludes_those_and_keeps_the_order():
    pool = [chat("q", f"{i}") if i % 3 else with_system(chat("q", f"{i}")) for i in range(1100)]
    made = tokenize(pool, TOKENIZERS["gemma"])
    assert made.kept == [i for i in range(1100) if i % 3]
    assert [e.position for e in made.excluded] == [i for i in range(1100) if i % 3 == 0]
    assert made.excluded[0].reason == "the chat template fails on it: TemplateError: System role not supported"
    assert [labelled_texts(t, TOKENIZERS["gemma"]) for t in made.tokens] == [[f"{i}<end_of_turn>"] for i in made.kept]


def test_reasons_of_rendering_and_truncation_come_by_position():
    pool = [chat("heart " * 99, "a"), with_system(chat("q", "a")), chat("q", "a"), chat("heart " * 99, "a")]
    made = tokenize(pool, TOKENIZERS["gemma"], max_length=40)
    assert made.kept == [2]
    assert [e.position for e in made.excluded] == [0, 1, 3]


def test_no_examples_give_no_tokens():
    made = tokenize([], TOKENIZERS["chatml"])
    assert (made.tokens, made.kept, made.excluded, made.notes) == ([], [], [], ())


def test_texts_above_the_tokenizers_own_limit_pass_without_a_warning(caplog):
    tokenizer = fast(BYTE_LEVEL, CHATML, model_max_length=4)
    logging.getLogger("transformers").propagate = True
    try:
        assert len(one(chat("q", "heart " * 50), tokenizer).input_ids) > 50
    finally:
        logging.getLogger("transformers").propagate = False
    assert caplog.records == []


# --- notes and errors ---------------------------------------------------------------------------------------------------


def test_what_is_not_as_expected_is_noted_with_its_count():
    drops = CHATML.replace("+ message['content'] +", "+ message['content'].split('</think>')[-1] +")
    made = tokenize([chat("q", "x</think>a"), chat("q", "b"), chat("q", "y</think>c")], fast(BYTE_LEVEL, drops))
    assert made.notes == (f"2 of 3 examples: {CHANGED}",)
    assert [labelled_texts(t, TOKENIZERS["chatml"]) for t in made.tokens] == [["a<|im_end|>"], ["b<|im_end|>"], ["c<|im_end|>"]]
    made = tokenize([chat("q", "a")], fast(BYTE_LEVEL, PLAIN))
    assert made.notes == (f"1 of 1 examples: {UNENDED}",)
    made = tokenize([chat("q", "a")], fast(BYTE_LEVEL, "{{ strftime_now('%Y') }}" + CHATML))
    assert len(made.notes) == 1
    assert "today's date" in made.notes[0]
    assert tokenize([chat("q", "a")], TOKENIZERS["chatml"]).notes == ()


def test_a_tokenizer_without_template_names_the_cure_and_takes_one():
    bare = fast(BYTE_LEVEL)
    for act in (lambda: tokenize([chat("q", "a")], bare), lambda: template_text(bare)):
        with pytest.raises(ModelError, match=r"must have one chat template, got none; give it by --chat-template FILE"):
            act()
    given_template = one(chat("q", "a"), bare, chat_template=CHATML)
    assert given_template.input_ids.tolist() == one(chat("q", "a"), TOKENIZERS["chatml"]).input_ids.tolist()
    replaced = one(chat("q", "a"), TOKENIZERS["zephyr"], chat_template=CHATML)
    assert replaced.labels.tolist() == given_template.labels.tolist()
    assert template_text(TOKENIZERS["zephyr"]) == ZEPHYR
    assert template_text(TOKENIZERS["zephyr"], CHATML) == CHATML


def test_a_template_that_is_no_jinja_names_the_line():
    with pytest.raises(ModelError, match=r"chat template must be valid Jinja, got an error in line 2: "):
        tokenize([chat("q", "a")], TOKENIZERS["chatml"], chat_template="line one\n{% for %}")


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ModelError, match=r"tokenizer must be a fast one \(with character offsets\), got SimpleNamespace"):
        tokenize([chat("q", "a")], SimpleNamespace(is_fast=False))  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 0, -5])
def test_a_length_without_room_for_a_prediction_is_refused(length):
    with pytest.raises(InvalidArgument, match=f"max_length must be at least 2 .*, got {length}"):
        tokenize([], TOKENIZERS["chatml"], max_length=length)


def test_ten_thousand_examples_take_seconds():
    pool = [chat(f"What is {i}?", "The heart pumps blood through the body. " * 8) for i in range(1000)]
    begin = time.process_time()
    assert len(tokenize(pool, TOKENIZERS["default-system"]).tokens) == 1000
    assert time.process_time() - begin < 2.5  # 0.4 s where this was written
