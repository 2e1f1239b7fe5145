"""Files to examples, examples to ids, ids to batches: on files and tokenizers made here."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, byte_level_tokenizer, toy_examples
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from switchkd.base.errors import ConfigError, DataError
from switchkd.data.examples import Example
from switchkd.data.fields import Message
from switchkd.data.templates import alpaca_prompt
from switchkd.data.texts import batch_indices, collate, tokenize

PAIR = {"prompt": "What is two and two?", "completion": "It is four."}


def space_marking_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before any text that stands alone, as SentencePiece vocabularies do."""
    words = ["<s>", "</s>", "▁", "▁Say", "▁it:", "it:", "yes", "▁yes"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("it:", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def example(prompt: str = PAIR["prompt"], completion: str = PAIR["completion"], **fields) -> Example:
    values = {"id": 0, "input": "", "messages": (Message("user", prompt),), "source": "here:1"}
    return Example(completion=completion, references=(completion,), **(values | fields))


def tokenized(examples, tokenizer=None, template="chat", max_prompt_length=400, max_completion_length=200):
    return tokenize(
        examples,
        tokenizer or byte_level_tokenizer(),
        template=template,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
    )


# --- templates and ids --------------------------------------------------------------------------------------------


def test_alpaca_wording():
    assert alpaca_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert alpaca_prompt("Add.", "2 {2}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n2 {2}\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("template", "context", "prompt"),
    [
        ("alpaca", "", alpaca_prompt(PAIR["prompt"])),
        ("alpaca", "2 2", alpaca_prompt(PAIR["prompt"], "2 2")),
        ("none", "", PAIR["prompt"]),
        ("none", "2 2", PAIR["prompt"] + "\n\n2 2"),
    ],
)
def test_plain_templates_end_with_one_eos(template, context, prompt):
    tokenizer = byte_level_tokenizer(template=None)
    [row], counts = tokenized([example(input=context)], tokenizer, template)
    assert tokenizer.decode(row.prompt_ids) == prompt
    assert tokenizer.decode(row.completion_ids) == "It is four.<|im_end|>"
    assert row.completion_ids.count(tokenizer.eos_token_id) == 1
    assert (counts.long_prompts, counts.end_tokens_in_text, counts.truncated) == (0, 0, 0)


THINKING = CHATML.replace(
    "+ m['content']", "+ ('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '') + m['content']"
)
SECOND_END = CHATML.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")


@pytest.mark.parametrize("template", [CHATML, THINKING, SECOND_END])
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("completion", ["It is four.", "\n four \n", "vier äöü 😀", "<s> four"])
def test_chat_ids_are_what_the_chat_template_writes(template, eos, completion):
    tokenizer = byte_level_tokenizer(eos, template)
    [row], _ = tokenized([example(completion=completion, input="2 2")], tokenizer)
    turns = [{"role": "user", "content": PAIR["prompt"] + "\n\n2 2"}]
    assert row.prompt_ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    turns.append({"role": "assistant", "content": completion})
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    ids = row.prompt_ids + row.completion_ids
    assert tokenizer.decode(whole).startswith(tokenizer.decode(ids))
    rest = tokenizer.decode(whole).removeprefix(tokenizer.decode(ids))
    assert rest.removesuffix("<|endoftext|>").strip() == "", "only what follows the end of the text may be missing"
    end = eos if template == SECOND_END else "<|im_end|>"  # of two closing tokens the one that stops
    assert row.completion_ids[-1] == tokenizer.convert_tokens_to_ids(end)
    if not completion.startswith("\n"):  # there the newline of the generation prompt would merge with the answer's
        assert ids == whole[: len(ids)]


def test_chat_template_without_an_end_token_gets_eos():
    bare = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}"
    template = bare + "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    tokenizer = byte_level_tokenizer("<|endoftext|>", template)
    [row], _ = tokenized([example()], tokenizer)
    assert tokenizer.decode(row.completion_ids) == "It is four.<|endoftext|>"
    with pytest.raises(ConfigError, match="ends a turn"):
        tokenized([example()], byte_level_tokenizer(None, template))


def test_several_turns():
    turns = (Message("system", "Be short."), Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "Bye"))
    tokenizer = byte_level_tokenizer()
    [row], _ = tokenized([example(messages=turns)], tokenizer)
    assert tokenizer.decode(row.prompt_ids).count("<|im_end|>") == 4
    with pytest.raises(DataError, match="here:1: template 'alpaca' takes one user turn, not system, user"):
        tokenized([example(messages=turns)], template="alpaca")
    strict = byte_level_tokenizer(template="{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match=r"here:1: the chat template refuses the turns system, user.*no system turn"):
        tokenized([example(messages=turns)], strict)


def test_beginning_token_is_kept_and_an_ending_one_never_closes_the_prompt():
    tokenizer = byte_level_tokenizer("<|endoftext|>")
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|endoftext|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>", special_tokens=specials
    )
    [row], _ = tokenized([example()], tokenizer, "none")
    assert tokenizer.decode(row.prompt_ids) == "<s>What is two and two?"
    assert tokenizer.decode(row.completion_ids) == "It is four.<|endoftext|>"
    [merging], _ = tokenized([example("What is t", "wo")], tokenizer, "none")
    assert tokenizer.decode(merging.completion_ids) == "wo<|endoftext|>"
    [row], _ = tokenized([example()], tokenizer, "chat")
    assert tokenizer.decode(row.prompt_ids).startswith("<|im_start|>"), "the chat template alone writes special tokens"


