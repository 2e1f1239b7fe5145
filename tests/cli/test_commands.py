"""The commands as a user types them, on a tiny pair saved to disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import pair_on_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchkd import StudentOnly, TeacherOnly
from switchkd.cli.commands import COMMANDS
from switchkd.cli.evaluate import EvaluateConfig
from switchkd.cli.flags import parse
from switchkd.cli.generate import GenerateConfig, PlayConfig
from switchkd.cli.main import main
from switchkd.cli.train import DemoConfig, demo_settings
from switchkd.training.settings import load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, a student and a data file, as flags."""
    settings = pair_on_disk(tmp_path_factory.mktemp("pair"))
    return {f"--{name.replace('_', '-')}": value for name, value in settings.items()}


SMALL = {
    "--template": "chat",
    "--max-prompt-length": "128",
    "--max-new-tokens": "12",
    "--max-completion-length": "24",
    "--eval-samples": "3",
    "--eval-max-new-tokens": "8",
    "--per-device-train-batch-size": "3",
}


def flags(*settings):
    """Flags of dictionaries of settings, later ones winning."""
    merged = {name: value for group in settings for name, value in group.items()}
    return [part for pair in merged.items() for part in pair]


def train(place, output, *switches, recipe="switch", **changes):
    own = {"--max-steps": "3", "--output-dir": str(output), **changes}
    return main(["train", recipe, *flags(place, SMALL, own), *switches])


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "switch"
    assert train(place, output, **{"--save-steps": "1"}) == 0
    return output


