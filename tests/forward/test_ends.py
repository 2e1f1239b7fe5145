"""The end of a text is one thing: what training text closes with, decoding and scoring stop at, and a saved student declares."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import SECOND_END, example
from tiny import (
    CHATML,
    POLICIES,
    VOCAB,
    assert_same,
    byte_level_tokenizer,
    retold,
    save_llama,
    tiny_model,
    tiny_tokenizer,
    toy_examples,
    toy_pair,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from switchkd import StudentOnly, Switch, decode, decode_reference, load_pair
from switchkd.base.errors import CheckpointError, ConfigError, ModelError
from switchkd.cli.main import main
from switchkd.data.texts import collate, tokenize
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.generate_backend import complete_by_generate
from switchkd.evaluation.results import read_results
from switchkd.evaluation.samples import Reader, trace
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.forward.ends import Ends, declared_ends, pair_ends
from switchkd.forward.head import Head, Sizes, response_hidden
from switchkd.methods.divergences import forward_kl, log_probs
from switchkd.methods.objectives import OBJECTIVES
from switchkd.methods.policy import TeacherOnly
from switchkd.models.loading import load_model
from switchkd.runs.replay import replayed
from switchkd.studies.study import flags
from switchkd.teachers.said import TeacherStates, TeacherTopK
from switchkd.teachers.states import TeacherCache
from switchkd.training import loss
from switchkd.training.loss import response_tokens
from switchkd.writing.examples import decode_examples
from switchkd.writing.teacher_texts import teacher_texts

START, CHAT_END, TEXT_END, BEGIN = 283, 284, 285, 286  # of byte_level_tokenizer
HASH = 2  # "#" there, and the eos_token_id of a Llama's config that names none
MERGED = Ends((1, 6, 9), 6)
PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8], [7], [5, 1, 3]]


# --- what is believed ---------------------------------------------------------------------------------------------


def declares(config=None, generation=None, eos=None, copied=False):
    """A model and tokenizer that name these ends; ``copied``: transformers took the generation config from config.json."""
    model, tokenizer = (
        tiny_model(),
        byte_level_tokenizer(eos, specials=("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>")),
    )
    model.config.eos_token_id = config
    model.generation_config.eos_token_id = config if copied else generation
    model.generation_config._from_model_config = copied
    tokenizer.bos_token = "<s>"
    return model, tokenizer


@pytest.mark.parametrize(
    ("ends", "believed", "words"),
    [
        ({"config": CHAT_END, "copied": True, "eos": "<|im_end|>"}, (CHAT_END,), ""),  # most models
        ({"config": HASH, "copied": True, "eos": "<|im_end|>"}, (CHAT_END,), "names 2 '#'"),  # a default of the class
        ({"config": 50256, "copied": True, "eos": "<|im_end|>"}, (CHAT_END,), "names 50256 '(no token)'"),
        ({"config": -1, "copied": True, "eos": "<|im_end|>"}, (CHAT_END,), "names -1"),
        ({"config": HASH, "generation": CHAT_END}, (CHAT_END,), "names 2 '#'"),
        ({"config": HASH, "generation": [HASH, CHAT_END]}, (HASH, CHAT_END), ""),  # shared
        ({"config": [HASH, CHAT_END], "copied": True, "eos": "<|im_end|>"}, (CHAT_END,), "names 2 '#'"),
        ({"config": BEGIN, "copied": True, "eos": "<|im_end|>"}, (CHAT_END,), "names 286 '<s>'"),  # begins texts
        ({"config": CHAT_END, "generation": [CHAT_END, TEXT_END], "eos": "<|im_end|>"}, (CHAT_END, TEXT_END), ""),  # Qwen
        ({"config": TEXT_END, "generation": [CHAT_END, TEXT_END], "eos": "<|im_end|>"}, (CHAT_END, TEXT_END), ""),
        ({"config": TEXT_END, "copied": True, "eos": "<|im_end|>"}, (CHAT_END, TEXT_END), "it is a special token, and believed"),
        ({"config": TEXT_END, "copied": True}, (TEXT_END,), "it is a special token, and believed"),
        ({"generation": [9, 3], "eos": "<|im_end|>"}, (3, 9, CHAT_END), ""),  # what generate stops at
    ],
)  # fmt: skip
def test_an_end_is_believed_by_evidence(ends, believed, words):
    ids, note = declared_ends(*declares(**ends), 287)
    assert ids == believed
    assert bool(note) == bool(words)
    if words:
        assert words in note


def test_a_model_without_an_end_that_is_one_is_refused():
    with pytest.raises(ModelError, match=r"no EOS token in generation_config\.json or the tokenizer, so no text would"):
        declared_ends(*declares())
    with pytest.raises(ModelError, match=r"config.json alone names 2 '#', which marks no end\); set eos_token_id"):
        declared_ends(*declares(config=HASH, copied=True))
    for outside in (287, -1):
        with pytest.raises(ModelError, match=f"EOS id {outside} lies outside the shared vocabulary of 287"):
            declared_ends(*declares(generation=[CHAT_END, outside]), 287)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def no_generation_config(folder):
    (folder / "generation_config.json").unlink()


def test_the_default_of_a_config_class_stops_nothing_wherever_it_is_asked(tmp_path):
    """Also in ``decode`` from Python, which has no tokenizer to ask."""
    tokenizer = byte_level_tokenizer()
    folder = tmp_path / "model"
    save_llama(folder, tokenizer, 1, eos_token_id=HASH)
    no_generation_config(folder)
    pair = load_pair(str(folder), str(folder), device="cpu")
    assert pair.eos_token_ids == (CHAT_END,) and pair.merged_eos_token_id is None
    assert any("2 '#'" in warning and "not believed" in warning for warning in pair.warnings)
    for models in ((pair.student, pair.teacher), (pair.student, load_model(str(folder), device="cpu"))):
        assert Ends.asked(None, 287, *models) == Ends((CHAT_END,))
    alone = load_model(str(folder), device="cpu")
    assert Ends.asked(None, 287, alone, alone) == Ends((HASH,)), "with no other word, the config's"


# --- the template's end -------------------------------------------------------------------------------------------


def base_pair(tmp_path, tokenizer=None, **changes):
    tokenizer = tokenizer or byte_level_tokenizer("<|endoftext|>")
    return [save_llama(tmp_path / name, tokenizer, seed, **changes) for seed, name in enumerate(("teacher", "student"))]


def of_pair(tokenizer, ids, template="chat"):
    return pair_ends({"teacher": ids, "student": ids}, tokenizer, template)


def test_a_templates_end_that_stops_nothing_joins_with_a_warning(tmp_path):
    folders = base_pair(tmp_path)
    for template in ("chat", "auto"):
        pair = load_pair(*folders, device="cpu", template=template)
        assert pair.ends == Ends((CHAT_END, TEXT_END), CHAT_END)
        [warning] = pair.warnings
        assert "closes an answer with 284 '<|im_end|>', at which nothing would stop" in warning
    for template in ("alpaca", "none"):
        pair = load_pair(*folders, device="cpu", template=template)
        assert (pair.ends, pair.warnings) == (Ends((TEXT_END,)), ())
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        load_pair(*folders, device="cpu", template="alpacca")


def test_equal_ends_that_the_template_closes_with_are_events_of_their_own():
    tokenizer = byte_level_tokenizer()
    assert of_pair(tokenizer, (CHAT_END,)) == (Ends((CHAT_END,)), ())
    assert of_pair(tokenizer, (CHAT_END, TEXT_END)) == (Ends((CHAT_END, TEXT_END)), ())
    assert of_pair(tokenizer, (CHAT_END, TEXT_END), "none") == (Ends((CHAT_END, TEXT_END)), ())


def closing_with(text, eos="<|endoftext|>"):
    return byte_level_tokenizer(eos, CHATML.replace("<|im_end|>\\n", text).replace("<|im_end|>\n", text))


def rows_of(tokenizer, ids, completions, template="chat"):
    examples = [example(completion=completion) for completion in completions]
    return tokenize(
        examples, tokenizer, template=template, max_prompt_length=400, max_completion_length=200, eos_token_ids=ids
    )


@pytest.mark.parametrize(
    ("closing", "declared", "text", "stops"),
    [
        ("<|im_end|>\n", (CHAT_END,), "four<|im_end|>", (CHAT_END,)),
        ("<|im_end|>\n", (CHAT_END, TEXT_END), "four<|im_end|>", (CHAT_END, TEXT_END)),
        ("<|im_end|>\n", (TEXT_END,), "four<|im_end|>", (CHAT_END, TEXT_END)),
        ("<|im_end|><|endoftext|>", (TEXT_END,), "four<|im_end|><|endoftext|>", (TEXT_END,)),
        ("<|im_end|>\n<|endoftext|>\n", (TEXT_END,), "four<|im_end|>\n<|endoftext|>", (TEXT_END,)),
        ("<|im_end|>\n<|endoftext|>", (CHAT_END, TEXT_END), "four<|im_end|>", (CHAT_END, TEXT_END)),
        ("\n", (TEXT_END,), "four<|endoftext|>", (TEXT_END,)),
        # A mark that is no token of its own: nothing could stop there, and no answer would equal its reference.
        ("<|no_token|>\n", (TEXT_END,), "four<|endoftext|>", (TEXT_END,)),
        ("\n### End\n", (TEXT_END,), "four<|endoftext|>", (TEXT_END,)),
    ],
)
def test_training_text_closes_with_what_stops(closing, declared, text, stops):
    tokenizer = closing_with(closing)
    ends, warnings = of_pair(tokenizer, declared)
    assert ends.ids == stops
    assert any("is not one token of this tokenizer" in warning for warning in warnings) == (
        "no_token" in closing or "#" in closing
    )
    [row], drops = rows_of(tokenizer, ends.ids, ["four"])
    assert tokenizer.decode(row.completion_ids) == text and drops.end_tokens_in_text == 0
    assert row.completion_ids[-1] in ends.ids and not set(row.completion_ids[:-1]) & set(ends.ids)


def test_marks_that_the_tokenizer_does_not_call_special_end_texts_too():
    tokenizer = byte_level_tokenizer("<|endoftext|>", CHATML.replace("<|im_end|>", "<|done|>"))
    tokenizer.add_tokens(["<|done|>", "</tool>"])
    done = tokenizer.convert_tokens_to_ids("<|done|>")
    ends, _ = of_pair(tokenizer, (TEXT_END,))
    assert ends == Ends((TEXT_END, done), done)
    [row], _ = rows_of(tokenizer, ends.ids, ["call</tool>"])
    assert tokenizer.decode(row.completion_ids) == "call</tool><|done|>", "what the answer ends in is no end"
    assert tokenizer.decode(ends.answer(row.completion_ids, tokenizer)) == "call</tool>"


def test_what_the_vocabulary_does_not_have_is_no_end():
    unknown = "{% for m in messages %}{{ m.content + '*' }}{% endfor %}"  # reads as <unk>, a special token
    tokenizer = tiny_tokenizer(chat_template=unknown)
    assert tokenizer("*")["input_ids"] == [tokenizer.unk_token_id]
    ends, [warning] = of_pair(tokenizer, (1,))
    assert ends == Ends((1,)) and "'*', which is not one token" in warning


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ 'constant' }}", "{{ broken"])
def test_a_template_that_takes_no_probe_adds_no_end(template):
    assert of_pair(byte_level_tokenizer("<|endoftext|>", template), (TEXT_END,)) == (Ends((TEXT_END,)), ())


def test_a_template_that_wants_a_system_turn_is_understood():
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    assert of_pair(byte_level_tokenizer("<|endoftext|>", strict), (TEXT_END,))[0].ids == (CHAT_END, TEXT_END)


def test_a_row_that_closes_where_nothing_stops_is_refused_with_its_place():
    odd = CHATML.replace("'<|im_end|>\n'", "('<s>' if m.content == 'odd' else '<|im_end|>') + '\n'")
    tokenizer = byte_level_tokenizer("<|im_end|>", odd)
    ends, _ = of_pair(tokenizer, (CHAT_END,))
    [row], _ = rows_of(tokenizer, ends.ids, ["even"])
    assert row.completion_ids[-1] == CHAT_END
    with pytest.raises(ConfigError, match=r"here:1: the template closes .* 284 '<\|im_end\|>'|not in"):
        rows_of(closing_with("<s>"), (CHAT_END,), ["four"])


@pytest.mark.parametrize("template", ["chat", "alpaca", "none"])
@pytest.mark.parametrize("mark", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("text", ["It is{} four.", "{} four.", "It is four.{}"])
def test_a_text_with_any_of_the_ends_inside_is_left_out(template, mark, text):
    kept, drops = rows_of(byte_level_tokenizer(), (CHAT_END, TEXT_END), ["It is four.", text.format(mark)], template)
    assert len(kept) == 1 and drops.end_tokens_in_text == 1


def test_a_tokenizer_without_eos_closes_with_what_the_model_declares():
    tokenizer = byte_level_tokenizer(None, template=None)
    [row], _ = rows_of(tokenizer, (TEXT_END,), ["four"], "none")
    assert tokenizer.decode(row.completion_ids) == "four<|endoftext|>"


def test_what_is_cut_has_no_end():
    rows, drops = tokenize(
        [example(completion="four and four")], byte_level_tokenizer("<|endoftext|>"), template="chat",
        max_prompt_length=400, max_completion_length=3, eos_token_ids=(CHAT_END, TEXT_END),
    )  # fmt: skip
    assert drops.truncated == 1 and not set(rows[0].completion_ids) & {CHAT_END, TEXT_END}


# --- a base student and an instruct teacher -----------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Folders of an instruct teacher, which ends with <|im_end|> or <|endoftext|>, and a base student, which knows the second."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    save_llama(teacher, byte_level_tokenizer(), 1)
    edit(teacher / "generation_config.json", eos_token_id=[CHAT_END, TEXT_END])
    save_llama(student, byte_level_tokenizer("<|endoftext|>", None), 2, layers=1)
    return str(teacher), str(student)


def test_a_base_student_of_an_instruct_teacher_is_taken(mixed):
    pair = load_pair(*mixed, device="cpu")
    assert pair.ends == Ends((CHAT_END, TEXT_END), CHAT_END)
    assert pair.eos_token_ids == (CHAT_END, TEXT_END)
    assert any("the models end texts differently (teacher 284 '<|im_end|>' and 285" in told for told in pair.warnings)
    # Either of several teachers may be the one that differs.
    pair = load_pair(mixed[0], mixed[0], device="cpu", teachers={"base": mixed[1]})
    assert pair.ends == Ends((CHAT_END, TEXT_END), CHAT_END)


@pytest.mark.parametrize(
    ("teacher", "student", "close", "expected"),
    [
        ((CHAT_END,), (TEXT_END,), "<|im_end|>", Ends((CHAT_END, TEXT_END), CHAT_END)),
        ((TEXT_END,), (CHAT_END,), "<|im_end|>", Ends((CHAT_END, TEXT_END), CHAT_END)),
        ((CHAT_END, TEXT_END), (TEXT_END,), "<|endoftext|>", Ends((CHAT_END, TEXT_END), TEXT_END)),
        ((TEXT_END,), (TEXT_END, BEGIN), "<|im_end|>", Ends((CHAT_END, TEXT_END, BEGIN), CHAT_END)),
        ((TEXT_END,), (BEGIN,), "\n", Ends((TEXT_END, BEGIN), TEXT_END)),  # closes with the tokenizer's
    ],
)
def test_the_one_event_is_what_the_template_writes(teacher, student, close, expected):
    tokenizer = closing_with(close)
    assert pair_ends({"teacher": teacher, "student": student}, tokenizer, "chat")[0] == expected


def test_merged_ends_by_the_formula():
    torch.manual_seed(0)
    logits = torch.randn(7, VOCAB, dtype=torch.float64, requires_grad=True)
    logs = MERGED.log_probs(logits)
    q = logits.softmax(-1)
    expected = q.detach().clone()
    expected[:, [1, 9]] = 0
    expected[:, 6] = q[:, [1, 6, 9]].sum(-1).detach()
    torch.testing.assert_close(logs.exp(), expected, atol=1e-15, rtol=1e-14)
    assert (logs[:, [1, 9]] == -torch.inf).all()
    ours = torch.autograd.grad(logs[:, 6].sum(), logits, retain_graph=True)[0]
    theirs = torch.autograd.grad(q[:, [1, 6, 9]].sum(-1).log().sum(), logits)[0]
    torch.testing.assert_close(ours, theirs)
    assert (ours[:, [1, 6, 9]] > 0).all(), "every end learns"
    assert MERGED.events(torch.tensor([1, 2, 6, 9])).tolist() == [6, 2, 6, 6]


def test_ends_with_no_mass_have_no_gradient_and_a_nan_stays_to_be_found():
    logits = torch.zeros(2, VOCAB, dtype=torch.float64)
    logits[0, [1, 6, 9]] = -torch.inf
    logits[1, 3] = torch.nan
    logits.requires_grad_()
    logs = MERGED.log_probs(logits)
    assert logs[0, 6] == -torch.inf and logs[1].isnan().all(), "the engine looks at one column"
    assert torch.autograd.grad(logs[0, 3], logits)[0][0].isfinite().all()


def test_ends_of_their_own_cost_nothing_and_move_nothing():
    logs = log_probs(torch.randn(2, VOCAB))
    assert Ends((1, 6)).merged(logs) is logs


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("drafter", ["student", "teacher"])
def test_merged_ends_are_lossless(name, drafter):
    student, teacher = tiny_model("llama", 1), tiny_model("llama", 2)
    settings = {"eos_token_ids": MERGED, "max_new_tokens": 10, "seed": 3}
    reference = decode_reference(student, teacher, PROMPTS, POLICIES[name], **settings)
    for block in (1, 4):
        out = decode(
            student, teacher, PROMPTS, POLICIES[name], block_size=block, drafter=drafter, batch_size=3, **settings
        )
        assert_same(out, reference)
    tokens = {token for row in reference for token in row.completion_ids}
    assert not tokens & {1, 9} and {row.stop_reason for row in reference} <= {"eos", "length", "policy"}


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_model_is_found_where_its_first_column_is_merged(broken):
    models = [tiny_model("llama", 1), tiny_model("llama", 2)]
    with torch.no_grad():
        models[broken].lm_head.weight[4] = torch.nan
    for call in (decode, decode_reference):
        [row] = call(*models, [[3, 4]], Switch(), 5, eos_token_ids=Ends((0, 6), 6))
        assert row.stop_reason == "non_finite"


def merged_pair(**settings):
    return dataclasses.replace(toy_pair(**settings), eos_token_ids=MERGED.ids, merged_eos_token_id=MERGED.merged_into)


def examples_of(count=8):
    """Ragged examples that close with the one end."""
    return [retold(e, completion_ids=[*e.completion_ids[:-1], 6]) for e in toy_examples(count)]


KEPT = [i for i in range(VOCAB) if i not in (1, 9)]  # what can be written where the ends are merged


def dense_merged(logits):
    """Log-probabilities of KEPT, by probabilities, through all logits."""
    q = logits.softmax(-1)
    one = (torch.tensor(KEPT) == MERGED.merged_into).to(q.dtype)
    return (q[:, KEPT] + one * q[:, [1, 9]].sum(-1, keepdim=True)).log()


def in_kept(ids):
    return torch.tensor([KEPT.index(i) for i in ids])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradient_of_the_loss_with_merged_ends(name, monkeypatch):
    """Against float64 autograd through probabilities: any objective, finite, and every end of the student learns."""
    monkeypatch.setattr("switchkd.forward.head.CPU_SIZES", Sizes(4 * VOCAB * 3, 4 * VOCAB * 2))
    teacher, student = tiny_model("llama", 2), tiny_model("qwen2", 1)
    objective, batch = OBJECTIVES[name](), collate([([3, 4], [5, 7, 6]), ([8], [2, 9])])  # 9: an end by another id
    tokens = response_tokens(batch, [[0, 1, 2], [0, 0]])
    heads = [Head.of(model, VOCAB, MERGED) for model in (student, teacher)]
    with torch.no_grad():
        states = TeacherStates(heads[1], response_hidden(teacher, batch))
    hidden = response_hidden(student, batch)
    ours = loss.total(objective, states, heads[0], hidden, tokens)
    ours.backward()
    gradient = student.lm_head.weight.grad.clone()
    student.zero_grad()
    logp = dense_merged(heads[1](states.hidden)).detach()
    logq = dense_merged(heads[0](response_hidden(student, batch)))
    assert tokens.ids.tolist() == [5, 7, 6, 2, 9]
    tokens = dataclasses.replace(tokens, ids=in_kept([5, 7, 6, 2, 6]))
    if objective.looks_ahead:
        written = (logs.detach().gather(1, tokens.ids.unsqueeze(1))[:, 0] for logs in (logp, logq))
        tokens = objective.look_ahead(tokens, *written)
    dense = objective.loss(logp, logq, tokens).sum()
    dense.backward()
    torch.testing.assert_close(ours, dense, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradient, student.lm_head.weight.grad, atol=1e-9, rtol=1e-9)
    assert gradient.isfinite().all()
    assert all(gradient[i].abs().sum() > 0 for i in MERGED.ids)


def test_the_cache_of_the_largest_probabilities_is_of_the_merged_law(tmp_path):
    examples = examples_of()
    pair = merged_pair()
    ids, logs = TeacherCache.build(pair, examples, tmp_path / "merged", "top_k", top_k=VOCAB - 2).top_k(3)
    row = (examples[3].prompt_ids, examples[3].completion_ids)
    with torch.no_grad():
        logp = dense_merged(Head.of(pair.teacher, VOCAB)(response_hidden(pair.teacher, collate([row]))))
    torch.testing.assert_close(
        logs.double(),
        logp.gather(1, torch.stack([in_kept(each) for each in ids.tolist()])),
        atol=1e-9,
        rtol=1e-9,
    )
    assert not set(ids.flatten().tolist()) & {1, 9}
    with pytest.raises(CheckpointError, match="merged_eos_token_ids"):
        TeacherCache.open(toy_pair(), examples, tmp_path / "merged", "top_k", top_k=VOCAB - 2)
    # At k = V a student is compared on everything, and the loss is that of the live teacher.
    every = TeacherCache.build(pair, examples, tmp_path / "all", "top_k", top_k=VOCAB).top_k(3)
    head = Head.of(pair.student, VOCAB, MERGED)
    hidden = response_hidden(pair.student, collate([row]))
    tokens = response_tokens(collate([row]), [[0] * len(row[1])])
    live = TeacherStates(Head.of(pair.teacher, VOCAB, MERGED), response_hidden(pair.teacher, collate([row])).detach())
    stored = TeacherTopK(*every)
    both = [loss.total(OBJECTIVES["forward_kl"](), says, head, hidden, tokens) for says in (live, stored)]
    torch.testing.assert_close(*both, atol=1e-9, rtol=1e-9)


def test_the_teachers_text_closes_with_the_one_end(tmp_path):
    settings = {"max_new_tokens": 12, "seed": 5}
    made = teacher_texts(merged_pair(), examples_of(20), tmp_path / "texts", DecodeSettings(TeacherOnly(), **settings))
    ended = [e.completion_ids for e in made if not e.truncated]
    assert ended and all(ids[-1] == 6 for ids in ended)
    assert not {token for e in made for token in e.completion_ids} & {1, 9}
    own = dataclasses.replace(toy_pair(), eos_token_ids=MERGED.ids)
    with pytest.raises(CheckpointError, match="merged_eos_token_id"):
        teacher_texts(own, examples_of(20), tmp_path / "texts", DecodeSettings(TeacherOnly(), **settings))


def test_scores_samples_and_replay_are_of_the_merged_law():
    pair = merged_pair()
    examples = [*examples_of(5), retold(examples_of(1)[0], id=9, completion_ids=[5, 9])]
    rows = [(e.prompt_ids, e.completion_ids) for e in examples]
    batch = collate(rows)
    with torch.no_grad():
        logp, logq = (
            dense_merged(Head.of(model, VOCAB)(response_hidden(model, batch))) for model in (pair.teacher, pair.student)
        )
    written = MERGED.events(batch.input_ids[batch.loss_mask])
    means = evaluate(pair, pair.student, examples, TASKS["references"], EvalSettings(5)).means()
    assert means["forward_kl"] == pytest.approx(forward_kl(logp, logq).mean().item(), rel=1e-9)
    nll = -logq.gather(1, in_kept(written.tolist()).unsqueeze(1)).mean().item()
    assert means["perplexity"] == pytest.approx(np.exp(nll), rel=1e-9)
    [rollout, *_] = decode_examples(pair, examples, DecodeSettings(Switch(), 8, seed=2), range(6))
    read = Reader(pair)
    found, again = trace(read, rollout), replayed(read(rollout), Switch(), rollout, 2)
    assert again["speakers"] == rollout.speakers
    assert again["divergences"] == pytest.approx(rollout.divergences, rel=1e-9)
    assert found.jsd == pytest.approx([min(max(d, 0), 1) for d in rollout.divergences], rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_generate_has_the_merged_law_too(seed):
    model = tiny_model("llama", seed)
    settings = {"max_new_tokens": 20, "eos_token_ids": MERGED, "vocab_size": VOCAB}
    rollouts = decode(model, model, PROMPTS, StudentOnly(), temperature=0, **settings)
    written = complete_by_generate(model, PROMPTS, DecodeSettings(StudentOnly(), 20, temperature=0.0), MERGED, VOCAB)
    assert written == [(r.completion_ids, r.stop_reason) for r in rollouts]


def test_generate_samples_the_merged_law():
    model = tiny_model("llama", 3, scale=4.0)
    settings = DecodeSettings(StudentOnly(), 1, temperature=0.7, seed=4, batch_size=5_000)
    texts = complete_by_generate(model, [[3, 4]] * 10_000, settings, MERGED, VOCAB)
    with torch.no_grad():
        law = (MERGED.log_probs(model(torch.tensor([[3, 4]])).logits[0, -1]) / 0.7).softmax(-1)
    rate = torch.tensor([ids[0] for ids, _ in texts]).bincount(minlength=VOCAB) / len(texts)
    assert ((rate - law).abs() <= 5 * (law * (1 - law) / len(texts)).sqrt() + 1e-3).all()
    assert rate[[1, 9]].sum() == 0


def test_a_loaded_pair_says_by_itself_that_its_ends_are_one_event(mixed):
    """From Python: ``decode`` without ends, with the pair's ids, or with ``pair.ends`` is one text."""
    pair = load_pair(*mixed, device="cpu")
    asked = [None, pair.eos_token_ids, pair.ends]
    assert [Ends.asked(ends, pair.vocab_size, pair.student, pair.teacher) for ends in asked] == [pair.ends] * 3
    assert Ends.asked([], pair.vocab_size, pair.student, pair.teacher) == Ends(())
    assert Ends.asked([TEXT_END], pair.vocab_size, pair.student, pair.teacher) == Ends((TEXT_END,))


