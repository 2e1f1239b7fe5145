"""How a study stands and how long it takes, read from folders that were made by hand."""

import json
import time

import pytest
from half_study import begin, dated, finish, grid_of, say, step

from switchkd.base.lock import LOCK, locked, worker
from switchkd.studies import progress
from switchkd.studies.progress import Folder, Standing, about, expected_seconds, seconds_left


def states(folder, **more):
    return {each.cell.name: each.state for each in folder.look(**more).cells}


def of(folder, name):
    return next(each for each in folder.look().cells if each.cell.name == name)


def test_every_state_is_told_from_the_folder(tmp_path):
    _, size, grid = grid_of(tmp_path, ("kd", "switch", "gkd"), (0, 1))
    folder = Folder(grid, size, tmp_path)
    assert set(states(folder).values()) == {"waiting"}
    begin(tmp_path / "kd-seed0", step(1, 0.5), step(2, 1.0))
    finish(tmp_path / "kd-seed0")
    begin(tmp_path / "switch-seed0", step(1, 0.25), log="$ switchkd train x\nstep 1\nerror: it is\nsomehow wrong\n")
    begin(tmp_path / "gkd-seed0", step(1, 0.25), log="$ switchkd train x\nstep 1\nstopped by SIGTERM\n")
    begin(tmp_path / "kd-seed1", step(1, 0.5))
    say(tmp_path / "switch-seed1", "$ switchkd train x\nTraceback (most recent call last)\n  …\nKeyError: 1\n")
    with locked(tmp_path / "kd-seed1"):
        assert states(folder) == {
            "kd-seed0": "done", "switch-seed0": "FAILED", "gkd-seed0": "stopped", "kd-seed1": "running",
            "switch-seed1": "FAILED", "gkd-seed1": "waiting",
        }  # fmt: skip
        seen = folder.look()
    assert seen.share == pytest.approx((1 + 0.25 + 0.25 + 0.5) / 6) and not seen.live
    assert seen.counts() == "1 of 6 runs done, 1 running, 2 FAILED, 1 stopped, 1 waiting"
    assert of(folder, "switch-seed0").log == "step 1\nerror: it is\nsomehow wrong" and of(folder, "gkd-seed0").log == ""


def test_a_run_is_done_when_all_of_its_evaluations_stand(tmp_path):
    _, size, grid = grid_of(tmp_path, evaluations=("math",))
    folder, run = Folder(grid, size, tmp_path), tmp_path / "kd-seed0"
    begin(run, step(1, 1.0))
    with locked(run):
        assert (of(folder, run.name).state, of(folder, run.name).share) == ("running", 0.99)
    finish(run)
    with locked(run):
        assert (of(folder, run.name).state, of(folder, run.name).share) == ("running", 0.99)
    finish(run, tasks=("math",))
    assert (of(folder, run.name).state, of(folder, run.name).share) == ("done", 1.0)


def test_an_evaluation_is_read_once_and_one_that_is_half_there_is_none(tmp_path, monkeypatch):
    _, size, grid = grid_of(tmp_path)
    read, run, count = progress.read_results, tmp_path / "kd-seed0", []
    monkeypatch.setattr(progress, "read_results", lambda file: count.append(file) or read(file))
    folder = Folder(grid, size, tmp_path)
    begin(run, step(1, 1.0))
    (run / "evaluation.json").write_text('{"format": 1, "results": {"student after"')
    assert of(folder, run.name).state == "stopped"
    finish(run)
    assert [of(folder, run.name).state for _ in range(3)] == ["done"] * 3 and len(count) == 2


def test_a_command_that_works_tries_again_what_failed_before_it(tmp_path):
    """Only what fails after it has begun has failed, as far as it goes."""
    _, size, grid = grid_of(tmp_path)
    folder, now = Folder(grid, size, tmp_path), time.time()
    for name in ("kd-seed0", "switch-seed0"):
        say(tmp_path / name, "$ switchkd train x\nerror: no\n")
    dated(tmp_path / "logs" / "kd-seed0.log", now - 100)
    assert states(folder)["kd-seed0"] == states(folder)["switch-seed0"] == "FAILED"
    with locked(tmp_path):
        dated(tmp_path / LOCK, now - 50)
        assert worker(tmp_path) and folder.look().live
        assert (states(folder)["kd-seed0"], states(folder)["switch-seed0"]) == ("waiting", "FAILED")
        # A second command in the same log counts, not the first.
        say(tmp_path / "switch-seed0", "$ switchkd train x\nerror: no\n$ switchkd train x --resume\n")
        assert states(folder)["switch-seed0"] == "running"


def test_one_that_says_nothing_is_loading_or_was_killed(tmp_path):
    _, size, grid = grid_of(tmp_path)
    now = [time.time()]
    folder, run = Folder(grid, size, tmp_path, clock=lambda: now[0]), tmp_path / "kd-seed0"
    begin(run, step(1, 0.5))
    assert of(folder, run.name).state == "stopped"
    with locked(tmp_path):
        dated(tmp_path / LOCK, now[0] - 1000)
        assert of(folder, run.name).state == "running"
        now[0] += progress.STARTING_SECONDS + 5
        assert of(folder, run.name).state == "FAILED"
        with locked(run):
            assert of(folder, run.name).state == "running"


