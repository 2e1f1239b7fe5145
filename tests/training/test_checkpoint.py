"""Folders and files that are whole or absent."""

import pytest
import torch
from tiny import byte_level_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from switchkd.base.errors import CheckpointError
from switchkd.base.storage import staged_folder, write_file
from switchkd.training.checkpoint import checkpoints, save_model


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    with staged_folder(target) as folder:
        (folder / "whole").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.parent.rglob("*")] == ["model", "whole"]


def test_a_staged_folder_never_replaces_another(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(OSError), staged_folder(target) as folder:
        (folder / "late").write_text("")
        target.mkdir()
        (target / "first").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "first"]


def test_write_file_is_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "scores.json"
    write_file(file, "old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("switchkd.base.storage.sync", full)
    with pytest.raises(OSError, match="no space"):
        write_file(file, "new")
    assert file.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_a_saved_model_replaces_the_one_before_and_opens_with_transformers(tmp_path):
    folder = tmp_path / "student"
    for seed in (1, 2):
        save_model(folder, tiny_model(seed=seed), byte_level_tokenizer())
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), tiny_model(seed=2).parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_model_of_which_nothing_was_written_is_an_error(tmp_path, monkeypatch):
    """Of several processes, transformers lets the first alone write, without a word."""
    model = tiny_model()
    monkeypatch.setattr(model, "save_pretrained", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match="transformers wrote no weights"):
        save_model(tmp_path / "student", model, byte_level_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_only_whole_checkpoints_count_and_in_order_of_their_steps(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", "checkpoint-²", "checkpoint-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":
            (tmp_path / name / "manifest.json").write_text("{}")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
