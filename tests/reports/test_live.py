"""What moves on a terminal while models work, what stands in its place elsewhere, and that looking changes nothing."""

import dataclasses
import io
import math
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny import POLICIES, VOCAB, assert_same, byte_level_tokenizer, tiny_model, toy_examples, toy_pair

from switchkd import Rollout, Switch, decode, decode_reference
from switchkd.base import terminal as terminal_module
from switchkd.base.terminal import SAY_EVERY
from switchkd.decoding.rollouts import DecodeCost, Rollouts
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.mixes import Adaptive, Generated
from switchkd.reports import live
from switchkd.reports import tables as report
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

TOKENIZER = byte_level_tokenizer()
PROMPTS = [[3, 4, 5], [7], [2, 2, 9]]


@pytest.fixture
def screen(monkeypatch):
    """Puts a console of the given size in the place of the real one; returns what is written to it."""

    def of(terminal, width=100, height=40):
        out = io.StringIO()
        size = {"width": width, "height": height, "force_terminal": terminal}
        colours = "standard" if terminal else None
        console = Console(file=out, **size, emoji=False, markup=False, highlight=False, color_system=colours)
        for module in (report, live, terminal_module):
            monkeypatch.setattr(module, "console", console)
        return out

    return of


def row(text, teacher_from=99, divergences=None, thresholds=None, reason="length"):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    unknown = [math.nan] * len(ids)
    speakers = [int(t >= teacher_from) for t in range(len(ids))]
    return Rollout(3, [1], ids, speakers, divergences or unknown, thresholds or unknown, reason)


