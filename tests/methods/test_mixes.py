"""Which text a step reads: shares, replay, pairs, a second corpus, budgets; all from (seed, step) and from the checkpoint."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from test_trainer import lines, trainer, weights, without_times
from tiny import VOCAB, byte_level_tokenizer, toy_examples, toy_pair

from switchkd import StudentOnly, Switch
from switchkd.base.errors import ConfigError, DataError
from switchkd.data.texts import load_text
from switchkd.decoding.rollouts import Rollouts
from switchkd.methods.mixes import Adaptive, Generated, GroundTruth, Pairs, TeacherText
from switchkd.methods.objective import CrossEntropy
from switchkd.methods.objectives import TAID, DistiLLM2, ForwardKL
from switchkd.methods.policies import CAOPD, TRB
from switchkd.methods.policy import REFERENCE, STUDENT, TEACHER
from switchkd.teachers.states import TeacherCache

ALWAYS = Adaptive(share=1.0, capacity=8, validation_steps=3)


def shares(mix, progress, buffered, share):
    """How often each source is chosen, over a grid of chances."""
    memory = {**mix.memory(), "share": share}
    chosen = [mix.source((i + 0.5) / 1000, progress, buffered, memory) for i in range(1000)]
    return {source: chosen.count(source) / 1000 for source in set(chosen)}


def test_adaptive_shares_are_distillms():
    mix = Adaptive(capacity=100)
    assert shares(mix, 0.0, 0, 0.0) == {"examples": 1.0}
    assert shares(mix, 0.25, 100, 0.4) == {"policy": 0.3, "replay": 0.1, "examples": 0.6}
    assert shares(mix, 1.0, 100, 0.4) == {"replay": 0.4, "examples": 0.6}
    assert shares(mix, 0.25, 99, 0.4) == {"policy": 0.4, "examples": 0.6}  # the buffer is filled first


def test_adaptive_share_rises_with_the_validation_loss():
    mix = Adaptive(share=0.85, increment=0.1, tolerance=0.1)
    memory = mix.remember(mix.memory(), 2.0)
    assert memory == {"share": 0.85, "loss": 2.0}
    assert mix.remember(memory, 2.09) == memory and mix.remember(memory, 1.0) == memory
    memory = mix.remember(memory, 2.1)
    assert memory == {"share": pytest.approx(0.95), "loss": 2.1}
    assert mix.remember(memory, 2.19) == memory
    assert mix.remember(memory, 9.0) == {"share": 1.0, "loss": 9.0}


@pytest.mark.parametrize("make", [lambda: Adaptive(share=1.1), lambda: Adaptive(capacity=0), lambda: Generated(-0.1)])
def test_wrong_settings_are_explained(make):
    with pytest.raises(ConfigError, match="got"):
        make()


def test_fixed_mixes():
    assert shares(GroundTruth(), 0.5, 0, 0) == shares(TeacherText(), 0.5, 0, 0) == {"examples": 1.0}
    assert shares(Pairs(), 0.5, 0, 0) == {"pairs": 1.0}
    assert shares(Generated(0.3), 0.5, 0, 0) == {"policy": 0.3, "examples": 0.7}


def rows_of(t, steps=1):
    """The rows that the loss of each step sees, in order, and each step's source."""
    seen, original = [], t.learner.loss
    t.learner.loss = lambda rows, objective: seen[-1].extend(rows) or original(rows, objective)
    sources = []
    for _ in range(steps):
        seen.append([])
        sources.append(t.train_step()[0]["source"])
    return seen, sources


def texts(rows):
    return [(row.prompt_ids, row.completion_ids, row.speakers) for row in rows]


def test_replayed_rows_are_rows_that_were_generated(tmp_path):
    t = trainer(tmp_path, mix=ALWAYS, validation=toy_examples(3), max_steps=12)
    t._look_at_validation = lambda: None  # its rows are not rows of a step
    seen, sources = rows_of(t, 12)
    assert sources[:2] == ["policy", "policy"] and {"policy", "replay"} == set(sources[2:])
    assert len(t.reading.replay) == 8 and all(rollout.said is None for rollout in t.reading.replay)
    generated = []
    for rows, source in zip(seen, sources, strict=True):
        if source == "policy":
            generated = [*generated, *texts(rows)][-8:]
        else:
            assert all(text in generated for text in texts(rows))
            assert len({json.dumps(text) for text in texts(rows)}) == 4  # drawn without replacement
    replays = [texts(rows) for rows, source in zip(seen, sources, strict=True) if source == "replay"]
    assert len(replays) > 1 and any(a != b for a, b in pairwise(replays))


