"""A teacher and a student, loaded and checked together: over one tokenizer, or with a bridge between two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from switchkd.base.errors import ConfigError, VocabularyError, nearest
from switchkd.base.storage import expanded
from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.opening import open_bridge
from switchkd.crossing.spelling import Spelling
from switchkd.data.settings import AUTO, Template
from switchkd.forward.ends import Ends, declared_ends, merged_by, pair_ends
from switchkd.models.loading import (
    MADE,
    adapter_base,
    check_place,
    device_named,
    is_adapter,
    load_model,
    load_tokenizer,
    made,
)
from switchkd.models.members import files_of, folder_dtype, load_student, load_teachers, naming
from switchkd.models.saved_student import settle_generation, verify_saved
from switchkd.models.settings import BASE, Place, chosen_teacher_dtype, dtype_name, teacher_device
from switchkd.models.vocabulary import (
    check_logits_rows,
    check_vocabulary,
    left_out_note,
    other_prompts,
    prompt_warnings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from switchkd.data.texts import TokenizedExample
    from switchkd.models.settings import ModelConfig


@dataclass(frozen=True)
class Pair:
    """A teacher (frozen) and a student (trainable), both in eval mode.

    ``vocab_size`` counts the ids that the tokenizer and both models' logits have; logits rows from ``vocab_size`` on
    are padding. ``eos_token_ids`` stop a text; where ``merged_eos_token_id`` is one of them, all are one event (``ends``).
    ``warnings`` are sentences to print once: the pair can be used, but differs in what they say. ``teachers`` are
    more teachers by name, for data rows that name one; all others have ``teacher``. ``folder_dtype`` is what the student's folder
    says that its weights are in, in which a distilled student is saved by default. ``teachers_stay``: the teachers' weights lie
    where they were asked to, and training does not move them to its device. ``bridges`` are those to teachers with another
    tokenizer, by their names; ``tokenizer``, ``vocab_size`` and ends are then the student's.
    """

    teacher: "PreTrainedModel"
    student: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    warnings: tuple[str, ...]
    teachers: "Mapping[str, PreTrainedModel]" = field(default_factory=dict)
    folder_dtype: str = "float32"
    merged_eos_token_id: int | None = None
    teachers_stay: bool = False
    teacher_templates: Mapping[str, str] = field(default_factory=dict)
    bridges: Mapping[str, Bridge] = field(default_factory=dict)

    @property
    def side(self) -> Side:
        """How the student spells text, and every teacher without a bridge."""
        return Side(self.tokenizer, self.vocab_size, self.ends)

    def side_of(self, teacher: str) -> Side:
        """How the teacher of that name spells text."""
        return self.bridges[teacher].teacher if teacher in self.bridges else self.side

    @property
    def other_tokenizers(self) -> "list[PreTrainedTokenizerBase]":
        """Those of teachers that do not have the student's."""
        return [bridge.teacher.tokenizer for bridge in self.bridges.values()]

    @property
    def ends(self) -> Ends:
        """What stops a text, and the law of that."""
        return Ends(tuple(self.eos_token_ids), self.merged_eos_token_id)

    @property
    def named_teachers(self) -> "dict[str, PreTrainedModel]":
        """All teachers by name; "" is the default one."""
        return {"": self.teacher, **self.teachers}

    def teacher_named(self, name: str) -> "PreTrainedModel":
        """The teacher of that name; raises ConfigError if there is none."""
        if name not in self.named_teachers:
            raise ConfigError(f"no teacher {name!r}{nearest(name, self.teachers)}; give it in teachers")
        return self.named_teachers[name]