def strip(text):
    """``text`` without what commands the terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def plain(lines):
    return [line.plain for line in lines]


# Watching


@pytest.mark.parametrize("name", ["switch_exponential", "adaswitch", "spell", "skd"])
def test_watching_changes_no_token_and_shows_texts_that_only_grow(name):
    models = tiny_model("llama", 1), tiny_model("llama", 2)
    settings = {"policy": POLICIES[name], "max_new_tokens": 10, "seed": 4, "eos_token_ids": [1]}
    seen = []
    watched = decode(*models, PROMPTS, **settings, block_size=2, batch_size=2, watch=seen.append)
    assert_same(watched, decode(*models, PROMPTS, **settings, block_size=2, batch_size=2))
    assert_same(watched, decode_reference(*models, PROMPTS, **settings))
    assert len(seen) == watched.cost.rounds > 2
    assert [rows.cost.kept_tokens for rows in seen] == [sum(len(r.completion_ids) for r in rows) for rows in seen]
    for number, final in enumerate(watched):
        for rows in seen:
            now = rows[number]
            size = len(now.completion_ids)
            assert now.completion_ids == final.completion_ids[:size] and now.speakers == final.speakers[:size]
            assert now.stop_reason == (final.stop_reason if size == len(final.completion_ids) else "")
        assert rows[number].completion_ids == final.completion_ids


@pytest.mark.parametrize("terminal", [True, False])
def test_play_writes_the_reference_loops_tokens(screen, terminal):
    pair, example = toy_pair(), toy_examples()[5]
    settings = {"policy": POLICIES["switch_constant"], "max_new_tokens": 12, "seed": 3}
    screen(terminal)
    played = live.play(pair, example, DecodeSettings(**settings), 8)
    reference = decode_reference(
        pair.student, pair.teacher, [example.prompt_ids], **settings, sample_ids=[8], eos_token_ids=pair.eos_token_ids
    )
    assert_same([played], reference)
    assert len(set(played.speakers)) == 2


def test_play_without_a_terminal_is_text_bars_and_cost_in_plain_lines(screen):
    pair, example, out = toy_pair(), toy_examples()[5], screen(False)
    settings = {"policy": POLICIES["switch_constant"], "max_new_tokens": 12, "seed": 3}
    played = live.play(pair, example, DecodeSettings(**settings), 8)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("#8 (") and "⟦" in out.getvalue() and "\x1b" not in out.getvalue()
    assert lines[-3].startswith("divergence ") and lines[-2].startswith("threshold  ▄▄▄▄")
    assert len(lines[-3].split()[1]) == len(played.completion_ids)
    assert lines[-1].startswith(f"{len(played.completion_ids)} tokens (")


def test_play_on_a_terminal_shows_prompt_text_and_numbers(screen):
    pair, example, out = toy_pair(), toy_examples()[5], screen(True)
    live.play(
        pair, example, DecodeSettings(**{"policy": Switch(tau_0=0.6, decay=0.03), "max_new_tokens": 12, "seed": 3}), 8
    )
    for words in (pair.tokenizer.decode(example.prompt_ids), "of 12 tokens", " > 0.", "\x1b[1;35m", "teacher 33%"):
        assert words in out.getvalue(), words


def test_a_text_longer_than_the_terminal_keeps_its_newest_lines_in_sight(screen):
    pair, example, out = toy_pair(), toy_examples()[5], screen(True, width=12, height=6)
    played = live.play(
        pair, example, DecodeSettings(**{"policy": Switch(tau_0=0.6), "max_new_tokens": 30, "seed": 3}), 8
    )
    last = out.getvalue().split("\x1b[?25h")[0].rsplit("\x1b[2K", 1)[1]
    lines = strip(last).splitlines()
    assert (
        len(lines) == 5
        and lines[-1].startswith("divergence")
        and lines[1] in plain(live.written(played, pair.tokenizer, 12))
    )


def test_play_says_why_a_row_cannot_be_decoded_and_when_it_fails_under_way(screen):
    pair = toy_pair()
    example = dataclasses.replace(toy_examples()[0], prompt_ids=[VOCAB + 3])
    out = screen(True)
    live.play(pair, example, DecodeSettings(Switch(), 4), 0)
    assert "ids must lie in 0..22" in " ".join(out.getvalue().split())
    with torch.no_grad():
        pair.teacher.get_input_embeddings().weight[5] = math.nan
    out = screen(True)
    live.play(pair, dataclasses.replace(example, prompt_ids=[5]), DecodeSettings(Switch(), 4), 0)
    assert "teacher's logits are not finite" in " ".join(out.getvalue().split())


def test_a_prompt_commands_no_terminal(screen):
    # None of the tiny models' few ids is an escape.
    decoder = SimpleNamespace(decode=lambda ids: "\x1b[2J" if ids == [3] else "")
    pair, out = dataclasses.replace(toy_pair(), tokenizer=decoder), screen(True)
    example = dataclasses.replace(toy_examples()[0], prompt_ids=[3])
    live.play(pair, example, DecodeSettings(Switch(), 2), 0)
    assert "␛[2J" in out.getvalue() and "\x1b[2J" not in out.getvalue()


# A page of text and bars


def test_bars_stand_under_their_tokens_and_lines_end_where_the_text_or_the_width_does():
    # "ab\n\ncdef" is one token a character
    seen = [0.0, 1.0, 0.5, 0.5, 1.0, math.nan, 0.0, 0.0]
    lines = live.written(row("ab\n\ncdef", 4, seen, [0.5] * 8), TOKENIZER, 4)
    assert plain(lines) == [
        "ab↵↵", "▁█▅▅", "▅▅▅▅",
        "cdef", "█·▁▁", "▅▅▅▅",
    ]  # fmt: skip
    assert [[span.style for span in line.spans if span.style] for line in lines[:2]] == [[], []]
    assert {span.style for line in lines[3:5] for span in line.spans} == {"bold magenta"}
    assert lines[5].style == "dim" and {span.style for span in lines[5].spans} <= {"dim"}
    assert plain(live.written(row("abcde", 99, [0.0] * 5), TOKENIZER, 3)) == ["abc", "▁▁▁", "de", "▁▁"]
    assert plain(live.written(row("abc"), TOKENIZER, 9)) == ["abc"]  # a policy that looks at nothing has no bars


def test_wide_characters_and_those_of_several_tokens_have_bars_of_their_width():
    text = "a好b"
    count = len(TOKENIZER.encode(text, add_special_tokens=False))
    assert count == 5
    lines = live.written(row(text, 99, [0.0, 1.0, 1.0, 1.0, 0.0]), TOKENIZER, 20)
    assert plain(lines) == [text, "▁██▁"] and lines[0].cell_len == lines[1].cell_len


def test_bars_above_one_are_scaled_to_the_most_and_infinity_is_the_highest():
    assert live.mark_lines(row("abc", 99, [0.0, 4.0, math.inf], [2.0, math.nan, 4.0])) == [
        "divergence ▁██  █ is 4.00",
        "threshold  ▅·█  █ is 4.00",
    ]


def test_the_newest_numbers():
    def state(divergence, threshold, speaker=0):
        one = dataclasses.replace(row("a", 1 - speaker), divergences=[divergence], thresholds=[threshold])
        return live.state_line(Rollouts([one], DecodeCost(seconds=2.0, kept_tokens=8)), 9).plain

    assert state(0.82, 0.3, 1) == "divergence 0.82 > 0.30 · teacher 100% · 1 of 9 tokens · 4.0 tokens/s"
    assert state(0.2, 0.3).startswith("divergence 0.20 ≤ 0.30 · teacher 0%")
    assert state(0.2, math.nan).startswith("divergence 0.20 · ")
    assert state(math.nan, math.nan).startswith("divergence – · ")


def test_control_characters_of_a_model_reach_no_terminal(screen):
    text = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08[red]"
    evil = row(text)
    for terminal in (True, False):
        out = screen(terminal)
        report.console.print(*live.written(evil, TOKENIZER, 60), sep="\n")
        live.print_rollout(evil, TOKENIZER)
        view(lambda picture: report.console.print(picture)).on_step(STEP, Rollouts([evil]))
        shown = out.getvalue()
        assert shown.count("␛[2J␛]0;title␇\\x9b31m␍␈[red]") == 3
        assert not any(code in shown for code in ("\x1b[2J", "\x1b]", "\x07", "\x9b", "\x08", "\r"))


# A run

STEP = {
    "step": 1, "loss": 1.5, "source": "policy", "tokens_per_second": 300.4, "seconds": 2.0, "seconds/generate": 1.0,
    "seconds/teacher": 0.25, "seconds/update": 0.75, "switch/teacher_share": 0.25, "switch/divergence_mean": None,
}  # fmt: skip


def view(show, total=4.0, clock=lambda: 0.0, **state):
    trainer = SimpleNamespace(step=0, progress=0.0, total_steps=total, pair=SimpleNamespace(tokenizer=TOKENIZER))
    for name, value in state.items():
        setattr(trainer, name, value)
    return live.TrainView(trainer, "strict", show, clock)


def drawn(picture, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(picture)
    return {line[:13].strip(): line[13:].strip() for line in out.getvalue().splitlines()}


def test_a_view_before_the_first_step_knows_nothing_and_says_so():
    pictures = []
    view(pictures.append)
    shown = drawn(pictures[-1])
    assert {
        shown[name]
        for name in ("loss", "by teacher", "divergence", "tokens/s", "a step takes", "scores", "newest text")
    } == {"–"}
    assert "starting" in shown["now"]


def test_a_view_shows_the_newest_numbers_their_curves_the_scores_and_the_sample():
    pictures = []
    run = view(pictures.append)
    data = {k: v for k, v in STEP.items() if "switch" not in k}
    run.on_step(STEP, Rollouts([row("other"), row("words", 2, reason="eos")]))
    run.on_step(data | {"loss": 1.0, "eval/strict": 12.5, "step": 2}, Rollouts())
    run.on_step(STEP | {"loss": 0.5, "switch/teacher_share": 1.0, "step": 3}, Rollouts())
    run.on_step(data | {"loss": 0.5, "seconds": 6.0, "step": 4}, Rollouts())
    shown = drawn(pictures[-1])
    assert shown["loss"] == "0.5000  █▅▁▁"
    assert shown["by teacher"] == "100%  ▃·█·"
    assert shown["divergence"] == "–"
    assert shown["a step takes"] == "3.00 s: writing 1.00 s · teacher reads 0.250 s · updating 0.750 s"
    assert shown["scores"] == "step 2: strict 12.5"
    assert shown["newest text"] == "#3 (eos) words"
    run.on_round(DecodeCost(seconds=2.0, kept_tokens=64))
    assert "writing text: 64 tokens, 32 tokens/s" in drawn(pictures[-1])["now"]


def test_a_sample_is_cut_to_a_few_lines_with_its_speakers_in_colour(screen):
    pictures, out = [], screen(True)
    view(pictures.append).on_step(STEP, Rollouts([row("one\ntwo\nthree\nfour\nfive", 4)]))
    report.console.print(pictures[-1])
    assert "four" in out.getvalue() and "…" in out.getvalue() and "five" not in out.getvalue()
    assert "\x1b[1;35mtwo" in out.getvalue() and "\x1b[1;35mone" not in out.getvalue()


@pytest.mark.parametrize("total,step", [(8.0, "step 4/8"), (math.inf, "step 4")])
def test_the_time_left_follows_the_share_of_the_run_that_is_done(total, step):
    """A resumed run is at a quarter; two steps of 10 s bring it to a half, so 40 s are left, by whichever budget."""
    now, pictures = [0.0], []
    run = view(pictures.append, total, lambda: now[0], step=2, progress=0.25)
    for number in (3, 4):
        now[0] += 10
        run.trainer.step, run.trainer.progress = number, 0.125 * number
        run.on_step(STEP | {"step": number}, Rollouts())
    [bar] = [text for name, text in drawn(pictures[-1]).items() if name.startswith("train")]
    assert f" 50% {step} 0:00:20 left 0:00:40" in bar


def trainer(folder, **changes):
    config = TrainConfig(
        policy=Switch(tau_0=0.6, decay=0.05), mix=Generated(1.0), max_new_tokens=6, per_device_train_batch_size=2,
        save_steps=0, seed=3, output_dir=str(folder),
    )  # fmt: skip
    return Trainer(toy_pair(), toy_examples(), dataclasses.replace(config, **{"max_steps": 2} | changes))


def test_a_run_is_a_view_on_a_terminal_and_lines_elsewhere_and_trains_the_same(tmp_path, screen):
    out = screen(False)
    lines = trainer(tmp_path / "lines")
    live.train(lines, "strict", lines.train)
    printed = out.getvalue().splitlines()
    assert printed[:2] == ["train …", "step 0/2: saving a checkpoint …"]
    assert printed[2].startswith("step 1/2: loss ") and printed[2].endswith(" s)")
    assert printed[4] == "step 2/2: saving a checkpoint …"
    assert len(printed) == 6 and printed[5].startswith("generated ") and "\x1b" not in out.getvalue()
    out = screen(True)
    shown = trainer(tmp_path / "view")
    live.train(shown, "strict", shown.train)
    assert (
        "100% step 2/2" in strip(out.getvalue())
        and "newest text" in out.getvalue()
        and "step 1/2: " not in out.getvalue()
    )
    assert out.getvalue().count("generated ") == 1
    for a, b in zip(lines.student.parameters(), shown.student.parameters(), strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("budget", [{"max_train_tokens": 30}, {"max_train_seconds": 0.01}])
def test_a_run_that_ends_by_a_budget_reaches_the_end_of_its_bar(tmp_path, screen, budget):
    out = screen(True)
    run = trainer(tmp_path, max_steps=-1, **budget)
    live.train(run, "strict", run.train)
    assert f"100% step {run.step} " in strip(out.getvalue())


# What a run does now

ALL = {"writing", "updating", "evaluating", "sampling", "saving"}


def phases_of(run, **asked):
    seen = []
    run.on_phase = lambda phase: seen.append((run.step, phase))
    run.train(**asked)
    return seen


def test_a_trainer_tells_what_it_begins_in_the_order_in_which_it_does_it(tmp_path):
    run = trainer(tmp_path, eval_steps=1, sample_steps=2, save_steps=1)
    own = phases_of(run, evaluate=lambda student: {"strict": 1.0}, sample=lambda progress: [])
    step = [(0, "writing"), (0, "updating"), (1, "evaluating"), (1, "saving")]
    last = [(1, "writing"), (1, "updating"), (2, "evaluating"), (2, "sampling"), (2, "saving")]
    assert own == [(0, "saving"), (0, "sampling"), *step, *last]
    assert {phase for _, phase in own} == ALL <= set(live.PHASES)


def test_a_step_on_the_data_reads_and_a_mix_that_looks_at_a_loss_says_so(tmp_path):
    own = phases_of(trainer(tmp_path, mix=Generated(0.0)))
    assert [phase for _, phase in own] == ["saving", *["reading", "updating"] * 2, "saving"]
    adaptive = trainer(tmp_path / "b")
    adaptive.validation = toy_examples()[:2]
    adaptive.config = dataclasses.replace(adaptive.config, mix=Adaptive(validation_steps=1))
    adaptive.reading.config = adaptive.config
    adaptive.reading.memory = adaptive.config.mix.memory()
    assert "validating" in [phase for _, phase in phases_of(adaptive)]


def test_a_view_says_what_the_run_does_now_and_since_when():
    now, pictures = [0.0], []
    run = view(pictures.append, clock=lambda: now[0])
    for phase, words in live.PHASES.items():
        run.on_phase(phase)
        now[0] += 65
        shown = drawn(pictures[-1])["now"]
        assert words in shown and "0:01:05" in shown
    run.end()
    assert "done" in drawn(pictures[-1])["now"]


def test_lines_name_what_begins_and_of_a_step_only_what_takes_long(screen):
    now, out = [0.0], screen(False)
    trained = SimpleNamespace(step=3, total_steps=8.0)
    run = live.TrainLines(trained, "strict", lambda: now[0])
    run.on_phase("writing")
    run.on_phase("updating")
    run.on_phase("evaluating")
    now[0] += SAY_EVERY - 1
    run.on_round(DecodeCost(seconds=2.0, kept_tokens=64))
    assert out.getvalue().splitlines() == ["train …", "step 3/8: evaluating on the held-out questions …"]
    now[0] += 1
    run.on_round(DecodeCost(seconds=2.0, kept_tokens=64))
    run.on_round(DecodeCost(seconds=2.0, kept_tokens=65))
    assert out.getvalue().splitlines()[2:] == ["step 4/8: writing text: 64 tokens, 32 tokens/s"]
    now[0] += SAY_EVERY
    run.on_phase("updating")
    assert out.getvalue().splitlines()[3:] == ["step 4/8: updating the student …"]


def test_a_view_that_fails_to_follow_a_phase_stops_no_run(tmp_path, screen, monkeypatch, capsys):
    screen(False)
    monkeypatch.setattr(live.TrainLines, "on_phase", lambda self, phase: 1 / 0)
    run = trainer(tmp_path)
    live.train(run, "strict", run.train)
    assert run.step == 2 and "division by zero" in capsys.readouterr().err
