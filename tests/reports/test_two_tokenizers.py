"""Texts of two tokenizers as people see them: by words, with the tokens of both models, and who wrote each."""

import dataclasses
import html
import io
import json
import math
import re
import shutil
from functools import partial
from itertools import pairwise

import pytest
from fabricated import metric
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import toy_examples, toy_pair
from two_readings import BRIDGE, PARTS, SIDES, STUDENT, TEACHER, WORDS, run_of, sample_of, save_models, written_by
from two_tokenizers import model_of, tokenizer_of

from switchkd import show
from switchkd.api.run import Run
from switchkd.base.errors import DataError
from switchkd.cli.main import main
from switchkd.crossing.readings import groups
from switchkd.decoding.rollouts import DecodeCost, Rollout, Rollouts, mean, rollout_metrics
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policies import Switch
from switchkd.models.pypi_pairs import PAIRS
from switchkd.reports import live
from switchkd.reports.curves import run_curves
from switchkd.reports.page import page
from switchkd.reports.record import RunRecord
from switchkd.reports.steps import alike
from switchkd.reports.viewer import drawn, payload, spoken, words
from switchkd.writing.turns import TurnJob, decode_turns_reference


@pytest.fixture(scope="module")
def turns():
    """Texts as the loop writes them."""
    settings = DecodeSettings(Switch(tau_0=0.08, decay=0.0), 20, seed=3)
    prompts = [side.spelling.encode(b"the cat sat") for side in SIDES]
    job = TurnJob.of(BRIDGE, model_of(STUDENT), model_of(TEACHER, seed=2), [prompts[0]] * 4, [prompts[1]] * 4, settings)
    rollouts = decode_turns_reference(job)
    assert {who for rollout in rollouts for who in rollout.speakers} == {0, 1}
    return rollouts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(models, tmp_path):
    return partial(run_of, models, tmp_path / "run")


def crossing(**changes):
    return {"cross/coverage": 0.75, "cross/student_mass": 0.9, "cross/teacher_mass": 0.95, **changes}


# --- words --------------------------------------------------------------------------------------------------------


@st.composite
def readings(draw):
    text = draw(st.text(alphabet="ab é東🙂", min_size=1, max_size=8)).encode()
    cuts = [sorted(draw(st.sets(st.integers(1, max(len(text) - 1, 1)))) | {0, len(text)}) for _ in range(2)]
    return text, [[text[a:b] for a, b in pairwise(own)] for own in cuts]


@given(readings())
def test_stretches_end_where_both_readings_and_a_character_do(case):
    text, (one, other) = case
    found = groups(one, other)
    assert [t for own, _ in found for t in own] == list(range(len(one)))
    assert [t for _, own in found for t in own] == list(range(len(other)))
    spelt = [b"".join(one[own.start : own.stop]) for own, _ in found]
    assert spelt == [b"".join(other[own.start : own.stop]) for _, own in found]
    ends = {0}
    for own in (one, other):
        ends = {sum(map(len, own[:t])) for t in range(len(own) + 1)} & (ends if own is other else set(range(99)))
    whole = {len(text[:place].decode(errors="ignore").encode()) for place in range(len(text) + 1)}
    assert {sum(map(len, spelt[: n + 1])) for n in range(len(spelt))} == (ends & whole) - {0}


def test_tokens_without_bytes_have_a_place():
    assert groups([b"a", b""], [b"a", b""]) == [(range(1), range(1)), (range(1, 2), range(1, 2))]  # both end
    assert groups([b"", b"a"], [b"a"]) == [(range(1), range(0)), (range(1, 2), range(1))]  # a mark of the student
    assert groups([b"ab"], [b"a", b"", b"b", b""]) == [(range(1), range(4))]
    assert groups([b"a", b"bc", b"d"], [b"a"]) == [
        (range(1), range(1)),
        *((range(t, t + 1), range(1, 1)) for t in (1, 2)),
    ]
    assert groups([], []) == []
    with pytest.raises(DataError, match="two readings spell two texts: 'ab' and 'ac'"):
        groups([b"ab"], [b"a", b"c"])


def test_words_are_the_text_and_have_one_writer_and_the_tokens_of_both(turns):
    for rollout in turns:
        found = words(SIDES, rollout.completion_ids, rollout.teacher_completion_ids)
        assert [t for word in found for t in word.places] == list(range(len(rollout.completion_ids)))
        for word in found:
            assert len({rollout.speakers[t] for t in word.places}) == 1
            assert all(math.isnan(rollout.divergences[t]) for t in word.places[1:])


