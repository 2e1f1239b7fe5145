"""What a row says and no example does: told once, with counts, or refused."""

import json

import pytest

from switchkd.base.errors import DataError
from switchkd.data.examples import load_examples

PAIR = {"prompt": "a", "completion": "b"}


def read(tmp_path, *rows, **settings):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(tmp_path / "a.jsonl"), **settings)


def talk(*turns, **fields):
    return {"messages": [{"role": role, "content": content, **more} for role, content, more in turns], **fields}


def test_fields_that_nothing_reads_are_named_with_the_count_of_rows(tmp_path, caplog):
    rows = [
        PAIR | {"id": 1},
        PAIR | {"id": 2, "note": ""},
        PAIR | {"note": "x", "messages": [{"a": 1}]},
        PAIR | {"note": None},
    ]
    read(tmp_path, *rows)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.endswith("a.jsonl: fields that are not read: 'id' (2 rows), 'note' (1 row), 'messages' (1 row)")


def test_a_later_row_of_other_fields_loses_none_in_silence(tmp_path, caplog):
    read(tmp_path, {"question": "a", "answer": "b"}, {"question": "a", "answer": "b", "solution": "c"})
    assert "'solution' (1 row)" in caplog.text
    caplog.clear()
    read(tmp_path, {"instruction": "a", "input": "b", "context": "c", "output": "d"})
    assert "'context' (1 row)" in caplog.text, "of two names for one thing the other one"
    caplog.clear()
    read(tmp_path, talk(("user", "a", {"recipient": "x"}), ("assistant", "b", {})))
    assert "'messages[].recipient' (1 row)" in caplog.text
    caplog.clear()
    read(tmp_path, PAIR, {"instruction": "a", "instances": [{"output": "b", "note": "c"}]} | PAIR)
    assert "'instruction' (1 row), 'instances' (1 row)" in caplog.text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            PAIR | {"chat_template_kwargs": {"enable_thinking": False}},
            "'chat_template_kwargs' .*: give it for all rows",
        ),
        (PAIR | {"images": ["a.png"]}, "'images' would change the text and is not read"),
        (PAIR | {"documents": [{"text": "x"}]}, "'documents'"),
        (PAIR | {"functions": [{"name": "x"}]}, "'functions' .*: write it as `tools`"),
        (PAIR | {"history": "x"}, "'history' must be a list of"),
        (PAIR | {"tools": "x"}, "'tools' is neither a list of objects nor one as JSON"),
        (
            talk(("user", "a", {}), ("assistant", "b", {}), history=[["c", "d"]]),
            "'history' .*: write its turns into the messages",
        ),
        (
            talk(("user", "a", {}), ("assistant", "b", {"function_call": {"name": "x"}})),
            r"'messages\[\].function_call'",
        ),
        (talk(("system", "a", {}), ("user", "a", {}), ("assistant", "b", {}), system="c"), "keep one of them"),
        (talk(("user", "a", {}), ("assistant", "b", {"weight": 0.5})), r"'messages\[\].weight' must be 0 or 1"),
        (
            talk(("user", "a", {}), ("assistant", "b", {"train": False})),
            "every assistant turn that it is not trained on",
        ),
        (
            talk(("user", "a", {}), ("assistant", "b", {"tool_calls": [{"function": {}}]})),
            "needs a function with a name",
        ),
        (PAIR | {"tools": [{"function": "add"}]}, "a tool, or a call of one, needs a function with a name"),
        (PAIR | {"tools": [{"name": 3}]}, "a tool, or a call of one, needs a function with a name"),
        (PAIR | {"tools": "[" * 100_000}, "nested too deeply"),
        (talk(("user", None, {"value": "a"}), ("assistant", "b", {})), "a turn without content .*role, value"),
        (
            {"conversations": [{"from": "humna", "value": "a"}]},
            "'conversations' has a turn from 'humna'; did you mean 'human'",
        ),
    ],
    ids=range(17),
)
def test_a_field_that_would_change_the_text_is_an_error_with_the_way_out(tmp_path, row, words):
    with pytest.raises(DataError, match=rf"(?s)a\.jsonl:1: .*{words}"):
        read(tmp_path, row)


@pytest.mark.parametrize("mark", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_an_answer_that_is_not_to_be_trained_is_prompt(tmp_path, mark, off, caplog):
    turns = [("user", "a", {}), ("assistant", "b", {mark: 1}), ("user", "c", {}), ("assistant", "d", {mark: off})]
    [row] = read(tmp_path, talk(*turns))
    assert (row.completion, len(row.messages)) == ("b", 1)
    assert "what follows the answer is not used (2 turns in 1 row)" in caplog.text
    [row] = read(tmp_path, talk(*turns[2:], *turns[:2]))
    assert (row.completion, len(row.messages)) == ("b", 3)


def test_turns_that_are_not_trained_are_told_once_with_counts(tmp_path, caplog):
    one = [("user", "a", {}), ("assistant", "b", {})]
    read(tmp_path, talk(*one), talk(*one * 3), talk(*one * 2, ("user", "c", {})), talk(*one))
    assert [record.getMessage().split("a.jsonl: ")[1] for record in caplog.records] == [
        "only the last answer of a row is used, earlier ones are read as its prompt; with assistant_turns all each is used "
        "(3 turns in 2 rows)",
        "what follows the answer is not used (1 turn in 1 row)",
    ]


@pytest.mark.parametrize(
    ("row", "optional"),
    [
        (PAIR, ["system", "history", "tools", "teacher"]),
        ({"instruction": "a", "output": "b"}, ["input", "context", "topic", "category", "system", "history"]),
        ({"dialogue": "a", "summary": "b"}, ["summary1", "summary2", "summary3"]),
        ({"problem": "a", "solution": "b"}, ["subject", "type"]),
        ({"instruction": "a", "instances": [{"output": "b"}]}, ["motivation_app"]),
    ],
)
def test_null_is_none_for_every_field_that_may_be_left_out(tmp_path, row, optional, caplog):
    settings = {"teacher_field": "teacher", "teachers": ("math",)}
    assert read(tmp_path, row | dict.fromkeys(optional), **settings) == read(tmp_path, row, **settings)
    turn = dict.fromkeys(("tool_calls", "reasoning_content", "name", "weight"))
    assert read(tmp_path, talk(("user", "a", {}), ("assistant", "b", turn))) == read(
        tmp_path, talk(("user", "a", {}), ("assistant", "b", {}))
    )
    assert not caplog.records