def load_pair(
    teacher: str,
    student: str | None = None,
    *,
    dtype: str = "float32",
    teacher_dtype: str = "auto",
    device: str | None = None,
    lora: "ModelConfig | None" = None,
    seed: int = 0,
    teachers: Mapping[str, str] | None = None,
    template: str | Template = AUTO,
    teacher_place: Place | None = None,
    teacher_files: str = "",
    teacher_writer: str = "",
    own_templates: bool = False,
    marks: Mapping[str, str] | None = None,
) -> Pair:
    """Load and check a pair; each name is a hub name, a local folder, or a pair of `MADE` (for both if ``student`` is None).

    A folder may hold a LoRA adapter, which is put on its base. ``lora`` asks for an adapter on the student: a new one of these
    settings, its weights keyed by ``seed``, or the one that the student's folder holds. Only the adapter is then trainable.
    The teacher ``"base"`` is the student's own base, on the same weights. A teacher may be the address of a vLLM server, which is
    asked what it says of texts (`switchkd.forward.served`); ``teacher_files`` is where its config, tokenizer and output layer lie,
    if not where the server says, ``teacher_writer`` the address of a second one that writes. ``teachers`` are more of them by name;
    each is checked as the first one is, and equal folders are loaded once.
    ``dtype`` is of the student's weights and products, ``teacher_dtype`` of the teachers'; ``auto`` is bfloat16 on a GPU that is
    good at it, else float32, and float64 for a teacher beside a student in float64. A new or opened adapter is float32 or wider.
    ``teacher_place`` says where the teachers' weights lie, if not beside the student's.
    ``template`` is the one that text will be written with: its end is one of the pair's. Both models read prompts under the
    teacher's chat template, or the student's where the teacher has none; with ``own_templates`` each reads under its own.
    A teacher may have another tokenizer than the student; ``marks`` are special tokens that mean the same in both, the student's
    name of each to the teacher's. ``device`` None is the current CUDA device if there is one, else the CPU.
    Raises ConfigError for a wrong setting, ModelError for a model that cannot be used, CheckpointError for what a run saved and is
    not as it was written, VocabularyError where tokenizers differ and cannot be bridged or a model has too few logits rows,
    ServerError where a server does not answer as it must.
    """
    teacher_name, student_name = _pair_names(teacher, student)
    sources = {"": teacher_name} | {name: made(source, "teacher") for name, source in (teachers or {}).items()}
    for source in dict.fromkeys([student_name, *sources.values()]):
        verify_saved(Path(expanded(source)))
    if BASE in sources.values() and lora is None and not is_adapter(student_name):
        raise ConfigError(
            f"teacher {BASE!r} is the model under the student's adapter, and {student_name} has none; set use_peft, or name a "
            f"teacher (a folder of that name is './{BASE}')"
        )
    place = teacher_place or Place()
    for name, source in sources.items():
        with naming(name):
            check_place(source, place)
    student_tokenizer = load_tokenizer(student_name)
    tokenizers, sizes, files = {}, {}, {}
    for name, source in sources.items():  # before any weights are read
        with naming(name):
            files[name] = files_of(source, "" if name else teacher_files)
            tokenizers[name] = student_tokenizer if source == BASE else load_tokenizer(files[name])
            sizes[name] = _size_of(tokenizers[name], student_tokenizer)
    student_model, notes = load_student(student_name, dtype, device, lora, seed)
    there = teacher_device(place, device_named(device))
    of_teachers = chosen_teacher_dtype(teacher_dtype, dtype, there)
    models = load_teachers(sources, of_teachers, str(there), student_model, place, files, tokenizers, teacher_writer)
    if teacher_name == BASE and not is_adapter(student_name):
        notes += (
            "note: a new adapter has no effect, so the student starts as its teacher, and a divergence on equal prompts has no "
            "gradient there: a teacher_prompt, dropout or what else is in the loss must move it; else name a student that is an "
            "adapter already",
        )
    pair = _put_together(models, student_model, tokenizers, student_tokenizer, sizes, template, own_templates, marks)
    return replace(
        pair, warnings=notes + pair.warnings, folder_dtype=folder_dtype(student_name), teachers_stay=place.stays
    )


