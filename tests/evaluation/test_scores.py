"""Scores against values worked out by hand from the official scripts and the papers, each beside what a near miss would say."""

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from shutil import which

import psutil
import pytest

from switchkd.base.errors import ConfigError, DataError
from switchkd.evaluation.scores import (
    best_rouge,
    exact_match,
    gsm8k_flexible,
    gsm8k_strict,
    gsm_plus_accuracy,
    math_equal,
    rouge,
    small_right,
    until_mistake,
)

ROOT = Path(__file__).parents[2]

# --- ROUGE and exact match ----------------------------------------------------------------------------------------

FOX, LOG = "The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."


def test_rouge_of_the_packages_own_example():
    # 9 and 8 words. Shared: the (twice), quick, brown, jumps, dog: 6. Pairs "the quick", "quick brown": 2 of 8 and 7.
    # Longest common subsequence: the quick brown jumps the: 5.
    expected = {"rouge_1": 100 * 2 * 6 / 17, "rouge_2": 100 * 2 * 2 / 15, "rouge_l": 100 * 2 * 5 / 17}
    assert rouge(LOG, FOX) == pytest.approx(expected)


def test_rouge_is_stemmed_f1_and_the_order_of_words_counts_only_for_some():
    assert rouge("cats running", "cat runs")["rouge_1"] == pytest.approx(100)
    # 1 of 1 word and 1 of 3: recall alone would say 33, precision 100.
    assert rouge("cat", "the cat sat")["rouge_1"] == pytest.approx(50)
    turned = rouge("mat the on", "on the mat")
    assert turned["rouge_1"] == pytest.approx(100) and turned["rouge_2"] == 0.0
    assert turned["rouge_l"] == pytest.approx(100 / 3)


def test_each_rouge_has_its_own_best_reference():
    # "a b" to "b a c": 2 words of 2 and 3, no pair, subsequence 1. To "a b d e f g": 2 of 2 and 6, pair 1 of 1 and 5.
    best = best_rouge("xa xb", ["xb xa xc", "xa xb xd xe xf xg"])
    assert best == pytest.approx({"rouge_1": 100 * 4 / 5, "rouge_2": 100 * 2 / 6, "rouge_l": 100 * 4 / 8})


def test_nothing_shared_with_nothing_is_zero():
    assert rouge("", "word") == rouge("word", "...") == {"rouge_1": 0.0, "rouge_2": 0.0, "rouge_l": 0.0}


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        (" The  answer,\nis YES! ", "the answer is yes", 100.0),
        ("the answer", "answer", 0.0),  # articles stay: SQuAD's normalisation takes them out, MiniLLM's does not
        ("well-known", "wellknown", 100.0),  # punctuation is removed, not replaced by a space
        ("well known", "wellknown", 0.0),
        ("yes “", "yes", 0.0),  # ASCII punctuation alone
        ("", "...", 0.0),  # an empty text is wrong, whatever is left of the reference
        ("...", "...", 100.0),
    ],
)
def test_exact_match(text, reference, score):
    assert exact_match(text, reference) == score


# --- GSM8K --------------------------------------------------------------------------------------------------------

GOLD = "He has 500 x 2 = 1,000 dollars.\nThat is 1,018 in all.\n#### 1,018"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 1,018", 100.0, 100.0),
        ("#### 1018", 100.0, 100.0),
        ("so #### 1018 dollars", 100.0, 100.0),
        ("#### 1018\n#### 7", 100.0, 0.0),  # strict: the first, flexible: the last
        ("#### 7\n#### 1018", 0.0, 100.0),
        ("#### 1018.", 0.0, 100.0),  # string equality; the harness takes one full stop off
        ("#### 1018.0", 0.0, 0.0),  # neither compares values
        ("#### 1018.00", 0.0, 0.0),
        ("#### $1,018", 0.0, 100.0),
        ("####1018", 0.0, 100.0),  # the space is part of the pattern
        ("### 1018", 0.0, 100.0),
        ("It is $1,018.", 0.0, 100.0),
        ("It is **1018**", 0.0, 100.0),
        ("1018 apples", 0.0, 100.0),
        ("1018 apples, not 7", 0.0, 0.0),
        ("It is 1018...", 0.0, 0.0),  # "1018..." less one full stop
        ("#### 1018\nWell ...", 100.0, 0.0),  # the dots are the last "number"
        ("#### -1018", 0.0, 0.0),
        ("#### one thousand", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_gsm8k(text, strict, flexible):
    assert (gsm8k_strict(text, GOLD), gsm8k_flexible(text, GOLD)) == (strict, flexible)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [("#### -3", 100.0, 100.0), ("#### 3", 0.0, 0.0), ("#### - 3", 0.0, 0.0), ("7-3", 0.0, 100.0), ("−3", 0.0, 0.0)],
)
def test_a_negative_answer(text, strict, flexible):
    assert (gsm8k_strict(text, "#### -3"), gsm8k_flexible(text, "#### -3")) == (strict, flexible)


