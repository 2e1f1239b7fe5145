"""The report in headless Chromium, as a person uses it. Skipped where there is no Chromium; ``./run test`` says how to get one."""

import json
import math
import shutil

import pytest
from fabricated import HOSTILE, metric, rollout, run, sample
from tiny import pair_on_disk
from two_readings import PARTS, SIDES, STUDENT, WORDS, run_of, save_models, written_by
from two_tokenizers import tokenizer_of

from switchkd.base.terminal import number, percent, visible
from switchkd.cli.main import main
from switchkd.reports.viewer import drawn
from switchkd.studies.study import flags

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open a file; the test fails if the page complains or asks for anything but itself."""
    contexts, complaints, requests = [], [], []

    def opened(file, width=1200, **settings):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith("file:") for url in requests) and len(requests) == len(contexts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as it is: three steps of SWITCH with looks at each."""
    folder = tmp_path_factory.mktemp("report")
    settings = {
        **pair_on_disk(folder), "template": "chat", "max_prompt_length": 128, "max_new_tokens": 12, "max_completion_length": 24,
        "eval_samples": 6, "eval_max_new_tokens": 8, "per_device_train_batch_size": 3, "max_steps": 3, "sample_steps": 1,
        "sample_prompts": 5, "mix.lmbda": 1, "policy.decay": 0.5, "output_dir": folder / "run",
    }  # fmt: skip
    assert main(["train", "switch", *flags(settings)]) == 0
    assert main(["report", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def looks(trained):
    """Samples by (step, prompt)."""
    lines = (trained / "samples.jsonl").read_text().splitlines()
    return {(s["step"], s["sample_id"]): s for s in map(json.loads, lines)}


def fact(page, name):
    """A line of the panel on the chosen token."""
    return page.locator("#token tr", has_text=name).first.locator("td").first.text_content()


def test_the_viewer_shows_who_wrote_each_token_and_what_both_models_said(visit, trained, looks):
    page = visit(trained / "report.html")
    shown = looks[3, 0]  # the newest look at the first prompt
    tokens = page.locator("#response .token")
    assert tokens.count() == len(shown["completion_ids"]) > 1
    by = ["teacher" if "teacher" in tokens.nth(t).get_attribute("class") else "student" for t in range(tokens.count())]
    assert by == [("student", "teacher")[who] for who in shown["speakers"]]
    assert page.locator("#chart rect.student, #chart rect.teacher").count() == 2 * tokens.count()
    assert page.locator("#chart path.threshold").get_attribute("d").count("H") == tokens.count()
    last = tokens.count() - 1
    tokens.nth(last).hover()
    assert fact(page, "place in the text") == str(last)
    for name, value in (("divergence", shown["divergences"]), ("threshold", shown["thresholds"])):
        assert float(fact(page, name)) == pytest.approx(value[last], rel=0.01)
    for who, name in enumerate(("probability, student", "probability, teacher")):
        assert fact(page, name) == percent(math.exp(round(shown["log_probs"][who][last], 3)))
    assert page.locator("#token-facts table").nth(1).locator("tbody tr").count() == 5
    assert page.locator("#chart-title").text_content().startswith(f"Divergence over {tokens.count()} tokens")


def test_the_keyboard_does_all(visit, trained, looks):
    page = visit(trained / "report.html")
    page.focus("#response")
    page.keyboard.press("ArrowRight")
    assert fact(page, "place in the text") == "1"
    page.keyboard.press("End")
    assert fact(page, "place in the text") == str(len(looks[3, 0]["completion_ids"]) - 1)
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert fact(page, "place in the text") == "0"
    for step in (2, 1, 0, 0):  # the first stays
        page.keyboard.press("[")
        assert page.locator("#step").text_content() == str(step)
        assert page.locator("#response .token").count() == len(looks[step, 0]["completion_ids"])
    page.keyboard.press("]")
    page.keyboard.press("ArrowDown")
    assert page.locator("#step").text_content() == "1" and page.locator("#text").input_value() == "1"
    assert page.locator("#response .token").count() == len(looks[1, 1]["completion_ids"])
    assert page.locator("#response").get_attribute("aria-activedescendant") == "token-0"


def listed(page):
    return [int(value) for value in page.locator("#text option").evaluate_all("all => all.map(o => o.value)")]


def test_filters_leave_what_lies_within(visit, trained, looks):
    page = visit(trained / "report.html")
    now = [looks[3, i] for i in range(5)]
    shares = [100 * sum(s["speakers"]) / len(s["speakers"]) for s in now]
    page.click("text=Show only some")
    cases = {
        "share": shares,
        "length": [len(s["completion_ids"]) for s in now],
        "score": [s["scores"]["rouge_l"] for s in now],
    }
    for name, values in cases.items():
        page.fill(f"#{name}-least", str(sorted(values)[2]))
        assert listed(page) == [i for i, value in enumerate(values) if value >= float(str(sorted(values)[2]))]
        page.fill(f"#{name}-least", "101")
        assert listed(page) == [] and page.locator("#count").text_content() == "0 of 5 texts"
        assert not page.locator("#response").is_visible()
        page.click("text=Show all")
        assert listed(page) == [0, 1, 2, 3, 4] and page.locator("#response").is_visible()


def test_texts_that_were_trained_on_can_be_looked_at_too(visit, trained):
    page = visit(trained / "report.html")
    page.select_option("#kind", "texts")
    rollouts = (trained / "rollouts.jsonl").read_text().splitlines()
    assert len(listed(page)) == len(rollouts) == 9 and not page.locator("#time").is_visible()
    assert page.locator("#response .token").count() == len(json.loads(rollouts[0])["completion_ids"])
    assert "answered again and again" in page.locator("#token").text_content()
    page.click("text=All tokens as a table")
    page.locator("#table tbody tr").first.wait_for()
    assert page.locator("#table tbody tr").count() == page.locator("#response .token").count()


def test_what_a_model_wrote_runs_nothing(visit, tmp_path):
    folder = run(
        tmp_path / "a", [metric(1)], [sample(1, HOSTILE, prompt=HOSTILE)], [rollout(1, HOSTILE)], method=HOSTILE
    )
    assert main(["report", str(folder)]) == 0
    page = visit(folder / "report.html")
    assert page.title() == "switchkd report: a"
    assert page.locator("#prompt").text_content() == HOSTILE
    assert page.locator("#response").text_content() == HOSTILE
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2


def test_an_injected_script_would_be_refused_by_the_pages_policy(chromium, tmp_path):
    folder = run(tmp_path / "a", [metric(1)], [sample(1, "yes")])
    assert main(["report", str(folder)]) == 0
    file = folder / "report.html"
    file.write_text(file.read_text().replace("<main>", "<main><script>document.title='owned'</script>"))
    with chromium.new_context() as context:
        page = context.new_page()
        page.goto(file.as_uri())
        assert page.title() == "switchkd report: a" and page.locator("#response .token").count() == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(visit, trained, scheme):
    page = visit(trained / "report.html", width=360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not page.locator("#token").is_visible()  # it would cover the text
    page.locator("#response .token").nth(1).click()
    assert page.locator("#token").is_visible() and fact(page, "place in the text") == "1"
    page.click("#close")
    assert not page.locator("#token").is_visible()
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    ink, paper = (sum(map(int, c[4:-1].split(","))) for c in colours)
    assert (ink < paper) == (scheme == "light")


def test_an_empty_run_and_a_page_without_javascript_say_what_they_can(visit, trained, tmp_path):
    empty = run(tmp_path / "empty")
    assert main(["report", str(empty)]) == 0
    assert visit(empty / "report.html").locator("#viewer").count() == 0
    plain = visit(trained / "report.html", java_script_enabled=False)
    assert "needs JavaScript" in plain.locator("noscript").inner_text()
    assert plain.locator("#scores table").first.is_visible() and not plain.locator("#viewer").is_visible()


# --- held-out answers -------------------------------------------------------------------------------------------------


def test_held_out_answers_are_turned_over_one_by_one(visit, trained):
    page = visit(trained / "report.html")
    record = json.loads((trained / "evaluation.json").read_text())
    lines = map(json.loads, (trained / "evaluation.completions.jsonl").read_text().splitlines())
    texts = {(line["model"], line["example"]): line["text"] for line in lines}
    ids, columns = record["data"]["ids"], ["student before", "student after", "teacher"]
    while page.locator("#answers-back").is_enabled():
        page.click("#answers-back")
    for place, example in enumerate(ids):
        assert page.locator("#answers-place").text_content() == f"question {place + 1} of {len(ids)}"
        assert page.locator("#answers-prompt").text_content() == record["data"]["prompts"][place]
        assert page.locator("#answers-reference").text_content() == record["data"]["references"][place][0]
        shown = page.locator("#answers-models .words").all_text_contents()
        assert shown == [visible(texts[model, example]) or "(nothing was written)" for model in columns]
        facts = page.locator("#answers-models .facts").all_text_contents()
        scores = [record["results"][model]["scores"]["rouge_l"]["values"][0][place] for model in columns]
        assert all(f"rouge_l {number(score)}" in fact for fact, score in zip(facts, scores, strict=True))
        if place + 1 < len(ids):
            page.click("#answers-on")
    assert page.locator("#answers-on").is_disabled()


def test_the_answers_of_several_runs_are_chosen_by_run(visit, tmp_path):
    for name in "ab":
        scores = {model: [1.0, 2.0] for model in ("student before", "student after")}
        run(tmp_path / name, [metric(1)], scores=scores, answers={m: [f"{m} of {name}"] * 2 for m in scores})
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output-file", str(tmp_path / "two.html")]) == 0
    page = visit(tmp_path / "two.html")
    assert "student after of a" in page.locator("#answers-models").text_content()
    page.select_option("#answers-run", "1")
    assert "student after of b" in page.locator("#answers-models").text_content()


def test_an_answer_of_a_model_is_text_whichever_is_shown(visit, tmp_path):
    scores = {model: [1.0, 2.0] for model in ("teacher", "student before", "student after")}
    folder = run(tmp_path / "a", [metric(1)], scores=scores, answers={model: [HOSTILE] * 2 for model in scores})
    assert main(["report", str(folder)]) == 0
    page = visit(folder / "report.html")
    for button in ("#answers-on", "#answers-back"):
        page.click(button)
        assert page.locator("#answers-models .words").all_text_contents() == [HOSTILE] * 3
    assert page.title() == "switchkd report: a" and page.locator("img").count() == 0


def test_without_javascript_the_first_answer_stands_there(visit, tmp_path):
    scores = {model: [1.0, 2.0] for model in ("teacher", "student before", "student after")}
    folder = run(
        tmp_path / "a", [metric(1)], scores=scores, answers={model: [f"said by {model}"] * 2 for model in scores}
    )
    assert main(["report", str(folder)]) == 0
    page = visit(folder / "report.html", java_script_enabled=False)
    assert (
        page.locator("#answers-models").is_visible()
        and "said by student after" in page.locator("#answers-models").inner_text()
    )
    assert not page.locator("#answers-controls").is_visible()


VALUES = [0.0, 3.1e-9, 0.0000312, 0.00012, 0.0123, 0.9996, 9.996, 12.34, 123.4, 1234.5, 4e15]


def test_numbers_in_the_viewer_are_written_as_everywhere_else(visit, tmp_path):
    """The page's script has no Python: its numbers are compared with ours, digit by digit."""
    record = rollout(1, "x" * len(VALUES)) | {"divergences": VALUES, "thresholds": [0.5] * len(VALUES)}
    assert len(record["completion_ids"]) == len(VALUES)
    folder = run(tmp_path / "a", [metric(1)], rollouts=[record])
    assert main(["report", str(folder)]) == 0
    page = visit(folder / "report.html")
    page.click("text=All tokens as a table")
    shown = page.locator("#table tbody tr").evaluate_all("all => all.map(row => row.cells[3].textContent)")
    assert shown == [number(float(f"{value:.4g}")) for value in VALUES]


def test_on_a_phone_the_card_of_a_token_is_closed_until_one_is_tapped(visit, trained):
    page = visit(trained / "report.html", width=390, has_touch=True)
    assert not page.locator("#token").is_visible()
    page.locator("#later").scroll_into_view_if_needed()
    page.locator("#earlier").tap()  # another text: still closed
    assert not page.locator("#token").is_visible()
    page.locator("#response .token").first.tap()
    assert page.locator("#token").is_visible()
    wide = visit(trained / "report.html", width=1280)
    assert wide.locator("#token").is_visible()


# --- two tokenizers -----------------------------------------------------------------------------------------------


def test_the_viewer_shows_the_tokens_of_both_models_of_a_word(visit, tmp_path):
    rollout = written_by(PARTS)
    count, by_teacher = len(rollout.completion_ids), sum(rollout.speakers)
    folder = run_of(save_models(tmp_path), tmp_path / "run", [rollout])
    assert main(["report", str(folder)]) == 0
    shown = visit(folder / "report.html")
    found = shown.locator("#response .token")
    assert found.all_text_contents() == WORDS
    assert [("teacher" in name) for name in found.evaluate_all("all => all.map(one => one.className)")] == [
        False, True, False, True, False, False,
    ]  # fmt: skip
    facts = shown.locator("#facts").text_content()
    assert f"6 words · {count} tokens" in facts and f"{round(100 * by_teacher / count)}% by the teacher" in facts
    assert (
        "the teacher's first word: 1" in facts and "place in the text (words)" in shown.locator("#chart").text_content()
    )
    found.nth(4).hover()
    told = drawn(rollout, tokenizer_of(STUDENT), SIDES)[4].tokens
    for name, tokens in zip(("the student's tokens", "the teacher's tokens"), told, strict=True):
        assert fact(shown, name) == " ".join(json.dumps(token, ensure_ascii=False) for token in tokens)
    assert found.nth(4).get_attribute("title").startswith("student: ")
    shown.focus("#response")
    shown.keyboard.press("ArrowLeft")
    assert fact(shown, "written by") == "the teacher" and fact(shown, "divergence") == "0.250"
    shown.locator("summary", has_text="All words as a table").click()
    assert shown.locator("#table tbody tr").count() == 6
    assert "the teacher's tokens" in shown.locator("#table thead").text_content()
