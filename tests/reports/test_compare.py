"""Comparisons of hand-made evaluation files: what is refused, what is one method, what is said, and the command."""

import json
import math
import re

import numpy as np
import pytest
import yaml

from switchkd.base.errors import ConfigError, DataError
from switchkd.cli.main import main
from switchkd.reports import tables as compare_report
from switchkd.reports.compare import compare, load_result

N = 60
RNG = np.random.default_rng(0)
HARD = RNG.normal(size=N)
TASK = {"name": "sums", "version": 1, "primary": "strict"}


def model(level, sha256, kl=1.0, examples=N):
    """Scores of a model that is better by ``level`` on every example, give or take some noise that is its own."""
    rng = np.random.default_rng(list(sha256.encode()))
    strict = 50 + 10 * HARD[:examples] + level + rng.normal(size=(2, examples))
    weights = [0, *range(1, examples)]
    nats = [None, *(kl + 0.1 * rng.random(examples - 1))]
    return {
        "model": {"name": sha256, "sha256": sha256},
        "scores": {
            "strict": {"values": strict.tolist(), "weights": None},
            "forward_kl": {"values": [nats], "weights": weights},
            "perplexity": {"values": [nats], "weights": weights},
            "length": {"values": [strict[0].tolist()], "weights": None},
            "forward_kl@0-10": {"values": [nats], "weights": weights},
        },
        "summary": {},
    }


def record(student, examples=N, **changes):
    results = {
        "teacher": model(20, "teacher", 0.0, examples),
        "student before": model(-20, "before", 3.0, examples),
        "student after": student,
    }
    return {
        "format": 1,
        "task": TASK,
        "data": {"file": "sums.jsonl", "sha256": "d" * 64, "ids": list(range(examples)), "groups": [""] * examples},
        "settings": {"seeds": [0, 1], "temperature": 0.7, "max_new_tokens": 64, "teacher_sha256": "teacher"},
        "results": results,
    } | changes


