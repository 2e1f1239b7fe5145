"""What the command line says of itself, what a shell completes, and what the words before and among the flags mean."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import switchkd
from switchkd import AdaSwitch, StudentOnly
from switchkd.base.errors import ConfigError
from switchkd.cli import flags
from switchkd.cli.commands import COMMANDS, GROUPS, LASTING, MANY, NOT_FROM_RECIPE, OF_A_RUN, TAKE_RECIPE
from switchkd.cli.flags import FEW, FIRST, parse
from switchkd.cli.main import main
from switchkd.methods.rules import NOUNS
from switchkd.training.settings import TrainConfig, load_recipe

ROOT = Path(__file__).parents[2]


def said(capfd, *arguments):
    """What a command line prints that ends without an error."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert not code
    return capfd.readouterr().out


# --- help ---------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_with_its_summary_in_its_group(capfd):
    paragraphs = said(capfd, "--help").split("\n\n")
    for title, group in GROUPS.items():
        [lines] = [part.splitlines()[1:] for part in paragraphs if part.startswith(f"{title}:\n")]
        assert [line.split(maxsplit=1) for line in lines] == [
            [name, command.summary] for name, command in group.items()
        ]


def test_version(capfd):
    assert said(capfd, "--version") == f"switchkd {switchkd.__version__}\n" == "switchkd 0.2.0\n"


def test_what_the_table_says_of_a_command_is_said_of_one_that_is_there():
    assert {*TAKE_RECIPE, *LASTING, *NOT_FROM_RECIPE, *OF_A_RUN} <= COMMANDS.keys()
    for name, settings in {**NOT_FROM_RECIPE, **OF_A_RUN}.items():
        assert {*settings} <= COMMANDS[name].settings.__dataclass_fields__.keys()


def boxes(text):
    """The boxes of a command's help by their titles, each as one line."""
    found = {}
    for line in text.splitlines():
        if line.startswith("╭"):
            title = line.strip("╭╮─ ")
            found[title] = ""
        elif line.startswith("│"):
            found[title] += line.strip("│ ") + " "
    return {title: " ".join(words.split()) for title, words in found.items()}


def test_the_help_of_train_names_the_rules_and_has_the_settings_in_groups(capfd):
    found = boxes(said(capfd, "train", "--help-all"))
    assert list(found) == [
        "positional arguments", "options", "model options", "data options", "method options", "writing options", "training options",
        "evaluation options", "output options", "policy options", "objective options", "mix options",
    ]  # fmt: skip
    for noun in ("policy", "objective", "mix"):
        [listed] = re.findall(rf"--{noun} \{{(.*?)\}}", found["method options"])
        assert re.split(r",\s*", listed) == list(NOUNS[noun][1])
    assert "--lora-r INT Rank of the adapter." in found["model options"]
    assert (
        "--eval-samples INT Held-out examples to evaluate on, the first of the file; -1 takes all, 0 none."
        in (found["evaluation options"])
    )


