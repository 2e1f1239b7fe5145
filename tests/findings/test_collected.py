"""A tiny study from its first run to its verdicts, and the same from the file of its scores, without its runs."""

import json
import lzma
import shutil

import numpy as np
import pytest
import yaml
from tiny import pair_on_disk

from switchkd.base.errors import ConfigError, DataError
from switchkd.cli.main import main
from switchkd.findings import collected
from switchkd.findings.claims import registered
from switchkd.findings.collected import collect, read_collected
from switchkd.reports.curves import cost
from switchkd.reports.record import read_metrics
from switchkd.reports.steps import ELAPSED
from switchkd.studies.plan import cells, load_plan
from switchkd.studies.study import _Running

CLAIMS = {
    "lower": {"says": "Soft is less surprised", "better": "soft", "than": ["sft"], "score": "perplexity", "expected": 0.1},
    "early": {"says": "… early", "better": "soft", "than": ["sft"], "score": "forward_kl", "at": 0.6},
    "cheap": {"says": "SFT is cheap", "better": "sft", "than": ["soft"], "score": "seconds"},
    "other": {"says": "… elsewhere", "better": "soft", "than": ["sft"], "task": "references"},
    "apart": {"says": "… of another size", "better": "soft", "than": ["sft"], "groups": ["far"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A plan's file, and the folder of its study, which has come to its end."""
    folder = tmp_path_factory.mktemp("study")
    settings = {
        **pair_on_disk(folder), "template": "none", "max_new_tokens": 8, "max_steps": 3, "per_device_train_batch_size": 2,
        "eval_samples": 4, "eval_max_new_tokens": 6, "eval_steps": 1, "save_steps": 0,
    }  # fmt: skip
    small = {"settings": settings, "seeds": [0, 1], "evaluations": {"references": {"eval_samples": 3}}}
    tree = {
        "title": "A plan",
        "methods": {"sft": "sft", "soft": {"recipe": "on_policy", "learning_rate": 1e-3}},
        "curves": ["switch/teacher_share"],
        "claims": CLAIMS,
        "sizes": {"small": small, "large": {"settings": settings, "pairs": {"near": {}, "far": {}}}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    with pytest.MonkeyPatch.context() as patched:  # in this process, which spares them the imports
        patched.setattr(_Running, "run", lambda self, arguments, log: main(arguments))
        assert main(["study", str(folder / "plan.yaml"), "--output-dir", str(folder / "st")]) == 0
    return folder / "plan.yaml", folder / "st"


def laid_out(file, st):
    plan = load_plan(str(file))
    size = plan.sized("small")
    return plan, size, cells(plan, size, st)


def shown(folder):
    """What a study shows, by the name of the file."""
    kinds = ("*.md", "*.json", "*.png", "*.svg", "*.xz", "compare*/*")
    return {str(file.relative_to(folder)): file.read_bytes() for kind in kinds for file in folder.glob(kind)}


def test_a_study_is_judged_and_shown_from_its_scores_alone(study, tmp_path, capsys):
    """From the runs, from the file, and from the folder of the study: the same bytes."""
    file, st = study
    whole = shown(st)
    assert {"study.md", "claims.json", "scores.json.xz", "progress.png", "curves.svg", "compare/compare.json"} <= set(
        whole
    )
    alone, again = tmp_path / "alone", tmp_path / "again"
    shutil.copy(st / "scores.json.xz", tmp_path / "moved.xz")
    for source, output in ((tmp_path / "moved.xz", alone), (st, again), (tmp_path / "moved.xz", alone)):
        assert main(["study", str(file), "--scores", str(source), "--output-dir", str(output)]) == 0
        assert shown(output) == whole
    assert not (alone / "cells").exists() and not (alone / "sft-seed0").exists()


def test_study_md_begins_with_the_claims(study):
    _, st = study
    page = (st / "study.md").read_text()
    first, rest = page.split("# Comparison on")[0], json.loads((st / "claims.json").read_text())
    assert page.startswith(
        "# A plan\n\n## What was claimed, and what holds\n\n| claim | methods | verdict | what was measured |"
    )
    assert [each["claim"] for each in rest["judgements"]] == ["lower", "early", "cheap", "other"]
    assert (
        "| **lower**: Soft is less surprised | soft / sft | **" in first
        and "eval/forward_kl after 60% of the tokens" in first
    )
    assert "Not about this size of the plan, which lacks their groups or evaluations: apart." in first
    assert "not those that the study began with" not in first and rest["changed"] == {}
    assert "progress.png" in page and "compare-references/compare.png" in page and "| sft | 2 | 3 |" in page
    assert yaml.safe_load((st / "cells" / "claims.yaml").read_text())["lower"]["expected"] == 0.1


def test_what_is_collected_is_what_the_runs_wrote(study):
    file, st = study
    found = collect(*laid_out(file, st), st, registered(st))
    own = next(run for run in found.runs if run.name == "soft-seed1")
    lines = read_metrics(st / "soft-seed1")
    assert [line["num_tokens"] for line in own.steps] == [line["num_tokens"] for line in lines]
    for kept, line in zip(own.steps, lines, strict=True):
        for name in ("loss", "switch/teacher_share", "eval/forward_kl"):
            assert kept[name] == pytest.approx(line[name], rel=1e-5)
    assert own.steps[-1][ELAPSED] == pytest.approx(sum(line["seconds"] for line in lines), rel=1e-5)
    assert own.cost["tokens"] == cost(lines)["tokens"]
    record = json.loads((st / "soft-seed1" / "evaluation-references.json").read_text())
    theirs, ours = record["results"]["student"]["scores"], own.results["references"].student.scores
    assert list(theirs) == list(ours)
    for name, values in theirs.items():
        assert ours[name].values == pytest.approx(np.array(values["values"]), rel=1e-5)
        assert ours[name].weights == pytest.approx(np.array(values["weights"]))
    assert own.steps.settings["learning_rate"] == 1e-3 and "output_dir" not in own.steps.settings


def test_a_study_that_is_half_done_can_be_judged(study, tmp_path, capsys):
    file, st = study
    half = tmp_path / "half"
    shutil.copytree(st, half)
    shutil.rmtree(half / "soft-seed1")
    (half / "soft-seed0" / "evaluation-references.json").unlink()  # trained, and not evaluated in all ways
    assert main(["study", str(file), "--scores", str(half), "--output-dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "study.md").read_text()
    assert page.count("**not run yet** | Not done: soft-seed0, soft-seed1.") == 4 and "| sft | 2 | 3 |" in page
    assert main(["study", str(file), "--scores", str(tmp_path), "--output-dir", str(tmp_path / "none")]) == 0
    assert "No run of it is done yet." in (tmp_path / "none" / "study.md").read_text()


def test_long_runs_are_kept_as_means_of_stretches(study, monkeypatch):
    file, st = study
    monkeypatch.setattr(collected, "LINES", 2)
    found = collect(*laid_out(file, st), st, {})
    own = next(run for run in found.runs if run.name == "soft-seed0").steps
    lines = read_metrics(st / "soft-seed0")
    losses = [line["loss"] for line in lines]
    assert own.steps_a_line == 2 and [line["step"] for line in own] == [1, 2, 3]  # each was evaluated
    assert "loss" not in own[0] and [line["eval/forward_kl"] for line in own] == pytest.approx(
        [line["eval/forward_kl"] for line in lines], rel=1e-5
    )
    assert [own[1]["loss"], own[2]["loss"]] == pytest.approx([sum(losses[:2]) / 2, losses[2]], rel=1e-5)


def test_what_is_no_such_file_or_of_another_plan_is_refused(study, tmp_path, capsys):
    file, st = study
    plan, size, _ = laid_out(file, st)
    packed = (st / "scores.json.xz").read_bytes()
    record = json.loads(lzma.decompress(packed))
    for name, contents in {
        "cut short": packed[:-20],
        "no xz": b"{}",
        "another format": lzma.compress(b'{"format": 9}'),
        "a part missing": lzma.compress(json.dumps({**record, "runs": [{"name": "x"}]}).encode()),
        "columns": lzma.compress(
            json.dumps({**record, "runs": [{**record["runs"][0], "steps": {"step": [1]}}]}).encode()
        ),
    }.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(DataError, match="cannot be read as the scores of a study"):
            read_collected(tmp_path / name, plan, size)
    with pytest.raises(DataError, match="cannot be read"):
        read_collected(tmp_path / "nowhere", plan, size)
    with pytest.raises(ConfigError, match="another plan or size: settings max_steps is 3 there, and 4 in this plan"):
        read_collected(
            st / "scores.json.xz", plan, laid_out(file, st)[1].__class__(settings=size.settings | {"max_steps": 4})
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "study.md").write_text("mine")
    assert main(["study", str(file), "--scores", str(st), "--output-dir", str(tmp_path / "mine")]) == 1
    assert "is no study's folder, and holds study.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("claim", "settings", "words"),
    [
        ({"score": "rouge_9"}, {}, "claim lower: the evaluation of sft-seed0 gives no score 'rouge_9'"),
        ({"score": "eval/rouge_9"}, {}, "gives no score 'rouge_9'"),
        ({"at": 0.1}, {"eval_steps": 0}, "claim lower is measured along the way, and sft-seed0 has no eval_steps"),
        ({"task": "references", "score": "strict"}, {}, "gives no score 'strict'"),
    ],
)
def test_a_claim_that_no_run_could_answer_is_found_before_the_first(study, tmp_path, capsys, claim, settings, words):
    tree = yaml.safe_load(study[0].read_text())
    tree["claims"] = {"lower": CLAIMS["lower"] | claim}
    tree["sizes"]["small"]["settings"] |= settings
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    assert main(["study", str(tmp_path / "plan.yaml"), "--output-dir", str(tmp_path / "st")]) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "st").exists()
