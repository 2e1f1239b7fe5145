"""The page of a study that is half done, and the thread that writes it."""

import re
import shutil
import threading
import time
from html.parser import HTMLParser

import pytest
from half_study import begin, finish, grid_of, say, step

from switchkd.base.errors import DiskError, InUseError
from switchkd.base.lock import locked
from switchkd.findings import outlook
from switchkd.findings import page as module
from switchkd.findings.page import followed, study_page
from switchkd.studies.plan import PAGE
from switchkd.studies.progress import Folder

HOSTILE = "<script>document.title='owned'</script><img src=x>\x1b[2J"
ALONE = {"meta", "br", "img"}  # elements without an end
SVG_NAME = "http://www.w3.org/2000/svg"  # a name, which no browser asks for


class Checked(HTMLParser):
    """Every element is closed in its turn, and every id is there once."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.words, self.metas = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [] and len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert tag != "script" and len(given) == len(attrs) and not any(name.startswith("on") for name in given)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.metas += [given] if tag == "meta" else []
        if tag not in ALONE:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def half_done(folder):
    """A study of two groups in which every state is there."""
    budgets = {"short": {"max_train_tokens": 100}, "long": {"max_train_tokens": 1000}}
    plan, size, grid = grid_of(folder, ("kd", "switch", "gkd"), (0, 1), budgets=budgets)
    for seed in (0, 1):
        for method in ("kd", "switch"):
            run = folder / f"short-{method}-seed{seed}"
            begin(run, step(1, 0.5, 30.0, 50, **{"eval/strict": 20.0}), step(2, 1.0, 30.0, 50, **{"eval/strict": 40.0}))
            finish(run, [40.0 + seed * (method == "switch"), 60.0])
    begin(folder / "short-gkd-seed0", step(1, 0.4, 30.0, 40), log=f"$ switchkd train x\nerror: {HOSTILE}\n")
    say(folder / "short-gkd-seed1", "$ switchkd train x\nstopped by SIGTERM\n")
    begin(folder / "long-kd-seed0", step(1, 0.37, 100.0, 370, **{"eval/strict": 12.5}))
    return plan, size, grid


def test_the_page_of_a_half_finished_study_has_all_of_it(tmp_path):
    plan, size, grid = half_done(tmp_path)
    with locked(tmp_path / "long-kd-seed0"):
        html = study_page(plan, Folder(grid, size, tmp_path).look(), tmp_path)
    found = Checked(html)
    for words in (
        "A <plan>", "4 of 12 runs done, 1 running, 1 FAILED, 1 stopped, 5 waiting.", "40% of the training is done; about",
        "running 37% strict 12.5", "done 1 min 0 s strict 50.0", "FAILED 40%", "kd 50.0 0 40.0 to 60.0 2", "gkd – – – 0",
        "strict along the way, by the tokens learned from.", "switch against kd: +0.2", "gkd against kd: with 0 seeds in common",
        "The end of logs/short-gkd-seed0.log: error: <script>document.title='owned'</script><img src=x>␛[2J",
    ):  # fmt: skip
        assert words in found.text, words
    order = ("short", "seed 0", "seed 1", "kd", "switch", "gkd", "long")
    places = [found.text.index(word, found.text.index("The runs")) for word in order]
    assert places == sorted(places)
    assert html.count("<svg") == 2 and "\x1b" not in html


def test_the_page_asks_for_nothing(tmp_path):
    plan, size, grid = half_done(tmp_path)
    html = study_page(plan, Folder(grid, size, tmp_path).look(), tmp_path)
    found = Checked(html)
    assert all(link.startswith("#") for link in found.links) and "url(http" not in html and "@import" not in html
    assert re.findall(r"\w+://[^\s\"'<]+", html.replace(SVG_NAME, "")) == []
    [policy] = [meta["content"] for meta in found.metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_it_looks_again_only_while_a_process_works(tmp_path):
    plan, size, grid = half_done(tmp_path)

    def refreshes():
        found = Checked(study_page(plan, Folder(grid, size, tmp_path).look(), tmp_path))
        return [meta["content"] for meta in found.metas if meta.get("http-equiv") == "refresh"], found.text

    times, text = refreshes()
    assert times == [] and "Nothing runs; the same command goes on" in text
    with locked(tmp_path):
        times, text = refreshes()
    assert times == ["20"] and "Nothing runs" not in text


def test_a_study_that_has_not_begun_says_so(tmp_path):
    plan, size, grid = grid_of(tmp_path)
    found = Checked(study_page(plan, Folder(grid, size, tmp_path).look(), tmp_path))
    for words in ("0% of the training is done; how long it will take is not known yet.", "No run is scored yet.",
                  "Nothing can be said before runs are scored."):  # fmt: skip
        assert words in found.text, words
    assert "Failed" not in found.text


def test_a_curve_is_of_the_runs_that_are_done_where_there_are_some(tmp_path, monkeypatch):
    plan, size, grid = half_done(tmp_path)
    begin(tmp_path / "long-kd-seed1", step(1, 0.2, 10.0, 200, **{"eval/strict": 1.0}))
    finish(tmp_path / "long-kd-seed1")
    drawn, draw = [], module.draw
    monkeypatch.setattr(module, "draw", lambda panels, *a, **k: drawn.append(panels) or draw(panels, *a, **k))
    study_page(plan, Folder(grid, size, tmp_path).look(), tmp_path)
    lines = [[(line.label, [run.name for run in line.runs]) for p in panels for line in p.lines] for panels in drawn]
    assert lines == [
        [("kd", ["short-kd-seed0", "short-kd-seed1"]), ("switch", ["short-switch-seed0", "short-switch-seed1"])],
        [("kd", ["long-kd-seed1"])],
    ]
    assert {panel.x for panels in drawn for panel in panels} == {"num_tokens"}


def test_what_has_not_changed_is_not_resampled_for_every_page(tmp_path, monkeypatch):
    plan, size, grid = half_done(tmp_path)
    count, bootstrap = [], outlook.bootstrap
    monkeypatch.setattr(outlook, "bootstrap", lambda *a: count.append(a) or bootstrap(*a))
    folder = Folder(grid, size, tmp_path)
    pages = [study_page(plan, folder.look(), tmp_path) for _ in range(2)]
    first = len(count)
    assert (
        first == 6 and [len(page) for page in pages] == [len(pages[0])] * 2
    )  # both seeds of two methods, whole and one by one
    for method in ("kd", "switch"):
        begin(tmp_path / f"long-{method}-seed1", step(1, 1.0))
        finish(tmp_path / f"long-{method}-seed1")
        begin(tmp_path / f"long-{method}-seed0", step(1, 1.0))
        finish(tmp_path / f"long-{method}-seed0")
    study_page(plan, folder.look(), tmp_path)
    assert len(count) == 12


# --- while a study runs -----------------------------------------------------------------------------------------------


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_page_is_written_at_the_start_and_at_the_end_by_one_thread(tmp_path, monkeypatch):
    plan, size, grid = half_done(tmp_path)
    moved, writers, write = [], set(), module.write_file
    monkeypatch.setattr(module, "write_file", lambda *a: writers.add(threading.current_thread()) or write(*a))
    with followed(plan, size, grid, tmp_path, 1, lambda *a: moved.append(a), 0.01), locked(tmp_path):
        wait_for((tmp_path / PAGE).exists)
        first = (tmp_path / PAGE).read_text()
        count = len(moved)
        wait_for(lambda: len(moved) > count + 2)
        assert (tmp_path / PAGE).read_text() == first  # not as often as the bar moves
        finish(tmp_path / "long-kd-seed0")
    last = (tmp_path / PAGE).read_text()
    assert 'http-equiv="refresh"' in first and 'http-equiv="refresh"' not in last
    assert "4 of 12 runs done" in first and "5 of 12 runs done" in last
    assert len(writers) == 1 and threading.current_thread() not in writers and not next(iter(writers)).is_alive()
    assert moved[0][0] == pytest.approx(4.77 / 12) and moved[-1][0] == pytest.approx(5.4 / 12)
    assert moved[-1][1].endswith(", 5/12 runs") and "left" in moved[-1][1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_who_has_not_the_lock_writes_nothing(tmp_path):
    """A second command on a study that runs is refused, and its page is the first one's."""
    plan, size, grid = half_done(tmp_path)
    moved = []
    with pytest.raises(InUseError), followed(plan, size, grid, tmp_path, 1, lambda *a: moved.append(a), 0.01):
        time.sleep(0.1)
        raise InUseError("another process's")
    assert not (tmp_path / PAGE).exists() and moved == []


