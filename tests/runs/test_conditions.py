"""What no setting says: it moves nothing that a run writes, or the run records it and says when it changes."""

import json
import os
import time

import pytest
import torch
import yaml
from tiny import pair_on_disk

from switchkd.base.errors import SwitchKDWarning
from switchkd.base.settings import from_dict
from switchkd.cli.main import main
from switchkd.runs.continuation import conditions, own_code, with_now
from switchkd.training.settings import TrainConfig

RULE = """
from dataclasses import dataclass
from switchkd import StudentOnly

@dataclass(frozen=True)
class Mine(StudentOnly):
    pass
"""


@pytest.fixture
def recipe(tmp_path):
    settings = {
        **pair_on_disk(tmp_path), "template": "chat", "max_new_tokens": 4, "max_steps": 1, "per_device_train_batch_size": 2,
        "eval_samples": 2, "eval_max_new_tokens": 3, "eval_steps": 1, "sample_steps": 1, "quiet": True,
        "output_dir": "run", "policy": "my_rule:Mine", "eval_temperature": 1.0, "eval_seeds": [1],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another time zone, language, home, working directory, umask and number of threads."""

    def go():
        for name, value in {"TZ": "Asia/Tokyo", "LANG": "C", "LC_ALL": "C", "HOME": str(tmp_path), "USER": "x"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")  # which is read at the start of a process only
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path / "there")
        time.tzset()
        os.umask(0o077)
        torch.set_num_threads(2)

    before = os.umask(0o022)
    os.umask(before)
    yield go
    monkeypatch.undo()
    time.tzset()
    os.umask(before)
    torch.set_num_threads(1)


def clocked(name):
    return any(word in name for word in ("second", "memory"))


def written(run):
    """All that a run wrote, without what a clock says and without the conditions."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    origin = json.loads(found.pop("origin.json"))
    conditions, found["origin"] = origin.pop("conditions"), origin
    for name in [name for name in found if name.endswith("manifest.json")]:  # checksums of what has seconds in it
        del found[name]
    for name in [name for name in found if name.endswith(("metrics.jsonl", "state.json"))]:
        lines = found[name].splitlines() if name.endswith("l") else [found[name]]
        found[name] = [{k: v for k, v in json.loads(line).items() if not clocked(k)} for line in lines]
    card = found["student/README.md"].decode().splitlines()
    found["student/README.md"] = [line for line in card if not line.startswith("- 1 optimizer steps")]
    return found, conditions


def test_where_and_how_a_process_runs_moves_nothing_that_it_writes(recipe, tmp_path, monkeypatch, elsewhere):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rule.py").write_text(RULE)
    assert main(["train", str(recipe)]) == 0
    here, [now] = written(tmp_path / "run")
    elsewhere()
    assert main(["train", str(recipe)]) == 0
    there, [then] = written(tmp_path / "there" / "run")
    assert there == here and len(here) > 12 and "sha256" in here["origin"]["policy"]
    assert (now["threads"], then["threads"]) == (1, 2) and then["environment"]["MKL_CBWR"] == "COMPATIBLE"
    assert {k for k in now if now[k] != then[k]} == {"threads", "environment"}
    assert "on `cpu, " in (tmp_path / "there" / "run" / "student" / "README.md").read_text()


def test_a_run_that_goes_on_under_other_conditions_says_so_and_notes_both(tmp_path):
    first = conditions(torch.device("cpu"), 1)
    assert with_now(tmp_path, [], first) == with_now(tmp_path, [first], dict(first)) == [first]
    assert not any(
        str(place) in json.dumps(first) for place in (os.getcwd(), os.uname().nodename, os.path.expanduser("~"))
    )
    for name in first:
        with pytest.warns(SwitchKDWarning, match=rf"{name}: .* -> 'other'.* may round otherwise"):
            noted = with_now(tmp_path, [first], first | {name: "other"})
        assert noted == [first, first | {name: "other"}]


def test_the_code_of_a_rule_of_one_s_own_is_known_by_its_contents(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert own_code(TrainConfig()) == {}
    found = []
    for module, code in {"one": RULE, "same": RULE, "other": RULE.replace("pass", "further: float = 1.0")}.items():
        (tmp_path / f"{module}_rule.py").write_text(code)
        found.append(own_code(from_dict(TrainConfig, {"policy": f"{module}_rule:Mine"}, "")))
    assert found[0].keys() == {"policy"} and found[0] == found[1] != found[2]
