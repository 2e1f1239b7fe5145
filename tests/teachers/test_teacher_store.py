"""The teacher's stored work: the same as fresh work, bound to what made it, and whole after a kill at any point."""

import dataclasses
import json
import math
import signal
from contextlib import nullcontext

import pytest
import torch
from faults import KILL, Faults, Killed
from test_memory import ours, short_of_memory
from tiny import VOCAB, retold, tiny_model, toy_examples, toy_pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from switchkd import TeacherOnly, decode_reference
from switchkd.base import signals
from switchkd.base.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    ModelError,
    NonFiniteError,
    SwitchKDWarning,
)
from switchkd.data.texts import TokenizedExample, collate
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.head import Head, response_hidden
from switchkd.methods.divergences import log_probs
from switchkd.methods.objectives import OBJECTIVES
from switchkd.teachers import store as teacher_store
from switchkd.teachers.said import TeacherStates, TeacherTopK
from switchkd.teachers.states import TeacherCache
from switchkd.teachers.store import fingerprint
from switchkd.training.loss import response_tokens, total
from switchkd.writing import teacher_texts as texts_module
from switchkd.writing.teacher_texts import teacher_texts

SETTINGS = dict(max_new_tokens=6, temperature=1.0, seed=5, batch_size=2)


def texts(folder, pair=None, examples=None, progress=lambda _: None, **changes):
    settings = DecodeSettings(TeacherOnly(), **SETTINGS | changes)
    return teacher_texts(pair or toy_pair(), examples or toy_examples(20), folder, settings, progress)


def part_of(folder, number):
    """The file of a part, whose name holds its checksum."""
    [file] = folder.glob(f"part-{number:05d}-*")
    return file


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def silent(pair):
    """A pair whose teacher must not be called."""

    def called(*_):
        raise AssertionError("the teacher was called")

    pair.teacher.register_forward_pre_hook(called)
    return pair


def dying(moment):
    """A callback that is a kill when it is called for the ``moment``-th time."""
    calls = iter(range(1, moment))

    def call(*_):
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return call


def changed(examples, place, **changes):
    tell = retold if "completion_ids" in changes else dataclasses.replace
    return [*examples[:place], tell(examples[place], **changes), *examples[place + 1 :]]


def other_weight(pair):
    weight = pair.teacher.model.layers[0].mlp.up_proj.weight.data
    weight[0, 0] = weight[0, 0].nextafter(weight.new_tensor(math.inf))


def other_vocabulary(pair):
    pair.tokenizer.add_tokens(["<new>"])


# --- checksums ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_the_fingerprint_sees_every_part_alone(family):
    """Tied weights (GPT-2, Gemma) too; equal models have equal fingerprints wherever they lie."""
    examples, pair = toy_examples(), toy_pair(family)
    base = fingerprint(pair, examples, completions=True)

    def differs(pair, examples, completions=True):
        now = fingerprint(pair, examples, completions=completions)
        return {key for key in base if now[key] != base[key]}

    assert differs(toy_pair(family), toy_examples()) == set()
    for parameter in pair.teacher.parameters():
        flat, value = parameter.data.view(-1), parameter.data.view(-1)[-1].clone()
        flat[-1] = value.nextafter(torch.tensor(math.inf).double())
        assert differs(pair, examples) == {"teacher_weights"}
        flat[-1] = value
    assert differs(pair, examples) == set()
    pair.teacher.config._name_or_path = "elsewhere"
    assert differs(pair, examples) == set()
    pair.teacher.config.rms_norm_eps = 1e-3
    assert differs(pair, examples) == {"teacher_config"}
    assert "teacher_weights" in differs(toy_pair(family, torch.float32), examples)
    pair = toy_pair(family)
    other_vocabulary(pair)
    assert differs(pair, examples) == {"tokenizer"}
    prompt, completion = examples[2].prompt_ids, examples[2].completion_ids
    for other in (
        examples[1:],
        [examples[1], examples[0], *examples[2:]],
        changed(examples, 2, id=99),
        changed(examples, 2, prompt_ids=[*prompt[:-1], prompt[-1] + 1]),
        changed(examples, 2, completion_ids=completion[:-1]),
        changed(examples, 2, prompt_ids=[*prompt, completion[0]], completion_ids=completion[1:]),
    ):
        assert differs(toy_pair(family), other) == {"examples"}
    prompts = [
        fingerprint(toy_pair(), e, completions=False)["examples"]
        for e in (examples, changed(examples, 2, completion_ids=[]))
    ]
    assert prompts[0] == prompts[1] != base["examples"]


