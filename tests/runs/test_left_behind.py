"""What a run and the commands that look at it leave on the disk: of the mode that the process's umask says, and a student that
tells nobody where it was made.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import byte_level_tokenizer, pair_on_disk
from transformers import AutoModelForCausalLM

from switchkd.base.settings import to_dict
from switchkd.cli.main import main
from switchkd.models.vocabulary import save_tokenizer
from switchkd.training.settings import TrainConfig

SMALL = [
    "--template", "chat", "--eval-samples", "2", "--max-new-tokens", "4", "--eval-max-new-tokens", "4", "--max-steps", "1",
    "--save-steps", "1", "--sample-prompts", "1",
]  # fmt: skip


def train(place, run, recipe, *more):
    pair = [f"--{name.replace('_', '-')}={value}" for name, value in place.items()]
    assert main(["train", recipe, *pair, *SMALL, "--output-dir", str(run), *more]) == 0
    return run


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_everything_that_is_left_has_the_mode_that_the_umask_says(tmp_path, umask, monkeypatch):
    (tmp_path / "pair").mkdir()
    place, left = pair_on_disk(tmp_path / "pair"), tmp_path / "left"
    monkeypatch.setenv("SWITCHKD_CACHE", str(left / "cache"))
    run = train(
        place,
        left / "run",
        "kd",
        "--teacher-cache",
        "hidden",
        "--eval-steps",
        "1",
        "--metric-for-best-model",
        "perplexity",
    )
    train(place, left / "written", "seqkd", "--use-peft")
    assert main(["report", str(run)]) == 0
    assert main(["evaluate", str(run), "--eval-samples", "1", "--task", "references"]) == 0
    assert main(["plot", str(run), "--figure", "length", "--output-dir", str(left / "figures")]) in (0, 1)
    assert main(["generate", str(run), "--limit", "1", "--output-file", str(left / "rollouts.jsonl")]) == 0
    teacher = place["teacher_model_name_or_path"]
    assert main(["prune", "--model-name-or-path", teacher, "--output-dir", str(left / "pruned"), "--layers", "2"]) == 0
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in left.rglob("*")}
    assert {path.suffix for path in found} >= {".safetensors", ".json", ".jsonl", ".yaml", ".html", ".md", ".jinja"}
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, path


# --- a student that is given away -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["whole", "merged", "adapter"])
def test_no_text_of_a_student_names_a_place_on_the_machine_but_the_base_of_an_adapter(kind, tmp_path, monkeypatch):
    """peft opens an adapter's base by its name, and a folder has no other name than its path; the card says so."""
    place = pair_on_disk(tmp_path)
    more = {"whole": [], "merged": ["--use-peft", "--merge"], "adapter": ["--use-peft"]}[kind]
    student = train(place, tmp_path / "run", "kd", *more) / "student"
    base = place["student_model_name_or_path"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in student.iterdir() if path.suffix != ".safetensors"}
    assert {"README.md", "tokenizer_config.json", "tokenizer.json", "student.json"} <= texts.keys()
    named = {name for name, text in texts.items() if str(tmp_path) in text or str(Path.home()) in text}
    if kind != "adapter":
        assert named == set() and "_name_or_path" not in json.loads(texts["config.json"])
        return
    settings = json.loads(texts["adapter_config.json"])
    assert named == {"adapter_config.json"} and settings.pop("base_model_name_or_path") == base
    assert str(tmp_path) not in json.dumps(settings) and "names that base by its folder" in texts["README.md"]
    monkeypatch.chdir("/")  # the path is whole: the adapter opens from anywhere
    AutoModelForCausalLM.from_pretrained(student)


@pytest.mark.parametrize("found", ["/home/somebody/models/tokenizer.json", "C:\\Users\\somebody\\tokenizer.json"])
def test_a_tokenizer_does_not_say_where_it_was_found(found, tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.name_or_path = tokenizer.init_kwargs["tokenizer_file"] = found
    tokenizer.init_kwargs |= {"special_tokens_map_file": found, "local_files_only": True}
    save_tokenizer(tokenizer, tmp_path)
    assert "somebody" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")


def test_how_somebody_looked_on_is_no_property_of_a_run(tmp_path, capsys):
    place = pair_on_disk(tmp_path)
    run = train(place, tmp_path / "run", "kd", "--quiet", "--sample-steps", "0", "--eval-samples", "0")
    capsys.readouterr()
    written = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("quiet", "resume", "resume_from", "allow_change", "push_to_hub", "bf16"):
        assert name not in written and name in TrainConfig.__dataclass_fields__
    # One of before says it, and is read as ever.
    (run / "config.yaml").write_text(yaml.safe_dump(written | {"quiet": True, "resume": False, "push_to_hub": ""}))
    assert main(["train", str(run), "--output-dir", str(tmp_path / "again")]) == 0
    assert "train …" in capsys.readouterr().out
    loud, still = TrainConfig(), TrainConfig(quiet=True)
    assert to_dict(loud) == to_dict(still)


# --- Windows ------------------------------------------------------------------------------------------------------------


def test_what_windows_does_not_have_is_not_asked_for():
    """No limits of a process, no SIGHUP and no SIGXCPU there. That a whole run works there was never seen."""
    program = (
        "import signal, sys\n"
        "import filelock, psutil  # which know Windows themselves\n"
        "for name in ('SIGHUP', 'SIGXCPU'): delattr(signal, name)\n"
        "sys.modules['resource'] = sys.modules['fcntl'] = sys.modules['termios'] = None\n"
        "from switchkd.cli.main import main\n"
        "from switchkd.base import signals\n"
        "import switchkd.base.limits, switchkd.base.lock, switchkd.base.storage\n"
        "with signals.deferred(), signals.terminable(): pass\n"
        "sys.exit(main(['completion', 'zsh']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
