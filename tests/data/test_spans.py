from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gradsieve.data.spans import (
    CHANGED,
    ENDLESS,
    HEADERLESS,
    UNENDED,
    AddedTokens,
    SpanError,
    find_spans,
    marked_spans,
)

TOKENS = AddedTokens.of(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|eot|>", "<|call|>", "\n\n"])


def S(content):
    return {"role": "system", "content": content}


def U(content):
    return {"role": "user", "content": content}


def A(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def called(name, content=None):
    return A(content, tool_calls=[{"type": "function", "function": {"name": name, "arguments": {}}}])


def pieces(render, *turns):
    found = find_spans(turns, render, TOKENS)
    assert found.text == render(turns, False)
    return [found.text[start:end] for start, end in found.spans], found.remarks


# --- templates whose spans are known by construction --------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A template made of parts; `spans` builds the text from the same parts and writes down where the words are."""

    start: str = ""
    default_system: str = ""
    headers: dict[str, str] | None = None
    end: str = "<|end|>"
    separator: str = "\n"
    last: str = ""
    trims: bool = False

    def render(self, turns, generation_prompt):
        return self.spans(turns)[0] + (self._header("assistant") if generation_prompt else "")

    def _header(self, role):
        return (self.headers or {}).get(role, f"<|{role}|>\n")

    def spans(self, turns):
        text, spans = self.start, []
        if self.default_system and turns[0]["role"] != "system":
            text += self.default_system
        for i, turn in enumerate(turns):
            content = turn["content"].strip() if self.trims else turn["content"]
            before = len(text := text + self._header(turn["role"]))
            text += content + self.end
            # Without a token of its own a last turn ends with what is written last.
            if turn["role"] == "assistant":
                is_last = i == len(turns) - 1
                closing = "" if not is_last else self.last if self.end and not self.separator else ""
                if is_last and self.last and not self.end:
                    closing = self.separator + self.last
                spans.append((before, len(text) + len(closing)))
            text += self.separator
        return text + self.last, spans


RECIPES = st.builds(
    Recipe,
    start=st.sampled_from(["", "<s>"]),
    default_system=st.sampled_from(["", "<|system|>\nYou are kind.<|end|>\n", "Be kind. "]),
    headers=st.sampled_from(
        [
            None,
            {"assistant": "<|assistant|>", "user": "<|user|>"},
            {"assistant": "### Response:\n", "user": "### Instruction:\n", "system": ""},
            {"assistant": " [/INST]", "user": "[INST] "},
        ]
    ),
    end=st.sampled_from(["<|end|>", "</s>", "<|eot|></s>", ""]),
    separator=st.sampled_from(["\n", "", "\n\n"]),
    last=st.sampled_from(["", "</s>"]),
    trims=st.booleans(),
)
WORDS = st.lists(
    st.sampled_from(["a", "b ", " ", "\n", "<think>", "</think>", "<|end|>", "</s>", "<|user|>", "[INST] ", "\U000f0000", "é"]),
    max_size=6,
).map(lambda words: "".join([*words, "x"]))
CONVERSATIONS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4).map(
    lambda pairs: [turn for question, answer in pairs for turn in (U(question), A(answer))]
)
SPACES = st.sampled_from(["", " ", "\n", " \n "])


@given(RECIPES, CONVERSATIONS, SPACES, SPACES, st.booleans())
@example(Recipe(last="</s>", separator=""), [U("q"), A("a"), U("q"), A("b")], "", "", False)
@example(Recipe(end="", last="</s>"), [U("q"), A("a"), U("q"), A("b")], "", "", False)
def test_spans_are_exact_for_templates_whose_parts_are_known(recipe, turns, before, after, system):
    turns = [{**turn, "content": before + turn["content"] + after} for turn in turns]
    turns = [S("Obey."), *turns] if system else turns
    text, expected = recipe.spans(turns)
    found = find_spans(turns, recipe.render, TOKENS)
    assert found.text == text
    assert [text[a:b] for a, b in found.spans] == [text[a:b] for a, b in expected]
    assert found.spans == tuple(expected)
    allowed = {UNENDED} if not recipe.end and not recipe.last else {ENDLESS} if not recipe.end and len(expected) > 1 else set()
    assert found.remarks == allowed


# --- templates one meets ------------------------------------------------------------------------------------------------


def zephyr(turns, generation_prompt):
    return "".join(f"<|{t['role']}|>\n{t['content']}</s>\n" for t in turns) + "<|assistant|>\n" * generation_prompt


def test_the_span_is_content_and_end_of_turn_without_header_and_newline():
    assert pieces(zephyr, S("s"), U("q"), A("one"), U("q"), A(" two\n")) == (["one</s>", " two\n</s>"], frozenset())


def test_a_turn_of_weight_0_has_no_span():
    assert pieces(zephyr, U("q"), A("one", weight=0), U("q"), A("two", weight=1)) == (["two</s>"], frozenset())


def test_a_conversation_may_begin_with_the_assistant():
    assert pieces(zephyr, A("one"), U("q"), A("two")) == (["one</s>", "two</s>"], frozenset({HEADERLESS}))


def test_a_template_that_ignores_the_generation_prompt_starts_at_the_content():
    def ignores(turns, generation_prompt):
        return zephyr(turns, False)

    assert pieces(ignores, U("q"), A("one"), U("q"), A("two")) == (["one</s>", "two</s>"], frozenset({HEADERLESS}))


def test_a_template_without_headers_needs_no_generation_prompt():
    def llama2(turns, generation_prompt):
        return "".join(f"<s>[INST] {t['content']} [/INST]" if t["role"] == "user" else f" {t['content']} </s>" for t in turns)

    assert pieces(llama2, U("q"), A("one"), U("q"), A("two")) == ([" one </s>", " two </s>"], frozenset())


def test_text_that_ends_a_turn_counts_even_where_it_is_no_token():
    def textual(turns, generation_prompt):
        text = "".join(f"{t['role'].upper()}: {t['content']} [STOP]\n" for t in turns)
        return text + "ASSISTANT: " * generation_prompt

    assert pieces(textual, U("q"), A("one"), U("q"), A("two")) == (["one [STOP]", "two [STOP]"], frozenset())


def thinking(turns, generation_prompt):
    """Reasoning of turns before the last question is dropped; the last turn gets an empty block if it has none."""
    last_question = max((i for i, t in enumerate(turns) if t["role"] == "user"), default=-1)
    text = ""
    for i, turn in enumerate(turns):
        content = turn["content"] or ""
        if turn["role"] == "assistant":
            reasoning, _, answer = content.rpartition("</think>")
            reasoning = reasoning.split("<think>")[-1].strip("\n")
            content = answer.lstrip("\n")
            if i > last_question:
                content = f"<think>\n{reasoning}\n</think>\n\n{content}"
            for call in turn.get("tool_calls", ()):
                content += f'<tool_call>{{"name": "{call["function"]["name"]}"}}</tool_call>'
        text += f"<|{turn['role']}|>\n{content}<|end|>\n"
    return text + "<|assistant|>\n" * generation_prompt


def test_reasoning_that_the_template_drops_or_adds_is_labelled_as_it_is_rendered():
    turns = [U("q"), A("<think>\nold\n</think>\n\none"), U("q"), A("<think>\nnew\n</think>\n\ntwo")]
    assert pieces(thinking, *turns) == (["one<|end|>", "<think>\nnew\n</think>\n\ntwo<|end|>"], frozenset({CHANGED}))
    assert pieces(thinking, U("q"), A("one")) == (["<think>\n\n</think>\n\none<|end|>"], frozenset())


def test_tool_calls_are_found_between_cut_conversations_even_when_history_is_rewritten():
    tool = {"role": "tool", "content": "42"}
    expected = ['<think>\n\n</think>\n\n<tool_call>{"name": "f"}</tool_call><|end|>', "<think>\n\n</think>\n\nit is 42<|end|>"]
    assert pieces(thinking, U("q"), called("f"), tool, A("it is 42")) == (expected, frozenset())
    expected = ['<tool_call>{"name": "f"}</tool_call><|end|>', "it is 42<|end|>", "<think>\n\n</think>\n\nbye<|end|>"]
    assert pieces(thinking, U("q"), called("f"), tool, A("it is 42"), U("thanks"), A("bye")) == (expected, frozenset())


def test_a_tool_call_that_the_template_drops_is_refused():
    with pytest.raises(SpanError, match="leaves out turn 1"):
        pieces(lambda turns, g: zephyr([{**t, "content": t["content"] or ""} for t in turns], g), U("q"), called("s"))


def test_tool_calls_of_a_template_without_generation_prompt_start_after_its_header():
    def mistral(turns, generation_prompt):
        text = "<s>"
        for turn in turns:
            call = "".join(f"<|call|>{c['function']['name']}" for c in turn.get("tool_calls", ()))
            text += f"[INST]{turn['content']}[/INST]" if turn["role"] == "user" else f" {turn['content'] or ''}{call}</s>"
        return text

    def headed(turns, generation_prompt):
        return mistral(turns, False).replace("[/INST] ", "[/INST]ASSISTANT: ")

    assert pieces(mistral, U("q"), called("f")) == ([" <|call|>f</s>"], frozenset())
    assert pieces(headed, U("q"), called("f")) == (["<|call|>f</s>"], frozenset())


def deepseek(turns, generation_prompt):
    """The generation prompt opens a block that the rendered conversation does not have."""
    text = ""
    for turn in turns:
        content = turn["content"].split("</think>")[-1] if turn["role"] == "assistant" else turn["content"]
        text += f"<|{turn['role']}|>{content}" + "</s>" * (turn["role"] == "assistant")
    return text + "<|assistant|><think>\n" * generation_prompt


@pytest.mark.parametrize(
    ("content", "kept"), [("<table>", "<table>"), ("<think>x</think>y", "y"), ("<t>x</think>\n<b>", "\n<b>")]
)
def test_a_generation_prompt_that_is_not_rendered_leaves_the_content(content, kept):
    remarks = {HEADERLESS} if content == kept else {HEADERLESS, CHANGED}
    assert pieces(deepseek, U("q"), A(content)) == ([f"{kept}</s>"], frozenset(remarks))
    both = [f"{kept}</s>", f"{kept}</s>"]
    assert pieces(deepseek, U("q"), A(content), U("q"), A(content)) == (both, frozenset(remarks))


def test_a_dropped_beginning_that_ends_like_the_text_before_is_told_apart():
    # The text before the kept part, `<|assistant|>`, ends with the `>` of the dropped `</think>`; so does `\n` with `\n`.
    def newline(turns, generation_prompt):
        parts = [t["content"].split("</think>")[-1].lstrip("\n") if t["role"] == "assistant" else t["content"] for t in turns]
        text = "".join(f"<|{t['role']}|>\n{part}<|end|>\n" for t, part in zip(turns, parts, strict=True))
        return text + "<|assistant|>\n<think>\n" * generation_prompt

    assert pieces(newline, U("q"), A("x</think>\n\nsol")) == (["sol<|end|>"], frozenset({HEADERLESS, CHANGED}))


def test_an_end_that_differs_for_the_last_turn_is_not_guessed():
    def gpt_oss(turns, generation_prompt):
        ends = ["<|end|>"] * (len(turns) - 1) + ["</s>" if turns[-1]["role"] == "assistant" else "<|end|>"]
        text = "".join(f"<s>{t['role']}<|call|>{t['content']}{end}" for t, end in zip(turns, ends, strict=True))
        return text + "<s>assistant" * generation_prompt

    assert pieces(gpt_oss, U("q"), A("one"), U("q"), A("two")) == (["<|call|>one", "<|call|>two</s>"], frozenset({ENDLESS}))


def test_a_system_prompt_that_moves_to_the_last_question_does_not_shift_the_spans():
    def moving(turns, generation_prompt):
        system = "".join(t["content"] + "\n\n" for t in turns if t["role"] == "system")
        last_question = max(i for i, t in enumerate(turns) if t["role"] == "user")
        text = "<s>"
        for i, turn in enumerate(turns):
            if turn["role"] == "user":
                text += f"[INST] {system if i == last_question else ''}{turn['content']}[/INST]"
            elif turn["role"] == "assistant":
                text += f" {turn['content']}</s>"
        return text

    assert pieces(moving, S("sys"), U("q"), A("one"), U("q"), A("two")) == (["one</s>", " two</s>"], frozenset({HEADERLESS}))


def shouting(turns, generation_prompt):
    return zephyr([{**t, "content": t["content"].upper()} for t in turns], generation_prompt)


def test_content_that_a_template_rewrites_letter_by_letter_is_still_found():
    assert pieces(shouting, U("q"), A("one")) == (["ONE</s>"], frozenset())
    assert pieces(lambda turns, g: f"{len(turns)}{shouting(turns, g)}", U("q"), A("one")) == (["ONE</s>"], frozenset())


def test_content_that_a_template_leaves_out_or_rewrites_as_a_whole_is_refused():
    def parts_only(turns, generation_prompt):
        text = "".join(f"<|{t['role']}|>{'' if isinstance(t['content'], str) else t['content'][0]}<|end|>" for t in turns)
        return text + "<|assistant|>" * generation_prompt

    def shortened(turns, generation_prompt):
        return zephyr([{**t, "content": t["content"][:3]} for t in turns], generation_prompt)

    def backwards(turns, generation_prompt):
        return f"{len(turns)}" + zephyr([{**t, "content": t["content"][::-1]} for t in turns], generation_prompt)

    for template in (parts_only, shortened, backwards):
        with pytest.raises(SpanError, match="turn 1"):
            pieces(template, U("q"), A("once upon a time"))


def test_a_failing_template_fails_openly():
    def broken(turns, generation_prompt):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pieces(broken, U("q"), A("one"))


def test_a_template_that_refuses_parts_of_a_conversation_still_gives_its_contents():
    def whole_only(turns, generation_prompt):
        if turns[-1]["role"] != "assistant":
            raise ValueError("conversations must end with an answer")
        return zephyr(turns, False)

    assert pieces(whole_only, U("q"), A("one"), U("q"), A("two")) == (["one</s>", "two</s>"], frozenset({HEADERLESS}))


# --- templates with markers ---------------------------------------------------------------------------------------------


def marked(text):
    """Returns the text without its braces, and where they were."""
    plain, blocks, opened = "", [], 0
    for character in text:
        if character == "{":
            opened = len(plain)
        elif character == "}":
            blocks.append((opened, len(plain)))
        else:
            plain += character
    return plain, blocks


def marked_pieces(turns, text):
    plain, blocks = marked(text)
    found = marked_spans(turns, plain, blocks, TOKENS)
    return [plain[start:end] for start, end in found.spans], found.remarks


TWO = (U("q"), A("one and"), U("q"), A("two"))


@pytest.mark.parametrize(
    ("text", "expected", "remarks"),
    [
        ("<|user|>q<|assistant|>{one and</s>}\n<|user|>q<|assistant|>{two</s>}\n", ["one and</s>", "two</s>"], set()),
        ("<|user|>q<|assistant|>{one and</s>\n}<|user|>q<|assistant|>{two</s> \n}", ["one and</s>", "two</s>"], set()),
        ("<|assistant|>{one and}</s><|assistant|>{two}</s>", ["one and", "two"], {UNENDED}),
        ("<|assistant|>{one and\n}<|assistant|>{two\n}", ["one and\n", "two\n"], {UNENDED}),
        ("{one and}{</s>\n}<|user|>{two}{</s>\n}", ["one and", "</s>", "two", "</s>"], set()),
        ("{<think>x</think>}{one and</s>}{two</s>}{calls f}", ["<think>x</think>", "one and</s>", "two</s>", "calls f"], set()),
        ("{one and [STOP]}{two [STOP]}", ["one and [STOP]", "two [STOP]"], {UNENDED}),
    ],
)
def test_markers_are_believed_but_for_white_space_after_the_end_of_turn(text, expected, remarks):
    assert marked_pieces(TWO, text) == (expected, frozenset(remarks))


@pytest.mark.parametrize(
    "text",
    [
        "<|assistant|>one and</s><|assistant|>two</s>",  # none
        "<|assistant|>{one and</s>}<|assistant|>two</s>",  # one
        "<|assistant|>{two</s>}<|assistant|>{one and</s>}",  # another order
        "{<|assistant|>one }and</s>{<|assistant|>tw}o</s>",  # shifted, as in macros
    ],
)
def test_markers_that_do_not_enclose_the_words_are_refused(text):
    with pytest.raises(SpanError, match="do not enclose"):
        marked_pieces(TWO, text)


def test_shifted_markers_are_refused_even_if_the_last_word_occurs_before():
    with pytest.raises(SpanError, match="do not enclose"):
        marked_pieces([U("q"), A("to be or not to be")], "{<|assistant|>to be or n}ot to be</s>")


def test_marked_turns_of_weight_0_are_left_out_if_they_can_be_told():
    turns = (U("q"), A("one", weight=0), U("q"), A("two"))
    assert marked_pieces(turns, "{one</s>}{two</s>}")[0] == ["two</s>"]
    with pytest.raises(SpanError, match="marks 4 blocks for 2 assistant turns, so none can be left out"):
        marked_pieces(turns, "{one}{</s>}{two}{</s>}")


def test_a_block_may_hold_tool_calls_after_its_content():
    turns = (
        U("q"),
        called("f", "let me see"),
        {"role": "tool", "content": "1"},
        called("f"),
        {"role": "tool", "content": "2"},
        A("so"),
    )
    text = "{let me see<call>f</call></s>}<tool>1{<call>f</call></s>}<tool>2{so</s>}"
    assert marked_pieces(turns, text)[0] == ["let me see<call>f</call></s>", "<call>f</call></s>", "so</s>"]
