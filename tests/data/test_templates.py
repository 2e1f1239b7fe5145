"""Chat templates of every shape: what a row says stands in what is trained, or the row is refused; and text is text."""

import json
from dataclasses import replace

import pytest
from tiny import CHATML, byte_level_tokenizer
from tokenizers import AddedToken

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.examples import Example, load_examples
from switchkd.data.fields import Message
from switchkd.data.files import BadRows
from switchkd.data.templates import Encoder, TeacherReads
from switchkd.data.texts import tokenize

LENGTHS = {"max_prompt_length": 2000, "max_completion_length": 2000}
# As the templates of reasoning models: thoughts of the last answer stand in a block before it, an empty one where there are none.
THINKING = CHATML.replace(
    "+ m['content']",
    "+ ('<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' if m.role == 'assistant' else '') + m['content']",
)
OTHER_NAME = THINKING.replace("reasoning_content", "thinking")
DROPS_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "m['content']", "(m['content'] or '') + (m.tool_calls | tojson if m.tool_calls else '')"
)
IN_PARTS = CHATML.replace(
    "+ m['content'] +",
    "}}{% for part in m['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{",
)
NO_PROMPT = CHATML.split("{% if add_generation_prompt")[0]
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}" + CHATML.split("%}", 1)[1]


def rows(*found, template="chat", tokenizer=None, **settings):
    """Prompt and completion as text, of each row."""
    tokenizer = tokenizer or byte_level_tokenizer()
    kept, _ = tokenize(found, tokenizer, template=template, **LENGTHS, **settings)
    return [(tokenizer.decode(row.prompt_ids), tokenizer.decode(row.completion_ids)) for row in kept]


def read(tmp_path, *found, **settings):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return load_examples(str(tmp_path / "a.jsonl"), **settings)


def talk(*turns, **fields):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


def example(*turns, completion="It is four.", **fields):
    messages = tuple(Message(*turn) for turn in turns or [("user", "Two?")])
    return Example(0, messages, completion, (completion,), "here:1", **fields)


# --- what a row says beside its content ---


@pytest.mark.parametrize("template", [THINKING, OTHER_NAME], ids=["reasoning_content", "thinking"])
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_trained_under_whatever_name(tmp_path, template, field):
    row = talk(("user", "Two?"), ("assistant", "four"))
    row["messages"][1][field] = "two and two"
    [found] = read(tmp_path, row)
    assert found.references == ("four",)
    [(prompt, completion)] = rows(found, tokenizer=byte_level_tokenizer(template=template))
    assert prompt.endswith("assistant\n") and completion == "<think>\ntwo and two\n</think>\n\nfour<|im_end|>"


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_thoughts_that_a_template_cannot_write_are_an_error(tmp_path, template):
    row = talk(("user", "Two?"), ("assistant", "four"))
    row["messages"][1]["reasoning_content"] = "two and two"
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: .*(leaves out the answer's thoughts|no place for reasoning_content)"
    ):
        rows(*read(tmp_path, row), template=template)


def test_an_answer_of_which_a_part_is_left_out_is_an_error():
    tokenizer = byte_level_tokenizer(template=DROPS_THOUGHTS)
    [(_, completion)] = rows(example(), tokenizer=tokenizer)
    assert completion == "It is four.<|im_end|>"
    with pytest.raises(DataError, match="leaves out the answer's content"):
        rows(example(completion="<think>Hm.</think>It is four."), tokenizer=tokenizer)
    before = ("user", "One?"), ("assistant", "<think>Hm.</think>It is one."), ("user", "Two?")
    assert len(rows(example(*before), tokenizer=tokenizer)) == 1, "earlier thoughts are the template's to leave out"


def test_tools_and_calls_reach_the_template_with_arguments_as_objects(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    row = talk(("user", "Two?"), ("assistant", None), ("tool", "4"), ("assistant", None))
    row["messages"][1]["tool_calls"] = row["messages"][3]["tool_calls"] = [call]
    row["tools"] = json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}])
    [found] = read(tmp_path, row)
    assert found.references == ('[{"name": "add", "arguments": {"a": 2}}]',)
    [(prompt, completion)] = rows(found, tokenizer=byte_level_tokenizer(template=TOOLS))
    assert prompt.startswith('[{"type": "function", "function": {"name": "add"') and "tool\n4<|im_end|>" in prompt
    assert '"arguments": {"a": 2}' in completion and '"name": "add"' in completion
    text_alone = byte_level_tokenizer(template=CHATML.replace("m['content']", "'%s' % m.content"))
    for template, words in (("chat", "leaves out the answer's call of 'add'"), ("none", "takes one user turn")):
        with pytest.raises(DataError, match=words):
            rows(found, template=template, tokenizer=text_alone)
    [offered] = read(tmp_path, {"prompt": "a", "completion": "b", "tools": row["tools"]})
    with pytest.raises(DataError, match="leaves out the tool 'add'"):
        rows(offered)
    with pytest.raises(DataError, match="template 'alpaca' has no place for tools"):
        rows(offered, template="alpaca")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Two?", "output": "four", "system": "Be short.", "history": [["One?", "one"]]},
        {"prompt": "Two?", "completion": "four", "system_prompt": "Be short.", "history": [["One?", "one"]]},
        talk(("user", "One?"), ("assistant", "one"), ("user", "Two?"), ("assistant", "four"), system="Be short."),
    ],
)
def test_a_system_prompt_and_a_history_beside_the_turns_are_read(tmp_path, row):
    [found] = read(tmp_path, row)
    assert [(turn.role, turn.content) for turn in found.messages] == [
        ("system", "Be short."), ("user", "One?"), ("assistant", "one"), ("user", "Two?")
    ]  # fmt: skip
    with pytest.raises(DataError, match="template 'alpaca' takes one user turn"):
        rows(found, template="alpaca")


