"""Several teachers, each for the rows that name it: loading, decoding, loss, stored work and settings."""

import dataclasses
import json

import pytest
import torch
import yaml
from test_teacher_prompt import dense, flags, own_prompt, still
from test_trainer import gradient_step, lines, trainer, weights, without_times
from tiny import _ROPE, byte_level_tokenizer, save, save_llama, tiny_model, tiny_tokenizer, toy_examples, toy_pair
from transformers import LlamaConfig, LlamaForCausalLM

from switchkd import TeacherOnly, decode, decode_reference, load_pair
from switchkd.base.errors import CheckpointError, ConfigError, DataError, ModelError, VocabularyError
from switchkd.base.settings import from_dict, to_dict
from switchkd.cli.evaluate import EvaluateConfig
from switchkd.cli.flags import parse
from switchkd.cli.generate import GenerateConfig
from switchkd.cli.main import main
from switchkd.data.examples import Example, load_examples
from switchkd.data.fields import Message
from switchkd.data.texts import by_teacher, tokenize
from switchkd.decoding.rollouts import DecodeCost
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.base_model import BaseModel
from switchkd.forward.head import Sizes
from switchkd.methods.mixes import Adaptive, Generated
from switchkd.methods.objectives import ForwardKL, MiniLLM, ReverseKL
from switchkd.methods.policies import MixIn
from switchkd.models.settings import ModelConfig
from switchkd.runs.preflight import memory_estimate
from switchkd.teachers.states import TeacherCache
from switchkd.teachers.store import fingerprint
from switchkd.training.optimizer import Masters
from switchkd.training.settings import TrainConfig, load_recipe
from switchkd.writing.examples import decode_examples
from switchkd.writing.teacher_texts import teacher_texts

NAMES = ("", "math", "code")


def wide_llama():
    """A teacher of another hidden size than the rest."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        model = LlamaForCausalLM(LlamaConfig(**_ROPE | {"hidden_size": 32})).to(torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.35)
    return model.requires_grad_(False)


def pair_of_three(family="llama"):
    code = tiny_model("gpt2", 7).requires_grad_(False)
    return dataclasses.replace(still(toy_pair(family)), teachers={"math": wide_llama(), "code": code})


def routed(count=12):
    """Examples of three teachers in turn, some of whose prompts are the teacher's own."""
    return [
        dataclasses.replace(e, teacher=NAMES[e.id % 3], teacher_prompt_ids=own_prompt(e.id) if e.id % 2 else None)
        for e in toy_examples(count)
    ]


def reading(pair):
    """Notes of each teacher the first tokens of the rows that it reads, and how often the student is run for the loss."""
    read, student = {name: [] for name in NAMES}, []
    for name, model in pair.named_teachers.items():
        model.register_forward_pre_hook(
            lambda _, args, kw, name=name: read[name].extend(kw["input_ids"].tolist()), with_kwargs=True
        )
    pair.student.register_forward_pre_hook(lambda *_: student.append(1))
    return read, student


# --- training -----------------------------------------------------------------------------------------------------


def test_each_row_is_written_by_its_own_teacher_in_the_order_of_the_examples(tmp_path):
    t = trainer(
        tmp_path, pair_of_three(), routed(), policy=TeacherOnly(), mix=Generated(1.0), per_device_train_batch_size=6
    )
    examples, told = t.reading.next(t.examples), []
    rollouts = t.reading.generate(examples, t.step, t.schedule, told.append)
    assert [r.teacher for r in rollouts] == [e.teacher for e in examples] and {r.teacher for r in rollouts} == set(
        NAMES
    )
    assert [r.id for r in rollouts] == list(range(6))
    for example, rollout in zip(examples, rollouts, strict=True):
        [alone] = decode_reference(
            t.pair.student, t.pair.teacher_named(example.teacher), [example.teacher_reads], TeacherOnly(), 6,
            seed=t.config.seed, sample_ids=[rollout.id], eos_token_ids=[1],
        )  # fmt: skip
        assert rollout.completion_ids == alone.completion_ids
        assert (rollout.prompt_ids, rollout.teacher_reads) == (example.prompt_ids, example.teacher_reads)
    kept = [cost.kept_tokens for cost in told]
    assert kept == sorted(kept) and told[-1] == rollouts.cost
    assert kept[-1] == sum(len(r.completion_ids) for r in rollouts)