def test_a_lock_that_a_killed_process_left_is_nobodys(tmp_path):
    with locked(tmp_path / "a"):
        owner = json.loads((tmp_path / "a" / LOCK).read_text())
        assert worker(tmp_path / "a") == owner
    assert worker(tmp_path / "a") == worker(tmp_path / "nowhere") == {}
    (tmp_path / LOCK).write_text(json.dumps(owner | {"started": owner["started"] - 1000}))
    assert worker(tmp_path) == {}
    (tmp_path / LOCK).write_text(json.dumps(owner | {"host": "elsewhere"}))
    assert worker(tmp_path)["host"] == "elsewhere"


def test_metrics_are_read_as_they_grow(tmp_path, monkeypatch):
    """A line that is cut short waits, a broken one is passed over, and no line is read twice."""
    _, size, grid = grid_of(tmp_path)
    parse, parsed, run = progress.json_object, [], tmp_path / "kd-seed0"
    monkeypatch.setattr(progress, "json_object", lambda line: parsed.append(line) or parse(line))
    folder = Folder(grid, size, tmp_path)
    scored = step(2, 0.2, 2.0, **{"eval/strict": 7.0, "seconds/evaluate": 5.0})
    begin(run, step(1, 0.1), scored, ends='{"step": 3, "num_tok')
    seen = of(folder, run.name)
    assert (seen.tokens, seen.seconds, seen.share) == (200, 1.0 + 2.0 + 5.0, 0.2)
    assert seen.scored == [{"step": 2, "num_tokens": 200, "eval/strict": 7.0}]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ens": 300, "progress": 0.3, "seconds": 4.0}\nbroken\n[]\n{"step": 4}\n')
    seen = of(folder, run.name)
    assert (seen.tokens, seen.seconds, seen.share) == (300, 12.0, 0.3) and len(parsed) == 6
    assert of(folder, run.name) == seen and len(parsed) == 6


def test_a_run_that_goes_on_has_cut_its_metrics_back(tmp_path):
    _, size, grid = grid_of(tmp_path)
    folder, run = Folder(grid, size, tmp_path), tmp_path / "kd-seed0"
    begin(run, step(1, 0.1), step(2, 0.2), step(3, 0.3))
    assert of(folder, run.name).seconds == 3.0
    begin(run, step(1, 0.1), step(2, 0.2, 5.0), step(3, 0.3, 5.0), step(4, 0.4, 5.0))  # longer than before already
    assert (of(folder, run.name).seconds, of(folder, run.name).tokens) == (16.0, 400)
    begin(run)
    assert (of(folder, run.name).seconds, of(folder, run.name).share) == (0.0, 0.0)


def test_what_a_run_took_is_its_steps_and_its_scoring_and_loading_where_that_was_seen(tmp_path):
    _, size, grid = grid_of(tmp_path, evaluations=("math",))
    now = [time.time()]
    folder, run = Folder(grid, size, tmp_path, clock=lambda: now[0]), tmp_path / "kd-seed0"
    with locked(tmp_path):
        dated(tmp_path / LOCK, now[0] - 1000)
        say(run, "$ switchkd train x\n")
        dated(tmp_path / "logs" / f"{run.name}.log", now[0] - 60)
        assert (of(folder, run.name).state, of(folder, run.name).loading) == ("running", None)
        begin(run, step(1, 1.0, 30.0))
        (run / "config.yaml").write_text("")
        dated(run / "config.yaml", now[0] - 50)
        finish(run, at=now[0], took=7.0, tasks=("math",))
        done = of(folder, run.name)
    assert (done.state, done.seconds, done.loading) == ("done", pytest.approx(37.0), pytest.approx(10.0))
    assert next(each for each in Folder(grid, size, tmp_path).look().cells if each.state == "done").loading is None


# --- time left ------------------------------------------------------------------------------------------------------


@pytest.fixture
def grid(tmp_path):
    return {cell.name: cell for cell in grid_of(tmp_path, ("kd", "switch"), (0, 1, 2))[2]}


def standing(grid, **how):
    """Runs by name (``_`` for ``-``): state, share, tokens, seconds; all others wait."""
    given = {name.replace("_", "-"): values for name, values in how.items()}
    return [Standing(cell, *given.get(name, ("waiting",))) for name, cell in grid.items()]


def test_nothing_is_known_before_anything_has_begun(grid):
    assert seconds_left(standing(grid), 1, True) is None
    assert seconds_left(standing(grid, kd_seed0=("running",)), 1, True) is None


