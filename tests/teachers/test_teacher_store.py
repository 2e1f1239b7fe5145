"""The teacher's stored work: the same as fresh work, bound to what made it, and whole after a kill at any point."""

import dataclasses
import json
import math

import pytest
import torch
from tiny import VOCAB, retold, tiny_model, toy_examples, toy_pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from switchkd import TeacherOnly, decode_reference
from switchkd.base.errors import CheckpointError, ConfigError, DataError, DiskError, ModelError, NonFiniteError
from switchkd.data.texts import TokenizedExample, collate
from switchkd.decoding.settings import DecodeSettings
from switchkd.decoding.teacher_texts import teacher_texts
from switchkd.forward.head import Head, response_hidden
from switchkd.methods.divergences import log_probs
from switchkd.methods.objectives import OBJECTIVES
from switchkd.teachers import store as teacher_store
from switchkd.teachers.said import TeacherStates
from switchkd.teachers.states import TeacherCache
from switchkd.teachers.store import fingerprint
from switchkd.training.loss import response_tokens, total

SETTINGS = dict(max_new_tokens=6, temperature=1.0, seed=5, batch_size=2)


def texts(folder, pair=None, examples=None, **changes):
    return teacher_texts(
        pair or toy_pair(), examples or toy_examples(20), folder, DecodeSettings(TeacherOnly(), **SETTINGS | changes)
    )


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


def test_killed_anywhere_and_resumed_is_the_straight_file(tmp_path, monkeypatch):
    """Cut at any byte, also within a line and before the seal; no row is made twice."""
    straight = texts(tmp_path / "straight")
    whole = (tmp_path / "straight" / "texts.jsonl").read_bytes()
    calls = []
    real = teacher_store.decode_examples

    def counting(*arguments):
        calls.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(teacher_store, "decode_examples", counting)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[7], ends[9] + 20, ends[-2], len(whole) - 1, len(whole)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "header.json").write_bytes((tmp_path / "straight" / "header.json").read_bytes())
        (folder / "texts.jsonl").write_bytes(whole[:cut])
        calls.clear()
        assert texts(folder) == straight
        assert [i for ids in calls for i in ids] == [e.id for e in toy_examples(20)][whole[:cut].count(b"\n") :]
        # The batches of the straight run, whose rounding is then the same.
        assert all(ids[0] % 8 == 0 for ids in calls[1:])
        assert (folder / "texts.jsonl").read_bytes() == whole
        assert {p.name for p in folder.iterdir()} == {"header.json", "texts.jsonl", "complete.json"}


@pytest.mark.parametrize("moment", range(4))
def test_a_process_that_dies_at_work_loses_a_chunk_at_most(tmp_path, moment):
    with pytest.raises(KeyboardInterrupt):
        texts(tmp_path / "t", progress=dying(moment + 1))
    told = []
    assert texts(tmp_path / "t", progress=told.append) == texts(tmp_path / "straight")
    assert sum(told) == 20 and told[0] == min(8 * moment, 20)
    names = [sorted((p.name, p.read_bytes()) for p in (tmp_path / f).iterdir()) for f in ("t", "straight")]
    assert names[0] == names[1]


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
        (tmp_path / "t" / "complete.json").unlink()
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