def test_layout_in_memory_does_not_matter_and_bytes_are_not_reinterpreted():
    weight = torch.arange(6, dtype=torch.float32).view(2, 3)
    sha = teacher_store.tensors_sha256
    assert sha({"w": weight}) == sha({"w": weight.T.contiguous().T}) == sha({"w": torch.stack([weight, weight])[1]})
    others = ({"v": weight}, {"w": weight.view(3, 2)}, {"w": weight.view(torch.int32)}, {"w": weight.bfloat16()})
    assert len({sha({"w": weight}), *map(sha, others)}) == 5
    assert sha({"w": torch.tensor(1.0)}) != sha({"w": torch.tensor(2.0)})


# --- the teacher's own text ---------------------------------------------------------------------------------------


def test_tensors_in_shards_have_the_checksum_of_the_whole_tensors(tmp_path):
    """A sharded tensor says that its bytes lie at address 0, whatever it holds."""
    plain = [{"a": torch.full((3, 2), value), "b": torch.arange(5.0)} for value in (1.0, 2.0)]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shards = [{name: distribute_tensor(own, mesh, [Shard(0)]) for name, own in each.items()} for each in plain]
        found = [teacher_store.tensors_sha256(each) for each in shards]
    finally:
        torch.distributed.destroy_process_group()
    assert found == [teacher_store.tensors_sha256(each) for each in plain] and found[0] != found[1]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_texts_are_the_teachers_own(tmp_path, batch_size):
    """Token by token what the reference loop writes under the teacher alone, in any batch, with the examples' ids as keys."""
    pair, examples = toy_pair(), changed(toy_examples(9), 3, id=77, references=("a", "b"))
    made = texts(tmp_path / "t", pair, examples, batch_size=batch_size)
    prompts, ids = [e.prompt_ids for e in examples], [e.id for e in examples]
    reference = decode_reference(pair.student, pair.teacher, prompts, TeacherOnly(), 6, 1.0, 5, ids, [1], VOCAB)
    assert [e.completion_ids for e in made] == [r.completion_ids for r in reference]
    assert [e.truncated for e in made] == [r.stop_reason == "length" for r in reference]
    assert len({e.truncated for e in made}) == 2
    kept = [(e.id, e.prompt_ids, e.references, e.source) for e in examples]
    assert [(e.id, e.prompt_ids, e.references, e.source) for e in made] == kept


def test_texts_never_depend_on_the_reference_completions(tmp_path):
    """SeqKD that reads the ground truth is not SeqKD."""
    blind = [retold(e, completion_ids=[]) for e in toy_examples(6)]
    assert texts(tmp_path / "a", examples=blind) == texts(tmp_path / "b", examples=toy_examples(6))
    assert texts(tmp_path / "a", silent(toy_pair()), toy_examples(6)) == texts(tmp_path / "b", examples=blind)


@pytest.fixture
def decoded(monkeypatch):
    """The ids of the rows that were decoded, call by call."""
    calls, real = [], texts_module.decode_examples

    def counting(*arguments):
        calls.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(texts_module, "decode_examples", counting)
    return calls