def test_the_time_left_of_runs_whose_like_are_done(grid):
    """kd takes 60 s (median of 40, 60, 400), switch 100: of its three runs one is done and one half."""
    cells = standing(
        grid, kd_seed0=("done", 1.0, 1000, 40.0), kd_seed1=("done", 1.0, 1000, 60.0), kd_seed2=("done", 1.0, 1000, 400.0),
        switch_seed0=("done", 1.0, 1000, 100.0), switch_seed1=("running", 0.5, 500, 50.0),
    )  # fmt: skip
    assert expected_seconds(grid["kd-seed0"], cells) == 60.0
    assert seconds_left(cells, 1, True) == 50.0 + 100.0
    assert seconds_left(cells, 2, True) == 100.0
    assert (
        seconds_left([*cells[:4], Standing(grid["switch-seed1"], "done", 1.0, 1000, 100.0), cells[5]], 2, True) == 100.0
    )


def test_scoring_that_is_to_come_is_left_too(grid):
    cells = standing(grid, kd_seed0=("done", 1.0, 1000, 100.0), kd_seed1=("running", 0.99, 1000, 70.0))
    assert seconds_left(cells[:3:2], 1, True) == pytest.approx(30.0)  # the first seeds of kd, and nothing else


def test_the_time_left_by_the_pace_of_the_method_and_of_all(grid):
    """kd has learned from 250 of 1,000 tokens in 20 s, so it takes 80; switch, of which nothing is known, as long."""
    cells = standing(grid, kd_seed0=("running", 0.25, 250, 20.0))
    assert seconds_left(cells, 1, True) == pytest.approx(60 + 2 * 80 + 3 * 80)
    assert seconds_left(cells, 3, True) == pytest.approx(80 + 80)
    assert seconds_left(cells[:1], 3, True) == pytest.approx(60)
    slow = standing(grid, kd_seed0=("running", 0.25, 250, 20.0), switch_seed0=("running", 0.5, 500, 100.0))
    assert expected_seconds(grid["switch-seed1"], slow) == pytest.approx(200.0)
    # Two run already, whatever was asked for; of what waits, each is begun where there is room first.
    assert seconds_left(slow, 1, True) == pytest.approx(max(60 + 80 + 80 + 200, 100 + 200))


def test_another_groups_pace_counts_by_its_tokens(tmp_path):
    budgets = {"short": {"max_train_tokens": 100}, "long": {"max_train_tokens": 1000}}
    cells = [Standing(c, "waiting") for c in grid_of(tmp_path, ("kd",), (0,), budgets=budgets)[2]]
    cells[0] = Standing(cells[0].cell, "done", 1.0, 100, 5.0)
    assert seconds_left(cells, 1, True) == pytest.approx(50.0)


def test_without_a_budget_of_tokens_the_share_that_is_done_counts(tmp_path):
    grid = {cell.name: cell for cell in grid_of(tmp_path, tokens=0)[2]}
    assert seconds_left(standing(grid, kd_seed0=("running", 0.2, 777, 10.0)), 4, True) == pytest.approx(50.0)


def test_what_failed_is_left_only_once_no_command_works(grid):
    cells = standing(
        grid, kd_seed0=("done", 1.0, 1000, 50.0), kd_seed1=("FAILED", 0.2, 200, 10.0), kd_seed2=("stopped", 0.0, 0, 0.0),
        **{f"switch_seed{n}": ("done", 1.0, 1000, 70.0) for n in range(3)},
    )  # fmt: skip
    assert seconds_left(cells, 1, True) == 0.0
    assert seconds_left(cells, 1, False) == pytest.approx(40 + 50)


def test_loading_is_counted_for_every_run_once_it_was_seen(grid):
    cells = standing(grid, kd_seed0=("done", 1.0, 1000, 50.0))[:3:2]
    cells[0] = Standing(cells[0].cell, "done", 1.0, 1000, 50.0, loading=12.0)
    assert expected_seconds(cells[1].cell, cells) == 62.0 == seconds_left(cells, 1, True)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "less than a minute"), (59, "less than a minute"), (95, "about 2 min"), (19 * 60, "about 19 min"),
        (41 * 60, "about 40 min"), (99 * 60, "about 100 min"), (2 * 3600, "about 2 h"), (2.3 * 3600, "about 2 h 20 min"),
        (119.9 * 60, "about 2 h"), (48 * 3600, "about 2.0 days"),
    ],
)  # fmt: skip
def test_a_rough_time_in_words(seconds, words):
    assert about(seconds) == words


def test_what_is_left_is_said_in_words(tmp_path):
    _, size, grid = grid_of(tmp_path, ("kd",))
    folder = Folder(grid, size, tmp_path)
    with locked(tmp_path):
        dated(tmp_path / LOCK, time.time() - 1000)
        assert folder.look().left_words() == "how long it will take is not known yet"
        begin(tmp_path / "kd-seed0", step(1, 0.5, 600.0, 500))
        assert folder.look().left_words() == "about 30 min left"
        begin(tmp_path / "kd-seed0", step(1, 0.5, 600.0, 500), log="$ switchkd train x\nerror: no\n")
        begin(tmp_path / "kd-seed1", step(1, 0.5, 600.0, 500), log="$ switchkd train x\nerror: no\n")
        assert folder.look().left_words() == "nothing is left that this command still tries"
    assert folder.look().left_words() == "about 20 min left once the same command goes on"
    for cell in grid:
        finish(tmp_path / cell.name)
    assert folder.look().left_words() == "all runs are done"