def write_run(folder, result, config=None, name="evaluation.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(result))
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """Two methods, one with three training seeds."""
    return [
        write_run(tmp_path / "switch", record(model(5, "s0")), {"seed": 0, "policy": "switch"}),
        *(
            write_run(
                tmp_path / f"kd-seed{seed}",
                record(model(0.02 * seed, f"k{seed}", 2.0)),
                {
                    "seed": seed,
                    "policy": "kd",
                    "output_dir": f"kd-seed{seed}",
                    "save_steps": seed,
                    "eval_samples": seed,
                },
            )
            for seed in (1, 2, 3)
        ),
    ]


def changed(path, edit):
    """Edit an evaluation file in place."""
    file = path if path.endswith(".json") else f"{path}/evaluation.json"
    with open(file) as stream:
        content = json.load(stream)
    edit(content)
    with open(file, "w") as stream:
        json.dump(content, stream)


def rows(comparison, score="strict"):
    return {row.method.label: row for row in comparison.scores[score]}


def page_of(runs, **settings):
    return compare_report.markdown(compare(runs, **settings))


def test_runs_that_differ_in_the_training_seed_are_one_method(runs):
    comparison = compare(runs)
    table = rows(comparison)
    assert list(table) == ["teacher", "student before", "switch", "kd"]
    assert list(table["kd"].method.models) == [1, 2, 3] and len(table["kd"].method.paths) == 3
    means = [np.mean(model(0.02 * seed, f"k{seed}")["scores"]["strict"]["values"]) for seed in (1, 2, 3)]
    assert table["kd"].estimate.mean == pytest.approx(np.mean(means))
    assert table["kd"].estimate.std == pytest.approx(np.std(means, ddof=1))
    assert comparison.baseline == "switch" and table["switch"].difference is None


@pytest.mark.parametrize("more", [{"learning_rate": 0.1}, {"eval_file": "what the adaptive mix looks at"}])
def test_runs_that_differ_in_more_are_methods_of_their_own(runs, tmp_path, more):
    other = write_run(tmp_path / "x" / "kd-seed4", record(model(0, "other")), {"seed": 4, "policy": "kd", **more})
    labels = list(rows(compare([*runs, other])))
    assert labels[2:] == ["switch", f"{runs[1]}/evaluation.json", f"{other}/evaluation.json"]


def test_plain_files_are_methods_with_the_files_names(tmp_path):
    for name, level in (("a", 0), ("b-seed2", 1), ("teacher", 2)):
        write_run(tmp_path, record(model(level, name)), name=f"{name}.json")
    files = [str(tmp_path / f"{name}.json") for name in ("a", "b-seed2", "teacher")]
    assert list(rows(compare(files)))[2:] == ["a", "b", files[2]]


def test_a_later_evaluation_of_the_student_alone_will_do(tmp_path):
    one = record(model(0, "one"))
    one["results"] = {"student": one["results"]["student after"]}
    comparison = compare([write_run(tmp_path / "one", one)], scores=["strict"])
    assert list(rows(comparison)) == ["one"] and not comparison.pairs


def test_a_difference_is_paired_and_judged_by_the_better_end(runs):
    table = compare(runs, baseline="kd").scores
    strict, kl = rows(compare(runs, baseline="kd")), {row.method.label: row for row in table["forward_kl"]}
    gap = strict["switch"].difference
    assert gap.estimate.mean == pytest.approx(5, abs=0.5) and gap.verdict == "better"
    # Examples are a hundred times more unlike than the models: unpaired, the interval would be about 7 wide.
    assert gap.estimate.high - gap.estimate.low < 2
    assert strict["student before"].difference.verdict == "worse"
    assert kl["switch"].difference.verdict == "better" and kl["switch"].difference.estimate.mean < 0
    assert kl["student before"].difference.verdict == "worse"
    assert {row.method.label: row for row in table["length"]}["switch"].difference.verdict == "higher"


def test_what_chance_explains_is_not_distinguishable(tmp_path):
    runs = [write_run(tmp_path / name, record(model(0, name))) for name in ("one", "two")]
    comparison = compare(runs)
    assert rows(comparison)["two"].difference.verdict == "not distinguishable"
    assert comparison.pairs["one", "two"].verdict == comparison.pairs["two", "one"].verdict == "not distinguishable"


def test_all_pairs_of_methods_are_compared_in_the_first_score(runs):
    comparison = compare(runs, scores=["forward_kl", "strict"])
    assert list(comparison.scores) == ["forward_kl", "strict"] and comparison.main_score == "forward_kl"
    assert set(comparison.pairs) == {("switch", "kd"), ("kd", "switch")}
    there, back = comparison.pairs["switch", "kd"], comparison.pairs["kd", "switch"]
    assert (there.verdict, back.verdict) == ("better", "worse")
    assert there.estimate.mean == -back.estimate.mean and there.estimate.low == pytest.approx(-back.estimate.high)


def test_scores_default_to_the_primary_one_and_the_others_over_whole_texts(runs):
    assert list(compare(runs).scores) == ["strict", "forward_kl", "perplexity", "length"]
    changed(runs[0], lambda r: r["results"]["student after"]["scores"].pop("length"))
    changed(runs[0], lambda r: r["results"]["teacher"]["scores"].pop("forward_kl"))
    comparison = compare(runs)
    assert list(comparison.scores) == ["strict", "forward_kl", "perplexity"]
    assert list(rows(comparison, "forward_kl")) == ["student before", "switch", "kd"]
    assert list(compare(runs, scores=["forward_kl@0-10"]).scores) == ["forward_kl@0-10"]


def test_perplexity_is_that_of_all_tokens(runs):
    scored = rows(compare(runs), "perplexity")["switch"].estimate
    values = model(5, "s0")["scores"]["perplexity"]
    nats = np.average(values["values"][0][1:], weights=values["weights"][1:])
    assert scored.mean == pytest.approx(math.exp(nats)) and scored.examples == N - 1


def test_references_that_differ_are_rows_of_their_own(runs):
    changed(runs[0], lambda r: r["results"]["student before"]["model"].update(sha256="another"))
    assert list(rows(compare(runs)))[1:3] == ["student before of kd", "student before of switch"]


REFUSED = {
    "task is {'name': 'sums', 'version': 2": lambda r: r["task"].update(version=2),
    "data sha256 is 'eeee'": lambda r: r["data"].update(sha256="eeee"),
    "2 are missing and 2 are new": lambda r: r["data"].update(ids=[*range(58), 90, 91]),
    "they are in another order": lambda r: r["data"].update(ids=[*range(59, -1, -1)]),
    "temperature is 1.0, not 0.7": lambda r: r["settings"].update(temperature=1.0),
    "seeds is [0], not [0, 1]; max_new_tokens is 32, not 64": lambda r: r["settings"].update(seeds=[0], max_new_tokens=32),
    "backend is 'vllm', not 'not set'": lambda r: r["settings"].update(backend="vllm"),
    "forward_kl can only be compared with one teacher": lambda r: r["settings"].update(teacher_sha256="t2"),
    "is of format 2, not 1": lambda r: r.update(format=2),
    "is of format None": lambda r: r.pop("format"),
    "it has no 'settings'": lambda r: r.pop("settings"),
    "none of a student": lambda r: r["results"].pop("student after"),
    "strict has 1 values a seed for 60 examples": lambda r: r["results"]["student after"]["scores"].update(
        strict={"values": [[1.0]], "weights": None}
    ),
    "1 of 60 examples have a value": lambda r: r["results"]["student after"]["scores"]["forward_kl"]["weights"].__setitem__(0, 1),
    "student after has no score 'strict', the task's primary one": lambda r: r["results"]["student after"]["scores"].pop("strict"),
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_compared_is_refused_by_name(runs, words):
    changed(runs[1], REFUSED[words])
    with pytest.raises(DataError, match=re.escape(words)) as refusal:
        compare(runs)
    assert "evaluation.json" in str(refusal.value) or "they share" in words


def test_other_teachers_do_not_stand_in_the_way_of_what_has_no_teacher(runs):
    changed(runs[0], lambda r: r["results"]["teacher"]["model"].update(sha256="t2"))
    changed(runs[0], lambda r: r["settings"].update(teacher_sha256="t2"))
    assert list(rows(compare(runs, scores=["strict"])))[:2] == ["teacher of kd", "teacher of switch"]


def test_a_missing_evaluation_says_how_to_make_it(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(DataError, match=f"no evaluation.json; make it with `switchkd evaluate {run}`$"):
        compare([str(run)])
    with pytest.raises(DataError, match=r"no evaluation .*nowhere; make one with `switchkd evaluate RUN`"):
        compare([str(tmp_path / "nowhere")])
    write_run(run, record(model(0, "x")), name="evaluation-sums.json")
    with pytest.raises(DataError, match="or compare one that there is: --task sums"):
        compare([str(run)])
    with pytest.raises(DataError, match=f"evaluation-other.json; make it with `switchkd evaluate {run} --task other`"):
        compare([str(run)], task="other")
    (run / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluation\.json cannot be read"):
        compare([str(run)])


def test_a_damaged_config_is_refused(runs):
    for text in ("a: [", "- a"):
        with open(f"{runs[0]}/config.yaml", "w") as config:
            config.write(text)
        with pytest.raises(DataError, match=r"its config\.yaml is not what switchkd writes"):
            compare(runs)


def test_a_named_task_has_its_own_file_or_is_the_runs_own(tmp_path):
    run = write_run(tmp_path / "run", record(model(0, "own")))
    assert load_result(run, "sums").student.model["sha256"] == "own"
    write_run(tmp_path / "run", record(model(0, "later")), name="evaluation-sums.json")
    assert load_result(run, "sums").student.model["sha256"] == "later"
    assert load_result(run).student.model["sha256"] == "own"
    with pytest.raises(DataError, match=r"of the task 'sums', not 'chat'.*switchkd evaluate .* --task chat"):
        load_result(run, "chat")


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"paths": []}, "nothing to compare"),
        ({"baseline": "swich"}, "no baseline 'swich'; did you mean 'switch'"),
        ({"scores": ["stict"]}, "no score 'stict' that all results have; did you mean 'strict'"),
    ],
)
def test_what_is_asked_for_and_not_there_is_named(runs, arguments, words):
    with pytest.raises(ConfigError, match=words):
        compare(**{"paths": runs, **arguments})