def test_no_space_is_made_up_before_a_completion():
    tokenizer = space_marking_tokenizer()
    [row], _ = tokenized([example("Say it:", "yes")], tokenizer, "none")
    assert tokenizer.convert_ids_to_tokens(row.completion_ids) == ["yes", "</s>"]


def test_a_completion_that_merges_into_the_prompt_leaves_the_prompt_as_it_is():
    tokenizer = byte_level_tokenizer()
    [row], _ = tokenized([example("What", "What")], tokenizer, "none")
    [merged], _ = tokenized([example("What is t", "wo")], tokenizer, "none")
    alone = tokenizer("What is t")["input_ids"]
    assert tokenizer("What is two")["input_ids"][: len(alone)] != alone, "the case under test"
    assert merged.prompt_ids == alone and tokenizer.decode(merged.completion_ids) == "wo<|im_end|>"
    assert tokenizer.decode(row.completion_ids) == "What<|im_end|>"


def test_many_examples_keep_their_order_and_records():
    rows = [example(f"What is {i}?", f"It is {i}.", id=i, source=f"here:{i}") for i in range(600)]
    tokenizer = byte_level_tokenizer()
    kept, _ = tokenized(rows, tokenizer)
    assert [(row.id, row.source, row.references) for row in kept] == [(r.id, r.source, r.references) for r in rows]
    assert [tokenizer.decode(row.completion_ids) for row in kept] == [f"It is {i}.<|im_end|>" for i in range(600)]


def test_long_prompts_are_dropped_whole_and_counted():
    rows = [example(id=0), example("What is two and two? " * 40, id=1), example(id=2)]
    length = len(tokenized(rows[:1])[0][0].prompt_ids)
    kept, counts = tokenized(rows, max_prompt_length=length)
    assert [row.id for row in kept] == [0, 2] and counts.long_prompts == 1
    with pytest.raises(
        DataError, match=rf"none of 3 .* 3 prompts are longer than max_prompt_length={length - 1} .*raise"
    ):
        tokenized(rows, max_prompt_length=length - 1)


def test_a_cut_completion_has_no_end_token():
    [whole], _ = tokenized([example()])
    full = len(whole.completion_ids)
    [exact], counts = tokenized([example()], max_completion_length=full)
    assert exact == whole and not exact.truncated and counts.truncated == 0
    [cut], counts = tokenized([example()], max_completion_length=full - 1)
    assert cut.completion_ids == whole.completion_ids[:-1] and cut.truncated and counts.truncated == 1


