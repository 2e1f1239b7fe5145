"""What a chat template is told is a setting: the same day before and after midnight, and variables by name."""

import dataclasses
import datetime as real
import json

import pytest
import transformers.utils.chat_template_utils as library
import yaml
from tiny import CHATML, byte_level_tokenizer, pair_on_disk

from switchkd.base.errors import ConfigError, DataError, SwitchKDWarning
from switchkd.base.settings import from_dict
from switchkd.cli.main import main
from switchkd.data import settings as template_inputs
from switchkd.data.examples import Example
from switchkd.data.fields import Message
from switchkd.data.settings import Template, with_template
from switchkd.data.templates import Encoder
from switchkd.reports.compare import compare
from switchkd.reports.page import _score_sheets
from switchkd.reports.record import RunRecord
from switchkd.reports.steps import differences
from switchkd.runs.distil import distil
from switchkd.training.settings import TrainConfig

# How templates of today ask for the day, each before plain ChatML. The first begins with a line break and white space.
CLOCKS = {
    "llama-3.2": (
        "\n  {%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}\n'
        "  {{- 'Today Date: ' + date_string }}"
    ),
    "smollm3": '{%- set today = strftime_now("%d %B %Y") -%}{{- "Today Date: " ~ today ~ "\\n" -}}',
    "gpt-oss": '{%- macro system() -%}{{- "Current date: " + strftime_now("%Y-%m-%d") }}{%- endmacro -%}{{ system() }}',
    "others": "{{ strftime_now('%A, %-d %B %Y, %H:%M, week %V, %e|%j|%y|%%d|%I%p') }}",
}
OLDER = (
    '{% if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}{{ date_string }}'  # Llama 3.1
)
TURNS = [{"role": "user", "content": "What is two?"}, {"role": "assistant", "content": "It is two."}]
EXAMPLE = Example(0, (Message("user", "What is two?"),), "It is two.", ("It is two.",), "here:1")


@pytest.fixture
def clock(monkeypatch):
    """Sets what the clock of this machine says, for the library's templates and for us."""

    def set_to(day):
        class Clock(real.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        monkeypatch.setattr(library, "datetime", Clock)
        monkeypatch.setattr(template_inputs, "datetime", Clock)

    return set_to


def tokenizer(before):
    return byte_level_tokenizer(template=before + CHATML)


def prompt(tokenizer, template):
    return tokenizer.decode(next(iter(Encoder(tokenizer, template)([EXAMPLE])))[0])


@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("day", ["2024-02-03", "2025-12-31T23:05"])
def test_a_stopped_clock_says_what_the_clock_said_on_that_day(name, day, clock):
    own = tokenizer(CLOCKS[name])
    clock(day)
    then = own.apply_chat_template(TURNS, tokenize=False)
    clock("2031-07-09T11:00")
    template = Template("chat", day)
    assert own.apply_chat_template(TURNS, tokenize=False) != then
    assert own.apply_chat_template(TURNS, tokenize=False, chat_template=template.text(own)) == then
    assert prompt(own, template) == then[: then.index("It is two.")]


def test_the_day_is_chosen_where_prompts_depend_on_it(clock):
    clock("2026-03-01")
    config = TrainConfig(template="chat")
    for name, before in CLOCKS.items():
        assert with_template(config, tokenizer(before)).template_date == "2026-03-01", name
        assert with_template(dataclasses.replace(config, template="none"), tokenizer(before)) == dataclasses.replace(
            config, template="none"
        )
    assert with_template(config, tokenizer("")) == with_template(config, tokenizer(OLDER)) == config
    assert with_template(dataclasses.replace(config, template_date="2020-01-02"), tokenizer(CLOCKS["smollm3"])) == (
        dataclasses.replace(config, template_date="2020-01-02")
    )


def test_teachers_with_a_tokenizer_of_their_own_read_under_their_own_template_of_the_day(clock):
    clock("2026-03-01")
    config, dated, plain = TrainConfig(), tokenizer(CLOCKS["smollm3"]), tokenizer("")
    none = byte_level_tokenizer(template=None)
    read = with_template(config, plain, others=[dated])
    assert (read.template, read.template_date) == ("chat", "2026-03-01")
    read = with_template(config, none, others=[dated])
    assert (read.template, read.template_date) == ("auto", "2026-03-01")
    assert with_template(config, plain, others=[none]).template == "auto"
    assert with_template(config, none, others=[none]).template == "alpaca"
    assert with_template(dataclasses.replace(config, template="none"), none, others=[dated]).template == "none"


def test_a_day_that_is_given_reaches_templates_that_take_one_by_name():
    own = tokenizer(OLDER)
    assert prompt(own, "chat").startswith("26 Jul 2024")
    assert prompt(own, Template("chat", "2020-01-02")).startswith("02 Jan 2020")
    told = Template("chat", "2020-01-02", {"date_string": "some day"})
    assert prompt(own, told).startswith("some day") and not told.reads_date(own)


@pytest.mark.parametrize("value", [True, False, 3, -0.5, 1e-9, "", 'a "b" \\n {{ x }} %} é 🙂 \u2028'])
def test_variables_reach_the_template_as_they_are(value):
    own = tokenizer("{{ told is defined }}|{{ told }}|{{ told is string }}")
    as_library = own.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True, told=value)
    assert own.apply_chat_template(
        TURNS[:1],
        tokenize=False,
        add_generation_prompt=True,
        chat_template=Template("chat", "", {"told": value}).text(own),
    ) == (as_library)
    assert prompt(own, Template("chat", "", {"told": value})) == as_library


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template_date": "yesterday"}, "template_date must be a day such as 2026-11-29, got 'yesterday'"),
        ({"chat_template_kwargs": {"messages": "x"}}, "no variable 'messages' that a setting could give"),
        ({"chat_template_kwargs": {"a b": 1}}, "no variable 'a b'"),
        ({"chat_template_kwargs": {"strftime_now": "x"}}, "set template_date"),
        ({"chat_template_kwargs": {"think": "false"}}, "on a command line write False"),
        ({"chat_template_kwargs": {"think": float("nan")}}, "finite"),
        ({"chat_template_kwargs": {"think": [1]}}, "chat_template_kwargs.think must be bool or int or float or str"),
        ({"chat_template_kwargs": {"think": True}, "template": "alpaca"}, "leave them out"),
        ({"template": "chatt"}, "template"),
    ],
)
def test_what_no_template_can_be_told_is_refused(settings, words):
    with pytest.raises(ConfigError, match="(?s).*".join(words.split(" | "))):
        from_dict(TrainConfig, settings, "recipe")