def killed_stores(straight):
    """What a kill at any moment can leave of a store: some whole files, in their order, and a part of the next under a hidden
    name; and what somebody leaves who deletes a part."""
    names = sorted(straight)  # the manifest first
    for count in range(len(names) + 1):
        there = {name: straight[name] for name in names[:count]}
        yield there
        if count < len(names):
            for share in (0, len(straight[names[count]]) // 2):
                yield there | {f".{names[count]}.switchkd-{'0' * 32}": straight[names[count]][:share]}
    for name in names[1:]:
        yield {other: straight[other] for other in names if other != name}


def test_killed_anywhere_and_resumed_is_the_straight_store(tmp_path, decoded):
    """Before, between and within writes; no row of a part that is there is made twice."""
    made = texts(tmp_path / "straight")
    straight = files(tmp_path / "straight")
    assert [name.partition("-")[0] for name in sorted(straight)] == ["manifest.json", *["part"] * 3]
    rows = {name: list(range(20))[place * 8 :][:8] for place, name in enumerate(sorted(straight)[1:])}
    for place, there in enumerate(killed_stores(straight)):
        folder = tmp_path / str(place)
        folder.mkdir()
        for name, contents in there.items():
            (folder / name).write_bytes(contents)
        decoded.clear()
        assert texts(folder) == made
        # The batches of the straight run, whose rounding is then the same.
        assert decoded == [ids for name, ids in rows.items() if name not in there]
        assert files(folder) == straight


@pytest.mark.parametrize("moment", range(3))
def test_a_process_that_dies_at_work_loses_a_part_at_most(tmp_path, decoded, moment):
    with pytest.raises(KeyboardInterrupt):
        texts(tmp_path / "t", progress=dying(moment + 1))
    assert [len(ids) for ids in decoded] == [8, 8, 4][: moment + 1]
    decoded.clear()
    told = []
    assert texts(tmp_path / "t", progress=told.append) == (made := texts(tmp_path / "straight")) and len(made) == 20
    assert told == [8, 8, 4] and [len(ids) for ids in decoded] == [*[8, 8, 4][moment + 1 :], 8, 8, 4]
    assert files(tmp_path / "t") == files(tmp_path / "straight")


def test_a_complete_store_never_calls_the_teacher(tmp_path):
    made = texts(tmp_path / "t")
    assert texts(tmp_path / "t", silent(toy_pair())) == made
    with pytest.raises((AssertionError, ModelError), match="the teacher was called"):
        texts(tmp_path / "other", silent(toy_pair()))


EXAMPLES = toy_examples(20)
OTHER_TEXTS = {
    "teacher_weights": (other_weight, EXAMPLES, {}),
    "teacher_config": (lambda pair: setattr(pair.teacher.config, "rope_theta", 9.0), EXAMPLES, {}),
    "tokenizer": (other_vocabulary, EXAMPLES, {}),
    "examples differs": (None, changed(EXAMPLES, 4, prompt_ids=[7, 7]), {}),
    "examples differs ": (None, [EXAMPLES[1], EXAMPLES[0], *EXAMPLES[2:]], {}),
    "examples differs  ": (None, EXAMPLES[:-1], {}),
    "seed is 5 there and 6 now": (None, EXAMPLES, {"seed": 6}),
    "temperature is 1.0 there and 0.5 now": (None, EXAMPLES, {"temperature": 0.5}),
    "top_p is None there and 0.5 now": (None, EXAMPLES, {"top_p": 0.5}),
    "min_p is None there and 0.1 now": (None, EXAMPLES, {"min_p": 0.1}),
    "max_new_tokens is 6 there and 7 now": (None, EXAMPLES, {"max_new_tokens": 7}),
}


@pytest.mark.parametrize("message", OTHER_TEXTS)
@pytest.mark.parametrize("finished", [True, False])
def test_texts_made_under_other_conditions_are_refused(tmp_path, message, finished):
    change, examples, settings = OTHER_TEXTS[message]
    texts(tmp_path / "t")
    if not finished:
        part_of(tmp_path / "t", 2).unlink()
    pair = toy_pair()
    if change:
        change(pair)
    with pytest.raises(CheckpointError, match=message.strip() + ".*delete") as caught:
        texts(tmp_path / "t", silent(pair), examples, **settings)
    assert str(caught.value).count("there, ") + str(caught.value).count(" there and ") == 1
    texts(tmp_path / "t")


@pytest.mark.parametrize("changes", [{"eos_token_ids": (1, 2)}, {"vocab_size": VOCAB - 1}])
def test_ids_that_end_or_bound_a_text_are_compared_too(tmp_path, changes):
    texts(tmp_path / "t")
    with pytest.raises(CheckpointError, match=next(iter(changes)) + " is .* there and .* now"):
        texts(tmp_path / "t", dataclasses.replace(silent(toy_pair()), **changes))


def test_settings_that_move_time_alone_are_free(tmp_path):
    made = texts(tmp_path / "t")
    assert texts(tmp_path / "t", silent(toy_pair()), batch_size=5, block_size=3, memory_gib=1.0) == made
    other_student = dataclasses.replace(toy_pair(), student=tiny_model("llama", 9))
    assert texts(tmp_path / "u", other_student, block_size=3) == made


@pytest.mark.parametrize("finished", [True, False])
def test_damaged_texts_are_refused(tmp_path, finished):
    folder = tmp_path / "t"
    made = texts(folder)
    if not finished:
        part_of(folder, 2).unlink()
    file = part_of(folder, 1)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    other = b'{"id": 9, "completion_ids": [23], "truncated": false}\n'
    changed_lines = [b"".join([lines[0], wrong, *lines[2:]]) for wrong in (b"{}\n", b"\0\0\n", lines[2], other)]
    short, long = (whole[:-9], b"".join(lines[:-1]), b""), (whole + whole[:30], whole + lines[0])
    for damaged in (*short, *long, whole.replace(b": [", b":  [", 1), *changed_lines):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"part-00001-\w+\.jsonl is damaged.*delete it"):
            texts(folder)
    file.unlink()
    assert texts(folder) == made and file.read_bytes() == whole
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged.*delete"):
        texts(folder)