def test_the_validation_loss_is_the_mean_negative_log_likelihood(tmp_path):
    """Of the student in evaluation mode, over all tokens, whatever the batch; looking changes nothing else."""
    examples = toy_examples(5)
    t = trainer(tmp_path, toy_pair("gpt2"), mix=ALWAYS, validation=examples, per_device_train_batch_size=2)
    before = weights(t)
    t._look_at_validation()
    nll, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.completion_ids])
        logs = t.pair.student(ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        nll -= logs.gather(1, torch.tensor(example.completion_ids).unsqueeze(1)).sum().item()
        count += len(example.completion_ids)
    assert t.reading.memory["loss"] == pytest.approx(nll / count, rel=1e-10)
    assert not t.pair.student.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(t).values(), strict=True))
    assert all(p.grad is None for p in t.pair.student.parameters())


def test_adaptive_needs_validation_examples(tmp_path):
    with pytest.raises(ConfigError, match="give validation_file"):
        trainer(tmp_path, mix=Adaptive())


def test_pairs_are_the_stored_text_and_a_fresh_one_of_the_same_prompts(tmp_path):
    stored = [
        dataclasses.replace(example, speakers=[TEACHER] * len(example.completion_ids)) for example in toy_examples()
    ]
    t = trainer(tmp_path, examples=stored, mix=Pairs(), policy=StudentOnly(), objective=DistiLLM2())
    [rows], _ = rows_of(t)
    assert len(rows) == 8
    for example, rollout in zip(rows[:4], rows[4:], strict=True):
        assert example in stored and example.prompt_ids == rollout.prompt_ids
        assert set(example.speakers) == {TEACHER} and set(rollout.speakers) == {STUDENT}


def test_examples_are_spoken_by_the_data():
    assert toy_examples(2)[1].speakers == [REFERENCE] * len(toy_examples(2)[1].completion_ids)


@pytest.mark.parametrize("objective", [ForwardKL(), TAID(s=0.2, step=0.3)])
def test_replay_shares_and_schedules_survive_a_stop(tmp_path, objective):
    settings = {"mix": dataclasses.replace(ALWAYS, share=0.6), "objective": objective, "save_steps": 1, "max_steps": 14}
    straight = trainer(tmp_path / "straight", validation=toy_examples(3), **settings)
    straight.train()
    part = trainer(tmp_path / "parts", validation=toy_examples(3), **settings)
    with pytest.raises(KeyboardInterrupt):
        part.train(lambda metrics, _: (_ for _ in ()).throw(KeyboardInterrupt) if metrics["step"] == 11 else None)
    again = trainer(tmp_path / "parts", validation=toy_examples(3), **settings)
    again.resume()
    assert again.step == 10 and again.reading.replay
    again.train()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_times(lines(tmp_path / "parts", name)) == without_times(lines(tmp_path / "straight", name))
    assert {m["source"] for m in lines(tmp_path / "parts", "metrics.jsonl")} == {"examples", "policy", "replay"}
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))
    assert straight.reading.replay == again.reading.replay


def test_a_second_corpus_adds_its_own_mean(tmp_path):
    """Gradient and values: objective's mean + weight times the corpus' mean, each over its own tokens."""
    corpus = [dataclasses.replace(e, prompt_ids=e.prompt_ids[:1]) for e in toy_examples(9)[4:]]
    gradients = {}

    def step(name, **settings):
        pair = toy_pair("gpt2")  # whose norms do not go through fp32
        for module in pair.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        t = trainer(tmp_path / name, pair, mix=GroundTruth(), max_grad_norm=0.0, **settings)
        t.learner.optimizer.register_step_pre_hook(
            lambda *_: gradients.update({name: [p.grad.clone() for p in t.pair.student.parameters()]})
        )
        return t.train_step()[0]

    both = step("both", corpus=corpus, lm_weight=0.3)
    plain = step("plain")
    alone = step("alone", examples=corpus, objective=CrossEntropy())
    assert both["loss"] == pytest.approx(plain["loss"], rel=1e-12)
    assert both["lm_loss"] == pytest.approx(alone["loss"], rel=1e-12) and "lm_loss" not in plain
    for a, b, c in zip(gradients["both"], gradients["plain"], gradients["alone"], strict=True):
        torch.testing.assert_close(a, b + 0.3 * c, atol=1e-12, rtol=1e-9)