def test_a_run_directory_holds_settings_metrics_rollouts_checkpoints_scores_and_student(run):
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "origin.json", "metrics.jsonl", "rollouts.jsonl", "samples.jsonl", "checkpoint-2", "checkpoint-3",
        "evaluation.json", "evaluation.completions.jsonl", "student",
    }  # fmt: skip
    metrics = records(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    assert {m["source"] for m in metrics} == {"policy", "examples"}
    scores = json.loads((run / "evaluation.json").read_text())
    assert list(scores["results"]) == ["teacher", "student before", "student after"]
    assert scores["task"] == {"name": "references", "version": 1, "primary": "rouge_l"}
    assert scores["settings"]["max_new_tokens"] == 8
    assert len({result["model"]["sha256"] for result in scores["results"].values()}) == 3
    rollout = records(run / "rollouts.jsonl")[0]
    assert len(rollout["completion_ids"]) == len(rollout["speakers"]) == len(rollout["divergences"])


def test_a_run_is_plotted_as_far_as_it_allows(run, tmp_path, capsys):
    assert main(["plot", str(run), "--output-dir", str(tmp_path / "all")]) == 0
    said = capsys.readouterr().out
    assert "progress: not drawn" in said and "not evaluated in the run" in said
    pictures = {"lambda", "divergence", "switch_rate", "length", "cost"}
    assert {p.name for p in (tmp_path / "all").iterdir()} == {
        f"{n}.{form}" for n in pictures for form in ("svg", "png")
    }
    assert main(["plot", str(run), "--figure", "cost", "--output-dir", str(tmp_path / "one")]) == 0
    assert {p.name for p in (tmp_path / "one").iterdir()} == {"cost.svg", "cost.png"}
    for wrong, message in (("progress", "not evaluated in the run"), ("costs", "did you mean 'cost'")):
        assert main(["plot", str(run), "--figure", wrong]) == 1 and message in capsys.readouterr().err


def test_the_student_opens_with_nothing_of_ours(run, place):
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    before = AutoModelForCausalLM.from_pretrained(place["--student-model-name-or-path"])
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(run / "student").chat_template


def test_a_run_that_was_stopped_goes_on_to_the_same_end(run, place, tmp_path):
    output = tmp_path / "again"
    code = (
        "import sys; from switchkd.cli.main import main; from switchkd.training import trainer\n"
        "save = trainer.Trainer.save\n"
        "def stop(self):\n    save(self)\n    if self.step == 2: raise KeyboardInterrupt\n"
        "trainer.Trainer.save = stop\n"
        "sys.exit(main())"
    )
    arguments = ["train", "switch", *flags(place, SMALL), "--max-steps", "3", "--save-steps", "1"]
    arguments += ["--output-dir", str(output)]
    stopped = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    assert not (output / "student").exists()
    assert main([*arguments, "--resume"]) == 0
    for name in (
        "student/model.safetensors",
        "checkpoint-3/optimizer.safetensors",
        "evaluation.json",
        "rollouts.jsonl",
    ):
        assert (output / name).read_bytes() == (run / name).read_bytes(), name


def test_a_damaged_checkpoint_is_told_of_in_a_line_and_passed_over(run, tmp_path, capsys):
    output = Path(shutil.copytree(run, tmp_path / "run"))
    file = output / "checkpoint-3" / "model.safetensors"
    os.truncate(file, 100)
    assert main(["train", str(output), "--resume-from", "checkpoint-3"]) == 1
    assert capsys.readouterr().err.endswith(
        f"error: {file} is damaged: it is not as it was written; there is checkpoint-2: give --resume-from, or --resume for the "
        "newest that is whole\n"
    )
    again = [sys.executable, "-m", "switchkd.cli", "train", str(output), "--resume"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines() == [
        f"warning: {file} is damaged: it is not as it was written. The run goes on from {output / 'checkpoint-2'}",
        f"warning: {file.parent} is later than the step that the run goes on from: it is now {file.parent}.set-aside, and may be "
        "deleted",
        f"warning: {output / 'student'} is the student of another step than 2, from which the run goes on: it is now "
        f"{output / 'student'}.set-aside, and may be deleted",
    ]
    assert (output / "checkpoint-3" / "model.safetensors").read_bytes() == (
        run / "student" / "model.safetensors"
    ).read_bytes()


def test_resuming_with_other_settings_is_refused(run, place, capsys):
    assert train(place, run, "--resume", **{"--save-steps": "1", "--learning-rate": "0.5"}) == 1
    assert "learning_rate: 0.0001 -> 0.5" in capsys.readouterr().err


def test_a_used_output_dir_is_refused(run, place, capsys):
    assert train(place, run) == 1
    assert "--resume" in capsys.readouterr().err


def test_a_run_is_its_own_recipe_and_its_student_can_be_evaluated_and_generate(run, tmp_path, capsys):
    scores, rollouts = tmp_path / "scores.json", tmp_path / "rollouts.jsonl"
    assert main(["evaluate", str(run), "--eval-samples", "3", "--output-file", str(scores)]) == 0
    saved = json.loads((run / "evaluation.json").read_text())["results"]
    ours = json.loads(scores.read_text())["results"]
    assert ours["student"] == saved["student after"] and ours["teacher"] == saved["teacher"]
    prompts = ["--prompt", "What is 2 and 2?", "And 3?"]
    teacher = ["--policy", "switch", "--policy.tau-0", "-1"]
    assert main(["generate", str(run), *prompts, *teacher, "--output-file", str(rollouts)]) == 0
    made = records(rollouts)
    assert len(made) == 2 and {s for r in made for s in r["speakers"]} == {1}
    out = capsys.readouterr().out
    assert "100% teacher" in out and "forwards per kept token" in out and "⟦" in out


def test_an_evaluation_takes_all_examples_and_the_students_own_text_whatever_the_run_did(run):
    config = parse(EvaluateConfig, ["evaluate", str(run)])
    assert (config.eval_samples, config.policy) == (-1, StudentOnly())
    assert config.student_model_name_or_path == str(run / "student") and config.template == "chat"


def test_generate_means_a_runs_student_and_play_its_policy(run):
    trained = load_recipe(str(run / "config.yaml")).policy
    assert parse(GenerateConfig, ["generate", str(run)]).policy == StudentOnly() != trained
    assert parse(GenerateConfig, ["generate", str(run), "--policy", "teacher_only"]).policy == TeacherOnly()
    assert parse(GenerateConfig, ["generate", str(run / "config.yaml")]).policy == trained
    assert parse(PlayConfig, ["play", str(run)]).policy == trained


@pytest.mark.parametrize("command", ["evaluate", "generate", "play"])
def test_a_run_without_a_student_is_refused_and_its_first_student_never_taken_for_it(run, tmp_path, capsys, command):
    unfinished = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(unfinished / "student")
    assert main([command, str(unfinished)]) == 1
    checkpoint = unfinished / "checkpoint-3"
    words = f"{unfinished} has no student yet; finish it with `switchkd train {unfinished} --resume`"
    assert f"{words}, or name a checkpoint's student instead: --student {checkpoint}\n" in capsys.readouterr().err
    config = parse(COMMANDS[command].settings, [command, str(unfinished), f"--student={checkpoint}"])
    assert config.student_model_name_or_path == str(checkpoint)


def test_a_run_takes_the_first_rows_that_it_is_told_to(place, capsys):
    assert main(["check", "kd", *flags(place, SMALL), "--train-samples", "5", "--num-train-epochs", "3"]) == 0
    assert "data.jsonl: 5 examples" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["check", "kd", "--train-samples", "0"])
    assert "train_samples must be at least 1, or -1" in capsys.readouterr().err


def test_a_budget_of_scored_text_beyond_the_context_is_found_before_training(place, capsys):
    assert main(["check", "kd", *flags(place, SMALL, {"--eval-max-new-tokens": "100000"})]) == 1
    assert "completion 100000 tokens exceed" in capsys.readouterr().err


def test_generate_from_a_file(place, capsys):
    arguments = flags({name: value for name, value in place.items() if name != "--train-file"})
    assert main(["generate", "adaswitch", *arguments, "--limit", "2", "--max-new-tokens", "5"]) == 0
    assert "#1 (" in capsys.readouterr().out


def test_play_writes_what_generate_writes_in_plain_lines(place, tmp_path, capsys):
    models = ["--teacher", place["--teacher-model-name-or-path"], "--student", place["--student-model-name-or-path"]]
    arguments = [*models, "--max-new-tokens", "12", "--policy", "switch", "--policy.tau-0", "-1", "--seed", "5"]
    prompt = ["--prompt", "What is 2 and 2?"]
    assert main(["play", *arguments, *prompt]) == 0
    text, *bars, cost = capsys.readouterr().out.strip().split("#0 (")[1].rsplit("\n", 3)
    assert "⟦" in text and [line.split()[0] for line in bars] == ["divergence", "threshold"] and "tokens/s" in cost
    assert main(["generate", *arguments, *prompt, "--output-file", str(tmp_path / "rollouts.jsonl")]) == 0
    assert f"#0 ({text}\n" in capsys.readouterr().out
    [made] = records(tmp_path / "rollouts.jsonl")
    assert len(bars[0].split()[1]) == len(made["completion_ids"])


def test_play_takes_a_run_and_the_first_held_out_question_where_there_is_no_prompt(run, capsys):
    assert main(["play", str(run), "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "data.jsonl: 1 examples" in out and "#0 (" in out


def test_play_asks_at_a_terminal_until_an_empty_prompt(place, monkeypatch, capsys):
    typed = iter(["What is 2 and 2?", "And 3?", " "])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    arguments = flags({name: value for name, value in place.items() if "model" in name})
    assert main(["play", *arguments, "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "#0 (" in out and "#1 (" in out and next(typed, None) is None


def test_a_quiet_run_says_where_the_student_lies_and_leaves_the_same_files(run, place, tmp_path, capsys):
    output = tmp_path / "quiet"
    assert train(place, output, "--quiet", **{"--save-steps": "1"}) == 0
    assert capsys.readouterr().out == f"student saved in {output / 'student'}\n"
    assert {p.name for p in output.iterdir()} == {p.name for p in run.iterdir()}
    for name in ("student/model.safetensors", "evaluation.json", "rollouts.jsonl"):
        assert (output / name).read_bytes() == (run / name).read_bytes(), name
    assert train(place, output, "--resume", **{"--save-steps": "1"}) == 0  # quiet is free to change
    assert "settings: " in capsys.readouterr().out


def test_check_says_what_a_run_would_do_and_writes_nothing(place, tmp_path, capsys):
    assert main(["check", "switch", *flags(place, SMALL), "--output-dir", str(tmp_path / "x")]) == 0
    out = capsys.readouterr().out
    for words in (
        "teacher: ",
        "student: ",
        "ids, equal in both",
        "steps: 80 of 3 rows",
        "memory without",
        "tau_0: 1.0",
    ):
        assert words in out
    assert not (tmp_path / "x").exists()


def test_prune(place, tmp_path, capsys):
    teacher = place["--teacher-model-name-or-path"]
    assert main(["prune", "--model-name-or-path", teacher, "--output-dir", str(tmp_path / "p"), "--layers", "1"]) == 1
    assert main(["prune", "--model-name-or-path", teacher, "--output-dir", str(tmp_path / "p"), "--layers", "2"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "p").config.num_hidden_layers == 2


def test_other_methods_run(place, tmp_path):
    for recipe, text in (("adaswitch", "policy"), ("skd", "policy"), ("kd", "examples")):
        assert train(place, tmp_path / recipe, recipe=recipe, **{"--eval-samples": "0"}) == 0
        assert {m["source"] for m in records(tmp_path / recipe / "metrics.jsonl")} == {text}
        assert (tmp_path / recipe / "student" / "config.json").is_file()


@pytest.mark.parametrize("method", ["switch", "adaswitch", "fast_opd", "kd"])
def test_demo_settings_are_the_methods_recipe_in_small(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = demo_settings(DemoConfig(method=method, seed=4))
    assert config.seed == 4 and config.output_dir == f"runs/demo-{method}"
    assert config.teacher_model_name_or_path == config.student_model_name_or_path == "demo"
    Path(config.output_dir).mkdir(parents=True)
    assert demo_settings(DemoConfig(method=method)).output_dir == f"runs/demo-{method}-2"


BAD = {
    "broken JSON": ({"--train-file": "{data}"}, '{"prompt": "a", "completion": "b"}\n{"prompt": \n', "data.jsonl:2"),
    "missing field": ({"--train-file": "{data}"}, '{"question": "a"}\n', "data.jsonl:1"),
    "no rows": ({"--train-file": "{data}"}, "\n", "data.jsonl"),
    "no file": ({"--train-file": "/nowhere/x.jsonl"}, "", "/nowhere/x.jsonl"),
    "over-long prompts": ({"--max-prompt-length": "3"}, "", "longer than max_prompt_length=3"),
    "context": ({"--max-prompt-length": "600"}, "", "context of 512"),
    "no model": ({"--student-model-name-or-path": "{folder}"}, "", "holds no config.json"),
    "setting": ({"--policy.horizon": "0"}, "", "at least 1 token"),
    "no trigger token": ({"--policy": "relay", "--policy.triggers": "Perhapsnot"}, "", "none of Relay's triggers"),
    "no such module": ({"--policy": "nowhere:Rule"}, "", "cannot import 'nowhere:Rule'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_explained_and_writes_nothing(place, tmp_path, capsys, name):
    changes, content, words = BAD[name]
    (tmp_path / "data.jsonl").write_text(content)
    changes = {k: v.format(data=tmp_path / "data.jsonl", folder=tmp_path) for k, v in changes.items()}
    try:
        code = train(place, tmp_path / "run", **changes)
    except SystemExit as exit:  # what the flags alone show to be wrong is a usage error
        code = exit.code
    assert code in (1, 2)
    err = capsys.readouterr().err
    assert words in err.replace("\n", " "), err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments,code,words",
    [
        ([], 2, "usage"),
        (["--help"], 0, "train and look:"),
        (["trian"], 1, "did you mean 'train'"),
        (["train", "swich"], 1, "did you mean 'switch'"),
        (["train", "--learning-rte", "1"], 2, "--learning-rate"),
        (["demo", "--method", "adaswich"], 1, "did you mean 'adaswitch'"),
        (["train", "--policy", "swich"], 1, "unknown policy 'swich'; did you mean 'switch'"),
        (["train", "--mix"], 1, "--mix needs a name: ground_truth"),
        (["methods"], 0, "SWITCH"),
        *[([command, "--help"], 0, "--") for command in COMMANDS],
    ],
)
def test_usage(arguments, code, words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "switchkd.cli", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == code
    assert words in done.stdout + done.stderr