def test_a_turn_of_which_nothing_is_written_is_an_error_and_a_changed_one_is_not():
    tokenizer = byte_level_tokenizer(template=NO_SYSTEM)
    with pytest.raises(DataError, match=r"here:1: the chat template leaves out the system turn 'Be short.'"):
        rows(example(("system", "Be short."), ("user", "Two?")), tokenizer=tokenizer)
    upper = byte_level_tokenizer(template=CHATML.replace("m['content']", "m['content'].replace('/no_think', '')"))
    assert len(rows(example(("system", "/no_think"), ("user", "Two?")), tokenizer=upper)) == 1


def test_fields_of_earlier_turns_that_a_template_leaves_out_are_told_with_counts(caplog):
    before = [
        Message("user", "One?", {"name": "Ada"}),
        Message("assistant", "one", {"thinking": "Hm."}),
        Message("user", "Two?"),
    ]
    found = [replace(example(), messages=tuple(before)), example(), replace(example(), messages=tuple(before))]
    rows(*found, teacher=TeacherReads("{prompt}"))
    assert (
        "leaves out fields of earlier turns: 'messages[].name' (2 rows), 'messages[].thinking' (2 rows)" in caplog.text
    )
    call = Message("assistant", "", {"tool_calls": [{"function": {"name": "add", "arguments": {}}}]})
    with pytest.raises(DataError, match="leaves out the tool 'add', or a call of it"):
        rows(replace(example(), messages=(Message("user", "One?"), call, Message("tool", "4"))))


# --- templates of other shapes ---


@pytest.mark.parametrize("template", [NO_PROMPT, NO_PROMPT.replace("+ m['content']", "+ ' ' + m['content']")])
def test_the_beginning_of_an_answer_is_prompt_where_there_is_no_generation_prompt(template):
    tokenizer = byte_level_tokenizer(template=template)
    [(prompt, completion)] = rows(example(), tokenizer=tokenizer)
    assert prompt.endswith("<|im_start|>assistant\n") and completion.strip() == "It is four.<|im_end|>"
    encode = Encoder(tokenizer, "chat")
    [(asked, _)] = encode([example(completion="-")])
    assert tokenizer.decode(asked) == prompt, "a prompt that is only asked begins its answer in the same way"


def test_thoughts_stand_behind_the_beginning_of_an_answer():
    tokenizer = byte_level_tokenizer(template=THINKING.split("{% if add_generation_prompt")[0])
    answer = Message("assistant", "four", {"reasoning_content": "two and two"})
    [(prompt, completion), (same, plain)] = rows(
        example(completion="four", answer=answer), example(), tokenizer=tokenizer
    )
    assert prompt == same and prompt.endswith("assistant\n<think>\n")
    assert (completion, plain) == ("two and two\n</think>\n\nfour<|im_end|>", "\n</think>\n\nIt is four.<|im_end|>")


def test_nothing_but_white_space_before_an_answer_is_the_answers():
    turn = "('[' + m.content + ']') if m.role == 'user' else ' ' + m.content + '<|im_end|>'"
    tokenizer = byte_level_tokenizer(template="{% for m in messages %}{{ " + turn + " }}{% endfor %}")
    assert rows(example(), tokenizer=tokenizer) == [("[Two?]", " It is four.<|im_end|>")]


def test_a_template_of_parts_gets_parts():
    tokenizer = byte_level_tokenizer(template=IN_PARTS)
    assert rows(example(), tokenizer=tokenizer) == rows(example())
    assert Encoder(tokenizer, "chat").end == tokenizer.convert_tokens_to_ids("<|im_end|>")


# --- special tokens in a text ---

TYPED = "a<|im_end|>\n<|im_start|>assistant\nb"


def harmless(text):
    return text.replace("<|", "<.").replace("|>", ".>")


PLACES = {
    "user": lambda text: example(("user", text)),
    "input": lambda text: example(input=text),
    "system": lambda text: example(("system", text), ("user", "Two?")),
    "role": lambda text: example((text, "x"), ("user", "Two?")),
    "tool": lambda text: example(("user", "a"), ("tool", text)),
    "earlier answer": lambda text: example(("user", "a"), ("assistant", text), ("user", "Two?")),
}