def test_check_prints_the_ends(mixed, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "Hi", "completion": "Yo"}) + "\n")
    names = {"teacher_model_name_or_path": mixed[0], "student_model_name_or_path": mixed[1], "train_file": data}
    assert main(["check", "kd", *flags(names | {"eval_samples": 0, "output_dir": tmp_path / "run"})]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ends: ")]
    assert line == (
        "ends: a text stops at 284 '<|im_end|>' and 285 '<|endoftext|>'; all of them count as one event, 284 '<|im_end|>'; "
        "training text closes with 284 '<|im_end|>'"
    )


# --- a student that knows its data by heart -----------------------------------------------------------------------

ROWS = {"Say one": "uno", "Say two": "dos", "Say three": "tres"}
WIDE = {"hidden_size": 48, "intermediate_size": 96}


def by_heart(folders, tmp_path, method="sft", **changes):
    """Train on the rows until they are known; the run, and what it scored."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS.items()))
    settings = {
        "teacher_model_name_or_path": folders[0], "student_model_name_or_path": folders[1], "train_file": data,
        "eval_file": data, "task": "references", "max_prompt_length": 96, "max_completion_length": 16, "max_new_tokens": 16,
        "eval_max_new_tokens": 16, "per_device_train_batch_size": 3, "max_steps": 60, "learning_rate": 5e-3, "save_steps": 0,
        "lr_scheduler_type": "constant", "output_dir": tmp_path / "run",
    } | changes  # fmt: skip
    assert main(["train", method, *flags(settings)]) == 0
    run = Path(settings["output_dir"])
    return run, settings, read_results(run / "evaluation.json")["student after"].means()


def generated(folder, model=None):
    """What a user of transformers gets from a saved folder, who names no end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in ROWS:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("template", [CHATML, SECOND_END])
def test_a_base_student_that_knows_its_data_by_heart_stops_and_matches(tmp_path, template):
    folders = base_pair(tmp_path, byte_level_tokenizer("<|endoftext|>", template), **WIDE)
    run, _, scores = by_heart(folders, tmp_path)
    assert scores["exact_match"] == scores["eos"] == 100.0
    config = GenerationConfig.from_pretrained(run / "student")
    assert TEXT_END in np.atleast_1d(config.eos_token_id)
    assert generated(run / "student") == generated(run / "checkpoint-60") == list(ROWS.values())


def evaluated(settings, tmp_path):
    """The scores of a saved student, opened again beside the same teacher."""
    names = {"teacher_model_name_or_path", "student_model_name_or_path", "eval_file", "task", "max_prompt_length"}
    own = {k: v for k, v in settings.items() if k in {*names, "max_completion_length", "eval_max_new_tokens"}}
    student, file = tmp_path / "run" / "student", tmp_path / "scores.json"
    own |= {"student_model_name_or_path": student, "output_file": file, "only": "student"}
    assert main(["evaluate", *flags(own)]) == 0
    return read_results(file)["student"].means()


@pytest.mark.parametrize("method", ["sft", "kd"])
def test_a_base_student_of_an_instruct_teacher_ends_as_it_was_taught_when_it_is_opened_again(tmp_path, method):
    """Its own folder says that its ends are one event, though its ends are by now those of its teacher."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    save_llama(teacher, byte_level_tokenizer(), 1, **WIDE)
    edit(teacher / "generation_config.json", eos_token_id=[CHAT_END, TEXT_END])
    save_llama(student, byte_level_tokenizer("<|endoftext|>", None), 2, layers=1, **WIDE)
    run, settings, scores = by_heart((teacher, student), tmp_path, method)
    if method == "sft":
        assert scores["exact_match"] == scores["eos"] == 100.0
        assert generated(run / "student") == list(ROWS.values())
    again = evaluated(settings, tmp_path)
    assert again["forward_kl"] == pytest.approx(scores["forward_kl"], rel=1e-6)
    assert again["perplexity"] == pytest.approx(scores["perplexity"], rel=1e-6)
    pair = load_pair(str(teacher), str(run / "student"), device="cpu")
    assert pair.ends == Ends((CHAT_END, TEXT_END), CHAT_END)


def test_an_adapter_says_where_its_texts_end(tmp_path):
    """On a base that writes <|im_end|> and declares <|endoftext|> alone."""
    teacher, student = base_pair(tmp_path, **WIDE)
    run, _, _ = by_heart((teacher, student), tmp_path)
    base = tmp_path / "base"
    run.joinpath("student").rename(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": TEXT_END}))
    for mark in ("manifest.json", "student.json"):  # on purpose
        (base / mark).unlink()
    changes = {"use_peft": [], "learning_rate": 1e-5, "max_steps": 2, "output_dir": tmp_path / "adapted" / "run"}
    run, settings, scores = by_heart((teacher, base), tmp_path, **changes)
    assert scores["exact_match"] == 100.0
    for folder in (run / "student", run / "checkpoint-2"):
        opened = load_model(str(folder), device="cpu")
        assert opened.generation_config.eos_token_id == [CHAT_END, TEXT_END]
        assert generated(folder, opened) == list(ROWS.values())
    assert evaluated(settings, tmp_path / "adapted")["forward_kl"] == pytest.approx(scores["forward_kl"], rel=1e-5)


def test_ends_that_were_merged_in_inference_mode_first_can_be_learned_from_later():
    """What is kept of them from call to call is a tensor that autograd may save."""
    ends = Ends((3, 8, 9), 8)
    with torch.inference_mode():
        ends.log_probs(torch.zeros(1, 12))
    logits = torch.zeros(1, 12, requires_grad=True)
    ends.log_probs(logits)[0, 8].backward()
    assert logits.grad[0, [3, 8, 9]].gt(0).all()