def test_one_digit_is_a_number_of_its_own():
    assert gsm8k_flexible("I have 7 of 9", "#### 9") == gsm8k_flexible("9", "#### 9") == 100.0
    assert gsm8k_flexible("9 %", "#### 9") == 100.0


SUM = "5 plus 2 is 7. 7+1=8.\n#### 8"


@pytest.mark.parametrize(
    ("text", "reference", "right", "until"),
    [
        (SUM, SUM, 100, 100),
        ("5+2=7. 7 and 1 make 8.\n#### 8", SUM, 100, 100),  # in other words
        ("5+2=7. 7+1=9.\n#### 9", SUM, 0, 500 / 7),  # the docs' example
        ("5+2=7. 7+1=9.\n#### 8", SUM, 100, 500 / 7),  # right in the end
        ("5+2=7. 7+1=8.\n#### 8\n#### 9", SUM, 100, 100),
        ("#### 8", SUM, 100, 0),
        ("", SUM, 0, 0),
        ("first, ada sold it", "First, Ada sold it.", 100, 0),
        ("First, Ada sold it.", "First, Ada sold it.", 100, 100),
        ("First, Ada ate it.", "First, Ada sold it.", 0, 50),
        ("First, Ada sold it. Then she slept.", "First, Ada sold it.", 0, 100),
    ],
)
def test_scores_of_the_small_pair(text, reference, right, until):
    assert small_right(text, reference) == right
    assert until_mistake(text, reference) == pytest.approx(until)


def test_a_gsm8k_reference_without_an_answer_is_an_error():
    with pytest.raises(DataError, match=r"the reference has no '#### N' to score against: 'It is five\.'"):
        gsm8k_strict("", "It is five.")


# --- GSM-Plus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("#### 5/8", "5/8", 100.0),
        ("#### 0.625", "5/8", 100.0),  # compared by value
        ("#### 10/16", "5/8", 100.0),
        ("#### 5", "5/8", 0.0),  # GSM8K's own pattern reads 5/8 as 5
        ("#### 4.330", "4.33", 100.0),
        ("#### 4.3", "4.33", 0.0),
        ("#### 18.00", "18", 100.0),
        ("#### 100", "1", 0.0),  # zeros are taken off behind a decimal point alone
        ("#### 1,018", "1018", 100.0),
        ("#### $1,018 in all", "1018", 100.0),
        ("#### 3 of 4", "3", 100.0),  # the first number of the line
        ("#### 3\n#### 4", "4", 100.0),  # of the last line
        ("It is 3, then 4.", "4", 100.0),  # without ####, the last number
        ("18\n#### eighteen", "18", 100.0),  # a #### line without a number counts as none
        ("#### 18\nQuestion: what is 2?\n#### 2", "18", 100.0),
        ("Questions left: 18\n#### 18", "18", 0.0),  # as the script cuts it
        ("question: 2\n#### 18", "18", 100.0),
        ("#### -7", "-7", 100.0),
        ("#### 7", "-7", 0.0),
        ("#### 1/0", "1", 0.0),
        ("#### " + "9" * 5000, "9", 0.0),
        ("no number", "0", 0.0),
        ("", "0", 0.0),
        ("There is not enough information: none", "3", 0.0),
    ],
)
def test_gsm_plus(text, gold, score):
    assert gsm_plus_accuracy(text, f"2 + 2 = 4\n#### {gold}", "digit expansion") == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#### None", 100.0),
        ("The problem does not specify the price.\n#### 5", 100.0),
        ("We CANNOT determine it.\n#### 5", 100.0),
        ("It cannot be determined.\n#### 5", 0.0),  # not among the script's phrases
        ("It cannot be determined.", 100.0),  # but there is no ####
        ("It is 5.", 100.0),
        ("#### 5", 0.0),
        ("", 0.0),
        ("\n", 0.0),
    ],
)
@pytest.mark.parametrize("group", ["critical thinking", ""])
def test_a_question_without_an_answer(text, score, group):
    assert gsm_plus_accuracy(text, "The price is not given.\n#### None", group) == score


def test_gsm_plus_references():
    assert gsm_plus_accuracy("#### 5", "#### 4\nno:\n#### 5.\n", "") == 100.0  # the last
    assert gsm_plus_accuracy("It is 5.", "#### 5", "critical thinking") == 0.0
    for reference in ("It is 5.", "5\n#### five"):
        with pytest.raises(DataError, match="no '#### N' or '#### None'"):
            gsm_plus_accuracy("", reference)


# --- mathematics --------------------------------------------------------------------------------------------------


