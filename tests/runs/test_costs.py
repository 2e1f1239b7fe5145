"""What a run's rounds cost is measured once and belongs to the run: whoever goes on with it plans by the same numbers."""

import pytest
import yaml
from tiny import pair_on_disk

from switchkd.base.errors import SwitchKDWarning
from switchkd.cli.main import main
from switchkd.decoding import pace
from switchkd.runs.continuation import read_config
from switchkd.studies.study import flags


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run", {
        **pair_on_disk(tmp_path), "template": "none", "max_new_tokens": 4, "max_steps": 2, "save_steps": 1,
        "per_device_train_batch_size": 2, "eval_samples": 0, "sample_steps": 0, "output_dir": tmp_path / "run",
    }  # fmt: skip


def costing(monkeypatch, seconds):
    """Every line that is measured from now on; nothing is known from before."""
    monkeypatch.setattr(pace, "line", lambda *_: (seconds, 1e-5))
    monkeypatch.setattr(pace, "_decisions", {})


def test_a_run_that_goes_on_plans_by_what_it_measured_at_its_start(run, monkeypatch):
    """Another machine, or a busy one, would measure something else, and with other blocks sums round otherwise."""
    folder, settings = run
    costing(monkeypatch, 1e-3)
    assert main(["train", "switch", *flags(settings), "--quiet"]) == 0
    assert read_config(folder).costs == (1e-3, 1e-5) * 3
    costing(monkeypatch, 0.5)
    again = [
        "train",
        "switch",
        *flags(settings | {"max_steps": 3}),
        "--resume",
        "--allow-change",
        "max_steps",
        "--quiet",
    ]
    with pytest.warns(SwitchKDWarning, match="set-aside"):
        assert main(again) == 0
    assert read_config(folder).costs == (1e-3, 1e-5) * 3


def test_a_run_that_writes_no_text_measures_nothing(run, monkeypatch):
    folder, settings = run
    monkeypatch.setattr(pace, "line", lambda *_: pytest.fail("measured"))
    assert main(["train", "kd", *flags(settings), "--quiet"]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["costs"] == []
