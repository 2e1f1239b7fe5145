"""Figures show what metrics and evaluations hold: values, gaps, who is left out; and as SVG they stand in any page."""

import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from switchkd.base.errors import ConfigError, DataError
from switchkd.base.settings import to_dict
from switchkd.methods.objectives import TVD
from switchkd.methods.policies import SKD, AdaSwitch, Switch
from switchkd.methods.policy import StudentOnly
from switchkd.reports.curves import metric_panels, run_curves, themed_svg
from switchkd.reports.figures import FIGURES, load_methods
from switchkd.reports.panels import COLOURS, POINTS, SMOOTH, Line, Panel, draw, panel_notes, thinned
from switchkd.reports.steps import Steps
from switchkd.training.settings import TrainConfig

NAN = math.nan


def rows(**columns):
    """Step metrics from their columns; a step whose value is ``...`` has not the metric."""
    steps = range(len(next(iter(columns.values()))))
    named = {name.replace("__", "/"): values for name, values in columns.items()}
    return of_run(
        {"step": i + 1, "num_tokens": 10 * (i + 1)} | {n: v[i] for n, v in named.items() if v[i] is not ...}
        for i in steps
    )


def of_run(lines, name="run", sha256=None, **settings):
    """Step metrics of a run with these settings."""
    return Steps(lines, to_dict(TrainConfig(**settings)), name, sha256)


def lines(axes):
    return {
        line.get_label(): np.asarray(line.get_xydata()) for line in axes.lines if not line.get_label().startswith("_")
    }


# --- lines ----------------------------------------------------------------------------------------------------------


def test_a_line_has_the_metrics_values_gaps_for_what_is_missing_and_passes_over_steps_without_it():
    metrics = rows(loss=[1.0, None, 3.0, ..., 5.0, math.inf, 7.0])
    [line] = draw([Panel("", [Line("a", [metrics], "loss")])], "").axes[0].lines
    np.testing.assert_equal(line.get_xydata(), [[1, 1], [2, NAN], [3, 3], [5, 5], [6, NAN], [7, 7]])
    assert line.get_marker() == "o" and line.get_markevery().tolist() == [True, False, False, False, False, True]


def test_a_line_of_runs_is_their_mean_and_its_band_their_range():
    runs = [rows(loss=[1.0, 2.0, 6.0]), rows(loss=[3.0, 2.0, 0.0])]
    axes = draw([Panel("", [Line("a", runs, "loss")])], "").axes[0]
    assert lines(axes)["a"].tolist() == [[1, 2], [2, 2], [3, 3]]
    [band] = axes.collections
    assert {(1, 1), (1, 3), (3, 0), (3, 6)} <= set(map(tuple, band.get_paths()[0].vertices))


def test_step_metrics_are_smoothed_over_what_is_there_and_a_single_runs_own_values_stand_behind():
    values = [float(i % 5) for i in range(30)]
    values[7] = None
    smooth, raw = draw([Panel("", [Line("a", [rows(loss=values)], "loss")])], "").axes[0].lines
    known = [NAN if v is None else v for v in values]
    expected = [NAN if i == 7 else np.nanmean(known[i - 4 : i + 5]) for i in range(4, 26)]
    np.testing.assert_allclose(smooth.get_ydata(), expected)
    assert smooth.get_xdata().tolist() == list(range(5, 27)) and SMOOTH == 9
    np.testing.assert_equal(raw.get_xydata()[:, 1], known)


def test_seeds_that_generate_at_different_steps_are_read_at_the_steps_of_all():
    runs = [rows(loss=[0.0, ..., 2.0, ..., 4.0]), rows(loss=[..., 3.0, 4.0, 5.0, ...])]
    assert lines(draw([Panel("", [Line("a", runs, "loss")])], "").axes[0])["a"].tolist() == [[2, 2], [3, 3], [4, 4]]


def test_evaluations_are_not_smoothed_nor_guessed_and_each_is_a_marker():
    runs = [rows(eval__x=[float(i) for i in range(12)]), rows(eval__x=[... if i % 2 else 2.0 * i for i in range(12)])]
    [line] = draw(metric_panels({"a": runs}, ["eval/x"]), "").axes[0].lines
    assert line.get_xydata().tolist() == [[i + 1, 1.5 * i] for i in range(0, 12, 2)]
    assert line.get_markevery().all()


