"""A teacher with a prompt of its own: decoding, states, loss, stored work and settings read it, and nothing else changes."""

import dataclasses
import json
import random

import pytest
import torch
from test_adapters import LORA, self_pair
from test_trainer import gradient_step, lines, trainer, weights, without_times
from tiny import (
    CHATML,
    POLICIES,
    VOCAB,
    assert_same,
    byte_level_tokenizer,
    save_llama,
    tiny_model,
    toy_examples,
    toy_pair,
)

from switchkd import Rollout, StudentOnly, Switch, TeacherOnly, decode, decode_reference
from switchkd.base.errors import CheckpointError, ConfigError, DataError
from switchkd.cli.main import main
from switchkd.data.examples import Example
from switchkd.data.fields import Message
from switchkd.data.settings import DataConfig
from switchkd.data.templates import TeacherReads, alpaca_prompt
from switchkd.data.texts import collate, teacher_prompt_limit, tokenize
from switchkd.decoding.pace import BLOCKS, Pace
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.forward.head import response_hidden
from switchkd.methods.divergences import forward_kl, log_probs
from switchkd.methods.mixes import Adaptive, Generated, GroundTruth, Pairs
from switchkd.methods.objectives import DistiLLM2, ForwardKL
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.models.pair import load_pair
from switchkd.runner.architecture import cache_bytes_per_token
from switchkd.runs.opening import check_context, load_task, load_train
from switchkd.runs.preflight import memory_estimate
from switchkd.teachers.states import TeacherCache
from switchkd.teachers.store import fingerprint
from switchkd.training.optimizer import Masters
from switchkd.training.settings import TrainConfig
from switchkd.writing.teacher_texts import teacher_texts

PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [5, 5], [10, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]
OWN = [[6, 2], [8, 9, 10, 2, 3, 7, 7, 4, 11, 12], [12], [5, 5], [9, 3, 4, 5, 6, 17, 2]]
BUDGET = 9


def with_own_prompts(examples):
    """Teacher prompts shorter and longer than the student's; every fourth row has none."""
    return [
        e if e.id % 4 == 3 else dataclasses.replace(e, teacher_prompt_ids=own_prompt(e.id)) for e in examples
    ]  # fmt: skip


def own_prompt(i):
    return [2 + (7 * i + 3 * j) % 20 for j in range(1 + (i * 3) % 8)]


# --- decoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(family, policy):
    student, teacher = tiny_model(family, 1), tiny_model(family, 2)
    reference = decode_reference(student, teacher, PROMPTS, POLICIES[policy], BUDGET, teacher_prompt_ids=OWN)
    assert [r.prompt_ids for r in reference] == PROMPTS and [r.teacher_prompt_ids for r in reference] == OWN
    combinations = [(1, 5, "auto"), (4, 2, "student"), (4, 3, "teacher"), (8, 1, "auto"), ("auto", None, "auto")]
    for block, batch, drafter in combinations:
        out = decode(
            student, teacher, PROMPTS, POLICIES[policy], BUDGET, block_size=block, batch_size=batch, drafter=drafter,
            teacher_prompt_ids=OWN, graphs=block == 4,
        )  # fmt: skip
        assert_same(out, reference)
        assert [r.teacher_prompt_ids for r in out] == OWN


@pytest.mark.parametrize("policy", POLICIES)
def test_any_choice_of_drafter_and_length_gives_the_same_text(policy, monkeypatch):
    pair, choices = (tiny_model("llama", 1), tiny_model("gemma3-hybrid", 2)), random.Random(4)

    def plan(self, rows, left):
        return self.round_of(choices.choice([STUDENT, TEACHER]), choices.randint(1, min(6, left)), frozenset(rows))

    monkeypatch.setattr(Pace, "plan", plan)
    reference = decode_reference(*pair, PROMPTS, POLICIES[policy], BUDGET, teacher_prompt_ids=OWN)
    assert_same(decode(*pair, PROMPTS, POLICIES[policy], BUDGET, batch_size=3, teacher_prompt_ids=OWN), reference)


