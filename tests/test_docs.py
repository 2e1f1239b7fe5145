"""Every command and every piece of Python in README and docs, run on a tiny pair that takes the demo pair's place.

A command may go over several lines, each with a backslash at its end. A ``text`` block behind a piece of Python is what it prints.
"""

import dataclasses
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tiny import CHATML, save_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from two_tokenizers import across_on_disk

from switchkd.base.errors import ConfigError
from switchkd.base.settings import shipped
from switchkd.cli import train
from switchkd.cli.commands import COMMANDS as CLI
from switchkd.cli.flags import parse
from switchkd.cli.main import main
from switchkd.crossing.alignments import ALIGNMENTS
from switchkd.data.examples import load_examples
from switchkd.data.formats import Wanted
from switchkd.methods.mixes import MIXES
from switchkd.methods.objectives import OBJECTIVES
from switchkd.methods.policies import POLICIES
from switchkd.models import pypi_pairs
from switchkd.studies.plan import cells, load_plan
from switchkd.teachers.across import check_across
from switchkd.writing.turns import check_policy

ROOT = Path(__file__).parents[1]


def pages_of(entries):
    """The pages of a navigation, in its order."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from pages_of(entry.values())
        else:
            yield from pages_of(entry)


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in pages_of(SITE["nav"]))]
# What sets up, tests or formats this checkout is run by the test command itself.
NOT_HERE = (
    "./run test", "./run docs", ".venv/bin/python -m pytest", ".venv/bin/ruff", "git clone", "cd switchkd", "pip install",
    "python3 -m venv", "source .venv", "switchkd --version",
)  # fmt: skip
# What needs several processes or GPUs is read, not run.
ELSEWHERE = re.compile(r"^torchrun |^srun | --teacher-(device|load-in)")
SHORT = {
    "demo": ["--max-steps", "2"],
    "train": [
        "--max-steps", "2", "--eval-samples", "2", "--max-new-tokens", "8", "--eval-max-new-tokens", "8", "--sample-prompts", "2",
    ],
    "check": ["--eval-samples", "2"],
    "evaluate": ["--eval-samples", "2", "--eval-max-new-tokens", "8"],
    "generate": ["--max-new-tokens", "8"],
    "play": ["--max-new-tokens", "8"],
    "prune": [],
    "make-pair": ["--scale", "tiny"],
    "methods": [],
    "tasks": [],
    "compare": [],
    "report": [],
    "plot": [],
    "study": [],
}  # fmt: skip


def blocks(language):
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
            yield page, block


def commands_in(block):
    """The commands of a block, each on one line."""
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip() and not line.startswith(NOT_HERE)]


COMMANDS = list(dict.fromkeys(command for _, block in blocks("bash") for command in commands_in(block)))


# Python that the pages tell to put into a file of the name in its first line, and Python to be run.
FILES = [code for _, code in blocks("python") if re.match(r"# \w+\.py\n", code)]
SNIPPETS = [(page, code) for page, code in blocks("python") if code not in FILES]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two tiny Llamas with a tokenizer that knows the sample's words."""
    folder = tmp_path_factory.mktemp("demo")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [text for e in load_examples("gsm8k-sample:train") for text in (e.messages[-1].content, e.completion)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return (
        Path(save_llama(folder / "teacher", tokenizer, 1, layers=25, max_position_embeddings=1024)),
        Path(save_llama(folder / "student", tokenizer, 2, max_position_embeddings=1024)),
    )


@pytest.fixture
def workplace(pair, tmp_path, monkeypatch):
    """A folder in which the demo is tiny, pair and run, hub names are the demo, and the data files of the docs exist.

    A pair of two families is one of two tokenizers, in ``across``.
    """
    short = {"max_new_tokens": 8, "eval_samples": 4, "eval_max_new_tokens": 8}
    settings = train.demo_settings
    monkeypatch.setattr(train, "demo_settings", lambda config: dataclasses.replace(settings(config), **short))
    monkeypatch.setattr(pypi_pairs, "pair_paths", lambda *_, **__: pair)
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("my_data.jsonl", "my_heldout.jsonl"):
        rows = ({"prompt": f"What is {n} and 2?", "completion": f"It is {n + 2}."} for n in range(8))
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    across_on_disk(tmp_path / "across", context=2048)
    for code in FILES:
        Path(code.splitlines()[0].removeprefix("# ")).write_text(code)
    return tmp_path


def at_hand(text):
    """A command or a piece of Python with models that are here in place of a hub's: a pair of two tokenizers for one of two
    families, else the demo."""
    both = re.search(r"HuggingFaceTB/", text)
    text = re.sub(r"\bQwen/[\w.-]+", "across/teacher" if both else "demo", text)
    return re.sub(r"\bHuggingFaceTB/[\w.-]+", "across/student", text)


def typed(command):
    """Run a documented command line, shortened, with models that are at hand."""
    words = shlex.split(at_hand(command))
    if ELSEWHERE.search(command):
        own = words[next(at for at, word in enumerate(words) if word in CLI) :]
        assert parse(CLI[own[0]].settings, own), command
    elif words[-1] == "--help":
        with pytest.raises(SystemExit, match="0"):
            main(words[1:])
    elif words[1] == "push":  # to a hub: the name is read, and the run is there
        assert Path(parse(CLI["push"].settings, words[1:]).run, "student").is_dir(), command
    elif words[1] == "lm-eval":  # its benchmarks come from a hub: the flags are read, and the run is there
        assert Path(parse(CLI["lm-eval"].settings, words[1:]).model_name_or_path, "student").is_dir(), command
    elif words[0] in ("switchkd", "./run"):
        assert main([*words[1:], *SHORT[words[1]]]) == 0, command
    elif words[0] == "python":  # what a page told to put into a file
        script(str(Path(words[1]).absolute()), *words[2:])
    else:
        assert words[0] == ".venv/bin/python", f"no rule to run {command!r}"
        script(*words[1:])


def script(path, *arguments):
    old, sys.argv = sys.argv, [path, *arguments]
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    finally:
        sys.argv = old


def test_commands_in_the_order_of_the_pages(workplace, capsys):
    """Later commands use what earlier ones made, as a reader would."""
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        typed(command)
    if shutil.which("chromium") and importlib.util.find_spec("playwright"):
        script("examples/report_picture.py", "runs/mine/report.html", "report.png")
        assert Path("report.png").stat().st_size > 10_000


@pytest.mark.parametrize("number", range(len(SNIPPETS)), ids=[page for page, _ in SNIPPETS])
def test_python_in_the_pages(workplace, pair, number, capsys):
    page, code = SNIPPETS[number]
    if "runs/first" in code:  # which the tutorial has trained by then
        Path("runs/first").mkdir(parents=True)
        Path("runs/first/student").symlink_to(pair[1])
    few = "max_steps=2, max_new_tokens=8, eval_samples=2, eval_max_new_tokens=8"
    short = re.sub(r"max_steps=\d+", few, at_hand(code))
    exec(compile(short, page, "exec"), {"__name__": "docs"})
    printed = capsys.readouterr().out
    assert "[" in printed
    if shown := re.search(
        rf"```python\n{re.escape(code)}```\n\n```text\n(.*?)```", (ROOT / page).read_text(), re.DOTALL
    ):
        assert printed == shown[1]


@pytest.mark.parametrize("text", [block for _, block in blocks("yaml") if "sizes:" in block])
def test_plans_in_the_pages(tmp_path, text):
    (tmp_path / "plan.yaml").write_text(text)
    plan = load_plan(str(tmp_path / "plan.yaml"))
    assert all(cells(plan, size, tmp_path) for size in plan.sizes.values())


ROWS = [(page, block) for page, block in blocks("json") if "{" in block]


@pytest.mark.parametrize("number", range(len(ROWS)), ids=[page for page, _ in ROWS])
def test_rows_in_the_pages_are_read(tmp_path, number):
    """Each row of a block for itself, as the rows of a block may be of several layouts."""
    _, block = ROWS[number]
    rows = [block] if block.count("\n{") == 0 else block.splitlines()
    for row in rows:
        (tmp_path / "row.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
        assert load_examples(str(tmp_path / "row.jsonl"), wanted=Wanted(answers=False))


def test_the_flat_example_runs(workplace, capsys):
    script("examples/switch_loop.py", "--steps", "2", "--budget", "6")
    assert "step 2: loss" in capsys.readouterr().out


def test_commands_over_several_lines_are_one():
    assert commands_in("switchkd train kd \\\n    --max-steps 2 # two\n./run test\nswitchkd tasks\n") == [
        "switchkd train kd --max-steps 2", "switchkd tasks"
    ]  # fmt: skip


def test_the_tree_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = set(re.findall(r"^      (\w+)/", text, re.MULTILINE))
    assert tree == {path.parent.name for path in (ROOT / "switchkd").glob("*/__init__.py")}


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_the_pages_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert any((place / path).exists() for place in (ROOT, ROOT / "switchkd")), f"{page}: {path}"
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(name)), f"{page}: {name}"


def test_tests_named_in_the_traps_exist():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)(?:…)?`", (ROOT / "docs/traps.md").read_text(encoding="utf-8")):
        assert f"def {name}" in source, name


def table(page, head):
    """The rows of the table with this head, as the cells of each."""
    _, _, rest = (ROOT / page).read_text(encoding="utf-8").partition(f"{head}\n")
    lines = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_on_two_tokenizers_says_what_is_refused():
    page = "docs/cross_tokenizer.md"
    told = {}
    for names, *answers in table(page, "| objective | `strict` | `prefix` | `sorted` |"):
        for name in re.findall(r"`(\w+)`", names):
            told[name] = dict(zip(ALIGNMENTS, (answer == "yes" for answer in answers), strict=True))
    assert told == {
        name: {kind: not refused(check_across, cls(), kind) for kind in ALIGNMENTS} for name, cls in OBJECTIVES.items()
    }
    told = {}
    for names, answer, _ in table(page, "| policy | | why |"):
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), answer == "yes")
    rules = {
        name: cls(trigger_ids=(1,), blank_ids=(2,)) if name == "relay" else cls() for name, cls in POLICIES.items()
    }
    assert told == {name: not refused(check_policy, rule) for name, rule in rules.items()}
    text = (ROOT / page).read_text(encoding="utf-8")
    assert {name for name in shipped("recipes") if name.startswith("cross_")} <= set(re.findall(r"`(\w+)`", text))


def refused(check, *arguments):
    try:
        check(*arguments)
    except ConfigError:
        return True
    return False


def test_the_methods_page_names_every_recipe_rule_and_setting():
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", page))
    assert named >= shipped("recipes").keys() | OBJECTIVES.keys() | MIXES.keys()