@pytest.mark.parametrize("kind", ["texts", "cache"])
def test_a_store_of_an_older_version_is_refused_with_the_way_out(tmp_path, kind):
    """Which lay otherwise in its folder: of texts, and of what a teacher says."""
    folder = tmp_path / "t"
    folder.mkdir()
    if kind == "texts":
        (folder / "header.json").write_text('{"format": "switchkd teacher texts 1"}')
        (folder / "texts.jsonl").write_text('{"id": 0, "completion_ids": [1], "truncated": false}\n')
    else:
        made_from = {"format": "switchkd teacher cache 1", "kind": "hidden"}
        (folder / "manifest.json").write_text(json.dumps({"made_from": made_from, "firsts": [0], "offsets": [0]}))
    there = files(folder)
    for call in (texts, lambda folder: build(folder, "hidden"), lambda folder: reopen(folder, "hidden")):
        with pytest.raises(CheckpointError, match=f"as an older version .* name another folder, or delete {folder} to"):
            call(folder)
    assert files(folder) == there


def test_a_store_of_a_newer_version_is_refused(tmp_path):
    build(tmp_path, "hidden")
    manifest = json.loads((tmp_path / "manifest.json").read_text()) | {"format": "switchkd teacher store 9"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"as another version .* name another folder, or delete"):
        build(tmp_path, "hidden")


@pytest.mark.parametrize("kind", ["texts", "cache"])
def test_a_part_that_cannot_be_read_is_named(tmp_path, kind):
    texts(tmp_path) if kind == "texts" else build(tmp_path, "hidden")
    file = part_of(tmp_path, 0)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=rf"{file} cannot be read .*; delete it"):
        texts(tmp_path) if kind == "texts" else build(tmp_path, "hidden")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for call in (texts, lambda folder: build(folder, "hidden")):
        with pytest.raises(CheckpointError, match=r"holds thesis\.tex; name an empty folder"):
            call(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_prompt_that_cannot_be_completed_is_named_and_the_parts_before_it_kept(tmp_path):
    examples = changed(toy_examples(20), 11, prompt_ids=list(range(2, 22)) * 3)
    with pytest.raises(DataError, match=r"toy:12: the teacher cannot complete it: .*exceed the models' context"):
        texts(tmp_path / "t", examples=examples)
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"manifest.json", part_of(tmp_path / "t", 0).name}
    pair = toy_pair()
    pair.teacher.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"toy:1: .*teacher's logits are not finite"):
        texts(tmp_path / "u", pair)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        texts(tmp_path / "u", max_new_tokens=-1)
    texts(tmp_path / "u")  # nothing had been made, so nothing was bound
    with pytest.raises(DataError, match="no examples"):
        teacher_texts(toy_pair(), [], tmp_path / "v", DecodeSettings(TeacherOnly(), **SETTINGS))