def test_each_model_reads_its_own_prompt():
    """A lone model writes what it writes for its own prompt, and the student's prompts given twice change nothing."""
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    for policy, read in ((StudentOnly(), PROMPTS), (TeacherOnly(), OWN)):
        plain = decode(*pair, read, policy, BUDGET)
        own = decode(*pair, PROMPTS, policy, BUDGET, teacher_prompt_ids=OWN)
        assert [r.completion_ids for r in own] == [r.completion_ids for r in plain]
    plain = decode(*pair, PROMPTS, POLICIES["spell"], BUDGET)
    assert_same(decode(*pair, PROMPTS, POLICIES["spell"], BUDGET, teacher_prompt_ids=PROMPTS), plain)
    assert [r.teacher_prompt_ids for r in plain] == [None] * len(PROMPTS)


@pytest.mark.parametrize("block,drafter", [(1, "auto"), (4, "student"), (4, "teacher")])
def test_kept_states_are_those_of_a_fresh_forward_on_the_teachers_prompt(block, drafter):
    student, teacher = tiny_model("gpt2", 1), tiny_model("llama", 2)
    rollouts = decode(
        student, teacher, PROMPTS, POLICIES["mix_in"], BUDGET, block_size=block, drafter=drafter, batch_size=2,
        teacher_prompt_ids=OWN, keep_hidden=True,
    )  # fmt: skip
    for rollout, own in zip(rollouts, OWN, strict=True):
        fresh = response_hidden(teacher, collate([(own, rollout.completion_ids)]))
        torch.testing.assert_close(rollout.said, fresh, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("engine", [decode, decode_reference])
def test_teacher_prompts_that_cannot_be_read_stop_their_row_alone(engine):
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    bad = [OWN[0], [], [3, VOCAB], [5] * 60, OWN[4]]
    rollouts = engine(*pair, PROMPTS, POLICIES["spell"], BUDGET, teacher_prompt_ids=bad)
    assert [r.stop_reason for r in rollouts][1:4] == ["empty_prompt", "invalid_token", "prompt_too_long"]
    for rollout, words in zip(rollouts[1:4], (
        "sample 1 has an empty teacher prompt",
        "sample 2 has token id 23 in its teacher prompt",
        "60 teacher prompt tokens + max_new_tokens 9 exceed the teacher's context of 64",
    ), strict=True):  # fmt: skip
        assert words in rollout.error and not rollout.completion_ids
    alone = decode_reference(
        *pair, [PROMPTS[0], PROMPTS[4]], POLICIES["spell"], BUDGET, sample_ids=[0, 4],
        teacher_prompt_ids=[OWN[0], OWN[4]],
    )  # fmt: skip
    assert_same([rollouts[0], rollouts[4]], alone)
    [long] = engine(*pair, [[5] * 60], StudentOnly(), BUDGET, teacher_prompt_ids=[[5]])
    assert "60 prompt tokens + max_new_tokens 9 exceed the student's context" in long.error
    with pytest.raises(ConfigError, match="1 teacher_prompt_ids for 2 prompts; give one list for each"):
        engine(*pair, PROMPTS[:2], StudentOnly(), BUDGET, teacher_prompt_ids=OWN[:1])


def test_budgets_of_zero_and_ends_of_text():
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    for budget, eos in ((0, None), (1, []), (BUDGET, [2, 5, 9, 14])):
        settings = {"eos_token_ids": eos, "teacher_prompt_ids": OWN}
        reference = decode_reference(*pair, PROMPTS, POLICIES["parity"], budget, **settings)
        assert_same(decode(*pair, PROMPTS, POLICIES["parity"], budget, block_size=4, **settings), reference)


def test_a_memory_budget_counts_the_teachers_prompt():
    pair = tiny_model("llama", 1), tiny_model("llama", 2)
    bytes_per_token = cache_bytes_per_token(pair[0])
    row = 2 * 10 * bytes_per_token + max(BLOCKS) * VOCAB * 16
    settings = {"memory_gib": (row + bytes_per_token) / 2**30}
    decode(*pair, [[3, 4]], Switch(), 8, **settings)
    with pytest.raises(ConfigError, match=r"one row of 58 tokens needs .* GiB"):
        decode(*pair, [[3, 4]], Switch(), 8, teacher_prompt_ids=[[5] * 50], **settings)


def test_rollouts_as_json():
    [rollout] = decode(tiny_model(), tiny_model(seed=1), [[3]], Switch(), 4, teacher_prompt_ids=[[4, 5]])
    record = json.loads(json.dumps(rollout.to_json()))
    assert record["teacher_prompt_ids"] == [4, 5]
    again = Rollout.from_json(record)
    assert again.teacher_prompt_ids == [4, 5] and again.teacher_reads == [4, 5]
    before = {k: v for k, v in record.items() if k != "teacher_prompt_ids"}  # of a run that knew of none
    assert Rollout.from_json(before).teacher_prompt_ids is None and Rollout.from_json(before).teacher_reads == [3]


# --- training -----------------------------------------------------------------------------------------------------


def dense(pair, rows):
    """Summed forward KL of the rows one by one, by plain logits; and how many tokens they have."""
    total, count = 0.0, 0
    for row in rows:
        own = row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids
        n = len(row.completion_ids)
        with torch.no_grad():
            logp = log_probs(pair.teacher(torch.tensor([own + row.completion_ids])).logits[0, -n - 1 : -1])
        logq = log_probs(pair.student(torch.tensor([row.prompt_ids + row.completion_ids])).logits[0, -n - 1 : -1])
        total, count = total + forward_kl(logp, logq).sum(), count + n
    return total, count


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("source", ["policy", "examples"])
def test_loss_and_gradient_are_dense_ones_whatever_the_split(tmp_path, family, source):
    examples = with_own_prompts(toy_examples())
    runs = []
    for size in (8, 4, 1):
        gradients, metrics, rollouts = gradient_step(
            tmp_path, pair=still(toy_pair(family)), examples=examples, mix=Generated(float(source == "policy")),
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_grad_norm=0.0,
        )  # fmt: skip
        assert metrics["source"] == source
        runs.append((gradients, metrics, rollouts))
    t = trainer(tmp_path, still(toy_pair(family)), examples, per_device_train_batch_size=8)
    rows = runs[0][2] or t.reading.next(examples)
    assert len({len(row.teacher_reads) - len(row.prompt_ids) for row in rows}) > 2
    total, count = dense(t.pair, rows)
    (total / count).backward()
    plain, _ = dense(t.pair, [dataclasses.replace(row, teacher_prompt_ids=None) for row in rows])
    assert abs(plain.item() - total.item()) > 0.1  # the teacher's prompt matters
    for gradients, metrics, rollouts in runs:
        assert [r.to_json() for r in rollouts] == [r.to_json() for r in runs[0][2]]
        assert metrics["loss"] == pytest.approx((total / count).item(), rel=1e-6)
        for name, parameter in t.pair.student.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-5)


