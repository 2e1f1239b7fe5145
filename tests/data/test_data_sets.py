"""The table of data sets in docs/data.md is true, field by field, on rows of their fields."""

import json
import logging
import re
from pathlib import Path

import pytest

from switchkd.base.errors import DataError
from switchkd.data.examples import load_examples
from switchkd.data.formats import Wanted

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
TALK = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "<think>Hm.</think>Four."}]
SHARED = [{"from": "human", "value": "Two?", "weight": 0.0}, {"from": "gpt", "value": "Four.", "weight": 1.0}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLED = [
    TALK[0],
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]},
]
TOOL_ROW = {"id": 0, "query": "Two?", "answers": '[{"name": "add"}]', "tools": json.dumps(TOOLS)}
ROWS = {
    "Alpaca": {
        "instruction": "Add.", "input": "2 2", "output": "4", "text": "Below is …", "system": "Be short.", "history": [["a", "b"]]
    },
    "Dolly-15k": {"instruction": "Who?", "context": "Ada.", "response": "Ada.", "category": "closed_qa"},
    "UltraChat-200k": {"prompt": "Two?", "prompt_id": "a", "messages": TALK},
    "Tulu 3": {"id": "a", "messages": TALK, "source": "ai2-adapt-dev/flan_v2_converted"},
    "OpenHermes 2.5, ShareGPT": {"conversations": SHARED, "source": "airoboros", "category": "x", "system_prompt": "Be kind."},
    "GSM8K": {"question": "2+2?", "answer": "<<2+2=4>>4\n#### 4"},
    "MATH-500": {
        "problem": "$1+1$?", "solution": "2", "answer": "2", "subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json"
    },
    "OpenR1-Math": {
        "problem": "$1+1$?", "solution": "2", "answer": "2", "problem_type": "Algebra", "source": "olympiads", "uuid": "a",
        "generations": ["<think>Hm.</think>2"], "messages": TALK,
    },
    "Self-Instruct": {
        "id": "seed_task_0", "name": "add", "instruction": "Add.", "instances": [{"input": "1 1", "output": "2"}],
        "is_classification": True,
    },
    "DialogSum": {"id": "train_0", "dialogue": "#Person1#: Hi", "summary": "A greets.", "topic": "greeting"},
    "xLAM function calling, with a method that needs answers": TOOL_ROW,
    "xLAM function calling, with one that needs prompts alone": TOOL_ROW,
    "ToolACE": {"system": "You may call …", "conversations": SHARED},
    "conversations with tools": {"id": "a", "messages": CALLED, "tools": json.dumps(TOOLS)},
}  # fmt: skip


def claims():
    """Data set: the fields that are read, named as not read, and refused, as the page says it."""
    lines = PAGE.read_text(encoding="utf-8").partition("| data set |")[2].splitlines()[2:]
    cells = (line.strip("|").split("|") for line in lines if line.startswith("|"))
    return {name.strip(): [set(re.findall("`(.*?)`", cell)) for cell in rest] for name, *rest in cells}


CLAIMS = claims()


def test_the_page_and_the_rows_are_of_the_same_data_sets():
    assert CLAIMS.keys() == ROWS.keys() and len(ROWS) >= 10


@pytest.mark.parametrize("name", CLAIMS)
def test_what_becomes_of_each_field(tmp_path, name, caplog):
    (read, unread, refused), row = CLAIMS[name], ROWS[name]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    wanted = Wanted(answers="prompts alone" not in name)
    if refused:
        with pytest.raises(DataError, match="are not read: write") as caught:
            load_examples(str(tmp_path / "a.jsonl"), wanted=wanted)
        assert all(field in str(caught.value) for field in refused)
        return
    with caplog.at_level(logging.WARNING):
        load_examples(str(tmp_path / "a.jsonl"), wanted=wanted)
    told = [record.getMessage() for record in caplog.records if "fields that are not read" in record.getMessage()]
    assert set(re.findall("'(.*?)'", told[0].rpartition("not read: ")[2]) if told else ()) == unread
    assert row.keys() == read | unread, "no field is missing from the page"