def test_a_word_shows_how_each_model_cuts_it_and_a_character_in_parts_is_drawn_once():
    rollout = written_by(PARTS)
    found = drawn(rollout, tokenizer_of(STUDENT), SIDES)
    assert [word.text for word in found] == WORDS
    told = {word.text: word.told for word in found}
    assert told[" 東京"] == 'student: " " "<0xE6>" "<0x9D>" "<0xB1>" "<0xE4>" "<0xBA>" "<0xAC>" · teacher: " 東京"'
    assert told["<|end|>"] == 'student: "<|end|>" · teacher: "<|end|>"'
    ids, others = (side.spelling.encode("東🙂".encode()) for side in SIDES)
    assert len(ids) == 7 and [word.text for word in words(SIDES, ids, others)] == ["東", "🙂"]


def test_without_the_teachers_tokens_or_with_one_tokenizer_a_text_is_drawn_by_tokens():
    rollout, tokenizer = written_by(PARTS), tokenizer_of(STUDENT)
    for same in (
        drawn(rollout, tokenizer, None),
        drawn(dataclasses.replace(rollout, teacher_completion_ids=None), tokenizer, SIDES),
    ):
        assert [word.places for word in same] == [range(t, t + 1) for t in range(len(rollout.completion_ids))]
        assert "".join(word.text for word in same) == "".join(WORDS) and not any(
            part for w in same for part in w.tokens
        )


# --- the report ---------------------------------------------------------------------------------------------------


def test_a_report_shows_words_with_the_tokens_of_both(run):
    rollout = written_by(PARTS)
    folder = run([rollout])
    shown = payload(RunRecord.read(folder), "a", 10**6)
    [look] = shown["texts"][0]["looks"]
    assert shown["notes"] == [] and look["tokens"] == WORDS and look["speakers"] == "010100"
    assert look["divergences"] == [0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.0] and look["thresholds"] == [0.5] * 6
    for (own, others), text in zip(look["readings"][:3], WORDS, strict=False):
        assert "".join(own) == "".join(others) == text
    assert sum(len(own) for own, _ in look["readings"]) == len(rollout.completion_ids)
    assert sum(len(others) for _, others in look["readings"]) == len(rollout.teacher_completion_ids)


def test_a_sample_says_of_a_word_what_is_known_of_it(run):
    rollout = written_by([(0, "the"), (0, " naïve")], end=False)
    count = len(rollout.completion_ids)
    [prompt] = payload(RunRecord.read(run([rollout], [sample_of(rollout)])), "a", 10**6)["prompts"]
    [look] = prompt["looks"]
    sizes = [len(tokens) for tokens, _ in look["readings"]]
    assert sum(sizes) == count and look["jsd"][0] == 0.25 and set(look["jsd"][1:]) == {None}
    assert look["logProbs"] == [[-1.0 * size for size in sizes], [-2.0] + [None] * (len(sizes) - 1)]
    assert look["top"][0] == [[[7, -0.5]]] * len(sizes) and look["top"][1] == [[[8, -0.25]]] + [[]] * (len(sizes) - 1)


def test_a_teachers_tokens_that_are_not_known_are_left_out_with_a_sentence(run, tmp_path):
    rollout = written_by(PARTS)
    folder = run([rollout, rollout], teacher_model_name_or_path="org/elsewhere")
    shown = payload(RunRecord.read(folder), "a", 10**6)
    look = shown["texts"][1]["looks"][0]
    assert "readings" not in look and len(look["tokens"]) == len(rollout.completion_ids)
    [note] = shown["notes"]
    assert "by the student's tokens alone" in note and "org/elsewhere is not on this machine" in note
    other = dataclasses.replace(rollout, teacher_completion_ids=rollout.teacher_completion_ids[1:])
    shutil.rmtree(folder)
    [note] = payload(RunRecord.read(run([other])), "a", 10**6)["notes"]
    assert "two readings spell two texts" in note