def pair_of(
    teacher: "PreTrainedModel",
    student: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    lora: "ModelConfig | None" = None,
    seed: int = 0,
    template: str | Template = AUTO,
    teacher_tokenizer: "PreTrainedTokenizerBase | None" = None,
    marks: Mapping[str, str] | None = None,
) -> Pair:
    """A pair of models that are loaded already, with the tokenizer of both, checked as `load_pair` checks one.

    A teacher with another one has ``teacher_tokenizer``; ``marks`` are as there. The student is trained in place. ``lora`` puts a
    new adapter of these settings on it.
    Raises ConfigError for a student that has an adapter already, ModelError for a model that cannot be decoded here,
    VocabularyError where a model has too few logits rows for the tokenizer.
    """
    from switchkd.forward.text_path import freeze_beside_text, frozen_note
    from switchkd.models.adapters import add_adapter, has_adapter
    from switchkd.runner.architecture import check_layers

    for model in (teacher, student):
        check_layers(model.config)
        model.eval()
    if has_adapter(student):
        raise ConfigError("the student has an adapter already; save it, and name its folder as the student")
    given = dtype_name(student.dtype)
    beside = freeze_beside_text(student)
    if lora is not None:
        add_adapter(student, lora, seed, beside)
    teacher.requires_grad_(False)
    tokenizers = {"": teacher_tokenizer or tokenizer}
    sizes = {"": _size_of(tokenizers[""], tokenizer)}
    pair = _put_together(
        {"": teacher}, student, tokenizers, tokenizer, sizes, template, own_templates=False, marks=marks
    )
    notes = (frozen_note(beside),) if beside else ()
    stay = teacher.device != student.device
    return replace(pair, warnings=notes + pair.warnings, folder_dtype=given, teachers_stay=stay)


def _put_together(
    models: "dict[str, PreTrainedModel]",
    student_model: "PreTrainedModel",
    tokenizers: "dict[str, PreTrainedTokenizerBase]",
    student_tokenizer: "PreTrainedTokenizerBase",
    sizes: Mapping[str, int | None],
    template: str | Template,
    own_templates: bool,
    marks: Mapping[str, str] | None = None,
) -> Pair:
    """The pair of a student and its teachers by name, with what they share: ids, ends, and the template of their prompts.

    ``sizes`` are those of `_size_of`.
    """
    others = {name: tokenizers[name] for name, size in sizes.items() if size is None}  # with tokenizers of their own
    shared = {name: tokenizer for name, tokenizer in tokenizers.items() if name not in others}
    vocab_size = min(
        [size for size in sizes.values() if size] or [check_vocabulary(student_tokenizer, student_tokenizer)]
    )
    for name, tokenizer in shared.items():
        with naming(name):
            vocab_size = check_logits_rows(models[name], vocab_size, "teacher", tokenizer)
            vocab_size = check_logits_rows(student_model, vocab_size, "student", tokenizer)
    if not shared:
        vocab_size = check_logits_rows(student_model, vocab_size, "student", student_tokenizer)
    warnings = left_out_note([student_tokenizer, *shared.values()], vocab_size)
    own = {name: _chat_template(name, each) for name, each in shared.items()} if own_templates else {}
    first = shared.get("", student_tokenizer)
    if not own_templates:
        warnings += prompt_warnings(first, student_tokenizer)
        warnings += other_prompts(first, {name: each for name, each in shared.items() if name})
    tokenizer = student_tokenizer if own_templates else first
    tokenizer.chat_template = tokenizer.chat_template or student_tokenizer.chat_template
    same = {name: models[name] for name in shared}
    ends, told = _ends(same, student_model, shared, student_tokenizer, vocab_size, tokenizer, template, bool(others))
    warnings += told + settle_generation(student_model, tokenizer)
    side, bridges = Side(tokenizer, vocab_size, ends), {}
    for name, other in others.items():
        with naming(name):
            size = check_logits_rows(models[name], check_vocabulary(other, other), "teacher", other)
            bridges[name], notes = open_bridge(side, models[name], other, size, template, marks)
            warnings += notes
    default = models.pop("")
    return Pair(
        default, student_model, tokenizer, vocab_size, ends.ids, tuple(dict.fromkeys(warnings)), models,
        merged_eos_token_id=ends.merged_into, teacher_templates=own, bridges=bridges,
    )  # fmt: skip