def test_schedules_hear_the_objective_and_not_the_corpus(tmp_path):
    t = trainer(tmp_path, mix=GroundTruth(), objective=TAID(), corpus=toy_examples(9))
    metrics, _ = t.train_step()
    assert t.objective_memory["loss"] == metrics["loss"] != metrics["lm_loss"]


def test_plain_text_is_all_completion_but_its_first_token(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "What is two and two?"}\n{"text": ""}\n\n{"text": "abc"}\n')
    tokenizer = byte_level_tokenizer()
    first, second = load_text(str(file), tokenizer, 4)
    assert (first.prompt_ids + first.completion_ids) == tokenizer("What is two and two?")["input_ids"][:4]
    assert len(first.prompt_ids) == 1 and first.truncated and not second.truncated
    assert (second.id, second.source) == (2, f"{file}:4")
    for content, words in (
        ('{"text": "a"}\n', "corpus.jsonl: no usable row"),
        ('{"text": 3}\n', "corpus.jsonl:1: field 'text'"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=words):
            load_text(str(file), tokenizer, 6)


def test_a_budget_grows_over_training(tmp_path):
    t = trainer(tmp_path, mix=Generated(1.0), max_new_tokens=9, max_new_tokens_start=3, max_steps=4, learning_rate=0.0)
    longest = [max(len(r.completion_ids) for r in t.train_step()[1]) for _ in range(4)]
    assert longest == [3, 5, 7, 9]
    steady = trainer(tmp_path, mix=Generated(1.0), max_new_tokens=3)
    assert {max(len(r.completion_ids) for r in steady.train_step()[1]) for _ in range(3)} == {3}


@pytest.mark.parametrize(
    "policy,setting,expected",
    [
        (CAOPD(alpha=0.8, alpha_end=0.2, hold=0.0), "alpha", [0.8, 0.4, 0.2]),
        (TRB(budget=0.8, warmup=8), "budget", [0.8, 0.4, 0.0]),
        (Switch(schedule="linear"), "horizon", [6, 6, 6]),
    ],
)
def test_policies_get_the_training_step_and_the_length(tmp_path, monkeypatch, policy, setting, expected):
    used = []
    monkeypatch.setattr(
        "switchkd.training.reading.decode_examples",
        lambda *arguments, **_: used.append(arguments[2].policy) or Rollouts(),
    )
    t = trainer(tmp_path, policy=policy, mix=Generated(1.0), max_steps=9, max_new_tokens_start=2)
    for t.step in (0, 4, 8):
        t.reading.generate([], t.step, t.schedule, None)
    assert [getattr(policy, setting) for policy in used] == pytest.approx(expected)


def test_objectives_that_ask_no_teacher_run_none(tmp_path):
    t = trainer(tmp_path, mix=GroundTruth(), objective=CrossEntropy())
    t.pair.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    metrics, _ = t.train_step()
    assert metrics["source"] == "examples" and metrics["loss"] > 0


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_runs_on_fixed_text_read_the_teacher_from_a_cache(tmp_path, kind):
    """The same losses and weights with a teacher that is never run; all ids kept, top_k is exact too."""
    settings = {"mix": GroundTruth(), "teacher_cache": kind, "teacher_cache_top_k": VOCAB, "max_steps": 5}
    live = trainer(tmp_path / "live", mix=GroundTruth(), max_steps=5)
    live.train()
    cache = TeacherCache.build(toy_pair(), toy_examples(), tmp_path / "cache", kind, top_k=VOCAB)
    kept = trainer(tmp_path / "kept", cache=cache, **settings)
    kept.pair.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    kept.train()
    for a, b in zip(lines(tmp_path / "live", "metrics.jsonl"), lines(tmp_path / "kept", "metrics.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    for a, b in zip(weights(live).values(), weights(kept).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"mix": Generated(0.5)}, "is for fixed text, and the mix generated generates"),
        ({"objective": CrossEntropy()}, "cross_entropy asks no teacher"),
        ({"objective": TAID(), "teacher_cache": "top_k"}, "use teacher_cache 'hidden'"),
        ({"objective": ForwardKL(temperature=2.0), "teacher_cache": "top_k"}, "at temperature 1"),
    ],
)
def test_a_cache_that_cannot_serve_is_refused(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, **{"mix": GroundTruth(), "teacher_cache": "hidden", **settings})