# --- what the teacher says about fixed text -----------------------------------------------------------------------

KINDS = {"hidden": {}, "top_k": {"top_k": 5}}


def ragged():
    """Also empty completions: at the start, in the middle and at the end."""
    examples = toy_examples(14)
    return [retold(e, completion_ids=[]) if e.id in (0, 6, 13) else e for e in examples]


def build(folder, kind, pair=None, examples=None, **settings):
    return TeacherCache.build(pair or toy_pair(), examples or ragged(), folder, kind, **KINDS[kind] | settings)


def reopen(folder, kind, pair=None, examples=None, **settings):
    return TeacherCache.open(silent(pair or toy_pair()), examples or ragged(), folder, kind, **KINDS[kind] | settings)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr("switchkd.teachers.states.PART_BYTES", 1000)


def fresh(model, example):
    with torch.no_grad():
        return response_hidden(model, collate([(example.prompt_ids, example.completion_ids)]))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_states_are_those_of_a_fresh_forward(tmp_path, small_parts, family, batch_size):
    pair = toy_pair(family)
    build(tmp_path / "c", "hidden", pair, batch_size=batch_size)
    cache = reopen(tmp_path / "c", "hidden", toy_pair(family))
    assert len(list((tmp_path / "c").glob("part-*"))) > 3
    for index in (13, 0, 6, *range(14)):  # in any order
        expected = fresh(pair.teacher, ragged()[index])
        assert cache.hidden(index).shape == expected.shape
        torch.testing.assert_close(cache.hidden(index), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_top_k_is_the_head_of_the_sorted_log_probs(tmp_path, small_parts, k):
    pair = toy_pair()
    build(tmp_path / "c", "top_k", pair, top_k=k)
    cache = reopen(tmp_path / "c", "top_k", top_k=k)
    head = Head.of(pair.teacher, VOCAB)
    for index, example in enumerate(ragged()):
        values, ids = log_probs(head(fresh(pair.teacher, example))).sort(descending=True)
        kept = cache.top_k(index)
        assert kept[0].dtype == torch.int32 and torch.equal(kept[0].long(), ids[:, :k])
        torch.testing.assert_close(kept[1], values[:, :k], atol=1e-12, rtol=1e-12)


def test_a_float32_teacher_is_kept_in_its_dtypes(tmp_path):
    pair = toy_pair(dtype=torch.float32)
    assert build(tmp_path / "a", "hidden", pair).hidden(1).dtype == torch.float32
    assert build(tmp_path / "b", "top_k", pair).top_k(1)[1].dtype == torch.float32
    pair = toy_pair(dtype=torch.bfloat16)
    hidden, kept = build(tmp_path / "c", "hidden", pair).hidden(1), build(tmp_path / "d", "top_k", pair).top_k(1)
    assert (hidden.dtype, kept[1].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(build(tmp_path / "e", "hidden", pair, batch_size=1).hidden(1), fresh(pair.teacher, ragged()[1]))


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.reads_teacher])
def test_the_loss_from_the_cache_is_the_loss_of_the_live_teacher(tmp_path, name):
    """Of hidden states to the last bit, of all ids to 1e-9; of fewer ids it is less, and more than nothing."""
    pair, objective = toy_pair(), OBJECTIVES[name]()
    hidden_cache = build(tmp_path / "h", "hidden", batch_size=1)
    caches = [build(tmp_path / str(k), "top_k", top_k=k) for k in (VOCAB, 6, 1)]
    head_p, head_q = Head.of(pair.teacher, VOCAB), Head.of(pair.student, VOCAB)
    for index, example in enumerate(ragged()):
        tokens = response_tokens(collate([(example.prompt_ids, example.completion_ids)]), [example.speakers])
        hidden_p, hidden_q = fresh(pair.teacher, example), fresh(pair.student, example)
        live = total(objective, TeacherStates(head_p, hidden_p), head_q, hidden_q, tokens)
        kept = hidden_cache.attached(example, index).said
        assert torch.equal(total(objective, TeacherStates(head_p, kept), head_q, hidden_q, tokens), live)
        if not objective.compares:
            continue
        tops = [TeacherTopK(*cache.attached(example, index).said) for cache in caches]
        all_ids, six, one = (total(objective, top, head_q, hidden_q, tokens) for top in tops)
        torch.testing.assert_close(all_ids, live, atol=1e-9, rtol=1e-9)
        if name != "akl":  # whose weights are no divergence's
            assert 0 < one <= six <= live + 1e-12 or not example.completion_ids