def test_a_method_has_one_look_also_where_another_has_no_curve():
    runs = {"a": [rows(loss=[1.0, 1.0])], "b": [rows(loss=[2.0, 2.0], eval__x=[1.0, 2.0])]}
    figure = draw(metric_panels(runs, ["eval/x", "loss"]), "t")
    first, second = ({k.get_label(): (k.get_color(), k.get_linestyle()) for k in axes.lines} for axes in figure.axes)
    assert first == {"b": second["b"]} and second["a"] != second["b"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "a"]


def test_names_are_shown_as_they_are():
    runs = {"_a": [rows(loss=[1.0, 2.0])], "$x_1$": [rows(loss=[1.0, 2.0])]}
    svg = themed_svg(draw(metric_panels(runs, ["loss"]), "$t$"), "")
    shown = {element.text.strip() for element in ElementTree.fromstring(svg).iter() if element.text}
    assert shown >= {"_a", "$x_1$", "$t$"}


def test_a_long_line_is_thinned_without_loss_of_extremes_or_gaps():
    values = np.sin(np.arange(5000.0))
    values[1234], values[4321], values[777] = 9.0, -9.0, NAN
    kept = thinned(values)
    assert len(kept) <= POINTS and {777, 1234, 4321} <= set(kept) and (np.diff(kept) > 0).all()
    assert thinned(values[:POINTS]).tolist() == list(range(POINTS))


@pytest.mark.parametrize("ground", ["#ffffff", "#111418"])
def test_colours_can_be_read_on_light_and_dark(ground):
    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.05 + float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for colour in COLOURS:
        low, high = sorted((luminance(colour), luminance(ground)))
        assert high / low >= 3, colour  # WCAG 2, graphical objects


# --- a report's curves ----------------------------------------------------------------------------------------------


def full(steps=24, seed=0):
    """Metrics of every kind."""
    rng = np.random.default_rng(seed)
    own = {
        "loss": np.linspace(1.2, 0.4, steps), "switch__threshold": np.full(steps, 0.2),
        "switch__teacher_share": np.linspace(0.5, 0.25, steps), "switch__switched_share": np.full(steps, 0.9),
        "switch__first_switch": np.full(steps, 3.0), "decode__agreement": np.full(steps, 0.8),
        "decode__block_length": np.full(steps, 6.0), "decode__kept_per_block": np.full(steps, 4.0),
        "tokens_per_second": rng.uniform(1, 2, steps), "memory_gib": np.full(steps, 1.5),
        "seconds__generate": np.full(steps, 0.5), "seconds__teacher": np.full(steps, 0.2),
        "seconds__update": np.full(steps, 0.3),
    }  # fmt: skip
    metrics = rows(**{name: values.tolist() for name, values in own.items()})
    for m in metrics:
        m |= {"switch/divergence_0-10": 0.4, "switch/divergence_11-50": 0.3}
    for m in metrics[::8]:
        m |= {
            "eval/rouge_l": 20.0 + m["step"],
            "eval/rouge_1": 30.0,
            "eval/forward_kl": 1.0,
            "eval/forward_kl@0-10": 2.0,
        }
    return metrics


def test_a_report_has_the_curves_that_there_is_data_for():
    made = {curve.name: curve for curve in run_curves({"run": full()})}
    assert list(made) == [
        "loss", "scores", "divergence", "teacher_share", "first_switch", "agreement", "speed", "memory", "time",
    ]  # fmt: skip
    assert list(lines(made["divergence"].figure.axes[0])) == [
        "divergence at positions 0-10", "divergence at positions 11-50", "threshold",
    ]  # fmt: skip
    assert [list(lines(axes)) for axes in made["scores"].figure.axes] == [
        ["rouge_l", "rouge_1"], ["forward_kl"],
    ]  # fmt: skip
    for curve in made.values():
        assert all(axes.get_ylabel() for axes in curve.figure.axes) and curve.figure.axes[-1].get_xlabel()
    assert made["divergence"].figure.legends and not made["loss"].figure.legends
    bare = of_run({k: m[k] for k in ("step", "num_tokens", "loss")} for m in full())
    assert [curve.name for curve in run_curves({"run": bare})] == ["loss"]
    assert run_curves({"run": of_run([])}) == []