def test_a_teacher_that_the_package_makes_is_read_where_it_was_made_and_never_made(run, models, tmp_path, monkeypatch):
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    folder = run([written_by(PARTS)], teacher_model_name_or_path="demo")
    [note] = payload(RunRecord.read(folder), "a", 10**6)["notes"]
    assert "would have to be made first" in note and not (tmp_path / "cache").exists()
    shutil.copytree(models, tmp_path / "cache" / PAIRS["demo"].folder)
    shown = payload(RunRecord.read(folder), "a", 10**6)
    assert shown["notes"] == [] and shown["texts"][0]["looks"][0]["tokens"] == WORDS


def test_text_is_read_with_the_students_tokenizer_also_where_only_some_teachers_have_another(run):
    other = written_by(PARTS)
    same = dataclasses.replace(other, teacher_completion_ids=None, teacher="alike")
    record = RunRecord.read(run([same, other], metrics=[metric(1, **crossing())]))
    assert record.tokenizer().get_vocab() == tokenizer_of(STUDENT).get_vocab() != tokenizer_of(TEACHER).get_vocab()
    looks = [text["looks"][0]["tokens"] for text in payload(record, "a", 10**6)["texts"]]
    assert len(looks[0]) == len(same.completion_ids) and looks[1] == WORDS


def test_a_page_says_that_they_take_turns_by_words_and_what_they_share(run):
    folder = run([written_by(PARTS)], metrics=[metric(step, **crossing()) for step in (1, 2)])
    text = html.unescape(re.sub(r"<script.*?</script>|<svg.*?</svg>", "", made := page([folder]), flags=re.S))
    assert "take turns by words" in text and "each word is written" in text and "Tap a word" in text
    both = len({*SIDES[0].spelling.bytes_of} & {*SIDES[1].spelling.bytes_of} - {b""})
    assert f"{both:,} spell the same; 75% of the text's tokens are trained on" in text
    assert "What the two tokenizers share." in text and "tokens that are trained on is 75%" in text
    assert (
        "the first line is their share" in text
        and "should be near 100%" in text
        and made.count("the teacher's probability of shared tokens") > 1
    )


def test_a_page_of_one_tokenizer_says_nothing_of_two(run):
    same = dataclasses.replace(written_by(PARTS), teacher_completion_ids=None, teacher_prompt_ids=None)
    folder = run(
        [same], metrics=[metric(1)], teacher_model_name_or_path=str(run.__self__) if hasattr(run, "__self__") else "x/y"
    )
    record = RunRecord.read(folder)
    assert not record.two_tokenizers
    text = re.sub(r"<script.*?</script>", "", page([folder]), flags=re.S)
    assert "each token (a word or a piece of one) is written" in text and "two tokenizers" not in text.lower()


def test_what_two_pairs_share_stands_on_no_common_axis(run, tmp_path):
    folder = run([], metrics=[metric(1, **crossing())])
    one = RunRecord.read(folder).metrics
    other = dataclasses.replace(RunRecord.read(folder)).metrics
    other.settings = {**other.settings, "teacher_model_name_or_path": "another"}
    for name in crossing():
        assert len(alike({"a": [one], "b": [one]}, name)) == 1 and len(alike({"a": [one], "b": [other]}, name)) == 2
    assert [curve.name for curve in run_curves({"a": one})].count("crossing") == 1


def test_numbers_of_a_step_are_over_tokens_and_divergences_over_the_places_where_the_rule_looked(turns):
    found = rollout_metrics(Rollouts(turns, turns.cost))
    seen = [value for rollout in turns for value in rollout.divergences if not math.isnan(value)]
    assert 0 < len(seen) < sum(len(rollout.completion_ids) for rollout in turns)
    assert found["switch/divergence_mean"] == pytest.approx(sum(seen) / len(seen))
    firsts = [rollout.speakers.index(1) for rollout in turns if 1 in rollout.speakers]
    assert found["switch/first_switch"] == pytest.approx(mean(map(float, firsts)))


# --- play, the live view, generate, notebooks ---------------------------------------------------------------------


