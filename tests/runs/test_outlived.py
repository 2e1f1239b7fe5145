"""Nothing that is said of a student is shown when that student is gone: a run that goes on takes it back, readers refuse it."""

import shutil
import warnings

import pytest
from test_resume import bit_flipped
from tiny import pair_on_disk

from switchkd.base.errors import CheckpointError, DataError, SwitchKDWarning
from switchkd.base.manifest import MANIFEST
from switchkd.cli.main import main
from switchkd.evaluation.results import read_results
from switchkd.models.pair import load_pair
from switchkd.models.saved_student import SavedStudent
from switchkd.reports.compare import load_result
from switchkd.reports.page import page
from switchkd.reports.record import RunRecord
from switchkd.runs import distil as runs
from switchkd.studies.study import flags
from switchkd.training.learner import Learner


def train(run, *more):
    return main(["train", str(run), "--resume", *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, scored in it and once more."""
    place = tmp_path_factory.mktemp("finished")
    settings = {
        **pair_on_disk(place), "template": "none", "max_new_tokens": 4, "max_steps": 4, "save_steps": 1, "save_total_limit": 5,
        "per_device_train_batch_size": 2, "eval_samples": 2, "eval_max_new_tokens": 3, "learning_rate": 3e-3, "sample_steps": 0,
        "output_dir": place / "run",
    }  # fmt: skip
    assert main(["train", "kd", *flags(settings), "--quiet"]) == 0
    assert main(["evaluate", str(place / "run"), "--only", "student"]) == 0
    return place / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def later(run):
    """The file of the evaluation that was made after the run."""
    [file] = run.glob("evaluation-*.json")
    return file


def test_student_scores_card_and_page_say_which_weights_and_step_they_are_of(run):
    student = SavedStudent.of(run)
    assert (student.step, student.weights_of_step) == (4, 4)
    for file, name in ((run / "evaluation.json", "student after"), (later(run), "student")):
        assert read_results(file)[name].model | student.mark() == read_results(file)[name].model
    record = RunRecord.read(run)
    assert (
        record.finished
        and not record.notes
        and f"4 steps; the student has the checksum {student.sha256[:12]}" in record.state
    )
    assert record.state in page([run]) and student.sha256 in (run / "student" / "README.md").read_text()


GOES_ON = {
    "past its end": ["--max-steps", "6", "--allow-change", "max_steps"],
    "from before it": ["--resume-from", "checkpoint-3"],
}


@pytest.mark.parametrize("way", GOES_ON)
def test_a_run_that_goes_on_takes_back_its_student_and_scores_before_the_first_new_step(run, way, monkeypatch):
    """Whoever kills it in that step finds no student of another step, and no scores of one."""

    def killed(*_):
        raise RuntimeError("killed")

    scores = later(run).name
    monkeypatch.setattr("switchkd.training.trainer.Trainer._train_step", killed)
    with pytest.raises(RuntimeError), pytest.warns(SwitchKDWarning) as warned:
        train(run, *GOES_ON[way])
    assert [name for name in ("student", scores) if (run / name).exists()] == []
    assert any(f"{run / 'student'} is the student of another step" in str(each.message) for each in warned)
    assert (run / "student.set-aside" / MANIFEST).is_file() and (run / f"{scores}.set-aside").is_file()
    assert set(read_results(run / "evaluation.json")) == {"teacher", "student before"}
    record = RunRecord.read(run)
    assert not record.finished and "Not finished" in record.state and record.evaluations.keys() == {"evaluation"}
    monkeypatch.undo()
    assert train(run) == 0 and RunRecord.read(run).finished
    assert SavedStudent.of(run).step == (6 if way == "past its end" else 4)


def test_a_run_that_has_ended_keeps_what_it_would_write_again(run):
    def files():
        named = ("config.yaml", "README.md")  # they name the run directory, which is a copy
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in named}

    before = files()
    assert train(run) == 0
    assert files() == before


def test_scores_of_a_student_that_was_replaced_are_refused_and_not_shown(run):
    shutil.copytree(run, other := run.parent / "other")
    with pytest.warns(SwitchKDWarning):
        assert train(other, "--max-steps", "5", "--allow-change", "max_steps") == 0
    shutil.rmtree(run / "student")
    shutil.copytree(other / "student", run / "student")
    for path in (run, later(run)):
        with pytest.raises(
            DataError, match=r"of the student of step 4, and .*student is another one, of step 5; evaluate anew"
        ):
            load_result(str(path))
    record = RunRecord.read(run)
    assert not record.finished and set(record.evaluations["evaluation"]) == {"teacher", "student before"}
    assert len(record.notes) == 2 and record.notes[0] in page([run])


def test_scores_of_a_checkpoint_are_not_those_of_the_runs_student(run, capsys):
    before = later(run).read_bytes()
    assert (
        main(["evaluate", str(run), "--student-model-name-or-path", str(run / "checkpoint-2"), "--only", "student"])
        == 0
    )
    assert later(run).read_bytes() == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "student.json", MANIFEST])
def test_a_student_that_is_not_as_it_was_written_is_not_opened(run, name, capsys):
    """One bit of its weights gave a perplexity of inf, and exit code 0."""
    bit_flipped(run / "student" / name)
    assert main(["evaluate", str(run)]) == 1
    assert str(run / "student") in (said := capsys.readouterr().err) and (name == MANIFEST or name in said)


@pytest.mark.parametrize("folder", ["student", "checkpoint-2"])
def test_what_a_run_saved_is_verified_wherever_it_is_opened(run, folder):
    (run / folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config.json cannot be read"):
        load_pair(str(run / folder), str(run / folder))


def test_scores_beside_the_text_of_others_are_refused_and_made_again_by_the_run(run):
    file = run / "evaluation.completions.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0].replace('"tokens": 3', '"tokens": 2'), *lines[1:]]) + "\n")
    with pytest.raises(DataError, match=r"evaluation.completions.jsonl beside it is of another evaluation, or damaged"):
        read_results(run / "evaluation.json")
    with pytest.warns(SwitchKDWarning, match="The run does that now"):
        assert train(run) == 0
    assert file.read_text().splitlines() == lines


# --- the folder -----------------------------------------------------------------------------------------------------


def moved(run):
    run.rename(run.with_name("moved"))


def replaced(run):
    moved(run)
    run.mkdir()


@pytest.mark.parametrize("how", [moved, replaced, shutil.rmtree])
@pytest.mark.parametrize("moment", ["a step", "the last scores"])
def test_a_run_whose_folder_goes_stops_and_makes_none_anew(run, how, moment, monkeypatch, capsys):
    place, name = (Learner, "update") if moment == "a step" else (runs, "score")
    call = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *args: (how(run), call(*args))[1])
    more = ["--max-steps", "5", "--allow-change", "max_steps"] if moment == "a step" else []
    with warnings.catch_warnings(action="ignore"):
        assert train(run, *more) == 1
    assert "is not the folder that the work began in" in capsys.readouterr().err
    assert not run.exists() or not any(run.iterdir())