def test_curves_say_in_words_what_they_show():
    said = {curve.name: curve.summary for curve in run_curves({"run": rows(
        loss=[1.2, 0.8, 0.4], switch__first_switch=[2.0, None, 4.0], switch__teacher_share=[0.25, 0.5, 0.75],
        memory_gib=[1.0, 1.0, 1.0],
    )})}  # fmt: skip
    assert said == {
        "loss": "loss falls from 1.20 to 0.40 over 3 steps.",
        "teacher_share": "tokens by the teacher rises from 25% to 75% over 3 steps.",
        "first_switch": "the teacher's first token rises from 2.00 to 4.00 (no value at step 2) over 3 steps.",
        "memory": "memory is 1.00 over 3 steps.",
    }


def test_of_several_runs_each_metric_is_a_panel_and_a_run_without_it_is_named():
    dumb = of_run({k: v for k, v in m.items() if not k.startswith(("switch/", "seconds/"))} for m in full())
    made = {curve.name: curve for curve in run_curves({"a": full(), "b": full(seed=1), "c": dumb})}
    shares = made["teacher_share"]
    assert [list(lines(axes)) for axes in shares.figure.axes] == [["a", "b"], ["a", "b"]]
    assert "c: tokens by the teacher has no value" in shares.summary
    assert shares.figure.axes[0].yaxis.get_major_formatter().convert_to_pct(0.5) == 50
    assert [axes.get_ylabel() for axes in made["scores"].figure.axes] == ["rouge_l (%)", "forward_kl\n(nats per token)"]
    assert len(made["time"].figure.axes) == 2 and made["time"].summary.endswith("c: time has no value.")


def test_the_time_of_a_step_is_stacked():
    [time] = [curve for curve in run_curves({"run": full(1)}) if curve.name == "time"]
    stairs = [patch.get_data() for patch in time.figure.axes[0].patches]
    assert [(s.values.tolist(), np.ravel(s.baseline).tolist()) for s in stairs] == [
        ([0.5], [0.0]), ([0.7], [0.5]), ([1.0], [0.7]),
    ]  # fmt: skip
    assert stairs[0].edges.tolist() == [0.5, 1.5]
    assert time.summary == "of 1.00 s, 50% writing text, 20% reading by the teacher, 30% updating."
    [time] = [curve for curve in run_curves({"run": full(100)}) if curve.name == "time"]
    assert time.summary.endswith("Each bar is the mean of up to 2 steps.")


# --- in a page ------------------------------------------------------------------------------------------------------


def test_an_svg_takes_the_colours_of_its_page_and_keeps_its_own():
    svg = themed_svg(run_curves({"run": full()})[2].figure, 'less <b> & "more"')
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root[0].text == 'less <b> & "more"'
    assert root.get("role") == "img" and root.get("aria-label") == 'less <b> & "more"'
    assert root.get("width") == "100%" and root.get("height") is None and root.get("viewBox")
    assert root.get("fill") == "currentColor" and not re.search(r"#000\b|#000000|black|#fff|white|<style|<\?|<!", svg)
    used = set(re.findall(r"#[0-9a-f]{6}\b(?!-)", svg.replace("url(#", "").replace('href="#', "")))
    assert used == {colour.lower() for colour in (COLOURS[0], COLOURS[1], COLOURS[2])}
    assert any(element.text == "training step" for element in root.iter("{http://www.w3.org/2000/svg}text"))


def test_ids_do_not_meet_in_one_page_and_lead_where_they_should():
    svgs = [themed_svg(curve.figure, curve.summary) for curve in run_curves({"run": full()})[:4]]
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in svgs]
    assert all(ids) and len({i for own in ids for i in own}) == sum(map(len, ids))
    for svg, own in zip(svgs, ids, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) == set(own)


def test_a_long_run_makes_no_heavy_page():
    rng = np.random.default_rng(0)
    metrics = rows(loss=rng.uniform(0, 1, 20_000).tolist())
    assert len(themed_svg(run_curves({"run": metrics})[0].figure, "")) < 40_000


# --- figures of methods ---------------------------------------------------------------------------------------------