def test_text_does_not_depend_on_the_company_of_other_teachers():
    pair, examples = pair_of_three(), routed(9)
    settings = DecodeSettings(MixIn(alpha=0.4), 7, seed=2)
    together = decode_examples(pair, examples, settings, [e.id for e in examples])
    for example, rollout in zip(examples, together, strict=True):
        [alone] = decode_examples(pair, [example], settings, [example.id])
        assert alone.to_json() == rollout.to_json()
    back = decode_examples(pair, examples[::-1], settings, [e.id for e in examples[::-1]])
    assert [r.to_json() for r in back[::-1]] == [r.to_json() for r in together]
    assert decode_examples(pair, [], settings, []) == [] and together.cost != DecodeCost()


@pytest.mark.parametrize("chunk_tokens", [3, 1000])
@pytest.mark.parametrize("source", ["policy", "examples"])
def test_loss_and_gradient_are_the_sums_of_separate_dense_ones(tmp_path, monkeypatch, source, chunk_tokens):
    """Whatever the split into micro-batches and chunks; each teacher reads its own rows, the student each batch once."""
    monkeypatch.setattr("switchkd.forward.head.CPU_SIZES", Sizes(chunk_tokens * 4 * 23, 2**21))
    runs = []
    for size in (8, 4, 1):
        gradients, metrics, rollouts = gradient_step(
            tmp_path, pair=pair_of_three(), examples=routed(), mix=Generated(float(source == "policy")),
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_grad_norm=0.0,
        )  # fmt: skip
        runs.append((gradients, metrics, rollouts))
    t = trainer(tmp_path, pair_of_three(), routed(), per_device_train_batch_size=8)
    rows = runs[0][2] or t.reading.next(t.examples)
    total = count = 0
    for name, places in by_teacher(rows).items():
        part, tokens = dense(dataclasses.replace(t.pair, teacher=t.pair.teacher_named(name)), [rows[i] for i in places])
        total, count = total + part, count + tokens
    (total / count).backward()
    for gradients, metrics, rollouts in runs:
        assert rollouts == runs[0][2]
        assert metrics["loss"] == pytest.approx((total / count).item(), rel=1e-6)
        for name, parameter in t.pair.student.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-5)
    read, student = reading(t.pair)
    t.learner.loss([dataclasses.replace(row, said=None) for row in rows], ForwardKL())
    assert len(student) == 1
    for name in NAMES:
        mine = [row.teacher_reads + row.completion_ids for row in rows if row.teacher == name]
        assert [ids[: len(text)] for ids, text in zip(read[name], mine, strict=True)] == mine


@pytest.mark.parametrize("objective", [MiniLLM(alpha=0.4), ReverseKL()])
def test_objectives_that_look_ahead_or_back_see_each_rows_teacher(tmp_path, objective):
    """The sum over rows apart is the loss of the rows together."""
    t = trainer(tmp_path, pair_of_three(), routed(), mix=Generated(1.0), policy=MixIn(alpha=0.4), objective=objective)
    rows = t.reading.generate(t.reading.next(t.examples), t.step, t.schedule, None)
    together = t.learner.loss(rows, objective).item()
    assert together == pytest.approx(sum(t.learner.loss([row], objective).item() for row in rows), rel=1e-9)
    swapped = [dataclasses.replace(row, teacher="math", said=None) for row in rows]
    assert abs(t.learner.loss(swapped, objective).item() - together) > 1e-2


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path):
    settings = {
        "examples": routed(), "validation": toy_examples(3), "save_steps": 1, "max_steps": 14,
        "mix": Adaptive(share=0.6, capacity=8, validation_steps=3),
    }  # fmt: skip
    straight = trainer(tmp_path / "straight", pair_of_three(), **settings)
    straight.train()
    part = trainer(tmp_path / "parts", pair_of_three(), **settings)
    with pytest.raises(KeyboardInterrupt):
        part.train(lambda metrics, _: (_ for _ in ()).throw(KeyboardInterrupt) if metrics["step"] == 11 else None)
    again = trainer(tmp_path / "parts", pair_of_three(), **settings)
    again.resume()
    assert again.step == 10 and {rollout.teacher for rollout in again.reading.replay} == set(NAMES)
    again.train()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_times(lines(tmp_path / "parts", name)) == without_times(lines(tmp_path / "straight", name))
    assert {m["source"] for m in lines(tmp_path / "parts", "metrics.jsonl")} == {"examples", "policy", "replay"}
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(again).values(), strict=True))
    assert straight.reading.replay == again.reading.replay