@pytest.fixture
def math_verify():
    pytest.importorskip("math_verify")


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        (r"So it is $\frac{6}{8}$.", "0.75", 100.0),
        (r"\boxed{\frac{3}{4}}", r"\frac34", 100.0),
        ("The answer is 1,018.", "2 and 3 make\n#### 1,018", 100.0),
        (r"$1 + x$", "x+1", 100.0),
        (r"$(1,2)$", "(1,2)", 100.0),
        (r"$(2,1)$", "(1,2)", 0.0),
        (r"\boxed{\text{Friday}}", r"\text{Friday}", 100.0),
        (r"It is 4, so \boxed{5}", r"Since 2 + 2 = 4 we get $4+1$, that is \boxed{5}.", 100.0),
        (r"It is 5, so \boxed{4}", r"\boxed{5}", 0.0),
        ("Of 96 they are 32: 33.333...%\n#### 33", "#### 33", 100.0),
        ("#### 33\n#### 32", "#### 33", 0.0),
        ("I do not know", "5", 0.0),
        ("", "5", 0.0),
    ],
)
def test_math_equal(math_verify, text, reference, score):
    assert math_equal(text, reference) == score


def test_a_math_reference_without_an_answer_is_an_error(math_verify):
    with pytest.raises(DataError, match="no answer in the reference 'nobody knows'"):
        math_equal("5", "nobody knows")


def test_any_thread_may_ask(math_verify):
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: math_equal(f"${i}+1$", str(i + i % 2))})) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 0.0, 1: 100.0, 2: 0.0, 3: 100.0, 4: 0.0, 5: 100.0}


def test_an_answer_that_would_take_for_ever_is_wrong_and_the_next_is_not(math_verify, caplog):
    from switchkd.evaluation.math_answers import Checker

    checker = Checker(time_limit=1.0)
    assert not checker.equal("$9^{9^{9^{9}}}$", "5")
    assert "more than 1 s" in caplog.text
    assert checker.equal("5", "5")
    time.sleep(1.2)  # the limit is an answer's: waiting for the next question takes none of it
    assert checker._process.poll() is None
    checker.close()


def script(tmp_path, code):
    """The command that runs ``code`` as a user's script, and which folder it is started in."""
    (tmp_path / "script.py").write_text(code)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {
        "args": [sys.executable, str(tmp_path / "script.py")],
        "cwd": tmp_path,
        "env": os.environ | {"PYTHONPATH": paths},
    }


ASK = """
from switchkd.evaluation.scores import math_equal
print("runs", __name__, math_equal("$4+1$", "5"), flush=True)
"""


def test_a_script_without_a_guard_runs_once_and_its_folder_is_not_imported_from(math_verify, tmp_path):
    (tmp_path / "sympy.py").write_text("raise SystemExit('own code ran')")
    done = subprocess.run(**script(tmp_path, ASK), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("runs __main__ 100.0\n", "")


def test_a_forked_child_has_a_process_of_its_own_and_its_end_is_not_its_parents(math_verify, tmp_path):
    code = (
        ASK
        + """
import os, sys
from switchkd.evaluation.math_answers import checker
process = checker()._process
if child := os.fork():
    os.waitpid(child, 0)
else:
    if "asks" in sys.argv:
        print("child", math_equal("6", "6"), checker()._process.pid != process.pid, flush=True)
    sys.exit()
print("again", math_equal("7", "7"), checker()._process is process and process.poll() is None)
"""
    )
    for more in ([], ["asks"]):
        command = script(tmp_path, code)
        done = subprocess.run(**command | {"args": command["args"] + more}, capture_output=True, text=True, timeout=60)
        child = "child 100.0 True\n" if more else ""
        assert (done.stdout, done.stderr) == (f"runs __main__ 100.0\n{child}again 100.0 True\n", "")


def test_an_expression_ends_in_time_though_its_asker_was_killed(math_verify, tmp_path):
    code = """
from switchkd.evaluation.math_answers import Checker
checker = Checker(time_limit=2.0)
checker.equal("5", "5")
print(checker._process.pid, flush=True)
checker.equal("$9^{9^{9^{9}}}$", "5")
"""
    with subprocess.Popen(**script(tmp_path, code), stdout=subprocess.PIPE, text=True) as asker:
        process = psutil.Process(int(asker.stdout.readline()))
        time.sleep(0.5)  # it is at work by then
        asker.kill()
    assert process.is_running()
    for _ in range(200):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return
    process.kill()
    pytest.fail("it goes on for ever")


def test_a_checker_that_cannot_start_is_an_error_not_a_zero(math_verify, monkeypatch):
    from switchkd.evaluation import math_answers

    monkeypatch.setattr(math_answers.sys, "executable", which("false"))
    with pytest.raises(ConfigError, match="cannot be started"):
        math_answers.Checker().equal("5", "5")


def test_without_math_verify(monkeypatch):
    from switchkd.evaluation import math_answers

    monkeypatch.setattr(math_answers, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'switchkd\[math\]'"):
        math_answers.check_installed()