def write_run(folder, policy, seed=0, metrics=None, score=None, **changes):
    """A run directory without weights. ``score`` is of all 40 examples, whose references have 5 (8 of them) or 20 tokens."""
    folder.mkdir()
    config = TrainConfig(policy=policy, seed=seed, per_device_train_batch_size=4, output_dir=str(folder), **changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics or []))
    if score is not None:
        lengths = [5] * 8 + [20] * 32
        values = [score + 10.0] * 8 + [score + (i % 2) for i in range(32)]
        result = {"model": {"name": "s", "sha256": "0"}, "scores": {
            "rouge_l": {"values": [values], "weights": [1.0] * 40},
            "forward_kl": {"values": [[1.0] * 40], "weights": lengths},
        }}  # fmt: skip
        record = {
            "format": 1, "task": {"name": "references", "version": 1, "primary": "rouge_l"}, "settings": {},
            "data": {"file": "d", "sha256": "d", "ids": list(range(40)), "groups": [""] * 40},
            "results": {"student after": result},
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(record))
    return str(folder)


def generated(share=0.5, steps=4, **more):
    columns = {
        "switch__teacher_share": [share] * steps,
        "switch__switched_share": [1.0] * steps,
        "seconds": [2.0] * steps,
    }
    return rows(**columns, **more)


@pytest.fixture
def methods(tmp_path):
    """Two decays with two seeds each, one on the data alone, one that was stopped before it was evaluated."""
    paths = []
    for decay, share, score in ((0.2, 0.8, 20.0), (0.1, 0.5, 30.0)):
        for seed in (0, 1):
            metrics = generated(
                share + 0.1 * seed, switch__divergence_mean=[0.3, 0.2, 0.1, None], eval__rouge_l=[..., 5.0, ..., 6.0],
                decode__teacher_forwards_per_token=[0.5, ..., 0.25, ...], completions__mean_length=[10.0, 0.0, 20.0, 0.0],
            )  # fmt: skip
            name = f"every_{1 / decay:.0f}-seed{seed}"
            paths.append(write_run(tmp_path / name, Switch(decay=decay), seed, metrics, score + 2 * seed))
    paths.append(write_run(tmp_path / "kd", StudentOnly(), 0, rows(seconds=[1.0] * 2), 25.0))
    paths.append(write_run(tmp_path / "stopped", Switch(schedule="constant"), 0, generated()))
    return load_methods(paths)


def test_lambda_is_drawn_against_share_and_score_and_runs_without_are_refused_by_name(methods):
    figure, notes = FIGURES["lambda"](methods)
    shares, scores = figure.axes
    assert shares.lines[-1].get_xydata().round(6).tolist() == [[5, 85], [10, 55]]
    assert scores.lines[-1].get_xydata().round(6).tolist() == [[5, 23.4], [10, 33.4]]
    dots = [line.get_ydata() for line in scores.lines if line.get_markersize() == 4]
    assert np.round(dots, 6).tolist() == [[22.4, 24.4], [32.4, 34.4]]
    assert "kd (no lambda in the policy student_only); stopped (no lambda: the schedule is constant" in notes
    with pytest.raises(DataError, match=r"nothing to draw: kd \(no lambda in the policy student_only\)"):
        FIGURES["lambda"]({"kd": methods["kd"]})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["every_5, every_10"]
    assert notes in figure.legends[0].get_title().get_text().replace("\n", " ")


def test_methods_that_differ_in_more_than_the_decay_are_not_joined(tmp_path):
    own = {"metrics": generated(), "score": 1.0}
    paths = [
        write_run(tmp_path / "lr.1", Switch(), **own),
        write_run(tmp_path / "lr.2", Switch(), learning_rate=0.5, **own),
    ]
    figure, _ = FIGURES["lambda"](load_methods(paths))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lr.1", "lr.2"]


def test_divergence_and_switch_rate_are_curves_of_methods(methods):
    figure, notes = FIGURES["divergence"](methods)
    np.testing.assert_allclose(lines(figure.axes[0])["every_5"][:, 1], [0.3, 0.2, 0.1, NAN])
    assert list(lines(figure.axes[0])) == ["every_5", "every_10"]
    assert "Left out: kd, stopped (its policy measured no divergence)." in notes and "bands: their range" in notes
    figure, notes = FIGURES["switch_rate"](methods)
    assert lines(figure.axes[0])["stopped"][:, 1].tolist() == [1.0] * 4
    np.testing.assert_allclose(lines(figure.axes[1])["every_10"][:, 1], [0.55] * 4)
    assert "kd (no text was generated)" in notes