@pytest.mark.parametrize("name", MANY)
def test_the_help_of_a_command_with_many_settings_is_short_and_names_the_way_to_all(name, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text, whole = said(capfd, name, "--help"), said(capfd, name, "--help-all")
    assert f"`switchkd {name} --help-all` lists all settings" in " ".join(text.split())
    assert len(text.splitlines()) < 0.5 * len(whole.splitlines()) and len(text.splitlines()) < 110
    assert all(len(line) <= 80 for line in text.splitlines() if line[:1] in "│╭╰")
    assert set(re.findall("--[a-z-]+", text)) < set(re.findall("--[a-z-]+", whole)) | {"--help-all", "--policy"}


def test_what_the_help_of_train_shows_first(capfd):
    text = said(capfd, "train", "--help")
    flags = {flag for line in text.splitlines() for flag in re.findall(r"^│ (--[a-z-]+)", line)}
    names = {name.replace("_", "-").replace("-model-name-or-path", "") for name in FIRST}
    assert flags - {"--help"} == {f"--{name}" for name in names}
    wanted = "teacher student train-file eval-file template max-steps num-train-epochs learning-rate per-device-train-batch-size"
    for name in f"{wanted} max-new-tokens dtype use-peft output-dir resume report-to push-to-hub".split():
        assert f"--{name}" in flags
    assert "--policy adaswitch --help" in " ".join(boxes(text)["method options"].split())


def test_only_commands_with_few_settings_show_all_at_once():
    many = {name for name, command in COMMANDS.items() if len(command.settings.__dataclass_fields__) > FEW}
    assert many == {*MANY}


def test_groups_and_first_settings_name_settings_that_there_are():
    fields = set(TrainConfig.__dataclass_fields__)
    assert {*FIRST} <= fields and {name for names in flags.ELSEWHERE.values() for name in names} <= fields
    assert {*flags.ELSEWHERE, *flags.GROUP_OF.values()} == {*flags.GROUPS}
    for command, names in flags.ALSO_FIRST.items():
        assert {*names} <= COMMANDS[command].settings.__dataclass_fields__.keys()


def test_a_rule_that_is_named_has_its_settings_in_the_short_help(capfd):
    assert "policy options" not in boxes(said(capfd, "train", "--help"))
    found = boxes(said(capfd, "train", "--save-steps", "3", "--policy", "adaswitch", "-h"))
    assert "--policy.ratio FLOAT" in found["policy options"] and "mix options" not in found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_of_a_command_stands_in_its_help_with_its_text(name, capfd):
    text = said(capfd, name, "--help-all")
    words, settings = " ".join(boxes(text).values()), COMMANDS[name].settings
    for setting, (_, about) in flags._groups_and_texts(settings).items():
        flag = setting.replace("_", "-")
        assert f"--{flag}" in text or f"[{flag.upper()}]" in text
        assert about and about in words, setting
    assert len(flags._groups_and_texts(settings)) == len(settings.__dataclass_fields__)


def test_help_after_a_recipe_has_its_defaults_and_its_rules(capfd):
    found = boxes(said(capfd, "train", "adaswitch", "--objective", "jsd", "--help"))
    assert "my_module:MyRule. (default: adaswitch)" in found["method options"]
    assert "--policy.ratio FLOAT" in found["policy options"] and "--objective.beta FLOAT" in found["objective options"]


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ("torch", "transformers", "numpy", "tyro", "switchkd.training.settings")),
        (["--version"], ("torch", "transformers", "numpy", "tyro", "switchkd.training.settings")),
        (["train", "--help"], ("torch", "transformers", "numpy")),
        (["train", "--help-all"], ("torch", "transformers", "numpy")),
        (["train", "--beta", "0.5", "--help"], ("torch", "transformers", "numpy")),
        (["chat", "--help"], ("torch", "transformers", "numpy")),
        (["completion", "bash"], ("torch", "transformers", "numpy")),
        (["evaluate", "adaswitch", "--help"], ("torch", "transformers", "numpy")),
        (["compare", "--help"], ("torch", "transformers", "numpy")),
    ],
)
def test_help_loads_none_of_the_heavy_libraries(arguments, absent):
    code = (
        "import sys; from switchkd.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    loaded = done.stderr.split()
    assert done.returncode == 0 and (done.stdout or "--beta" in arguments) and "switchkd.cli.main" in loaded
    assert not set(absent) & set(loaded)


# --- completion ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """A function that says what bash completes the last of some words with."""
    if not shutil.which("bash"):
        pytest.skip("no bash")
    script = tmp_path_factory.mktemp("completion") / "switchkd.sh"
    made = subprocess.run(
        [sys.executable, "-m", "switchkd.cli", "completion", "bash"], cwd=ROOT, capture_output=True, text=True
    )
    script.write_text(made.stdout)
    code = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()\n'
        '[[ $(complete -p switchkd) =~ -F\\ ([^ ]+) ]] && "${BASH_REMATCH[1]}" && printf "%s\\n" "${COMPREPLY[@]}"'
    )
    # The script asks for python3; that of the tests is one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def completed(*words):
        command = ["bash", "--norc", "-c", code, "bash", str(script), "switchkd", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
        assert not done.stderr
        return done.stdout.split()

    return completed


def test_bash_completes_commands(bash):
    assert set(bash("")) == {*COMMANDS, "-h", "--help"}
    assert bash("tra") == ["train"] and bash("cha") == ["chat"] and set(bash("m")) == {"make-pair", "methods"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["train", "--learning-r"], ["--learning-rate"]),
        (["train", "adaswitch", "--learning-r"], ["--learning-rate"]),
        (["train", "--policy", "ada"], ["adaswitch"]),
        (["evaluate", "runs/mine", "--policy", "teach"], ["teacher_only"]),
        (["train", "--objective", "skew"], [name for name in NOUNS["objective"][1] if name.startswith("skew")]),
        (["train", "--template", "al"], ["alpaca"]),
        (["make-pair", "--scale", ""], ["full", "tiny"]),
        (["compare", "--b"], ["--baseline"]),
    ],
)
def test_bash_completes_flags_and_their_values(bash, words, found):
    assert found and bash(*words) == found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_is_completed_has_every_flag_of_every_command(shell, capfd):
    script = said(capfd, "completion", shell)
    for name, command in COMMANDS.items():
        assert name in script
        for setting, field in command.settings.__dataclass_fields__.items():
            positional = "Positional" in str(field.type)
            assert positional or setting.replace("_", "-") in script, (name, setting)