def test_damaged_texts_are_refused(tmp_path):
    texts(tmp_path / "t")
    file = tmp_path / "t" / "texts.jsonl"
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole.replace(b": [", b":  [", 1), whole + whole[:30]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"texts\.jsonl is damaged.*delete"):
            texts(tmp_path / "t")
    (tmp_path / "t" / "complete.json").unlink()
    lines = whole.splitlines(keepends=True)
    for wrong in (b"{}\n", b"\0\0\n", lines[2], b'{"id": 1, "completion_ids": [23], "truncated": false}\n'):
        file.write_bytes(b"".join([lines[0], wrong, *lines[2:]]))
        with pytest.raises(CheckpointError, match=r"texts\.jsonl:2 is damaged"):
            texts(tmp_path / "t")
    file.write_bytes(whole + lines[0])
    with pytest.raises(CheckpointError, match="21 lines for 20 examples"):
        texts(tmp_path / "t")
    (tmp_path / "t" / "header.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"header\.json cannot be read"):
        texts(tmp_path / "t")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for call in (texts, lambda folder: build(folder, "hidden")):
        with pytest.raises(CheckpointError, match=r"holds thesis\.tex; name an empty folder"):
            call(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_prompt_that_cannot_be_completed_is_named_and_the_text_before_it_kept(tmp_path):
    examples = changed(toy_examples(20), 11, prompt_ids=list(range(2, 22)) * 3)
    with pytest.raises(DataError, match=r"toy:12: the teacher cannot complete it: .*exceed the models' context"):
        texts(tmp_path / "t", examples=examples)
    assert (tmp_path / "t" / "texts.jsonl").read_bytes().count(b"\n") == 11
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
def small_shards(monkeypatch):
    monkeypatch.setattr("switchkd.teachers.states.SHARD_BYTES", 1000)


def fresh(model, example):
    with torch.no_grad():
        return response_hidden(model, collate([(example.prompt_ids, example.completion_ids)]))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_states_are_those_of_a_fresh_forward(tmp_path, small_shards, family, batch_size):
    pair = toy_pair(family)
    build(tmp_path / "c", "hidden", pair, batch_size=batch_size)
    cache = reopen(tmp_path / "c", "hidden", toy_pair(family))
    assert len(list((tmp_path / "c").glob("shard-*"))) > 3
    for index in (13, 0, 6, *range(14)):  # in any order
        expected = fresh(pair.teacher, ragged()[index])
        assert cache.hidden(index).shape == expected.shape
        torch.testing.assert_close(cache.hidden(index), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 5, VOCAB])
def test_top_k_is_the_head_of_the_sorted_log_probs(tmp_path, small_shards, k):
    pair = toy_pair()
    build(tmp_path / "c", "top_k", pair, top_k=k)
    cache = reopen(tmp_path / "c", "top_k", top_k=k)
    head = Head.of(pair.teacher, VOCAB)
    for index, example in enumerate(ragged()):
        values, ids = log_probs(head(fresh(pair.teacher, example))).sort(descending=True)
        kept = cache.top_k(index)
        assert kept.ids.dtype == torch.int32 and torch.equal(kept.ids.long(), ids[:, :k])
        torch.testing.assert_close(kept.log_probs, values[:, :k], atol=1e-12, rtol=1e-12)


def test_a_float32_teacher_is_kept_in_its_dtypes(tmp_path):
    pair = toy_pair(dtype=torch.float32)
    assert build(tmp_path / "a", "hidden", pair).hidden(1).dtype == torch.float32
    assert build(tmp_path / "b", "top_k", pair).top_k(1).log_probs.dtype == torch.float32
    pair = toy_pair(dtype=torch.bfloat16)
    hidden, kept = build(tmp_path / "c", "hidden", pair).hidden(1), build(tmp_path / "d", "top_k", pair).top_k(1)
    assert (hidden.dtype, kept.log_probs.dtype) == (torch.bfloat16, torch.float32)
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
        tops = [cache.attached(example, index).teacher_top_k for cache in caches]
        all_ids, six, one = (total(objective, top, head_q, hidden_q, tokens) for top in tops)
        torch.testing.assert_close(all_ids, live, atol=1e-9, rtol=1e-9)
        if name != "akl":  # whose weights are no divergence's
            assert 0 < one <= six <= live + 1e-12 or not example.completion_ids


@pytest.mark.parametrize("where", ["forward", "between", "write"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_build_goes_on_and_leaves_no_half_file(tmp_path, small_shards, monkeypatch, kind, where):
    """What is there after the kill is whole, and is not made again."""
    build(tmp_path / "straight", kind, batch_size=2)
    whole = {p.name: p.read_bytes() for p in (tmp_path / "straight").iterdir()}
    for moment in (1, 2, 3):
        folder, pair, die = tmp_path / str(moment), toy_pair(), dying(moment)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if where == "forward":
                pair.teacher.model.register_forward_hook(die)
            if where == "write":  # the data is written and not yet in place
                patch.setattr("switchkd.base.storage.sync", dying(2 * moment + 1))
            build(folder, kind, pair, batch_size=2, progress=die if where == "between" else lambda _: None)
        there = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert there.items() <= whole.items() and len(there) < len(whole)
        if "manifest.json" in there:
            with pytest.raises(CheckpointError, match=r"shard-0000\d\.safetensors is missing; build"):
                reopen(folder, kind)
            (folder / f".shard-00001.safetensors.switchkd-{'0' * 32}").write_bytes(
                b"half"
            )  # a killed process cannot clean up
        times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        told = []
        build(folder, kind, batch_size=2, progress=told.append)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == whole and sum(told) == 14
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
    with pytest.raises(CheckpointError, match="holds no teacher cache"):
        reopen(tmp_path / "nothing", "hidden")
    with pytest.raises(ConfigError, match="did you mean 'hidden'"):
        TeacherCache.build(toy_pair(), ragged(), tmp_path / "x", "hiden")
    for wrong in ({"top_k": 0}, {"top_k": VOCAB + 1}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build(tmp_path / "x", "top_k", **wrong)
    with pytest.raises(DataError, match="no examples"):
        TeacherCache.build(toy_pair(), [], tmp_path / "x", "hidden")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap", "foreign", "remove", "manifest", "offsets"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, small_shards, damage):
    folder = tmp_path / "c"
    build(folder, "hidden")
    file, name = folder / "shard-00001.safetensors", r"shard-00001\.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-100] ^= 1
    if damage in ("flip", "cut", "empty"):
        file.write_bytes(bytes({"flip": data, "cut": data[:-8], "empty": b""}[damage]))
    if damage == "swap":
        file.write_bytes((folder / "shard-00002.safetensors").read_bytes())
    if damage == "foreign":
        build(tmp_path / "other", "hidden", toy_pair(seeds=(1, 3)))
        file.write_bytes((tmp_path / "other" / file.name).read_bytes())
    if damage == "remove":
        file.unlink()
    manifest = folder / "manifest.json"
    if damage == "manifest":
        manifest.write_text(manifest.read_text()[:-5])
        name = r"manifest\.json"
    if damage == "offsets":
        record = json.loads(manifest.read_text())
        record["offsets"][3] += 1
        manifest.write_text(json.dumps(record))
        name = r"manifest\.json"
    with pytest.raises(CheckpointError, match=name + ".*(delete|build)"):
        reopen(folder, "hidden")
    if damage in ("flip", "cut", "empty", "swap", "foreign"):
        with pytest.raises(CheckpointError, match=name):
            build(folder, "hidden")
        file.unlink()  # the way out
    if damage not in ("manifest", "offsets"):
        build(folder, "hidden")
        reopen(folder, "hidden")


def test_examples_without_any_completion(tmp_path):
    examples = [retold(e, completion_ids=[]) for e in toy_examples(3)]
    for kind, shape in (("hidden", (0, 16)), ("top_k", (0, 5))):
        build(tmp_path / kind, kind, examples=examples)
        cache = reopen(tmp_path / kind, kind, examples=examples)
        tensors = [cache.hidden(2)] if kind == "hidden" else [cache.top_k(2).ids, cache.top_k(2).log_probs]
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
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(("batch_size", "tokens"), [(3, 10**6), (32, 20)])
def test_forwards_are_capped_in_rows_and_tokens(tmp_path, monkeypatch, batch_size, tokens):
    monkeypatch.setattr("switchkd.teachers.states.BATCH_TOKENS", tokens)
    pair, shapes = toy_pair(), []
    pair.teacher.model.register_forward_pre_hook(lambda _, a, k: shapes.append(k["input_ids"].shape), with_kwargs=True)
    build(tmp_path / "c", "hidden", pair, batch_size=batch_size)
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
    monkeypatch.setattr("switchkd.teachers.states.SHARD_BYTES", 1000)  # more than one is to be written

    def gone(_):
        if folder.exists():
            folder.rename(tmp_path / "moved")

    with pytest.raises(DiskError, match="is not the folder that the work began in"):
        if kind == "texts":
            texts(folder, progress=gone)
        else:
            build(folder, "hidden", progress=gone)
    assert not folder.exists()
