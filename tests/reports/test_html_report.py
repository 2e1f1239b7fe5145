"""The report: what it says of runs in any state, and that nothing a model wrote can act in it."""

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from fabricated import HOSTILE, metric, rollout, run, sample

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.plain import spread
from switchkd.cli.main import main
from switchkd.methods.policies import AdaSwitch, Switch
from switchkd.reports.page import _score_sheets, page
from switchkd.reports.record import RunRecord, read_metrics
from switchkd.reports.viewer import payload


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
    [shown] = json.loads(data)
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
    assert not any(words in html for words in ("teacher's share of", "teacher forwards per", "most memory"))


def test_a_finished_run_says_what_improved_and_is_compared_example_by_example(tmp_path):
    scores = {"teacher": [100.0] * 20, "student before": [0.0] * 20, "student after": [100.0] * 15 + [0.0] * 5}
    folder = run(tmp_path / "a", [metric(1)], scores=scores)
    (folder / "student").mkdir()
    text = Elements(page([folder])).text
    assert "Finished after 1 steps" in text
    assert "strict 0 before, 75.0 after: +75.0 [+55.0, +90.0], better." in text


def test_several_runs_share_a_page_under_names_that_tell_them_apart(tmp_path):
    one, two = (run(tmp_path / seed / "same", [metric(1)], [sample(1, "yes")]) for seed in "ab")
    text = Elements(page([one, two])).text
    assert "a/same: Finished" not in text and "a/same: Not finished" in text and "b/same: Not finished" in text
    with pytest.raises(ConfigError, match="given twice"):
        page([one, one])


def tables(paths):
    """Titles, columns and rows of the score tables of a page of these runs."""
    records = [RunRecord.read(path) for path in paths]
    return [(s.header[1:], [row[0] for row in s.rows]) for s in _score_sheets(records, [path.name for path in paths])]


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
    assert thin["notes"] == [f"{len(kept)} of 20 looks at the prompts are shown, evenly spread."]


def test_the_page_of_a_long_run_stays_under_five_megabytes(tmp_path):
    words = "a long answer with many words in it " * 14
    looks = [sample(step, words, sample_id=i) for step in range(0, 2000, 100) for i in range(8)]
    folder = run(tmp_path / "a", [metric(step) for step in range(1, 2001)], looks, [rollout(1, words)] * 300)
    assert (folder / "samples.jsonl").stat().st_size > 10e6
    made = page([folder])
    assert 2e6 < len(made.encode()) < 5e6 and "looks at the prompts are shown, evenly spread" in made


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