def still(pair):
    """The pair without dropout."""
    for module in pair.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return pair


def test_replayed_rows_and_pairs_are_judged_on_the_teachers_prompt(tmp_path):
    examples = with_own_prompts(toy_examples())
    t = trainer(tmp_path, examples=examples, mix=Adaptive(share=1.0, capacity=8), validation=toy_examples(3))
    t.train_step()
    assert len({r.teacher_prompt_ids is None for r in t.reading.replay}) == 2
    rows = t.reading.replayed(t.step)
    assert t.learner.loss(rows, ForwardKL()).item() == pytest.approx(dense(t.pair, rows)[0].item(), rel=1e-9)
    t = trainer(tmp_path, examples=examples, mix=Pairs(), objective=DistiLLM2())
    rows, fresh = t.reading.rows("pairs", t.step, t.schedule)
    assert len(rows) == 2 * len(fresh)
    assert t.learner.loss(rows, ForwardKL()).item() == pytest.approx(dense(t.pair, rows)[0].item(), rel=1e-9)


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path):
    settings = {
        "examples": with_own_prompts(toy_examples()), "validation": toy_examples(3), "save_steps": 1, "max_steps": 14,
        "mix": Adaptive(share=0.6, capacity=8, validation_steps=3),
    }  # fmt: skip
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    part = trainer(tmp_path / "parts", **settings)
    with pytest.raises(KeyboardInterrupt):
        part.train(lambda metrics, _: (_ for _ in ()).throw(KeyboardInterrupt) if metrics["step"] == 11 else None)
    again = trainer(tmp_path / "parts", **settings)
    again.resume()
    assert again.step == 10 and any(rollout.teacher_prompt_ids for rollout in again.reading.replay)
    again.train()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_times(lines(tmp_path / "parts", name)) == without_times(lines(tmp_path / "straight", name))
    assert {m["source"] for m in lines(tmp_path / "parts", "metrics.jsonl")} == {"examples", "policy", "replay"}
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))
    assert straight.reading.replay == again.reading.replay


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_new_adapter_learns_from_its_own_base_that_sees_more(tmp_path, lmbda):
    """On equal prompts there is no divergence and nothing to learn; with its own prompt the base is another teacher."""
    settings = {"mix": Generated(lmbda), "max_steps": 60, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    equal, _ = trainer(tmp_path / "equal", self_pair(stirred=False), **settings).train_step()
    assert equal["loss"] == pytest.approx(0.0, abs=1e-12)
    examples = [dataclasses.replace(e, teacher_prompt_ids=own_prompt(e.id)) for e in toy_examples(4)]
    t = trainer(tmp_path / "own", self_pair(stirred=False), examples, **settings)
    before = [p.clone() for p in t.pair.teacher.parameters()]
    first = t.reading.generate(t.reading.next(t.examples), t.step, t.schedule, None)
    assert max(d for r in first for d in r.divergences) > 1e-2
    t.train()
    losses = [m["loss"] for m in lines(tmp_path / "own", "metrics.jsonl")]
    assert losses[0] > 1e-2 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(torch.equal(a, b) for a, b in zip(before, t.pair.teacher.parameters(), strict=True))


def test_in_evaluation_each_model_reads_its_own_prompt():
    pair, settings, task = toy_pair(), EvalSettings(4, batch_size=3), TASKS["references"]
    pair.tokenizer.batch_decode = lambda rows, **_: [str(row) for row in rows]
    own, plain = (
        evaluate(pair, pair.student, examples, task, settings)
        for examples in (with_own_prompts(toy_examples(6)), toy_examples(6))
    )
    assert own.completions == plain.completions and own.means()["perplexity"] == plain.means()["perplexity"]
    assert own.means()["forward_kl"] != plain.means()["forward_kl"], "what it is compared with reads another"


# --- stored work --------------------------------------------------------------------------------------------------


def test_stored_text_is_the_teachers_on_its_own_prompt_and_bound_to_it(tmp_path):
    examples = with_own_prompts(toy_examples(9))
    made = teacher_texts(
        toy_pair(), examples, tmp_path / "text", DecodeSettings(TeacherOnly(), max_new_tokens=6, seed=5, batch_size=2)
    )
    pair = toy_pair()
    fresh = decode_reference(
        pair.student, pair.teacher, [e.teacher_reads for e in examples], TeacherOnly(), 6, seed=5,
        sample_ids=[e.id for e in examples], eos_token_ids=pair.eos_token_ids,
    )  # fmt: skip
    assert [e.completion_ids for e in made] == [r.completion_ids for r in fresh]
    assert [e.teacher_prompt_ids for e in made] == [e.teacher_prompt_ids for e in examples]
    with pytest.raises(CheckpointError, match="examples differs"):
        teacher_texts(pair, toy_examples(9), tmp_path / "text", DecodeSettings(TeacherOnly(), max_new_tokens=6, seed=5))


def test_the_fingerprint_sees_teacher_prompts_and_is_as_before_without():
    pair, examples = toy_pair(), toy_examples(3)

    def digest(*own):
        rows = [dataclasses.replace(e, teacher_prompt_ids=ids) for e, ids in zip(examples, own, strict=True)]
        return fingerprint(pair, rows, completions=True)["examples"]

    found = [digest(*own) for own in ((None, None, None), ([], None, None), ([4], None, None), (None, [4], None))]
    assert len({*found, digest([4, 5], None, None), digest(*(e.prompt_ids for e in examples))}) == 6
    assert found[0] == "062a06286ff648db31d32bf1539b84987ee5709d8c38517522dccc76be3fea6a"


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_the_cache_is_of_the_teachers_prompt(tmp_path, kind):
    examples = with_own_prompts(toy_examples())
    cache = TeacherCache.build(toy_pair(), examples, tmp_path / "cache", kind, top_k=VOCAB)
    t = trainer(
        tmp_path, examples=examples, cache=cache, mix=GroundTruth(), teacher_cache=kind, teacher_cache_top_k=VOCAB
    )
    t.pair.teacher.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    rows = t.reading.next(t.examples)
    expected, _ = dense(toy_pair(), [dataclasses.replace(row, said=None) for row in rows])
    assert t.learner.loss(rows, ForwardKL()).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(CheckpointError, match="examples differs"):
        TeacherCache.open(toy_pair(), toy_examples(), tmp_path / "cache", kind, top_k=VOCAB)


# --- settings and data --------------------------------------------------------------------------------------------

TELLING = "{prompt}\n\nA correct answer is: {completion}\nExplain it."


def example(*turns, **fields):
    messages = tuple(Message(role, text) for role, text in turns)
    values = {"id": 0, "completion": "It is {4}.", "references": ("It is {4}.",), "source": "here:1"}
    return Example(messages=messages, **values | fields)


def tokenized(
    examples, template, teacher_prompt=TELLING, max_prompt_length=300, max_completion_length=40, tokenizer=None
):
    return tokenize(
        examples, tokenizer or byte_level_tokenizer(), template=template, max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length, teacher=TeacherReads(teacher_prompt),
    )  # fmt: skip


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
def test_the_teachers_prompt_goes_through_the_same_template(template):
    tokenizer, question = byte_level_tokenizer(), "What is {two} and two?"
    [row], counts = tokenized([example(("user", question), input="Add.")], template)
    told = f"{question}\n\nA correct answer is: It is {{4}}.\nExplain it."
    text = {
        "chat": f"<|im_start|>user\n{told}\n\nAdd.<|im_end|>\n<|im_start|>assistant\n",
        "alpaca": alpaca_prompt(told, "Add."),
        "none": f"{told}\n\nAdd.",
    }[template]
    assert tokenizer.decode(row.teacher_prompt_ids) == text
    assert tokenizer.decode(row.prompt_ids) == text.replace(told, question)
    assert counts.long_teacher_prompts == 0
    [plain], _ = tokenized([example(("user", question), input="Add.")], template, teacher_prompt="")
    assert plain == dataclasses.replace(row, teacher_prompt_ids=None)


def test_the_last_user_turn_is_replaced_and_no_other():
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "Two and two?")]
    [row], _ = tokenized([example(*turns)], "chat", "Answer {completion} for {prompt}")
    text = byte_level_tokenizer().decode(row.teacher_prompt_ids)
    assert text.count("Hello") == 1 and "user\nAnswer It is {4}. for Two and two?<|im_end|>" in text
    with pytest.raises(
        DataError, match=r"here:1: no user turn that teacher_prompt could replace \(roles: system, tool\)"
    ):
        tokenized([example(("system", "a"), ("tool", "b"))], "chat")