def test_a_variable_that_the_template_does_not_read_is_refused():
    own = tokenizer("{% if enable_thinking %}think{% endif %}")
    assert prompt(own, Template("chat", "", {"enable_thinking": True})).startswith("think")
    with pytest.raises(ConfigError, match=r"reads no variable 'enable_thinkin'.*enable_thinking"):
        prompt(own, Template("chat", "", {"enable_thinkin": True}))


def test_templates_by_name_without_a_default_are_refused_in_words():
    own = byte_level_tokenizer()
    own.chat_template = {"a": CHATML, "b": CHATML}
    with pytest.raises(ConfigError, match="template 'chat' cannot be used"):
        prompt(own, "chat")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pair whose template writes the day, and whose answers it takes a variable for."""
    folder = tmp_path_factory.mktemp("clock")
    pair = pair_on_disk(folder)
    for role in ("teacher", "student"):
        file = folder / role / "tokenizer_config.json"
        written = CLOCKS["smollm3"] + "{{ 'deep ' if deep }}" + CHATML
        (folder / role / "chat_template.jinja").unlink(missing_ok=True)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": written}))
    return pair


def settings(folders, run, **changes):
    own = {
        "output_dir": str(run), "mix": {"name": "teacher_text"}, "policy": "student_only", "objective": "forward_kl",
        "teacher_store_dir": str(run.parent / "store"), "max_prompt_length": 128, "max_completion_length": 16, "max_new_tokens": 4,
        "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4, "eval_samples": 3, "eval_max_new_tokens": 4,
        "eval_on_start": False, "sample_prompts": 1, "quiet": True, "chat_template_kwargs": {"deep": True},
    }  # fmt: skip
    return from_dict(TrainConfig, folders | own | changes, "here")


def losses(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"], record["grad_norm"], record["num_tokens"]) for record in records]


def test_a_run_stays_on_the_day_that_it_began(folders, tmp_path, clock):
    """After midnight it goes on, its store is taken, a run of the next day is compared with it, and its day can be asked for."""
    clock("2026-05-06")
    first, second, third = (tmp_path / name for name in ("m-seed0", "m-seed1", "m-seed2"))
    distil(settings(folders, first))
    recorded = yaml.safe_load((first / "config.yaml").read_text())
    assert (recorded["template_date"], recorded["chat_template_kwargs"]) == ("2026-05-06", {"deep": True})
    [store] = (tmp_path / "store").iterdir()
    straight = losses(first)

    clock("2026-05-07")
    with pytest.warns(SwitchKDWarning, match="set-aside"):
        distil(settings(folders, first, resume_from="checkpoint-1"))
    assert losses(first) == straight and [store] == list((tmp_path / "store").iterdir())
    assert yaml.safe_load((first / "config.yaml").read_text())["template_date"] == "2026-05-06"

    distil(settings(folders, second, template_date="2026-05-06"))
    assert [store] == list((tmp_path / "store").iterdir()) and losses(second) == straight
    distil(settings(folders, third, seed=1))
    assert len(list((tmp_path / "store").iterdir())) == 2
    comparison = compare([str(first), str(third)])
    assert comparison.settings["template_date"] == "2026-05-06 and 2026-05-07"
    records = [RunRecord.read(run) for run in (first, third)]
    assert len(_score_sheets(records, ["first", "third"])) == 1  # side by side in a report too, and on one axis
    assert differences(*(record.metrics for record in records), "eval/rouge_l") == []
    assert [row.method.label for row in comparison.scores[comparison.main_score] if not row.method.reference] == ["m"]

    assert main(["evaluate", str(first), "--output-file", str(tmp_path / "again.json"), "--only", "student"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["settings"]["template_date"] == "2026-05-06"
    with pytest.raises(DataError, match="chat_template_kwargs"):
        thinner = settings(folders, tmp_path / "other", chat_template_kwargs={})
        distil(thinner)
        compare([str(first), thinner.output_dir])


def test_the_command_line_takes_variables_with_their_types(folders, tmp_path, capsys):
    pair = [f"--{name.replace('_', '-')}={value}" for name, value in folders.items()]
    own = ["--max-prompt-length=128", "--max-new-tokens=4", "--max-completion-length=16", "--eval-samples=0"]
    assert main(["check", *pair, *own, "--template-date=2020-01-02", "--chat-template-kwargs", "deep", "False"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out.split("settings:\n")[1])
    assert (shown["template_date"], shown["chat_template_kwargs"]) == ("2020-01-02", {"deep": False})
