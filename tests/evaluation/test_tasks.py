"""Tasks: which scores they give, on which rows, and where their data is."""

import pytest

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.examples import Example
from switchkd.data.fields import Message
from switchkd.data.files import BadRows
from switchkd.data.formats import FORMATS
from switchkd.evaluation.scores import SCORES
from switchkd.evaluation.tasks import TASKS, eval_sources, scorable, task_named

NAMES = {
    "rouge": {"rouge_1", "rouge_2", "rouge_l", "exact_match"},
    "dialogsum": {"rouge_1_first", "rouge_2_first", "rouge_l_first"},
    "gsm8k": {"strict", "flexible", "rouge_l"},
    "gsm_plus": {"accuracy", "rouge_l"},
    "math": {"math_equal", "flexible", "rouge_l"},
    "small": {"right", "until_mistake", "rouge_l"},
}


@pytest.fixture(autouse=True)
def math_verify(request):
    if "math" in request.node.name:
        pytest.importorskip("math_verify")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_scores_its_own_reference_in_full_and_an_empty_text_as_zero(name):
    task, reference = TASKS[name], "The price is $6 each.\n#### 18"
    scores = task.score(reference, [reference], "")
    assert set(scores) == NAMES.get(name, NAMES["rouge"]) and set(scores) <= set(SCORES)
    assert scores == pytest.approx(dict.fromkeys(scores, 100.0))
    assert task.score("", [reference], "") == dict.fromkeys(scores, 0.0)
    assert task.primary in scores
    assert set(task.formats) <= {known.name for known in FORMATS}
    assert task.name == name and task.version >= 1 and task.hub.startswith(("hub:", "small:")) == (task.hub != "")


def test_instructions_take_the_best_reference():
    scores = TASKS["references"].score("two words", ["quite different", "Two words!"], "")
    assert scores["exact_match"] == scores["rouge_l"] == 100.0


def test_dialogsum_with_three_references():
    # F1 of the words shared with each: 2 of 2 and 4, 2 of 2 and 2, none.
    score = TASKS["dialogsum"].score
    scores = score("xa xb", ["xa xb xc xd", "xa xb", "xe"], "")
    assert scores["rouge_l_first"] == pytest.approx(200 / 3)
    assert scores["rouge_l_best"] == pytest.approx(100)
    assert scores["rouge_l_mean"] == pytest.approx((200 / 3 + 100 + 0) / 3)
    assert len(scores) == 9 and set(scores) <= set(SCORES)


def test_gsm_plus_knows_the_group():
    score = TASKS["gsm_plus"].score
    assert score("It depends.", ["#### None"], "critical thinking")["accuracy"] == 100.0
    assert score("It depends on 5.", ["#### 5"], "digit expansion")["accuracy"] == 100.0
    assert TASKS["gsm_plus"].leave_out == ("critical thinking",)


def test_math_compares_the_last_number_with_the_boxed_one():
    solution = r"Of 7 there are 2, so \boxed{35}."
    scores = TASKS["math"].score("It is 35", [solution], "")
    assert (scores["math_equal"], scores["flexible"]) == (100.0, 100.0)
    assert TASKS["math"].score("It is 2", [solution], "")["flexible"] == 0.0


def test_an_unusable_reference_shows_before_anything_is_generated():
    for name in ("gsm8k", "gsm_plus", "math"):
        if name == "math":
            pytest.importorskip("math_verify")
        with pytest.raises(DataError, match="reference"):
            TASKS[name].score("", ["no answer here"], "")


@pytest.mark.parametrize(
    ("source_format", "name"),
    [("gsm8k", "gsm8k"), ("gsm_plus", "gsm_plus"), ("math", "math"), ("dialogue", "dialogsum"), ("pair", "references"),
     ("messages", "references"), ("instruction", "references"), ("instances", "references")],
)  # fmt: skip
def test_auto_goes_by_the_rows(source_format, name):
    assert task_named("auto", source_format) is TASKS[name]


def test_a_task_by_its_name():
    assert task_named("gsm8k", "messages") is TASKS["gsm8k"]
    assert task_named("references", "gsm8k") is TASKS["references"]
    with pytest.raises(ConfigError, match=r"no task 'gsmk8'; did you mean 'gsm8k'\?"):
        task_named("gsmk8", "gsm8k")
    with pytest.raises(ConfigError, match="task gsm_plus is scored on rows of the layout gsm_plus, not 'pair'"):
        task_named("gsm_plus", "pair")


def test_a_missing_package_shows_when_the_task_is_chosen(monkeypatch):
    from switchkd.evaluation import math_answers

    monkeypatch.setattr(math_answers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'switchkd\[math\]'"):
        task_named("math", "math")


def test_where_the_examples_come_from():
    mine = ("mine.jsonl",)
    assert eval_sources(mine, "gsm8k") == eval_sources(mine, "auto") == mine
    assert eval_sources((), "gsm8k") == ("hub:openai/gsm8k/main:test",)
    with pytest.raises(ConfigError, match="task unnatural_instructions has no data of its own; give eval_file"):
        eval_sources((), "unnatural_instructions")
    with pytest.raises(ConfigError, match="nothing to evaluate on: give eval_file"):
        eval_sources((), "auto")
    for file in ((), mine):
        with pytest.raises(ConfigError, match=r"did you mean 'gsm8k'\?"):
            eval_sources(file, "gsm8")


def test_rows_that_a_task_cannot_score_against_are_bad_rows():
    found = [
        Example(i, (Message("user", "a"),), text, (text,), f"a.jsonl:{i + 1}")
        for i, text in enumerate(["#### 4", "four"])
    ]
    bad = BadRows("a.jsonl", 1)
    assert scorable(TASKS["gsm8k"], found, bad) == found[:1] and len(bad) == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2: task gsm8k: the reference has no '#### N'"):
        scorable(TASKS["gsm8k"], found, BadRows("a.jsonl"))