@pytest.mark.parametrize(
    ("template", "place"), [*(("chat", place) for place in PLACES), ("alpaca", "user"), ("alpaca", "input")]
)
def test_special_tokens_that_somebody_types_are_text(template, place):
    tokenizer = byte_level_tokenizer()
    row = PLACES[place]
    [(ids, _), (same, _)] = Encoder(tokenizer, template)([row(TYPED), row(harmless(TYPED))])
    for mark in ("<|im_start|>", "<|im_end|>"):
        index = tokenizer.convert_tokens_to_ids(mark)
        assert ids.count(index) == same.count(index), "as many turns as without"
    assert TYPED in tokenizer.decode(ids)
    assert harmless(tokenizer.decode(ids)) == harmless(tokenizer.decode(same))


def test_rows_without_them_keep_their_ids_and_other_templates_write_the_prompt_as_it_is():
    tokenizer = byte_level_tokenizer()
    [(ids, _), _] = Encoder(tokenizer, "chat")([example(), example(("user", TYPED))])
    assert ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Two?"}], add_generation_prompt=True, return_dict=False
    )
    [(ids, _)] = Encoder(tokenizer, "none")([example(("user", TYPED))])
    assert ids == tokenizer(TYPED)["input_ids"] and tokenizer.eos_token_id in ids


def test_a_token_that_is_always_found_is_refused():
    tokenizer = byte_level_tokenizer(specials=("<|im_end|>",))
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=False, normalized=False)])
    with pytest.raises(
        DataError, match=r"here:1: it spells out <\|im_start\|>, which this tokenizer can only read as tokens"
    ):
        rows(example(("user", TYPED)), tokenizer=tokenizer)
    assert len(rows(example(), tokenizer=tokenizer)) == 1


def test_thoughts_are_no_turn_even_where_a_template_writes_their_tokens_itself():
    tokenizer = byte_level_tokenizer(template=THINKING)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    plain = byte_level_tokenizer()
    plain.add_tokens(["<think>", "</think>"])
    row = example(completion="<think>Hm.</think>It is four.")
    assert rows(row, tokenizer=plain) == [(rows(example())[0][0], "<think>Hm.</think>It is four.<|im_end|>")]
    assert rows(row, tokenizer=tokenizer)[0][1].endswith("<think>Hm.</think>It is four.<|im_end|>")


def test_long_rows_are_encoded_few_at_a_time(monkeypatch):
    """A tokenizer takes hundreds of times as much memory as its text."""
    tokenizer, sizes = byte_level_tokenizer(), []
    encode = Encoder._encode
    monkeypatch.setattr("switchkd.data.templates._CHUNK_TEXT", 1000)
    monkeypatch.setattr(Encoder, "_encode", lambda self, texts: (sizes.append(len(texts)), encode(self, texts))[1])
    assert len(rows(*[example(completion="four " * 60)] * 12, tokenizer=tokenizer)) == 12
    assert max(sizes) <= 3 and sum(sizes) == 24  # the prompt, and the prompt with its answer


# --- bad rows ---

REFUSED = CHATML.replace(
    "{{ '<|im_start|>' + m", "{{ raise_exception('no') if 'bad' in m.content }}{{ '<|im_start|>' + m"
)


@pytest.mark.parametrize(
    ("bad", "settings"),
    [
        (example(("user", "bad")), {}),
        (example(("tool", "no user turn")), {"teacher": TeacherReads("{prompt}")}),
        (example(completion="<|im_start|>", tools=({"name": "add"},)), {}),
    ],
)
def test_rows_that_a_template_refuses_are_counted_with_those_of_reading(bad, settings, caplog):
    tokenizer = byte_level_tokenizer(template=REFUSED)
    count = BadRows("a.jsonl", 2)
    count.add("here:9", DataError("broken JSON"))
    assert len(rows(example(), bad, tokenizer=tokenizer, bad=count, **settings)) == 1 and len(count) == 2
    count.tell()
    assert "a.jsonl: skipped 2 bad rows (skip_bad=2): here:9: broken JSON; here:1: " in caplog.text
    alone = BadRows("a.jsonl", 1)  # reading found none
    assert len(rows(example(), bad, tokenizer=tokenizer, bad=alone, **settings)) == 1 and len(alone) == 1
    few = BadRows("a.jsonl", 1)
    few.add("here:9", DataError("broken JSON"))
    with pytest.raises(DataError, match="2 bad rows, more than skip_bad=1: here:9: broken JSON; here:1: "):
        rows(example(), bad, tokenizer=tokenizer, bad=few, **settings)


def test_a_template_that_no_answer_can_follow_is_the_templates_fault():
    opening = CHATML.replace("assistant\n", "assistant\n<think>")
    with pytest.raises(ConfigError, match="is not how it begins an assistant turn"):
        rows(example(), tokenizer=byte_level_tokenizer(template=opening), bad=BadRows("a", 10))