def test_long_prompts_of_the_teacher_are_dropped_and_counted():
    """The limit holds a prompt and completion of the longest kind and the template's own words; twice the prompt is too long."""
    tokenizer, rows = byte_level_tokenizer(), [example(("user", "Two?" * (1 + 30 * i)), id=i) for i in range(3)]
    longest = max(len(row.prompt_ids) for row in tokenized(rows, "chat", max_prompt_length=10**4)[0])
    kept, counts = tokenized(rows, "chat", max_prompt_length=longest)
    assert [row.id for row in kept] == [0, 1, 2] and counts.long_teacher_prompts == 0
    limit = teacher_prompt_limit(tokenizer, TeacherReads(TELLING), longest, 40)
    assert limit == longest + 40 + len(tokenizer(TELLING)["input_ids"]) > max(len(r.teacher_prompt_ids) for r in kept)
    kept, counts = tokenized(rows, "chat", "{prompt} {prompt}", max_prompt_length=longest)
    assert [row.id for row in kept] == [0, 1] and (counts.long_prompts, counts.long_teacher_prompts) == (0, 1)
    with pytest.raises(DataError, match=r"none of 1 .* 1 prompts of the teacher are longer than \d+ tokens"):
        tokenized(rows[2:], "chat", "{prompt} {prompt}", max_prompt_length=longest)
    assert teacher_prompt_limit(tokenizer, TeacherReads(), 12, 40) == 12