def test_one_teacher_by_name_is_the_plain_setting_bit_for_bit(tmp_path):
    plain = trainer(tmp_path / "plain")
    plain.train()
    pair = toy_pair()
    pair = dataclasses.replace(
        pair, teacher=tiny_model("llama", 8).requires_grad_(False), teachers={"it": pair.teacher}
    )
    pair.teacher.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    seen = []
    named = trainer(tmp_path / "named", pair, [dataclasses.replace(e, teacher="it") for e in toy_examples()])
    seen.clear()  # of the probe of its head
    named.train()
    assert not seen
    assert without_times(lines(tmp_path / "named", "metrics.jsonl")) == without_times(
        lines(tmp_path / "plain", "metrics.jsonl")
    )
    for a, b in zip(*(lines(tmp_path / run, "rollouts.jsonl") for run in ("named", "plain")), strict=True):
        assert a == b | {"teacher": "it"}
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(named).values(), strict=True))


def test_no_teacher_gets_a_gradient_or_moves(tmp_path):
    t = trainer(tmp_path, pair_of_three(), routed(), max_steps=2)
    before = [p.clone() for model in t.pair.named_teachers.values() for p in model.parameters()]
    t.train()
    after = [p for model in t.pair.named_teachers.values() for p in model.parameters()]
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(after, before, strict=True))


def test_a_name_that_the_pair_does_not_have(tmp_path):
    examples = [dataclasses.replace(e, teacher="maths") for e in toy_examples()]
    for lmbda in (0.0, 1.0):
        with pytest.raises(ConfigError, match="no teacher 'maths'; did you mean 'math'"):
            trainer(tmp_path, pair_of_three(), examples, mix=Generated(lmbda)).train_step()


# --- stored work --------------------------------------------------------------------------------------------------


def test_stored_text_is_each_teachers_own_and_bound_to_all(tmp_path):
    pair, examples = pair_of_three(), routed()
    made = teacher_texts(
        pair, examples, tmp_path, DecodeSettings(TeacherOnly(), max_new_tokens=6, seed=5, batch_size=2)
    )
    for example, text in zip(examples, made, strict=True):
        [alone] = decode(
            pair.student, pair.teacher_named(example.teacher), [example.teacher_reads], TeacherOnly(), 6, seed=5,
            sample_ids=[example.id], eos_token_ids=[1],
        )  # fmt: skip
        assert text.completion_ids == alone.completion_ids and text.teacher == example.teacher
    assert teacher_texts(pair, examples, tmp_path, DecodeSettings(TeacherOnly(), max_new_tokens=6, seed=5)) == made
    others = [dataclasses.replace(e, teacher="math") for e in examples]
    with pytest.raises(CheckpointError, match="teacher_of_example differs"):
        teacher_texts(pair, others, tmp_path, DecodeSettings(TeacherOnly(), max_new_tokens=6, seed=5))
    pair.teachers["code"].lm_head.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError, match="teachers differs"):
        teacher_texts(pair, examples, tmp_path, DecodeSettings(TeacherOnly(), max_new_tokens=6, seed=5))
    assert fingerprint(toy_pair(), toy_examples(), completions=True).keys() == {
        "teacher_weights", "teacher_config", "tokenizer", "examples",
    }  # fmt: skip


def test_a_cache_of_several_teachers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="keeps the words of one teacher, and examples name 'code'"):
        TeacherCache.build(pair_of_three(), routed(), tmp_path, "hidden")
    settings = {
        "teachers": {"a": "x", "b": "y"},
        "teacher_field": "t",
        "teacher_cache": "hidden",
        "mix": "ground_truth",
    }
    with pytest.raises(ConfigError, match="'hidden' keeps the words of one teacher, and there are 3; use 'none'"):
        from_dict(TrainConfig, settings, "r.yaml")