def test_a_page_that_cannot_be_written_ends_nothing_and_is_told_of_once(tmp_path, monkeypatch, capsys):
    plan, size, grid = half_done(tmp_path)
    tries, write = [], module.write_file

    def full(*arguments):
        tries.append(arguments)
        raise DiskError("no room")

    monkeypatch.setattr(module, "write_file", full)
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.0)
    with followed(plan, size, grid, tmp_path, 1, lambda *a: None, 0.01), locked(tmp_path):
        wait_for(lambda: len(tries) > 2)
        monkeypatch.setattr(module, "write_file", write)
        wait_for((tmp_path / PAGE).exists)
    said = capsys.readouterr().err
    assert said.count("progress.html could not be written") == 1 and "DiskError: no room" in said
    assert "the study goes on" in said


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on the PATH (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk_in_light_and_dark(chromium, tmp_path, width):
    plan, size, grid = half_done(tmp_path)
    (tmp_path / PAGE).write_text(study_page(plan, Folder(grid, size, tmp_path).look(), tmp_path))
    papers, complaints, asked = [], [], []
    for scheme in ("light", "dark"):
        with chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
            page = context.new_page()
            page.on("console", lambda message: complaints.append(message.text))
            page.on("request", lambda request: asked.append(request.url))
            page.goto((tmp_path / PAGE).as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ink, paper = page.evaluate(
                "(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('td.FAILED')))"
            )
            ink, paper = (sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper))
            assert abs(ink - paper) > 300 and (ink < paper) == (scheme == "light")
            papers.append(paper)
    assert complaints == [] and len(asked) == 2 and papers[0] != papers[1]