@pytest.mark.parametrize("where", ["forward", "between", "write"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_build_goes_on_and_leaves_no_half_file(tmp_path, small_parts, monkeypatch, kind, where):
    """What is there after the kill is whole, and is not made again."""
    build(tmp_path / "straight", kind, batch_size=2)
    whole = files(tmp_path / "straight")
    for moment in (1, 2, 3):
        folder, pair, die = tmp_path / str(moment), toy_pair(), dying(moment)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if where == "forward":
                pair.teacher.model.register_forward_hook(die)
            if where == "write":  # the data is written and not yet in place
                patch.setattr("switchkd.base.storage.sync", dying(2 * moment + 1))
            build(folder, kind, pair, batch_size=2, progress=die if where == "between" else lambda _: None)
        there = files(folder)
        assert there.items() <= whole.items() and len(there) < len(whole)
        if there:
            with pytest.raises(CheckpointError, match=r"part-0000\d is missing in .*; build"):
                reopen(folder, kind)
            half = f".{part_of(tmp_path / 'straight', 1).name}.switchkd-{'0' * 32}"
            (folder / half).write_bytes(b"half")  # a killed process cannot clean up
        times = {name: (folder / name).stat().st_mtime_ns for name in there}
        told = []
        build(folder, kind, batch_size=2, progress=told.append)
        assert files(folder) == whole and sum(told) == 14
        assert all((folder / name).stat().st_mtime_ns == times[name] for name in there)
        reopen(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_cache_never_calls_the_teacher(tmp_path, kind):
    build(tmp_path / "c", kind)
    assert build(tmp_path / "c", kind, silent(toy_pair())) == reopen(tmp_path / "c", kind)


RAGGED = ragged()
OTHER_CACHES = {
    "teacher_weights": (other_weight, RAGGED, {}),
    "teacher_config": (lambda pair: setattr(pair.teacher.config, "rope_theta", 9.0), RAGGED, {}),
    "tokenizer": (other_vocabulary, RAGGED, {}),
    "examples differs": (None, changed(RAGGED, 4, completion_ids=[7, 1]), {}),
    "examples differs ": (None, [RAGGED[1], RAGGED[0], *RAGGED[2:]], {}),
    "examples differs  ": (None, changed(RAGGED, 4, id=40), {}),
    "top_k is 5 there and 4 now": (None, RAGGED, {"top_k": 4}),
}


@pytest.mark.parametrize("message", OTHER_CACHES)
def test_a_cache_of_something_else_is_refused(tmp_path, message):
    change, examples, settings = OTHER_CACHES[message]
    build(tmp_path / "c", "top_k")
    pair = toy_pair()
    if change:
        change(pair)
    for call in (reopen, build):
        with pytest.raises(CheckpointError, match=message.strip() + ".*delete") as caught:
            call(tmp_path / "c", "top_k", pair, examples, **settings)
        assert str(caught.value).count("there, ") + str(caught.value).count(" there and ") == 1


def test_another_kind_or_none_is_refused(tmp_path):
    build(tmp_path / "c", "top_k")
    with pytest.raises(CheckpointError, match="kind is 'top_k' there and 'hidden' now"):
        reopen(tmp_path / "c", "hidden")
    with pytest.raises(CheckpointError, match=r"part-00000 is missing in .*/nothing; build"):
        reopen(tmp_path / "nothing", "hidden")
    with pytest.raises(ConfigError, match="did you mean 'hidden'"):
        TeacherCache.build(toy_pair(), ragged(), tmp_path / "x", "hiden")
    for wrong in ({"top_k": 0}, {"top_k": VOCAB + 1}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(tmp_path / "x", "top_k", **wrong)
    with pytest.raises(DataError, match="no examples"):
        TeacherCache.build(toy_pair(), [], tmp_path / "x", "hidden")
    assert not (tmp_path / "x").exists()


DAMAGES = ["flip", "cut", "empty", "swap", "swapped name", "foreign", "foreign name", "remove", "manifest", "firsts"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_refused_by_name(tmp_path, small_parts, damage):
    folder, manifest = tmp_path / "c", tmp_path / "c" / "manifest.json"
    build(folder, "hidden")
    file, name = part_of(folder, 1), r"part-00001(-\w+\.safetensors)? is (damaged|missing)"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    build(tmp_path / "other", "hidden", toy_pair(seeds=(1, 3)))
    second, foreign = part_of(folder, 2), part_of(tmp_path / "other", 1)
    contents = {
        "flip": data, "cut": data[:-8], "empty": b"", "swap": second.read_bytes(), "swapped name": second.read_bytes(),
        "foreign": foreign.read_bytes(), "foreign name": foreign.read_bytes(),
    }  # fmt: skip
    names = {"swapped name": second.name.replace("part-00002", "part-00001"), "foreign name": foreign.name}
    if damage in contents:
        file.unlink()
        (folder / names.get(damage, file.name)).write_bytes(contents[damage])
    if damage == "remove":
        file.unlink()
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:-5])
    if damage == "firsts":
        record = json.loads(manifest.read_text())
        record["firsts"][1] += 1
        manifest.write_text(json.dumps(record))
    if damage in ("manifest", "firsts"):
        name = r"manifest\.json is damaged"
    with pytest.raises(CheckpointError, match=name + ".*(delete|build)"):
        reopen(folder, "hidden")
    if damage in contents:
        with pytest.raises(CheckpointError, match=name):
            build(folder, "hidden")
        part_of(folder, 1).unlink()  # the way out
    if damage not in ("manifest", "firsts"):
        build(folder, "hidden")
        reopen(folder, "hidden")


def test_examples_without_any_completion(tmp_path):
    examples = [retold(e, completion_ids=[]) for e in toy_examples(3)]
    for kind, shape in (("hidden", (0, 16)), ("top_k", (0, 5))):
        build(tmp_path / kind, kind, examples=examples)
        cache = reopen(tmp_path / kind, kind, examples=examples)
        tensors = [cache.hidden(2)] if kind == "hidden" else cache.top_k(2)
        assert all(tensor.shape == shape for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_output_is_named_and_not_kept(tmp_path, kind):
    pair = toy_pair()
    pair.teacher.model.embed_tokens.weight.data[8] = math.nan
    examples = [
        TokenizedExample(0, [3], [4, 1], [2, 2], (), False, "a:1"),
        TokenizedExample(1, [3, 4], [8, 1], [2, 2], (), False, "a:2"),
    ]
    pair.teacher.lm_head.weight = torch.nn.Parameter(pair.teacher.lm_head.weight.detach().clone())
    with pytest.raises(NonFiniteError, match="a:2: what the teacher computes for it is not finite"):
        build(tmp_path / "c", kind, pair, examples)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("batch_size", "tokens"), [(3, 10**6), (32, 20)])
def test_forwards_are_capped_in_rows_and_tokens(tmp_path, monkeypatch, batch_size, tokens):
    monkeypatch.setattr("switchkd.teachers.states.BATCH_TOKENS", tokens)
    pair, shapes = toy_pair(), []
    pair.teacher.model.register_forward_pre_hook(lambda _, a, k: shapes.append(k["input_ids"].shape), with_kwargs=True)
    build(tmp_path / "c", "hidden", pair, batch_size=batch_size)
    shapes.pop(0)  # by which the output layer was proved
    assert all(rows <= batch_size and rows * width <= tokens for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == 11 > len(shapes)  # none for the three without a completion


def test_the_teachers_mode_is_given_back(tmp_path):
    pair = toy_pair("gpt2")
    pair.teacher.train()
    first = build(tmp_path / "c", "hidden", pair).hidden(1)
    assert pair.teacher.training
    torch.testing.assert_close(first, fresh(toy_pair("gpt2").teacher, ragged()[1]), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["texts", "cache"])
def test_a_store_whose_folder_goes_is_not_made_anew(tmp_path, monkeypatch, kind):
    folder = tmp_path / "store"
    monkeypatch.setattr("switchkd.teachers.states.PART_BYTES", 1000)  # more than one is to be written

    def gone(_):
        if folder.exists():
            folder.rename(tmp_path / "moved")

    with pytest.raises(DiskError, match="is not the folder that the work began in"):
        if kind == "texts":
            texts(folder, progress=gone)
        else:
            build(folder, "hidden", progress=gone)
    assert not folder.exists()


def test_after_memory_ran_out_the_next_part_begins_with_the_rows_that_fit(tmp_path, monkeypatch):
    """And the text is the same; it is said once."""
    made = texts(tmp_path / "straight", batch_size=4)
    with pytest.warns(SwitchKDWarning, match="with 4 rows at once: from here on 2;") as said:
        short_of_memory(monkeypatch, rows=2)
        assert texts(tmp_path / "short", batch_size=4) == made
    assert len(ours(said)) == 1
    assert files(tmp_path / "short") == files(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["texts", *KINDS])
def test_a_signal_ends_the_work_between_two_batches_and_it_is_gone_on_from(tmp_path, small_parts, kind):
    def work(folder, progress):
        if kind == "texts":
            texts(folder, progress=progress)
        else:
            build(folder, kind, batch_size=2, progress=progress)

    with signals.deferred(), pytest.raises(signals.Stopped):
        work(tmp_path / "t", lambda _: signal.raise_signal(signal.SIGTERM))
    assert len(files(tmp_path / "t")) == 2  # the manifest and the part behind which the signal came
    for name in ("t", "straight"):
        work(tmp_path / name, lambda _: None)
    assert files(tmp_path / "t") == files(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["texts", "cache"])
def test_killed_in_any_file_operation_it_goes_on_to_the_straight_store(tmp_path, monkeypatch, small_parts, kind):
    """What stands under its own name after the kill is whole."""
    monkeypatch.setattr(teacher_store, "locked", lambda *_, **__: nullcontext(lambda: None))  # which has its own tests
    pair, examples = toy_pair(), toy_examples(5)

    def work(folder):
        if kind == "texts":
            texts(folder, pair, examples, batch_size=1, max_new_tokens=1)
        else:
            build(folder, "hidden", pair, examples)

    with Faults().installed() as faults:
        work(tmp_path / "straight")
    straight = files(tmp_path / "straight")
    assert faults.count > 4 * len(straight) >= 12
    for at in range(1, faults.count + 1):
        folder = tmp_path / str(at)
        with pytest.raises(Killed), Faults(at, KILL).installed():
            work(folder)
        there = {name: contents for name, contents in files(folder).items() if not name.startswith(".")}
        assert there.items() <= straight.items()
        work(folder)
        assert files(folder) == straight