def _size_of(tokenizer: "PreTrainedTokenizerBase", student: "PreTrainedTokenizerBase") -> int | None:
    """The ids that a teacher's tokenizer shares with the student's; None where it is another one, to which a bridge leads.

    Raises VocabularyError where none can.
    """
    try:
        return check_vocabulary(tokenizer, student)
    except VocabularyError as differ:
        try:
            for each, role in ((tokenizer, "teacher"), (student, "student")):
                Spelling(each, role)
        except VocabularyError as error:
            raise VocabularyError(f"{error}. (One text in two tokenizers, since they differ: {differ})") from error
        return None


def load_alone(name: str, dtype: str = "float32", template: str | Template = AUTO, load_in_4bit: bool = False) -> Pair:
    """A student without its teacher, for text that it writes alone: itself stands in the teacher's place, and is never asked there.

    Arguments and errors are those of ``load_pair``; of a pair that is made by name, this is its student.
    """
    source = made(name, "student")
    verify_saved(Path(expanded(source)))
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype, load_in_4bit=load_in_4bit)
    sizes: dict[str, int | None] = {"": check_vocabulary(tokenizer, tokenizer)}
    return _put_together({"": model}, model, {"": tokenizer}, tokenizer, sizes, template, own_templates=False)


def student_base(name: str) -> str:
    """The model that the teacher ``"base"`` of student ``name`` is."""
    return adapter_base(_pair_names(BASE, name)[1])


def _pair_names(teacher: str, student: str | None) -> tuple[str, str]:
    if student is None and teacher not in MADE:
        raise ConfigError(
            f"teacher {teacher!r} has no student; name one, or make one with `switchkd prune {teacher} FOLDER`"
        )
    return made(teacher, "teacher"), made(teacher if student is None else student, "student")


def _chat_template(teacher: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The chat template of a teacher that is to read under its own."""
    if not tokenizer.chat_template:
        whose = f"teacher {teacher!r}" if teacher else "the teacher"
        raise ConfigError(f"teacher_template 'own': {whose} has no chat template; leave teacher_template 'shared'")
    return tokenizer.get_chat_template()


def _ends(
    teachers: "Mapping[str, PreTrainedModel]",
    student: "PreTrainedModel",
    tokenizers: "Mapping[str, PreTrainedTokenizerBase]",
    student_tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    tokenizer: "PreTrainedTokenizerBase",
    template: str | Template,
    one_event: bool,
) -> tuple[Ends, tuple[str, ...]]:
    """The ends of a pair, which all of its models then declare, and what there is to say of them; ``tokenizer`` is the pair's.

    ``one_event``: several of them are one in any case.
    """
    found = {}
    for name, model in teachers.items():
        with naming(name):
            found[f"teacher {name!r}" if name else "teacher"] = declared_ends(model, tokenizers[name], vocab_size)
    found["student"] = declared_ends(student, student_tokenizer, vocab_size)
    models = [*teachers.values(), student]
    merged = one_event or any(merged_by(model) is not None for model in models)
    ends, told = pair_ends({role: ids for role, (ids, _) in found.items()}, tokenizer, template, merged)
    for model in models:
        ends.declare(model)
    return ends, (*dict.fromkeys(note for _, note in found.values() if note), *told)


def within(examples: "Sequence[TokenizedExample]", pair: "Pair") -> "list[TokenizedExample]":
    """The examples whose every token is in the vocabulary that a pair shares; all, where its tokenizer has no other token."""
    sides = [pair.side, *(bridge.teacher for bridge in pair.bridges.values())]
    if all(side.vocab_size > max(side.tokenizer.get_vocab().values()) for side in sides):
        return list(examples)
    return [e for e in examples if _is_within(e, pair)]


def _is_within(example: "TokenizedExample", pair: "Pair") -> bool:
    theirs = max(chain(example.teacher_reads, example.teacher_completion))
    return max(chain(example.prompt_ids, example.completion_ids)) < pair.vocab_size and (
        theirs < pair.side_of(example.teacher).vocab_size
    )