def test_a_run_given_twice_is_refused(runs):
    with pytest.raises(ConfigError, match=r"one method and training seed \(2\)"):
        compare([*runs, runs[2]])


def test_the_page_has_every_figure_and_says_what_it_means(runs):
    comparison = compare(runs)
    page = compare_report.markdown(comparison)
    estimate = rows(comparison)["kd"].estimate
    assert (
        f"| kd | 3 | {estimate.mean:.1f} ± {estimate.std:.4f} [{estimate.low:.1f}, {estimate.high:.1f}] | 60 |" in page
    )
    gap = rows(comparison)["kd"].difference.estimate
    assert f"| −{-gap.mean:.2f} [−{-gap.low:.2f}, −{-gap.high:.2f}] | worse |" in page
    assert f"| kd | −{-gap.mean:.2f} worse |  |" in page  # the pairs
    assert "## forward_kl (lower is better)" in page and "temperature 0.7" in page and "(compare.svg)" in page
    for words in ("95 %", "percentiles of 2000 bootstrap", "not corrected", "one run", "rough", "over training runs"):
        assert words in page
    assert "†" not in page


def test_few_examples_are_marked(tmp_path):
    runs = [
        write_run(tmp_path / name, record(model(level, name, examples=12), 12)) for name, level in (("a", 0), ("b", 9))
    ]
    page = page_of(runs, scores=["strict"])
    assert "| 12† |" in page and "better† |" in page and "† fewer than 30 examples" in page
    assert "a†" in [tick.get_text() for tick in compare_report.plot(compare(runs)).axes[0].get_yticklabels()]


