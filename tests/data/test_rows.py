"""What a row may look like: prompts alone, prompts with answers, conversations of every writing; and what becomes of each turn."""

import json

import pytest

from switchkd.base.errors import DataError
from switchkd.data.examples import load_examples, split
from switchkd.data.formats import Wanted

PROMPTS, EVERY = Wanted(answers=False), Wanted(answers=True, every=True)
USER, ANSWER = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}
SYSTEM = {"role": "system", "content": "Be short."}
CALL = {"name": "add", "arguments": {"a": 2}}


def read(tmp_path, *rows, **settings):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(tmp_path / "a.jsonl"), **settings)


def turns(example):
    return [f"{message.role}: {message.content}" for message in example.messages]


ALONE = {
    "TRL's prompt-only": {"prompt": "Two?"},
    "TRL's prompt-only, conversational": {"prompt": [USER]},
    "with a system turn": {"prompt": [SYSTEM, USER]},
    "a conversation that ends with a question": {"messages": [SYSTEM, USER]},
    "ShareGPT": {"conversations": [{"from": "system", "value": "Be short."}, {"from": "human", "value": "Two?"}]},
    "Alpaca": {"instruction": "Two?", "input": ""},
    "ms-swift": {"query": "Two?"},
    "GSM8K": {"question": "Two?"},
    "MATH": {"problem": "Two?"},
    "a cell that is empty": {"prompt": "Two?", "completion": ""},
    "an answer that is null": {"prompt": "Two?", "completion": None},
}


@pytest.mark.parametrize("name", ALONE)
def test_a_prompt_alone_is_taken_where_no_answer_is_needed_and_refused_where_one_is(tmp_path, name):
    [example] = read(tmp_path, ALONE[name], wanted=PROMPTS)
    assert turns(example)[-1] == "user: Two?" and example.references == () and example.completion == ""
    assert ("Be short." in str(example.messages)) == ("Be short." in str(ALONE[name]))
    with pytest.raises(DataError, match=r"needs|needed|empty completion|no assistant turn"):
        read(tmp_path, ALONE[name])


ANSWERED = {
    "TRL's prompt-completion": {"prompt": "Two?", "completion": "Four."},
    "TRL's, conversational": {"prompt": [USER], "completion": [ANSWER]},
    "a prompt of turns, an answer of text": {"prompt": [USER], "completion": "Four."},
    "a prompt of text, an answer of turns": {"prompt": "Two?", "completion": [ANSWER]},
    "messages": {"messages": [USER, ANSWER]},
    "content in parts": {"messages": [USER | {"content": [{"type": "text", "text": t} for t in ("Two", "?")]}, ANSWER]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]},
    "ShareGPT with roles": {"conversations": [USER, ANSWER]},
    "Alpaca": {"instruction": "Two?", "output": "Four."},
    "ms-swift": {"query": "Two?", "response": "Four."},
}  # fmt: skip


@pytest.mark.parametrize("wanted", [Wanted(), PROMPTS, EVERY], ids=str)
@pytest.mark.parametrize("name", ANSWERED)
def test_every_writing_of_one_question_and_its_answer_is_the_same_example(tmp_path, name, wanted):
    [example] = read(tmp_path, ANSWERED[name], wanted=wanted)
    assert (turns(example), example.completion, example.references) == (["user: Two?"], "Four.", ("Four.",))