def test_early_progress_is_by_steps_and_by_tokens(methods):
    figure, notes = FIGURES["progress"](methods)
    by_steps, by_tokens = figure.axes
    assert lines(by_steps)["every_5"].tolist() == [[2, 5], [4, 6]]
    assert lines(by_tokens)["every_5"].tolist() == [[20, 5], [40, 6]]
    assert (by_steps.get_xlabel(), by_tokens.get_xlabel()) == ("training step", "tokens learned from")
    assert "kd, stopped (not evaluated in the run)" in notes
    with pytest.raises(DataError, match="not evaluated in the run"):
        FIGURES["progress"]({"kd": methods["kd"]})


def test_scores_by_length_are_those_of_the_examples_with_such_references(methods):
    figure, notes = FIGURES["length"](methods)
    [axes] = figure.axes
    found = [(line.get_ydata()[0], line.get_markerfacecolor() == "white") for line in axes.lines]
    assert found == [(31, True), (21.5, False), (41, True), (31.5, False), (35, True), (25.5, False)]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1-10\n(8 examples)", "11-50\n(32 examples)"]
    assert "stopped (no final evaluation, the run has not ended)" in notes
    assert axes.get_xlabel() == "length of the reference (tokens)" and "higher is better" in axes.get_ylabel()


def test_cost_is_against_tokens_seconds_and_forwards_of_those_that_have_them(methods):
    figure, notes = FIGURES["cost"](methods)
    places = [{label: xy[0].tolist() for label, xy in lines(axes).items()} for axes in figure.axes]
    assert places[0] == {"every_5": [40, 23.4], "every_10": [40, 33.4], "kd": [20, 27.4]}
    assert places[1] == {"every_5": [8, 23.4], "every_10": [8, 33.4], "kd": [2, 27.4]}
    assert places[2] == {"every_5": [40, 23.4], "every_10": [40, 33.4]}  # (0.5 * 10 + 0.25 * 20) tokens of 4 rows
    assert all(axes.get_xlim()[0] <= 0 for axes in figure.axes)
    assert "Without teacher forwards, as no text was generated: kd." in notes


def test_what_cannot_be_compared_or_read_is_refused(methods, tmp_path):
    file = tmp_path / "kd" / "evaluation.json"
    file.write_text(file.read_text().replace('"settings": {}', '"settings": {"max_new_tokens": 9}'))
    paths = [str(tmp_path / name) for name in ("kd", "every_5-seed0")]
    with pytest.raises(DataError, match="max_new_tokens"):
        FIGURES["cost"](load_methods(paths))
    with pytest.raises(ConfigError, match="not a run directory"):
        load_methods([str(tmp_path)])
    with pytest.raises(DataError, match="nothing to plot"):
        load_methods([])
    with pytest.raises(ConfigError, match="one method and training seed"):
        load_methods([paths[0], paths[0]])