@pytest.mark.parametrize(
    "text,words",
    [
        ("Be brief.", "has none of the fields"),
        ("{{prompt}}", "has none of the fields"),
        ("{answer}", r"unknown field \{answer\}; known are \{prompt\} and \{completion\}"),
        ("{prompt} {}", r"unknown field \{\}"),
        ("{prompt!r}", r"unknown field \{prompt!r\}"),
        ("{completion:>9}", r"unknown field \{completion:>9\}"),
        ("{prompt} {", "write {{ and }} for braces"),
    ],
)
def test_templates_that_say_nothing_or_too_much(text, words):
    for make in (TrainConfig, DataConfig):
        with pytest.raises(ConfigError, match=words):
            make(teacher_prompt=text)
    with pytest.raises(ConfigError, match=words):
        tokenized([example(("user", "a"))], "none", text)


@pytest.fixture
def place(tmp_path):
    """A base model and a data file, as flags."""
    rows = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}."} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = save_llama(tmp_path / "base", byte_level_tokenizer(template=CHATML), 1)
    file = str(tmp_path / "data.jsonl")
    return ["--student-model-name-or-path", base, "--train-file", file, "--eval-file", file, "--template", "chat"]


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


SMALL = flags(
    max_prompt_length=90, max_new_tokens=8, max_completion_length=24, eval_samples=2, eval_max_new_tokens=4,
    per_device_train_batch_size=4, max_steps=2, teacher_model_name_or_path="base",
)  # fmt: skip