@pytest.mark.parametrize(
    ("template", "eos", "marker"),
    [
        ("none", "<|im_end|>", "<|im_end|>"),
        ("chat", "<|im_end|>", "<|im_end|>"),
        ("chat", "<|endoftext|>", "<|im_end|>"),
        ("chat", "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_a_completion_that_spells_out_an_end_token_is_dropped_and_counted(template, eos, marker):
    tokenizer = byte_level_tokenizer(eos)
    kept, counts = tokenized([example(), example(completion=f"It is{marker} four.")], tokenizer, template)
    assert len(kept) == 1 and counts.end_tokens_in_text == 1


def test_settings_and_tokenizers_that_cannot_be_used():
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        tokenized([example()], template="alpacca")
    with pytest.raises(ConfigError, match="use 'alpaca' or 'none'"):
        tokenized([example()], byte_level_tokenizer(template=None))
    with pytest.raises(ConfigError, match="eos token"):
        tokenized([example()], byte_level_tokenizer(None), template="none")
    with pytest.raises(ConfigError, match="at least 1 token"):
        tokenized([example()], max_completion_length=0)
    with pytest.raises(ConfigError, match="at least 1 token"):
        tokenized([example()], max_prompt_length=0)
    with pytest.raises(DataError, match="here:1: the prompt has no tokens"):
        tokenized([example("")], template="none")
    with pytest.raises(DataError, match="none of 0 examples"):
        tokenized([])
    opening = CHATML.replace("assistant\n", "assistant\n<think>")
    with pytest.raises(ConfigError, match="is not how it begins an assistant turn"):
        tokenized([example()], byte_level_tokenizer(template=opening))


# --- order --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**64 - 1), st.integers(1, 4))
def test_every_example_once_an_epoch(n_examples, batch_size, seed, epochs):
    steps = range(-(-n_examples * epochs // batch_size))
    stream = [index for step in steps for index in batch_indices(n_examples, batch_size, step * batch_size, seed)]
    assert len(stream) == batch_size * len(steps)
    for epoch in range(epochs):
        assert sorted(stream[epoch * n_examples : (epoch + 1) * n_examples]) == list(range(n_examples))


def test_the_stream_does_not_depend_on_the_batch_size():
    streams = [
        [i for step in range(60 // size) for i in batch_indices(25, size, step * size, 7)] for size in (1, 4, 6, 30)
    ]
    assert all(stream == streams[0] for stream in streams)


def test_large_seeds_differ_to_the_last_bit():
    assert batch_indices(50, 50, 50, 2**64 - 1) != batch_indices(50, 50, 50, 2**64 - 2)


def test_order_differs_by_epoch_and_seed_and_is_pinned():
    orders = {tuple(batch_indices(8, 8, 8 * step, seed)) for step in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert batch_indices(8, 8, 0, 0) == [0, 2, 1, 5, 4, 3, 6, 7], "the order is part of what a seed promises"


@pytest.mark.parametrize("numbers", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1), (1, 1, 0, 2**64)])
def test_order_numbers_out_of_range(numbers):
    with pytest.raises(ConfigError, match="no batch for"):
        batch_indices(*numbers)


# --- batches ------------------------------------------------------------------------------------------------------

_ids = st.integers(0, 5)
_rows = st.lists(st.tuples(st.lists(_ids, min_size=1, max_size=6), st.lists(_ids, max_size=6)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=100)
@given(_rows, _ids)
def test_masks_come_from_lengths_whatever_the_tokens(rows, pad_id):
    batch = collate(rows, pad_id)
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    assert batch.input_ids.shape == (len(rows), width)
    for b, (prompt, completion) in enumerate(rows):
        n_pad = width - len(prompt) - len(completion)
        assert batch.input_ids[b].tolist() == prompt + completion + [pad_id] * n_pad
        assert batch.attention_mask[b].tolist() == [1] * (width - n_pad) + [0] * n_pad
        assert batch.loss_mask[b].tolist() == [False] * len(prompt) + [True] * len(completion) + [False] * n_pad
        assert batch.position_ids[b].tolist() == list(range(width))


def test_pad_equal_to_eos_keeps_every_real_eos_in_the_loss():
    eos = 2
    batch = collate([([eos, 5], [6, eos, eos]), ([5], [eos])], pad_id=eos)
    assert batch.loss_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.attention_mask.sum(1).tolist() == [5, 2]


def test_empty_completions_and_types():
    batch = collate([([3, 4], []), ([3], [])])
    assert not batch.loss_mask.any() and batch.loss_mask.dtype == torch.bool
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.position_ids.dtype} == {torch.int64}


def test_to_moves_every_tensor():
    moved = collate([([3, 4], [5])]).to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.attention_mask, moved.position_ids, moved.loss_mask)} == {
        "meta"
    }


@pytest.mark.parametrize("rows", [[], [([], [1])], [([1], [1]), ([], [])]])
def test_rows_that_cannot_be_a_batch(rows):
    with pytest.raises(DataError, match="needs rows with a prompt"):
        collate(rows)


def test_a_text_has_a_speaker_for_each_of_its_tokens():
    [example, *_] = toy_examples(1)
    with pytest.raises(DataError, match=rf"{example.source}: 1 speakers for {len(example.completion_ids)} tokens"):
        dataclasses.replace(example, speakers=[0])
    assert dataclasses.replace(example, completion_ids=[4, 5], speakers=[0, 1]).speakers == [0, 1]