# --- loading ------------------------------------------------------------------------------------------------------


def test_teachers_are_checked_frozen_and_loaded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, student = (save(tmp_path / str(seed), seed=seed) for seed in range(3))
    loaded = []
    original = LlamaForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        LlamaForCausalLM,
        "from_pretrained",
        classmethod(lambda cls, source, *a, **k: loaded.append(str(source)) or original(cls, source, *a, **k)),
    )
    teachers = {"again": "0", "other": str(second), "other-too": f"{second}/../1"}
    pair = load_pair(str(first), str(student), device="cpu", teachers=teachers)
    assert sorted(loaded) == [str(first), str(second), str(student)]
    assert pair.teachers["again"] is pair.teacher and pair.teachers["other"] is pair.teachers["other-too"]
    assert pair.teachers["other"] is not pair.teacher and list(pair.named_teachers) == ["", *teachers]
    assert not any(p.requires_grad or m.training for m in pair.named_teachers.values() for p in m.parameters())
    assert all(p.requires_grad for p in pair.student.parameters()) and pair.warnings == ()
    need = memory_estimate(TrainConfig(), pair, Masters(pair.student))
    assert need["teacher, in float32"] == 2 * need["the student's trained weights, as they are updated, in float32"]


def test_base_may_be_one_of_several(tmp_path):
    teacher, student = (str(save(tmp_path / str(seed), seed=seed)) for seed in range(2))
    pair = load_pair(teacher, student, device="cpu", lora=ModelConfig(use_peft=True), teachers={"self": "base"})
    assert isinstance(pair.teachers["self"], BaseModel) and pair.teachers["self"].student is pair.student
    with pytest.raises(ConfigError, match="'base' is the model under the student's adapter"):
        load_pair(teacher, student, device="cpu", teachers={"self": "base"})


def test_each_teacher_must_fit_the_student_and_is_named_if_not(tmp_path):
    teacher, student = (str(save(tmp_path / str(seed), seed=seed)) for seed in range(2))
    others = {
        "vocabulary": (
            save(tmp_path / "v", tokenizer=tiny_tokenizer(digits=True)),
            VocabularyError,
            "cut text differently",
        ),
        "end": (save(tmp_path / "e"), ModelError, "EOS id 20 lies outside"),
        "nothing": (tmp_path / "missing", ModelError, "does not exist"),
    }
    (tmp_path / "e" / "generation_config.json").write_text('{"eos_token_id": [1, 20]}')
    for name, (folder, error, words) in others.items():
        with pytest.raises(error, match=rf"^teacher '{name}': .*{words}"):
            load_pair(teacher, student, device="cpu", teachers={name: str(folder)})
    chatty = save(tmp_path / "c", tokenizer=tiny_tokenizer(chat_template="{{ messages }}"))
    [warning] = load_pair(teacher, student, device="cpu", teachers={"chatty": str(chatty)}).warnings
    assert warning.startswith("teacher 'chatty' writes prompts otherwise; the default teacher's chat template")


# --- settings and data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values,words",
    [
        ({"teachers": {"a": "b"}}, "with teacher_field '': give teacher_field, the field of a row"),
        ({"teacher_field": "a"}, "teachers {} with teacher_field 'a': give teachers, by name, or neither"),
        ({"teachers": {"": "b"}, "teacher_field": "a"}, "needs a name and a model in each entry"),
        ({"teachers": {"a": ""}, "teacher_field": "a"}, "needs a name and a model in each entry"),
        ({"teachers": {"a": 1}, "teacher_field": "a"}, "r.yaml: teachers.a must be str, got 1"),
        ({"teachers": {True: "b"}, "teacher_field": "a"}, "r.yaml: teachers, the name must be str, got True"),
        ({"teachers": ["b"], "teacher_field": "a"}, "teachers must be dict"),
    ],
)
def test_wrong_settings_are_explained(values, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(TrainConfig, values, "r.yaml")


def test_teachers_from_yaml_and_from_the_command_line(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("teachers: {math: some/model, code: other/model}\nteacher_field: subject\n")
    config = load_recipe(str(file))
    assert config.teachers == {"math": "some/model", "code": "other/model"}
    assert from_dict(TrainConfig, to_dict(config), "again") == config
    typed = parse(
        TrainConfig, ["train", "--teachers", "math", "some/model", "code", "other/model", "--teacher-field", "subject"]
    )
    assert typed == config
    assert parse(TrainConfig, ["train", str(file), "--teachers.code", "mine"]).teachers["code"] == "mine"
    assert parse(EvaluateConfig, ["evaluate", str(file)]).teachers == config.teachers


def test_a_merged_students_run_finds_its_base_under_every_name(tmp_path):
    (tmp_path / "student").mkdir()
    config = TrainConfig(
        student_model_name_or_path="some/base", teachers={"self": "base", "code": "other/model"}, teacher_field="t",
        use_peft=True, merge=True,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    parsed = parse(GenerateConfig, ["generate", str(tmp_path)])
    assert parsed.teachers == {"self": "some/base", "code": "other/model"} and not parsed.use_peft
    assert parsed.teacher_model_name_or_path == "demo"


def written(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "completion": "b"} | row) + "\n" for row in rows))
    return str(file)