LONG = [SYSTEM, USER, ANSWER, USER | {"content": "And three?"}, ANSWER | {"content": "Nine."}]
TALKS = {
    "messages": {"messages": LONG},
    "ShareGPT": {
        "system": "Be short.",
        "conversations": [
            {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."},
            {"from": "human", "value": "And three?"}, {"from": "gpt", "value": "Nine."},
        ],
    },
    "Alpaca's history": {
        "system": "Be short.", "history": [["Two?", "Four."]], "instruction": "And three?", "output": "Nine."
    },
    "ms-swift's history": {"system": "Be short.", "history": [["Two?", "Four."]], "query": "And three?", "response": "Nine."},
}  # fmt: skip


@pytest.mark.parametrize("name", TALKS)
def test_every_answer_of_a_conversation_is_an_example_or_the_last_is_and_it_is_said(tmp_path, name, caplog):
    everything = ["system: Be short.", "user: Two?", "assistant: Four.", "user: And three?"]
    [last] = read(tmp_path, TALKS[name])
    assert (turns(last), last.completion) == (everything, "Nine.")
    assert "earlier ones are read as its prompt; with assistant_turns all each is used (1 turn in 1 row)" in caplog.text
    caplog.clear()
    first, last = read(tmp_path, TALKS[name], wanted=EVERY)
    assert [(turns(one), one.completion) for one in (first, last)] == [(everything[:2], "Four."), (everything, "Nine.")]
    assert (first.id, last.id) == (0, 2**32) and not caplog.records


def test_a_question_at_the_end_is_a_prompt_where_prompts_are_enough(tmp_path, caplog):
    row = {"messages": [*LONG, USER]}
    [answered] = read(tmp_path, row)
    assert answered.completion == "Nine." and "what follows the answer is not used (1 turn" in caplog.text
    caplog.clear()
    [asked] = read(tmp_path, row, wanted=PROMPTS)
    assert len(asked.messages) == 6 and asked.references == ()
    assert "earlier ones are read as its prompt" in caplog.text, "answers that are not trained on are told"
    found = read(tmp_path, row, wanted=Wanted(answers=False, every=True))
    assert [(len(one.messages), one.completion) for one in found] == [(2, "Four."), (4, "Nine."), (6, "")]


def test_answers_that_are_not_to_be_trained_are_none_of_every_answer(tmp_path):
    silent = [*LONG[:2], LONG[2] | {"weight": 0}, *LONG[3:]]
    [only] = read(tmp_path, {"messages": silent}, wanted=EVERY)
    assert only.completion == "Nine."
    [only] = read(tmp_path, {"prompt": LONG[:4], "completion": [LONG[4]]}, wanted=EVERY)
    assert only.completion == "Nine.", "answers in a prompt are prompt"


def test_calls_of_tools_in_sharegpt_are_calls(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "Two and two?"}, {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "4"}, {"from": "gpt", "value": "Four."},
        ],
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
    }  # fmt: skip
    called, said = read(tmp_path, row, wanted=EVERY)
    assert called.answer.calls == [CALL] and json.loads(called.completion) == [CALL]
    assert [message.role for message in said.messages] == ["user", "assistant", "tool"] and said.completion == "Four."
    assert said.tools[0]["name"] == "add"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [USER, ANSWER]}, "'prompt' ends with an assistant turn"),
        ({"prompt": []}, "'prompt' must be a list of one or more objects"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}, "only {'type': 'text'"),
        ({"messages": [{"role": "user", "content": ["Two?"]}]}, "holds 'Two[?]'; of content in parts only"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "a turn from 'narrator'; known: assistant, bing"),
        ({"conversations": [{"from": "function_call", "value": "add(2)"}]}, "broken JSON"),
        (
            {"data": [{"prompt": "a"}]},
            "Its field 'data' is a list of objects; if these are the rows, write that list alone",
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "Preferences are not read"),
    ],
)
def test_rows_that_are_refused_for_what_they_are(tmp_path, row, words):
    with pytest.raises(DataError, match=rf"(?s)a\.jsonl:1: .*{words}"):
        read(tmp_path, row, wanted=PROMPTS)


# --- rows that are held out ---------------------------------------------------------------------------------------


def test_what_is_held_out_depends_on_the_prompt_alone(tmp_path):
    rows = [{"prompt": f"What is {i} squared?", "completion": f"{i * i}"} for i in range(400)]
    train, held_out = split(read(tmp_path, *rows), 0.05)
    assert len(train) + len(held_out) == 400 and 8 <= len(held_out) <= 36
    prompts = {example.messages for example in held_out}
    assert prompts.isdisjoint(example.messages for example in train)
    for others in (rows[::-1], rows[:200], [{"prompt": row["prompt"]} for row in rows]):
        examples = read(tmp_path, *others, wanted=PROMPTS)
        again = {example.messages for example in split(examples, 0.05)[1]}
        assert again == prompts & {example.messages for example in examples}
    wider = {example.messages for example in split(read(tmp_path, *rows), 0.2)[1]}
    assert prompts < wider


def test_one_question_is_never_on_both_sides(tmp_path):
    talks = [
        {"messages": [SYSTEM, USER | {"content": f"Topic {i}?"}, ANSWER, USER | {"content": f"More {j}?"}, ANSWER]}
        for i in range(20)
        for j in range(3)
    ]
    train, held_out = split(read(tmp_path, *talks, wanted=EVERY), 0.2)

    def topics(examples):
        return {example.messages[1].content for example in examples}

    assert topics(train).isdisjoint(topics(held_out)) and topics(train) | topics(held_out) == {
        f"Topic {i}?" for i in range(20)
    }


def test_few_prompts_give_one_that_is_held_out_and_one_prompt_gives_an_error(tmp_path):
    pair = [{"prompt": text, "completion": "b"} for text in ("a", "c")]
    train, held_out = split(read(tmp_path, *pair), 0.05)
    assert len(train) == len(held_out) == 1
    assert [len(side) for side in split(read(tmp_path, *pair), 0.5)] == [1, 1]
    with pytest.raises(DataError, match=r"none of 2 examples can be held out.*give eval_file, or set eval_split to 0"):
        split(read(tmp_path, pair[0], pair[0]), 0.05)