def test_an_interval_without_width_is_explained(runs):
    changed(
        runs[0],
        lambda r: r["results"]["student after"]["scores"].update(strict={"values": [[0.1] * N] * 2, "weights": None}),
    )
    assert "| switch | 1 | 0.100 ± 0 [0.100, 0.100] | 60‡ |" in page_of(runs) and "up to 3/n" in page_of(runs)


def test_a_score_that_no_example_has_is_shown_as_missing(tmp_path):
    runs = [write_run(tmp_path / name, record(model(0, name))) for name in ("a", "b")]
    for run in runs:
        changed(run, lambda r: [m["scores"]["forward_kl@0-10"].update(weights=[0] * N) for m in r["results"].values()])
    comparison = compare(runs, scores=["forward_kl@0-10"])
    assert "| a | 1 | - [-] | 0 |" in compare_report.markdown(comparison)
    assert compare_report.to_json(comparison)["scores"]["forward_kl@0-10"]["rows"][0]["mean"] is None
    compare_report.plot(comparison)


def test_the_plot_shows_the_methods_best_first_with_their_intervals(runs):
    comparison = compare(runs)
    for score, order in (("strict", ["kd (3 runs)", "switch"]), ("forward_kl", ["kd (3 runs)", "switch"])):
        [axes] = compare_report.plot(compare(runs, scores=[score])).axes
        assert [tick.get_text() for tick in axes.get_yticklabels()] == order  # from the bottom up
    [axes] = compare_report.plot(comparison).axes
    shown = [path.vertices[:, 0].tolist() for lines in axes.collections for path in lines.get_paths()]
    wanted = [rows(comparison)[name].estimate for name in ("kd", "switch")]
    assert shown == [[e.low, e.high] for e in wanted]
    assert {line.get_label() for line in axes.lines} >= {"teacher", "student before"}
    assert "higher is better" in axes.get_xlabel()


def test_the_command_prints_and_writes(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *runs, "--baseline", "kd", "--score", "strict", "--output-dir", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "sums (version 1): 60 examples" in shown and "better" in shown and f"written: {out}/compare.md" in shown
    assert sorted(file.name for file in out.iterdir()) == [f"compare.{kind}" for kind in ("json", "md", "png", "svg")]
    saved = json.loads((out / "compare.json").read_text())
    labels = {row["label"]: row for row in saved["scores"]["strict"]["rows"]}
    assert saved["baseline"] == "kd" and labels["kd"]["seeds"] == [1, 2, 3] and labels["kd"]["difference"] is None
    assert labels["switch"]["difference"]["verdict"] == "better" and len(labels["kd"]["files"]) == 3
    assert {(pair["of"], pair["less"], pair["verdict"]) for pair in saved["pairs"]} == {
        ("switch", "kd", "better"), ("kd", "switch", "worse"),
    }  # fmt: skip
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main(["compare", *runs, "--baseline", "kd", "--score", "strict", "--output-dir", str(out)]) == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_command_without_a_folder_writes_nothing_and_explains_errors(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", runs[0]]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["compare"]) == 1 and "nothing to compare" in capsys.readouterr().err