def test_a_damaged_evaluation_of_a_finished_run_says_so(methods, tmp_path):
    (tmp_path / "kd" / "student").mkdir()
    (tmp_path / "kd" / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json cannot be read"):
        FIGURES["cost"](load_methods([str(tmp_path / "kd")]))


# --- what is not measured alike -------------------------------------------------------------------------------------

SCORED = {"eval__rouge_l": [1.0, 2.0], "eval__forward_kl": [1.0, 0.5]}
APART = {
    "other data": ("eval/rouge_l", {"sha256": {"eval_file": "b"}}),
    "another file": ("eval/rouge_l", {"eval_file": "b.jsonl"}),
    "another budget": ("eval/rouge_l", {"eval_max_new_tokens": 7}),
    "another temperature": ("eval/rouge_l", {"eval_temperature": 0.5}),
    "another teacher": ("eval/forward_kl", {"teacher_model_name_or_path": "b"}),
    "another teacher's weights": ("eval/forward_kl", {"sha256": {"teacher_model_name_or_path": "b"}}),
    "another unit": ("switch/divergence_mean", {"policy": AdaSwitch()}),
    "another threshold": ("switch/threshold", {"policy": AdaSwitch(divergence="tvd")}),
    "another objective": ("loss", {"objective": TVD()}),
    "a loss of other text": ("loss", {"train_file": "b.jsonl"}),
    "a loss of other text under one name": ("loss", {"sha256": {"train_file": "b"}}),
    "a loss to another teacher": ("loss", {"teacher_model_name_or_path": "b"}),
    "a share in other text": ("switch/teacher_share", {"train_file": "b.jsonl"}),
    "a divergence from another teacher": ("switch/divergence_mean", {"teacher_model_name_or_path": "b"}),
}


SHA256 = {"eval_file": "a", "train_file": "a", "teacher_model_name_or_path": "a"}


def two_runs(other):
    columns = SCORED | {"loss": [1.0, 0.5], "switch__divergence_mean": [0.5, 0.25], "switch__threshold": [0.5, 0.25]}
    columns |= {"switch__teacher_share": [0.5, 0.25]}
    sha256 = SHA256 if "sha256" in other else None
    return {
        "a": of_run(rows(**columns), "run-a", sha256, policy=Switch()),
        "b": of_run(rows(**columns), "run-b", **{"policy": Switch(), "sha256": sha256} | other),
    }


@pytest.mark.parametrize("difference", APART)
def test_what_is_not_measured_alike_stands_on_no_common_axis(difference):
    name, other = APART[difference]
    if "sha256" in other:
        other = {"sha256": SHA256 | other["sha256"]}
    runs = two_runs(other)
    own = {label: [run] for label, run in runs.items()}
    assert [[line.label for line in panel.lines] for panel in metric_panels(own, [name])] == [["a"], ["b"]]
    with pytest.raises(DataError, match=f"{name} cannot stand on one axis: in run-b, .* as in run-a"):
        Panel("", [Line(label, runs, name) for label, runs in own.items()])
    told = " ".join(curve.summary for curve in run_curves(runs))
    assert re.search(r"Not measured alike, so in panels of their own \([^)]*\): in run-b, ", told)
    assert [len(p.lines) for p in metric_panels(own, ["eval/rouge_l"])] == ([1, 1] if name == "eval/rouge_l" else [2])


def test_the_same_text_of_another_day_is_no_other_text():
    dated = {"template_date": "2026-11-29", "template": "chat"}
    runs = [of_run(rows(loss=[1.0]), name, SHA256 | {"train_file": name}, **dated) for name in "ab"]
    assert len(metric_panels({run.name: [run] for run in runs}, ["loss"])) == 1


def test_runs_without_what_they_are_compared_by_are_drawn_by_nobody():
    with pytest.raises(AttributeError):
        Panel("", [Line("a", [[{"step": 1, "loss": 1.0}]], "loss"), Line("b", [[{"step": 1, "loss": 1.0}]], "loss")])


def test_early_progress_of_other_data_has_panels_of_its_own(tmp_path):
    """Also of runs that were stopped, of which nothing is known but the settings and origin.json."""
    paths = []
    for name, sha256 in (("a", "1"), ("b", "2"), ("c", "1")):
        own = {"eval_max_new_tokens": 9} if name == "c" else {}
        paths.append(
            write_run(tmp_path / name, Switch(decay=0.1 + ord(name)), metrics=generated(2, 2, **SCORED), **own)
        )
        (tmp_path / name / "origin.json").write_text(json.dumps({"eval_file": {"examples": 1, "sha256": sha256}}))
    figure, notes = FIGURES["progress"](load_methods(paths))
    assert {tuple(lines(axes)) for axes in figure.axes} == {("a",), ("b",), ("c",)}
    assert "in b, eval_file sha256 is '2', not '1' as in a" in notes and "in c, eval_max_new_tokens is 9, not" in notes


@pytest.mark.parametrize("figure", ["lambda", "length", "cost"])
def test_final_scores_that_cannot_be_compared_are_drawn_by_no_figure(methods, tmp_path, figure):
    for path in tmp_path.glob("*/evaluation.json"):
        path.write_text(path.read_text().replace('"sha256": "d"', f'"sha256": "{path.parent.name}"'))
    with pytest.raises(DataError, match="cannot be compared with"):
        FIGURES[figure](load_methods([str(tmp_path / name) for name in ("every_5-seed0", "every_10-seed1")]))


# --- captions -------------------------------------------------------------------------------------------------------


def test_lines_are_called_means_only_where_they_are():
    short, long = rows(loss=[1.0] * 26), rows(loss=[1.0] * 27)
    notes = [
        panel_notes([Panel("", [Line("a", [run], "loss") for run in runs])])
        for runs in ([short], [long], [short, long])
    ]
    means, faint = "each point is the mean of the values of 9 neighbouring steps.", "Faint: the values themselves."
    assert notes == ["", f"Lines: {means} {faint}", f"Lines of 27 values and more: {means} {faint}"]
    gaps = rows(loss=[1.0 if step % 9 == 0 else None for step in range(90)])  # one value in each window
    assert panel_notes([Panel("", [Line("a", [gaps], "loss")])]) == ""
    many = rows(loss=[1.0] * (POINTS + 1))
    assert f"the lowest and the highest of each of {POINTS // 3} stretches" in panel_notes(
        [Panel("", [Line("a", [many], "loss")])]
    )
    assert panel_notes([Panel("", [Line("a", [rows(eval__x=[1.0] * 27)], "eval/x")])]) == ""


@pytest.mark.parametrize(
    ("unit", "policy"),
    [("bits", Switch()), ("nats", AdaSwitch()), ("probability", SKD()), ("probability", AdaSwitch(divergence="tvd"))],
)
def test_every_axis_names_a_unit_that_there_is(unit, policy):
    run = of_run(rows(loss=[1.0], switch__threshold=[1.0], **{"switch__divergence_0+": [1.0]}), policy=policy)
    loss, divergence = run_curves({"a": run})  # alone, and two in one panel
    assert loss.figure.axes[0].get_ylabel() == "loss (nats per token)"
    assert divergence.figure.axes[0].get_ylabel().replace("\n", " ") == f"divergence ({unit})"
    [panel] = metric_panels({"a": [run], "b": [run]}, ["switch/threshold"])
    assert panel.label.replace("\n", " ") == f"threshold ({unit})"


def test_a_rule_from_elsewhere_is_named_in_the_place_of_its_unit():
    run = of_run(rows(switch__threshold=[1.0], loss=[1.0]))
    run.settings["policy"], run.settings["objective"] = {"name": "mine:Rule"}, {"name": "mine:Loss"}
    labels = [panel.label.replace("\n", " ") for panel in metric_panels({"a": [run]}, ["switch/threshold", "loss"])]
    assert labels == ["threshold (unit of mine:Rule)", "loss (unit of mine:Loss)"]


def test_a_loss_has_the_unit_of_its_objective():
    [panel] = metric_panels({"a": [of_run(rows(loss=[1.0, 2.0]), objective=TVD())]}, ["loss"])
    assert panel.label == "loss\n(probability per token)"


def test_a_value_that_is_missing_is_not_called_not_finite():
    [curve] = run_curves({"a": rows(memory_gib=[1.0, None, 1.0, math.inf, None])})
    assert curve.summary == "memory is 1.00 (no value at steps 2, 5) (not finite at step 4) over 5 steps."


def test_several_runs_show_the_main_score_of_their_task():
    runs = {name: of_run(full(), task="references") for name in "ab"}
    for run in runs.values():
        for line in run[::8]:
            values = {key: line.pop(key) for key in ("eval/rouge_1", "eval/rouge_l")}  # in the order of a task's scores
            line |= values
    [scores] = [curve for curve in run_curves(runs) if curve.name == "scores"]
    assert [axes.get_ylabel() for axes in scores.figure.axes] == ["rouge_l (%)", "forward_kl\n(nats per token)"]


def test_bands_of_an_older_run_are_drawn_under_its_own_names():
    metrics = rows(loss=[1.0, 2.0], **{"switch__divergence_0+": [0.5, 0.4], "switch__divergence_16+": [0.3, 0.2]})
    [curve] = [curve for curve in run_curves({"run": metrics}) if curve.name == "divergence"]
    assert list(lines(curve.figure.axes[0])) == ["divergence at positions 0+", "divergence at positions 16+"]