def test_an_unknown_shell_is_explained(capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["completion", "bsh"])
    assert "bash" in capfd.readouterr().err


# --- words before and among the flags -----------------------------------------------------------------------------------

MY_RULE = """
from dataclasses import dataclass
from switchkd import AdaSwitch

@dataclass(frozen=True)
class Patient(AdaSwitch):
    patience: int = 2
    \"\"\"how often it looks away\"\"\"
"""


def test_a_rule_of_ones_own_is_named_by_its_path_and_its_settings_are_flags(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("rule_of_my_own.py").write_text(MY_RULE)
    named = ["train", "kd", "--policy", "rule_of_my_own:Patient"]
    policy = parse(TrainConfig, [*named, "--policy.patience", "4", "--policy.ratio", "2"]).policy
    assert (type(policy).__name__, policy.patience, policy.ratio) == ("Patient", 4, 2.0)
    found = boxes(said(capfd, *named, "--help"))
    assert "relay,rule_of_my_own:Patient}" in re.sub(r",\s*", ",", found["method options"])
    assert "--policy.patience INT how often it looks away" in found["policy options"]


@pytest.mark.parametrize(
    "words", [["--policy", "adaswitch"], ["--policy=adaswitch"], ["--policy", "skd", "--policy", "adaswitch"]]
)
def test_the_last_rule_that_is_named_is_taken_with_its_settings(words):
    assert parse(TrainConfig, ["train", "kd", *words, "--policy.window", "7"]).policy == AdaSwitch(window=7)


def test_settings_that_are_right_together_may_be_given_together():
    """MiniLLM's weights undo a mix-in; text that the student wrote alone needs none."""
    config = parse(TrainConfig, ["train", "minillm", "--policy", "student_only", "--objective.alpha", "0"])
    assert config.policy == StudentOnly() and config.objective.alpha == 0


def test_settings_that_contradict_each_other_are_wrong_usage(capfd):
    with pytest.raises(SystemExit, match="2"):
        parse(TrainConfig, ["train", "kd", "--objective", "minillm"])
    assert capfd.readouterr().err.startswith("error: the objective minillm corrects for text")


def test_flags_win_over_the_recipe_and_may_be_written_with_underscores():
    config = parse(TrainConfig, ["train", "adaswitch", "--learning_rate", "0.5", "--teacher=a", "--no_eval_on_start"])
    recipe = load_recipe("adaswitch")
    assert (config.learning_rate, config.teacher_model_name_or_path, config.eval_on_start) == (0.5, "a", False)
    assert (config.policy, config.objective, config.max_new_tokens) == (
        recipe.policy,
        recipe.objective,
        recipe.max_new_tokens,
    )


def test_a_recipe_after_the_flags_is_not_silently_left_out():
    with pytest.raises(
        ConfigError, match="'adaswitch' is a recipe or a run if it comes first: switchkd train adaswitch …"
    ):
        parse(TrainConfig, ["train", "--seed", "3", "adaswitch"])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_without_words_has_the_defaults_of_its_settings(name):
    assert parse(COMMANDS[name].settings, [name]) == COMMANDS[name].settings()


def test_the_package_starts_a_command_as_a_module():
    done = subprocess.run([sys.executable, "-m", "switchkd.cli", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and "did you mean 'train'" in done.stderr


def test_one_of_several_processes_ends_before_python_takes_itself_apart():
    """What torch's threads let go of so late has aborted processes whose work was done; what is registered for the end runs."""
    program = textwrap.dedent("""
        import atexit, os, sys
        from switchkd.cli.__main__ import leave

        class Late:
            def __del__(self, abort=os.abort):
                abort()

        sys.late = Late()
        atexit.register(print, "registered")
        sys.stdout.write("said, ")
        leave(3)
    """)
    alone = {name: value for name, value in os.environ.items() if name != "RANK"}
    one, of_two = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        for environment in (alone, alone | {"RANK": "1"})
    )
    assert one.returncode == -signal.SIGABRT
    assert (of_two.returncode, of_two.stdout) == (3, "said, registered\n")
