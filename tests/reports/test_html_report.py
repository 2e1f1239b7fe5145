"""The report: what it says of runs in any state, and that nothing a model wrote can act in it."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from fabricated import HOSTILE, metric, rollout, run, sample

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.plain import spread
from switchkd.cli.main import main
from switchkd.methods.policies import AdaSwitch, Switch
from switchkd.reports.compare import compare
from switchkd.reports.page import _gains, _score_sheets, measures, page
from switchkd.reports.record import RunRecord, read_metrics
from switchkd.reports.viewer import answers, payload


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.links = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_data(self, data):
        self.text += data


def test_what_a_model_wrote_is_text_and_the_page_loads_nothing(tmp_path):
    folder = run(
        tmp_path / HOSTILE.replace("/", "_"), [metric(1)], [sample(1, HOSTILE, prompt=HOSTILE)], [rollout(1, HOSTILE)],
        train_file=HOSTILE, method=HOSTILE,
    )  # fmt: skip
    found = Elements(html := page([folder]))
    assert found.tags.count("script") == 2 and "img" not in found.tags
    assert all(link.startswith("#") for link in found.links) and "http-equiv" in html
    data = html.split('id="data">')[1].split("</script>")[0]
    [shown] = json.loads(data)["texts"]
    assert "".join(shown["prompts"][0]["looks"][0]["tokens"]) == HOSTILE == shown["prompts"][0]["prompt"]
    assert "".join(shown["texts"][0]["looks"][0]["tokens"]) == HOSTILE


def test_an_empty_run_a_stopped_one_and_one_with_nan_say_so(tmp_path):
    empty = Elements(page([run(tmp_path / "empty")])).text
    assert "No step was finished" in empty and "Nothing was evaluated" in empty and "No text was generated" in empty
    stopped = run(tmp_path / "stopped", [metric(1), metric(2)], max_steps=8, save_steps=1)
    for step in (1, 2, 3):
        (stopped / f"checkpoint-{step}").mkdir()
        if step < 3:  # the third was being written
            (stopped / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    text = Elements(page([stopped])).text
    assert "stopped after step 2 of 8" in text and "newest checkpoint is that of step 2" in text
    broken = run(tmp_path / "broken", [metric(1), metric(2, loss=math.nan), metric(3, loss=math.inf)])
    assert "loss is not finite at steps 2, 3" in Elements(page([broken])).text


def test_what_is_missing_is_left_out_and_not_shown_as_zero(tmp_path):
    html = page([run(tmp_path / "a", [metric(1)], scores={"teacher": [math.nan, math.nan]})])
    assert ">strict</th><td>-</td>" in html
    assert not any(words in html for words in ("who wrote the text", "passes through the teacher", "most memory"))


def test_a_finished_run_says_what_improved_and_is_compared_example_by_example(tmp_path):
    scores = {"teacher": [100.0] * 20, "student before": [0.0] * 20, "student after": [100.0] * 15 + [0.0] * 5}
    folder = run(tmp_path / "a", [metric(1)], scores=scores)
    (folder / "student").mkdir()
    text = Elements(page([folder])).text
    assert "Finished after 1 step." in text
    assert "The student became better: +75.0 [+55.0, +90.0]. 75% of the gap to the teacher is closed" in text
    assert "(95 % interval: 55% to 90%)" in text


def test_several_runs_share_a_page_under_names_that_tell_them_apart(tmp_path):
    one, two = (run(tmp_path / seed / "same", [metric(1)], [sample(1, "yes")]) for seed in "ab")
    text = Elements(page([one, two])).text
    assert "a/same: Finished" not in text and "a/same: Not finished" in text and "b/same: Not finished" in text
    with pytest.raises(ConfigError, match="given twice"):
        page([one, one])


def tables(paths):
    """Titles, columns and rows of the score tables of a page of these runs."""
    records = [RunRecord.read(path) for path in paths]
    sheets = _score_sheets(records, [path.name for path in paths])
    return [(sheet.header[1:], [row[0] for row in sheet.rows]) for sheet in sheets]


@pytest.mark.parametrize("change", ["data", "settings", "task", "teacher"])
def test_scores_that_cannot_be_compared_are_not_side_by_side(tmp_path, change):
    paths = [run(tmp_path / name, [metric(1)], scores={"student": [1.0, 2.0]}) for name in "ab"]
    assert tables(paths) == [(["a: student", "b: student"], ["strict"])]
    changes = {
        "data": ("data", {"sha256": "other"}), "settings": ("settings", {"max_new_tokens": 9}),
        "task": ("task", {"version": 2}), "teacher": ("settings", {"teacher_sha256": "0123456789"}),
    }  # fmt: skip
    for path in paths:
        record = json.loads((path / "evaluation.json").read_text())
        scores = record["results"]["student"]["scores"]
        scores["forward_kl"] = scores["strict"]
        if path.name == "b":
            place, values = changes[change]
            record[place] |= values
        (path / "evaluation.json").write_text(json.dumps(record))
    names = ["strict", "forward_kl"]
    if change == "teacher":  # moves divergences alone
        rows = ["strict", "forward_kl (teacher None)", "forward_kl (teacher 01234567)"]
        assert tables(paths) == [(["a: student", "b: student"], rows)]
    else:
        assert tables(paths) == [(["a: student"], names), (["b: student"], names)]


def test_looks_are_thinned_to_fit_first_and_last_kept_and_the_page_says_so(tmp_path):
    steps = [0, *range(10, 200, 10)]
    folder = run(tmp_path / "a", [metric(1)], [sample(step, "some words " * 20) for step in steps])
    whole = payload(RunRecord.read(folder), "a", 10**7)
    assert [look["step"] for look in whole["prompts"][0]["looks"]] == steps and whole["notes"] == []
    thin = payload(RunRecord.read(folder), "a", len(json.dumps(whole)) // 2)
    kept = [look["step"] for look in thin["prompts"][0]["looks"]]
    assert len(json.dumps(thin)) <= len(json.dumps(whole)) // 2
    assert 1 < len(kept) < len(steps) and kept[0] == 0 and kept[-1] == 190
    words = f"The prompts were answered at 20 points of training; {len(kept)} of these are shown, evenly spread."
    assert thin["notes"] == [words]


def test_the_page_of_a_long_run_stays_under_five_megabytes(tmp_path):
    words = "a long answer with many words in it " * 14
    looks = [sample(step, words, sample_id=i) for step in range(0, 2000, 100) for i in range(8)]
    folder = run(tmp_path / "a", [metric(step) for step in range(1, 2001)], looks, [rollout(1, words)] * 300)
    assert (folder / "samples.jsonl").stat().st_size > 10e6
    made = page([folder])
    assert 2e6 < len(made.encode()) < 5e6 and "of these are shown, evenly spread" in made


def test_the_unit_is_the_policys(tmp_path):
    record = RunRecord.read(run(tmp_path / "a", [metric(1)], [sample(1, "yes")]))
    assert payload(record, "a", 10**6)["unit"] == Switch.unit == "bits" and AdaSwitch.unit == "nats"


def test_a_run_whose_tokenizer_is_gone_shows_ids_and_says_so(tmp_path):
    folder = run(tmp_path / "a", [metric(1)], [sample(1, "yes")])
    for file in (tmp_path / "teacher").glob("token*"):
        file.unlink()
    shown = payload(RunRecord.read(folder), "a", 10**6)
    assert shown["prompts"][0]["looks"][0]["tokens"][0].startswith("⟨") and "tokenizer" in shown["notes"][0]


@pytest.mark.parametrize("missing", ["top", "completion_ids", "reference"])
def test_a_record_without_one_of_its_fields_is_named_by_line_and_field(tmp_path, missing):
    records = [sample(1, "yes"), sample(2, "no")]
    del records[1][missing]
    folder = run(tmp_path / "a", [metric(1)], records)
    with pytest.raises(DataError, match=f"samples.jsonl, line 2 is damaged: it has no '{missing}'"):
        RunRecord.read(folder)


def test_a_cut_last_line_is_left_out_and_any_other_damage_is_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = [metric(1), metric(2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in whole) + '{"st')
    assert read_metrics(tmp_path) == whole
    file.write_text(json.dumps(metric(1)) + '\n{"st\n' + json.dumps(metric(3)) + "\n")
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(("count", "most"), [(0, 3), (2, 3), (3, 3), (10, 1), (10, 2), (10, 4), (1000, 37)])
def test_a_spread_is_even_and_keeps_both_ends(count, most):
    places = spread(count, most)
    assert len(places) == min(count, most) and places == sorted(set(places))
    if most > 1 and count:
        assert places[0] == 0 and places[-1] == count - 1
    gaps = np.diff(places)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_the_command_writes_beside_the_run_or_where_it_is_told(tmp_path, capsys):
    folder = run(tmp_path / "a", [metric(1)])
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").is_file()
    assert main(["report", str(folder), "--output-file", str(tmp_path / "b" / "x.html")]) == 0
    assert (tmp_path / "b" / "x.html").read_text() == (folder / "report.html").read_text()
    assert main(["report"]) == 1 and "give run directories" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1 and "is not a run directory" in capsys.readouterr().err


# --- the first answer, and the held-out answers -----------------------------------------------------------------------

MODELS = ("teacher", "student before", "student after")
SCORES = {"teacher": [100.0] * 40, "student before": [0.0] * 40, "student after": [100.0] * 16 + [0.0] * 24}
STEP = {"source": "policy", "switch/teacher_share": 0.25, "seconds/teacher": 0.1, "seconds/update": 0.4}


def answered(folder, count=40, **changes):
    answers = {model: [f"{model} says {i}" for i in range(count)] for model in MODELS}
    steps = [metric(1, **STEP), metric(2, source="examples", **{"seconds/update": 1.0})]
    return run(folder, steps, [sample(1, "yes")], scores=SCORES, answers=answers, **changes)


def test_the_page_begins_with_the_answer_and_ends_with_the_settings(tmp_path):
    html = page([answered(tmp_path / "a")])
    text = " ".join(Elements(html).text.split())
    places = [
        html.index(f'<section id="{name}"') for name in ("answer", "answers", "texts", "scores", "curves", "settings")
    ]
    assert places == sorted(places)
    first = text[text.index("strict (%)") : text.index("While a text is made in training")]
    order = [
        "Student before training 0", "Student after training 40", "Teacher 100", "40% of the gap to the teacher is closed",
        "training steps 2", "tokens learned from 20", "time, without evaluation 2.00 s",
        "student 75%, teacher 25% (in 1 of 2 steps",
        "Question 16?", "Reference 16.", "student before says 16", "student after says 16", "teacher says 16",
    ]  # fmt: skip
    closely = first.replace(" ", "")
    at = [closely.index(words.replace(" ", "")) for words in order]
    assert at == sorted(at)


def test_the_share_of_the_gap_has_an_interval_and_no_gap_is_called_none(tmp_path):
    [measure] = measures(RunRecord.read(answered(tmp_path / "a")))
    assert measure.closed == pytest.approx(0.4) and measure.width == pytest.approx(40)
    assert re.search(r"\(95 % interval: 2\d% to 5\d%\)", measure.sentence)
    none = {"teacher": [0.0] * 40, "student before": [0.0, 100.0] * 20, "student after": [100.0] * 40}
    [measure] = measures(RunRecord.read(run(tmp_path / "b", [metric(1)], scores=none)))
    assert measure.closed is None and "there is no gap to close" in measure.sentence
    [measure] = measures(RunRecord.read(run(tmp_path / "c", [metric(1)], scores=dict.fromkeys(SCORES, [0.0] * 40))))
    assert "it says nothing" in measure.sentence and "[" not in "".join(measure.values.values())
    assert measures(RunRecord.read(run(tmp_path / "d", [metric(1)], scores={"teacher": [1.0]}))) == []


def told(folder, most=10**6, by="strict"):
    return answers(RunRecord.read(folder).evaluations["evaluation"], "a", MODELS, by, most)


def test_all_answers_are_there_with_question_reference_and_their_own_scores(tmp_path):
    found = told(answered(tmp_path / "a"))
    assert [item["number"] for item in found["items"]] == list(range(1, 41)) and found["all"] == 40
    for i in (0, 15, 16, 39):
        item = found["items"][i]
        assert (item["prompt"], item["references"]) == (f"Question {i}?", [f"Reference {i}."])
        assert {m: own["text"] for m, own in item["models"].items()} == {m: f"{m} says {i}" for m in MODELS}
        assert {m: own["scores"]["strict"] for m, own in item["models"].items()} == {
            m: "100" if SCORES[m][i] else "0" for m in MODELS
        }
    assert "typical: its strict changed as the mean does" in found["notes"][0]


def test_the_answer_to_begin_with_moved_like_the_mean(tmp_path):
    scores = {"student before": [0.0, 0.0, 10.0, 0.0], "student after": [100.0, 0.0, 50.0, 6.0]}
    texts = {model: ["a", "b", "c", "d"] for model in scores}
    folder = run(tmp_path / "a", [metric(1)], scores=scores, answers=texts)
    found = answers(RunRecord.read(folder).evaluations["evaluation"], "a", list(scores), "strict", 10**6)
    assert found["first"] == 2  # the mean is 36.5; they moved by 100, 0, 40 and 6


def test_answers_are_thinned_to_fit_and_older_evaluations_have_no_question(tmp_path):
    folder = answered(tmp_path / "a")
    whole = told(folder)
    thin = told(folder, len(json.dumps(whole["items"])) // 3)
    assert [item["number"] for item in thin["items"]][:: len(thin["items"]) - 1] == [1, 40]
    assert f"{len(thin['items'])} of 40 answers are shown" in " ".join(thin["notes"]) and len(thin["items"]) < 20
    record = json.loads((folder / "evaluation.json").read_text())
    del record["data"]["prompts"], record["data"]["references"]
    (folder / "evaluation.json").write_text(json.dumps(record))
    old = told(folder)
    assert old["items"][3]["prompt"] == "" and "What was asked is not known" in " ".join(old["notes"])
    assert "student after says 3" in json.dumps(old)
    assert "hidden><summary>The question" in page([folder])


def test_what_was_scored_runs_nothing_in_the_page(tmp_path):
    folder = answered(tmp_path / "a")
    texts = folder / "evaluation.completions.jsonl"
    lines = [json.loads(line) | {"text": HOSTILE} for line in texts.read_text().splitlines()]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads((folder / "evaluation.json").read_text())
    del record["completions_sha256"]
    record["data"] |= {"prompts": [HOSTILE] * 40, "references": [[HOSTILE]] * 40}
    (folder / "evaluation.json").write_text(json.dumps(record))
    found = Elements(page([folder]))
    assert found.tags.count("script") == 2 and "img" not in found.tags
    assert found.text.count(HOSTILE) == 5  # question, reference and three answers, in the page itself


# --- several runs -----------------------------------------------------------------------------------------------------


def with_other(folder, **changes):
    record = json.loads((folder / "evaluation.json").read_text())
    for place, values in changes.items():
        record[place] |= values
    (folder / "evaluation.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"max_new_tokens": 9}}, "max_new_tokens is 9, not 'not set'"),
        ({"data": {"sha256": "other"}}, "data sha256 is 'other', not 'd'"),
        ({"task": {"version": 2}}, "'version': 2"),
        ({"data": {"ids": [*range(39), 99]}}, "ids of 40 examples, not the same 40: 1 are missing and 1 are new"),
    ],
)
def test_runs_that_compare_would_refuse_share_no_table_and_the_page_names_what_differs(tmp_path, change, words):
    both = [answered(tmp_path / name) for name in "ab"]
    alike = RunRecord.read(both[0]), RunRecord.read(both[1])
    assert len(_gains(alike, {name: measures(r) for name, r in zip("ab", alike, strict=True)})) == 1
    if "ids" in change.get("data", {}):
        texts = both[1] / "evaluation.completions.jsonl"
        texts.write_text(texts.read_text().replace('"example": 39', '"example": 99'))
    with_other(both[1], **change)
    record = json.loads((both[1] / "evaluation.json").read_text())
    record.pop("completions_sha256")
    (both[1] / "evaluation.json").write_text(json.dumps(record))
    records = [RunRecord.read(path) for path in both]
    gains = _gains(records, {name: measures(r) for name, r in zip("ab", records, strict=True)})
    assert [[row[0] for row in table["rows"]] for table in gains] == [["a"], ["b"]]
    assert "not comparable" in gains[1]["title"] and words in gains[1]["title"]
    sheets = _score_sheets(records, ["a", "b"])
    assert not any("a: teacher" in sheet.header and "b: teacher" in sheet.header for sheet in sheets)
    assert words in sheets[1].title
    with pytest.raises(DataError, match=re.escape(words)):
        compare(list(map(str, both)))


def test_a_run_on_several_files_names_them_all(tmp_path):
    folder = run(tmp_path / "a", [metric(1)])
    settings = yaml.safe_load((folder / "config.yaml").read_text()) | {"train_file": ["one.jsonl", "two.jsonl"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "one.jsonl, two.jsonl" in page([folder])