def test_rows_name_their_teachers(tmp_path, caplog):
    file = written(tmp_path, {"t": "math"}, {}, {"t": ""}, {"t": "code"})
    settings = {"teacher_field": "t", "teachers": ("math", "code")}
    assert [e.teacher for e in load_examples(file, **settings)] == ["math", "", "", "code"]
    assert {e.teacher for e in load_examples(file)} == {""}
    file = written(tmp_path, {"t": "math"}, {"t": "maths"})
    words = r"rows.jsonl:2: field 't' names the teacher 'maths'; known are math, code\. Correct the row"
    with pytest.raises(DataError, match=words):
        load_examples(file, **settings)
    assert len(load_examples(file, skip_bad=1, **settings)) == 1 and "names the teacher 'maths'" in caplog.text
    with pytest.raises(DataError, match="field 't' must be a string, not int"):
        load_examples(written(tmp_path, {"t": 3}), **settings)
    example = Example(0, (Message("user", "a"),), "b", ("b",), "here:1", teacher="math")
    [row], _ = tokenize(
        [example], byte_level_tokenizer(), template="none", max_prompt_length=9, max_completion_length=9
    )
    assert row.teacher == "math"


def test_from_the_command_line(tmp_path, capsys):
    rows = [{"prompt": f"{i} and {i}?", "completion": f"{2 * i}.", "subject": NAMES[i % 3]} for i in range(9)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    default, math, code, student = (save_llama(tmp_path / f"m{i}", byte_level_tokenizer(), i) for i in range(4))
    models = flags(
        teacher_model_name_or_path=default, student_model_name_or_path=student, train_file=file, eval_file=file
    )
    small = flags(
        max_prompt_length=64, max_new_tokens=6, max_completion_length=16, eval_samples=2, eval_max_new_tokens=4,
        per_device_train_batch_size=6, max_steps=2, template="chat", output_dir=tmp_path / "run", teacher_field="subject",
    )  # fmt: skip
    teachers = ["--teachers", "math", math, "code", code]
    assert main(["check", "on_policy", *models, *small, *teachers]) == 0
    out = capsys.readouterr().out
    assert "9 examples; teachers: the default 3, math 3, code 3" in out
    assert f"teacher 'math': {math}" in out and f"teacher: {default}" in out
    assert main(["train", "on_policy", *models, *small, *teachers]) == 0
    by_source = {"math": 1, "code": 2, "": 0}
    tokenizer = byte_level_tokenizer()
    for rollout in lines(tmp_path / "run", "rollouts.jsonl"):
        first = int(tokenizer.decode(rollout["prompt_ids"]).split("user\n")[1][0])
        assert first % 3 == by_source[rollout["teacher"]]
    asked = flags(limit=3, output_file=tmp_path / "out.jsonl", policy="switch")  # which reads the teachers of the rows
    assert main(["generate", str(tmp_path / "run"), *asked]) == 0
    assert [r["teacher"] for r in lines(tmp_path, "out.jsonl")] == list(NAMES)
    (tmp_path / "m1").rename(tmp_path / "gone")  # evaluation asks the default teacher alone
    assert main(["evaluate", str(tmp_path / "run"), *flags(eval_samples=2)]) == 0
