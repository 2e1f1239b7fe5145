"""A student without its teacher: `generate RUN`, `chat`, and models in the place of a run. And a recipe by five questions."""

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny import byte_level_tokenizer, pair_on_disk, save_llama

from switchkd import decode
from switchkd.base.errors import ConfigError
from switchkd.base.settings import to_dict
from switchkd.base.terminal import visible
from switchkd.cli import choose, generate
from switchkd.cli.choose import which
from switchkd.cli.flags import parse
from switchkd.cli.generate import ChatConfig, GenerateConfig
from switchkd.cli.main import main
from switchkd.methods.policies import Switch
from switchkd.methods.policy import StudentOnly
from switchkd.models.pair import load_alone, load_pair
from switchkd.training.settings import TrainConfig, load_recipe

PROMPTS = ["--prompt", "What is 2 and 2?", "And 3?", "--max-new-tokens", "12"]


@pytest.fixture
def place(tmp_path):
    return pair_on_disk(tmp_path)


@pytest.fixture
def run(tmp_path, place):
    """A run directory with a student, as one finds it: settings, and what was trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = TrainConfig(**place, output_dir=str(folder), policy=Switch(tau_0=-1.0), max_new_tokens=12)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    save_llama(folder / "student", byte_level_tokenizer(), 7)
    return folder


def written(arguments, tmp_path):
    file = tmp_path / "rollouts.jsonl"
    assert main(["generate", *arguments, *PROMPTS, "--output-file", str(file)]) == 0
    return [json.loads(line)["completion_ids"] for line in file.read_text().splitlines()]


def typed(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_runs_student_writes_what_it_writes_beside_its_teacher_which_need_not_be_there(run, place, tmp_path, capsys):
    student = str(run / "student")
    pair = load_pair(place["teacher_model_name_or_path"], student)
    alone = load_alone(student)
    assert (alone.vocab_size, alone.ends) == (pair.vocab_size, pair.ends)
    ids = [pair.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
           for text in PROMPTS[1:3]]  # fmt: skip
    beside = decode(pair.student, pair.teacher, ids, StudentOnly(), max_new_tokens=12, vocab_size=pair.vocab_size,
                    eos_token_ids=pair.ends)  # fmt: skip
    shutil.rmtree(place["teacher_model_name_or_path"])
    made = written([str(run)], tmp_path)
    assert made == [rollout.completion_ids for rollout in beside]
    out = capsys.readouterr().out
    assert "100% student" in out and "teacher 0\n" in out


def test_rows_that_name_teachers_are_read_without_them(run, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "What is 2 and 2?", "completion": "4", "kind": "sums"}\n')
    config = yaml.safe_load((run / "config.yaml").read_text())
    more = {"teachers": {"others": str(tmp_path / "nowhere")}, "teacher_field": "kind", "teacher_prompt": "{prompt}!"}
    (run / "config.yaml").write_text(yaml.safe_dump(config | more))
    assert main(["generate", str(run), "--limit", "1", "--eval-file", str(file)]) == 0
    assert main(["generate", str(run), "--limit", "1", "--eval-file", str(file), "--policy", "switch"]) == 1


@pytest.mark.parametrize("name", ["a hub name that nobody has/x", "http://127.0.0.1:9"])
def test_a_teacher_that_cannot_be_reached_is_not_asked_for(run, tmp_path, name):
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"teacher_model_name_or_path": name.replace(" ", "-")}))
    assert len(written([str(run)], tmp_path)) == 2


def test_a_rule_that_asks_the_teacher_still_has_it(run, place, tmp_path, capsys):
    written([str(run), "--policy", "switch", "--policy.tau-0", "-1"], tmp_path)
    assert "100% teacher" in capsys.readouterr().out
    shutil.rmtree(place["teacher_model_name_or_path"])
    assert main(["generate", str(run), "--policy", "switch", *PROMPTS]) == 1


def test_a_model_in_the_place_of_a_run_writes_alone(run, place, tmp_path):
    student = str(run / "student")
    assert written([student], tmp_path) == written([str(run)], tmp_path)
    for name in (student, "some/model", "qwen-coder"):
        config = parse(GenerateConfig, ["generate", name])
        assert (config.student_model_name_or_path, config.policy) == (name, StudentOnly())
        assert parse(ChatConfig, ["chat", name]).student_model_name_or_path == name
    assert isinstance(parse(GenerateConfig, ["generate", "switch"]).policy, Switch)
    with pytest.raises(ConfigError, match="no recipe 'swich'"):
        parse(GenerateConfig, ["generate", "swich"])


# --- chat ---------------------------------------------------------------------------------------------------------------


def chatted(monkeypatch, *lines, arguments=(), run=None):
    """The conversations that the template was given, a list of (role, text) for each turn."""
    asked = []
    answer = generate._answer

    def watched(pair, turns, *rest):
        asked.append([(turn.role, turn.content) for turn in turns])
        return answer(pair, turns, *rest)

    monkeypatch.setattr(generate, "_answer", watched)
    typed(monkeypatch, *lines)
    assert main(["chat", str(run), *arguments]) == 0
    return asked


def test_chat_goes_on_with_what_was_said_until_it_is_cleared(run, monkeypatch, capsys):
    shutil.rmtree(run.parent / "teacher")
    asked = chatted(monkeypatch, "One", "", "Two", "/clear", "Three", "/quit", "Four", run=run)
    out = capsys.readouterr().out
    assert [turns[-1] for turns in asked] == [("user", text) for text in ("One", "Two", "Three")]
    assert [role for role, _ in asked[1]] == ["user", "assistant", "user"] and len(asked[2]) == 1
    assert asked[1][0] == ("user", "One") and asked[1][1][1] and visible(asked[1][1][1]) in out


def test_chat_answers_as_generate_does_under_the_runs_template(run, tmp_path, monkeypatch, capsys):
    typed(monkeypatch, "What is 2 and 2?")
    assert main(["chat", str(run)]) == 0
    said = capsys.readouterr().out.split("exactly …\n", 1)[1]
    [ids, _] = written([str(run)], tmp_path)
    assert said == visible(byte_level_tokenizer().decode(ids, skip_special_tokens=True)) + "\n"
    assert parse(ChatConfig, ["chat", str(run)]).max_new_tokens == 12


def test_chat_under_a_template_of_one_turn_forgets_by_itself(run, monkeypatch):
    asked = chatted(monkeypatch, "One", "Two", arguments=["--template", "none"], run=run)
    assert asked == [[("user", "One")], [("user", "Two")]]


def test_a_turn_beyond_the_context_is_told_of_and_the_conversation_stands(run, monkeypatch, capsys):
    asked = chatted(monkeypatch, "One", "a" * 600, "Two", run=run)
    assert "context" in capsys.readouterr().err and ("user", "a" * 600) not in asked[2] and len(asked[2]) == 3


def test_an_answer_is_printed_as_it_grows_and_no_half_character(monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(generate, "console", console)
    ids = list("Zürich".encode())
    stream = generate._Stream(lambda ids: bytes(ids).decode(errors="replace"))

    class Row:
        pass

    row, seen = Row(), []
    for count in range(1, len(ids) + 1):
        row.completion_ids = ids[:count]
        stream.watch([row])
        seen.append(console.file.getvalue())
    stream.end(ids)
    assert seen == ["Z", "Z", "Zü", "Zür", "Züri", "Züric", "Zürich"]
    assert console.file.getvalue() == "Zürich\n" and stream.text == "Zürich"


# --- a recipe by questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "method"),
    [("yyy", "on_policy"), ("yyn", "kd"), ("nyy", "on_policy"), ("nyn", "seqkd"), ("yny", "seqkd"), ("nnn", "seqkd")],
)
def test_three_questions_choose_a_method_and_the_recipe_is_whole(answers, method, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert which(*[letter == "y" for letter in answers]) == method
    typed(
        monkeypatch,
        place["teacher_model_name_or_path"],
        place["student_model_name_or_path"],
        place["train_file"],
        *answers,
        "",
    )
    assert main(["new", "mine.yaml"]) == 0
    assert "switchkd check mine.yaml" in capsys.readouterr().out
    made, shipped = load_recipe("mine.yaml"), load_recipe(method)
    assert (made.policy, made.objective, made.mix, made.template) == (
        shipped.policy, shipped.objective, shipped.mix, TrainConfig().template,
    )  # fmt: skip
    for name in ("teacher_model_name_or_path", "student_model_name_or_path"):
        assert getattr(made, name) == place[name]
    assert made.train_file in (place["train_file"], (place["train_file"],)) and made.output_dir == f"runs/{method}"
    text = Path("mine.yaml").read_text()
    assert f"# {method}: {choose.WHY[method]}." in text and "switchkd train mine.yaml" in text
    if answers == "yyy":
        assert main(["check", "mine.yaml", "--eval-file", place["train_file"], "--max-steps", "1"]) == 0


def test_what_is_typed_stays_text_and_is_asked_again_where_it_is_no_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch, "a: b # c", "", "", "perhaps", "n", "", "y", "runs/é")
    assert main(["new"]) == 0
    made = load_recipe("recipe.yaml")
    assert made.teacher_model_name_or_path == "a: b # c" and made.output_dir == "runs/é"
    assert made.student_model_name_or_path == "demo" and "y or n, please" in capsys.readouterr().out


def test_a_file_that_is_there_is_never_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("mine")
    typed(monkeypatch, *[""] * 7)
    assert main(["new"]) == 1 and "recipe.yaml is there already" in capsys.readouterr().err
    Path("there.yaml").symlink_to(tmp_path / "nowhere")
    assert main(["new", "there.yaml"]) == 1
    # One that comes while questions are asked.
    monkeypatch.setattr(choose, "recipe_text", lambda *_: Path("late.yaml").write_text("theirs") and "ours")
    assert main(["new", "late.yaml"]) == 1
    assert (Path("late.yaml").read_text(), Path("recipe.yaml").read_text()) == ("theirs", "mine")


def test_an_input_that_ends_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch, "a", "b")
    assert main(["new"]) == 1 and "the input ended" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
