"""Only what was written here is ever deleted: the files that a manifest names. What else lies among them is kept, and named."""

import json
import os

import pytest
from test_restoring import GOOD, by, scored
from test_trainer import trainer
from tiny import toy_pair

from switchkd.base.errors import SwitchKDWarning
from switchkd.base.manifest import MANIFEST, foreign, take_away
from switchkd.base.storage import staged_folder, tidy, write_file
from switchkd.training.checkpoint import checkpoints, prune, save_model
from switchkd.training.restoring import whole_checkpoint


def saved(folder, *steps):
    """A run with checkpoints of these steps."""
    t = trainer(folder, save_total_limit=9)
    for t.step in steps:
        t.reading.rows_read = t.step * t.reading.rows_per_step
        t.save()
    return t


def all_text(folder):
    return {path.read_text() for path in folder.rglob("*.txt")}


PLACES = {
    "a checkpoint that is pruned": ("checkpoint-1", lambda run: prune(run, 1)),
    "a student that is replaced": (
        "student",
        lambda run: save_model(run / "student", toy_pair().student, toy_pair().tokenizer),
    ),
    "a later one that is put aside twice": (
        "checkpoint-2",
        lambda run: [take_back(run), saved(run, 2), take_back(run)],
    ),
}


def take_back(run):
    from switchkd.training import restoring

    (run / "checkpoint-2" / "more.txt").write_text("more")
    restoring.take_back(run, 1, 1, ended=False)


@pytest.mark.filterwarnings("ignore::switchkd.base.errors.SwitchKDWarning")
@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("manifest", ["whole", "damaged", "missing"])
def test_a_file_that_somebody_put_into_a_folder_of_ours_is_kept(tmp_path, case, manifest):
    saved(tmp_path, 1, 2)
    save_model(tmp_path / "student", toy_pair().student, toy_pair().tokenizer)
    name, act = PLACES[case]
    (tmp_path / name / "notes").mkdir()
    (tmp_path / name / "notes" / "thesis.txt").write_text("thesis")
    if manifest == "damaged":
        (tmp_path / name / MANIFEST).write_text("{")
    if manifest == "missing":
        (tmp_path / name / MANIFEST).unlink()
    act(tmp_path)
    assert "thesis" in all_text(tmp_path)


def test_what_is_kept_is_named_and_what_is_ours_goes(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoint-1" / "thesis.txt").write_text("thesis")
    with pytest.warns(
        SwitchKDWarning,
        match="checkpoint-1 holds 'thesis.txt', which the run did not write; that is kept in .*1.set-aside",
    ):
        prune(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoint-1.set-aside").iterdir()] == ["thesis.txt"]
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_manifest_that_names_files_elsewhere_deletes_none(tmp_path):
    saved(tmp_path, 1)
    folder, outside = tmp_path / "checkpoint-1", tmp_path / "thesis.txt"
    outside.write_text("thesis")
    (folder / "mine.txt").write_text("mine")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(
        json.dumps(manifest | {"../thesis.txt": {"size": 6, "sha256": ""}, str(outside): {"size": 6, "sha256": ""}})
    )
    with pytest.warns(SwitchKDWarning, match="mine.txt"):
        take_away(folder)
    assert all_text(tmp_path) == {"thesis", "mine"}


def test_folders_that_only_look_like_best_students_stay_and_count_for_nothing(tmp_path):
    (tmp_path / "best-2024").mkdir()
    (tmp_path / "best-1").mkdir()
    (tmp_path / "best-1" / "thesis.txt").write_text("thesis")
    with pytest.warns(
        SwitchKDWarning, match="best-1 holds 'thesis.txt'"
    ):  # a best student of the first step takes its name
        assert scored(tmp_path, by(rouge_l=GOOD), save_total_limit=2)["step"] == 2
    assert {"best-2", "best-2024"} <= {path.name for path in tmp_path.iterdir()} and "thesis" in all_text(tmp_path)


@pytest.mark.parametrize("relative", [True, False])
def test_a_checkpoint_that_is_a_link_is_pruned_and_gone_on_from_and_what_it_leads_to_stays(tmp_path, relative):
    """On another disk, say. It broke pruning, and every later resume."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    saved(run, 1)
    (run / "checkpoint-1").rename(elsewhere)
    (run / "checkpoint-1").symlink_to("../elsewhere" if relative else elsewhere)
    assert whole_checkpoint(run) == run / "checkpoint-1"
    t = trainer(run, resume=True, save_total_limit=2)
    t.resume()
    for t.step in (2, 3):
        t.save()
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert (elsewhere / MANIFEST).is_file() and not foreign(elsewhere)


@pytest.mark.filterwarnings("ignore::switchkd.base.errors.SwitchKDWarning")
@pytest.mark.parametrize("make", [lambda run: saved(run, 3), lambda run: (run / "checkpoint-3").symlink_to("gone")])
def test_links_among_later_checkpoints_do_not_stop_a_run_that_goes_back(tmp_path, make):
    from switchkd.training.restoring import take_back

    saved(tmp_path, 1)
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "checkpoint-1")
    make(tmp_path)
    take_back(tmp_path, 1, 1, ended=False)
    assert (tmp_path / "checkpoint-9.set-aside").is_symlink()
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]


def test_hidden_files_of_others_are_not_what_a_killed_process_left(tmp_path):
    mine = tmp_path / f".cache.{'0' * 32}"
    mine.write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x").write_text("x")
    ours = tmp_path / f".checkpoint-3.switchkd-{'0' * 32}"
    ours.symlink_to(elsewhere)
    tidy(tmp_path)
    assert mine.exists() and not os.path.lexists(ours) and (elsewhere / "x").exists()


def test_a_folder_that_is_a_link_is_replaced_as_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_file(tmp_path / "elsewhere" / "x", "x")
    (tmp_path / "student").symlink_to(tmp_path / "elsewhere")
    with staged_folder(tmp_path / "student", replace=True) as staging:
        (staging / "y").write_text("y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "student"]
    assert (tmp_path / "elsewhere" / "x").exists() and not (tmp_path / "student").is_symlink()