def test_bars_stand_under_words_and_the_newest_numbers_are_those_of_the_newest_word():
    rollout, tokenizer = written_by(PARTS, end=False), tokenizer_of(STUDENT)
    text, bars, limits = live.written(rollout, tokenizer, 80, SIDES)
    assert text.plain == "".join(WORDS[:-1]) and live.NEWLINE not in text.plain and "·" not in bars.plain + limits.plain
    assert bars.cell_len == text.cell_len == limits.cell_len
    assert [text.plain[span.start : span.end] for span in text.spans if span.style] == [" cats", " naïve"]
    firsts = [word.places.start for word in drawn(rollout, tokenizer, SIDES)]
    assert [len(line.split()[1]) for line in live.mark_lines(rollout, firsts)] == [5, 5]
    assert math.isnan(rollout.divergences[-1]) or len(firsts) == len(rollout.completion_ids)
    cut = dataclasses.replace(rollout, divergences=[0.75] + [math.nan] * (len(rollout.completion_ids) - 1))
    assert live.state_line(Rollouts([cut], DecodeCost(1.0)), 9).plain.startswith("divergence 0.75 > 0.50")
    alone = dataclasses.replace(cut, teacher_completion_ids=None)
    assert live.state_line(Rollouts([alone], DecodeCost(1.0)), 9).plain.startswith("divergence – ·")


def test_a_word_is_coloured_whole():
    found = spoken(written_by(PARTS), tokenizer_of(STUDENT), brackets=True)
    assert found.plain == "the⟦ cats⟧ sat⟦ naïve⟧ 東京<|end|>"


@pytest.mark.parametrize("terminal", [True, False])
def test_play_shows_words(monkeypatch, terminal):
    rollout, out = written_by(PARTS), io.StringIO()
    console = Console(file=out, width=90, force_terminal=terminal, highlight=False)
    monkeypatch.setattr(live, "console", console)

    def decoded(*_, watch=None):
        rows = Rollouts([rollout])
        rows.cost.seconds = 1.0
        if watch:
            watch(rows)
        return rows

    monkeypatch.setattr(live, "decode_examples", decoded)
    pair = dataclasses.replace(toy_pair(), tokenizer=tokenizer_of(STUDENT), bridges={"": BRIDGE})
    example = dataclasses.replace(toy_examples()[0], prompt_ids=[5])
    live.play(pair, example, DecodeSettings(Switch(), 9), 0)
    if terminal:
        assert "under each word a bar" in " ".join(out.getvalue().split())
    else:
        assert "\ndivergence ▁▂▂▃▃▁  █ is 1.00\n" in out.getvalue()


def test_generate_says_who_wrote_each_word(models, tmp_path):
    file = tmp_path / "made.jsonl"
    roles = [f"--{role}={models / role}" for role in ("teacher", "student")]
    names = [*roles, "--template=none", "--dtype=float64"]
    rule = ["--policy=switch", "--policy.tau-0=0.08", "--policy.decay=0", "--max-new-tokens=16", "--seed=3"]
    assert main(["generate", *names, *rule, "--prompt", "the cat sat", "What is", "--output-file", str(file)]) == 0
    made = [json.loads(line) for line in file.read_text().splitlines()]
    assert {word["speaker"] for record in made for word in record["words"]} == {"student", "teacher"}
    for record in made:
        rollout = Rollout.from_json(record)
        found = drawn(rollout, tokenizer_of(STUDENT), SIDES)
        assert record["teacher_completion_ids"] == rollout.teacher_completion_ids and len(record["words"]) == len(found)
        for told, word in zip(record["words"], found, strict=True):
            assert told == {"text": word.text, "speaker": ("student", "teacher")[rollout.speakers[word.places.start]]}
    alone = [*names[1:], "--policy=student_only", "--max-new-tokens=3"]
    assert main(["generate", *alone, "--prompt", "the", "--output-file", str(file)]) == 0
    assert "words" not in json.loads(file.read_text())


def test_a_notebook_shows_words_with_the_tokens_of_both(run):
    rollout = written_by(PARTS)
    made = show(rollout, tokenizer_of(STUDENT), tokenizer_of(TEACHER))._repr_html_()
    spans = re.findall(r'<span title="([^"]*)"([^>]*)>([^<]*)</span>', made)
    found = drawn(rollout, tokenizer_of(STUDENT), SIDES)
    assert [html.unescape(text) for _, _, text in spans] == WORDS
    assert [bool(style) for _, style, _ in spans] == [False, True, False, True, False, False]
    assert html.unescape(spans[3][0]) == f"{found[3].told} · divergence 0.250, threshold 0.500"
    plain = show(rollout, tokenizer_of(STUDENT))._repr_html_()
    assert plain.count("<span title") == len(rollout.completion_ids) and "student:" not in plain
    texts = Run(run([rollout, rollout])).rollouts()
    assert texts[:1]._repr_html_() == made and list(texts.sides) == [""]