def test_self_distillation_from_the_command_line(tmp_path, place):
    """The base of a new adapter sees the answer; the run says so, and generating from its file does it too."""
    run = tmp_path / "run"
    told = flags(teacher_prompt=TELLING, output_dir=run)
    assert main(["train", "on_policy", *place, *SMALL, "--use-peft", *told]) == 0
    rollouts = lines(run, "rollouts.jsonl")
    tokenizer = byte_level_tokenizer()
    for rollout in rollouts:
        assert "A correct answer is: It is" in tokenizer.decode(rollout["teacher_prompt_ids"])
        assert "A correct" not in tokenizer.decode(rollout["prompt_ids"])
    assert lines(run, "metrics.jsonl")[0]["loss"] > 0
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(run), *flags(limit=2, output_file=out, policy="switch")]) == 0
    assert all("A correct" in tokenizer.decode(r["teacher_prompt_ids"]) for r in lines(tmp_path, "out.jsonl"))
    assert main(["generate", str(run), *flags(prompt="Two?", output_file=out)]) == 0
    assert [r["teacher_prompt_ids"] for r in lines(tmp_path, "out.jsonl")] == [None]


def test_contexts_and_memory_count_the_teachers_prompt(place):
    base = place[1]
    pair = load_pair("base", base, device="cpu", lora=LORA)
    plain = TrainConfig(max_prompt_length=200, max_completion_length=150, max_new_tokens=100, use_peft=True)
    check_context(plain, pair)
    told = dataclasses.replace(plain, teacher_prompt="{prompt} {completion}")
    limit = teacher_prompt_limit(pair.tokenizer, TeacherReads(told.teacher_prompt), 200, 150)
    with pytest.raises(
        ConfigError, match=rf"under teacher_prompt of up to {limit} \+ completion 150 .* the teacher's context"
    ):
        check_context(told, pair)
    texts = [memory_estimate(config, pair, Masters(pair.student))["decoding"] for config in (plain, told)]
    rows = min(plain.generation_batch_size, plain.per_device_train_batch_size * plain.gradient_accumulation_steps)
    assert texts[1] - texts[0] == rows * (limit - 200) * cache_bytes_per_token(pair.teacher)


def test_data_for_training_and_for_evaluation(tmp_path, place, capsys):
    pair, file = load_pair("base", place[1], device="cpu", lora=LORA), tmp_path / "long.jsonl"
    rows = [{"prompt": text, "completion": "Yes."} for text in ("Two?", "Is it two? " * 20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = load_task(DataConfig(), pair, str(file))
    assert len(plain) == 2 and all(row.teacher_prompt_ids is None for row in plain)
    config = DataConfig(max_prompt_length=len(plain[1].prompt_ids), max_completion_length=9)
    told = TrainConfig(
        train_file=str(file), eval_split=0, teacher_prompt="{prompt} {prompt}",
        max_prompt_length=config.max_prompt_length, max_completion_length=9,
    )  # fmt: skip
    [kept] = load_train(told, pair)
    assert kept.id == 0 and kept.teacher_prompt_ids
    assert "1 examples; 1 prompts of the teacher over their limit left out" in capsys.readouterr().out
