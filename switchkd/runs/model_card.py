"""The card beside a student: what it is, how it was made, what it scores, and the licences that it comes under.

``README.md`` as the Hugging Face Hub reads it. Nothing is asked of a network, and what is not known is said to be unknown.
Names and paths stand in code spans, where no character is markup; no text of a model or of the data stands in a card.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from switchkd.base import __version__
from switchkd.base.manifest import CARD, MANIFEST
from switchkd.base.settings import to_dict
from switchkd.base.storage import expanded
from switchkd.base.terminal import number
from switchkd.data.files import SAMPLE
from switchkd.data.tables import PREFIX
from switchkd.data.templates import alpaca_prompt
from switchkd.evaluation.statistics import FEW_EXAMPLES
from switchkd.forward.served import ServedModel
from switchkd.methods.rules import name_of
from switchkd.models.adapters import ADAPTER_CONFIG, has_adapter
from switchkd.models.loading import MADE, adapter_base
from switchkd.models.saved_student import STUDENT
from switchkd.models.settings import BASE, dtype_name, is_address, quantised
from switchkd.reports.tables import FEW, estimate_text
from switchkd.runner.architecture import num_parameters
from switchkd.runs.continuation import conditions
from switchkd.training.settings import TrainConfig

if TYPE_CHECKING:
    from switchkd.evaluation.results import Evaluation
    from switchkd.training.trainer import Trainer


# What comes with the package or is made by it: id on the hub, licence, and where it is from.
OWN = {
    "demo": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "SmolLM2-135M-Instruct (as a student, 15 of its 30 layers)",
    ),
    "qwen-coder": (
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "apache-2.0",
        "Qwen2.5-Coder-Instruct (1.5B as a teacher, 0.5B as a student), from files of few bits that others put on PyPI",
    ),
    "small": ("", "", "made by `switchkd make-pair` from generated text, so nothing is inherited"),
    SAMPLE: ("openai/gsm8k", "mit", "a part of GSM8K"),
}
LIMITATIONS = """\
The scores above, if there are any, are automatic: nobody has read the answers. An interval says how far a score may move with
other examples of the same kind, and nothing about other tasks, languages or prompts. Nothing else was evaluated: not safety, not
bias, not truth beyond what the task checks. A student learns its teacher's faults too."""


@dataclass(frozen=True)
class Source:
    """A model or data file that the student comes from.

    ``hub`` is its id on the hub and ``license`` its licence, each "" where there is none known; ``terms`` says so in Markdown.
    """

    role: str
    name: str
    hub: str
    license: str
    terms: str


def model_card(
    trainer: Trainer, results: Mapping[str, Evaluation], evaluated: Mapping[str, Any], sha256: str = ""
) -> str:
    """The card of the student that ``trainer`` made, as Markdown with the hub's metadata.

    ``sha256`` is the checksum of the manifest of all files that the card is of, where they are saved with one. ``results``
    are evaluations by the name of their model, perhaps none, and ``evaluated`` is all that they depend on.
    """
    config = trainer.config.anew()
    models, data = _models(config), _data(config)
    manifest = f"\n- the files that this card is of are those of a `{MANIFEST}` with the SHA-256 {_code(sha256)}"
    parts = {
        "": _pair(trainer) + (manifest if sha256 else ""),
        "## Use\n\n": _use(trainer),
        "## Method\n\n": _method(config),
        "## Data and cost\n\n": _cost(trainer, data),
        "## Scores\n\n": _scores(results, evaluated),
        "## Licences\n\n": "\n".join(
            f"- {source.role} {_code(source.name)}: {source.terms}" for source in models + data
        ),
        "## Limitations\n\n": LIMITATIONS,
        "## Made with\n\n": _recipe(config),
    }
    title = f"# {_code(Path(config.output_dir).resolve().name)}"
    text = "\n\n".join([title, *(heading + part for heading, part in parts.items())])
    metadata = _metadata(trainer, models, data)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"))


def _metadata(trainer: Trainer, models: Sequence[Source], data: Sequence[Source]) -> ModelCardData:
    licenses = {source.license for source in models}
    shared = licenses.pop() if len(licenses) == 1 else ""
    inherited = shared if shared not in ("", "other") else None
    return ModelCardData(
        license=inherited or "other",
        license_name=None if inherited else "see-licences-in-the-card",
        base_model=models[-1].hub or None,
        datasets=[source.hub for source in data if source.hub] or None,
        library_name="peft" if _is_adapter(trainer) else "transformers",
        pipeline_tag="text-generation",
        tags=["switchkd", "knowledge-distillation"],
    )


# --- what it comes from -------------------------------------------------------------------------------------------


def _models(config: TrainConfig) -> list[Source]:
    """Teachers and student, each followed by its base if it is an adapter; the last is what the student's weights come from."""
    named = {"teacher": config.teacher_model_name_or_path}
    named |= {f"teacher {_code(name)}": source for name, source in config.teachers.items()}
    named["student base"] = config.student_model_name_or_path
    found = []
    for role, name in named.items():
        source = config.student_model_name_or_path if name == BASE else name
        whole = source if source in MADE else adapter_base(source)
        if name not in (BASE, whole):
            found.append(_source(f"{role}, an adapter", name, "model"))
        found.append(_source(role, whole, "model"))
    return found


def _data(config: TrainConfig) -> list[Source]:
    files = {"training data": config.train_file, "text of the language-modelling loss": config.lm_file}
    return [_source(role, file, "dataset") for role, named in files.items() for file in named]


def _source(role: str, name: str, kind: Literal["model", "dataset"]) -> Source:
    if is_address(name):
        return Source(role, public_name(name), "", "", "unknown: check where it came from")
    if own := OWN.get(name.split(":")[0]):
        hub, license, origin = own
        return Source(role, public_name(name), hub, license, f"{_code(license)}, {origin}" if license else origin)
    folder = Path(expanded(name))
    if kind == "dataset":
        repository = re.match(rf"{PREFIX}([^/]+/[^/:]+)", name)
        hub = repository[1] if repository else ""
    else:
        hub = "" if folder.is_dir() else name
    license = _license(try_to_load_from_cache(hub, CARD, repo_type=kind) if hub else folder / CARD)
    place = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{hub}" if hub else "where it came from"
    terms = f"{_code(license)}, by its {CARD}" if license else f"unknown: check {place}"
    return Source(role, public_name(name), hub, license, terms)


def _license(readme: Any) -> str:
    """The licence that a README's metadata names; "" where there is none to be read."""
    try:
        text = Path(readme).read_text(encoding="utf-8")
        license = ModelCard(text).data.to_dict().get("license") if text.startswith("---") else None
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # absent, or no metadata that can be read
        return ""
    return license.lower() if isinstance(license, str) else ""


# --- what it says -------------------------------------------------------------------------------------------------


def _is_adapter(trainer: Trainer) -> bool:
    return has_adapter(trainer.pair.student) and not trainer.config.merge


def _pair(trainer: Trainer) -> str:
    config, pair = public_settings(trainer.config), trainer.pair
    trained = sum(parameter.numel() for parameter in pair.student.parameters() if parameter.requires_grad)
    sources, method = {"": config.teacher_model_name_or_path, **config.teachers}, quantised(pair.student.config)
    lines = ["A student language model that switchkd distilled from its teacher.", ""]
    for name, model in pair.named_teachers.items():
        role = f"teacher {_code(name)}" if name else "teacher"
        size = "behind a server" if isinstance(model, ServedModel) else f"{num_parameters(model):,} parameters"
        lines.append(f"- {role}: {_code(sources[name])}, {size}")
    lines.append(
        f"- student: {_code(config.student_model_name_or_path)}, {num_parameters(pair.student):,} parameters, {trained:,} trained"
    )
    lines.append(
        f"- the student was trained in {dtype_name(trainer.learner.masters.dtype)}, and multiplied in {config.dtype}"
        f"{f', its frozen weights quantised ({method})' if method else ''}; the teacher was in {config.teacher_dtype}"
    )
    if has_adapter(pair.student):
        where = "lies here alone: load it on its base" if _is_adapter(trainer) else "is merged into the weights here"
        lines.append(f"- what was trained is a LoRA adapter, which {where}")
    if _is_adapter(trainer) and Path(trainer.pair.student.name_or_path).is_dir():
        lines.append(
            f"- `{ADAPTER_CONFIG}` names that base by its folder on the machine of the training, as `from_pretrained` needs it "
            "there; write a name that others can open in its place before you share the adapter"
        )
    if trainer.best:
        score = f"{_code(config.metric_for_best_model)} {number(trainer.best['score'])}"
        lines.append(f"- the weights are those of step {trainer.best['step']}, the best of the run by {score}")
    return "\n".join(lines)


QUESTION = "What is 12 plus 30?"


def _use(trainer: Trainer) -> str:
    """How the student is opened and asked, as it was trained to be."""
    config, adapter = trainer.config, _is_adapter(trainer)
    own = config.prompts
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"name = {config.push_to_hub or STUDENT!r}  # this folder, or its name on the hub",
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)",
    ]
    if own.name == "chat":
        lines += [
            f'messages = [{{"role": "user", "content": {QUESTION!r}}}]',
            "prompt = tokenizer.apply_chat_template(",
            "    messages, add_generation_prompt=True, return_dict=True, return_tensors='pt'"
            f"{f', **{dict(own.variables)!r}' if own.variables else ''}",
            ")",
        ]
    else:
        text = alpaca_prompt(QUESTION) if own.name == "alpaca" else QUESTION
        lines.append(f"prompt = tokenizer({text!r}, return_tensors='pt')")
    lines += [
        f"written = model.generate(**prompt, max_new_tokens={config.max_new_tokens})",
        "print(tokenizer.decode(written[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True))",
    ]
    code = "\n".join(lines)
    fence, generation = _fence(code, 3), trainer.student.generation_config
    names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty"
    cuts = ", ".join(f"{name} {value:g}" for name in names if (value := getattr(generation, name, None)) is not None)
    how = f"samples ({cuts or 'as it is'})" if generation.do_sample else f"is greedy{f' ({cuts})' if cuts else ''}"
    packages = f"transformers 5 or later{' and peft' if adapter else ''}"
    return (
        f"With {packages}; earlier versions of transformers look for parts of `config.json` in other places.\n\n"
        f"{fence}python\n{code}\n{fence}\n\n"
        f"It was trained under the template `{own.name}`. Without settings of its own `generate` {how}, as "
        "`generation_config.json` says, which the student has from the model that it was made from."
    )


def _method(config: TrainConfig) -> str:
    rules = {"What is lowered": config.objective, "On which text": config.mix}
    if config.mix.generates:
        rules = {"Who writes the next token": config.policy} | rules
    lines = [_plain(config.method), ""] if config.method else []
    for question, rule in rules.items():
        what = (type(rule).__doc__ or "").strip().split("\n")[0]
        lines.append(f"- {question}: {_code(name_of(rule))}. {what}")
    return "\n".join(
        [*lines, "", "p is the teacher's distribution, q the student's, m the one that a token is drawn from."]
    )


def _cost(trainer: Trainer, data: Sequence[Source]) -> str:
    lines = [f"- {source.role}: {_code(source.name)}" for source in data]
    lines[0] += f", {len(trainer.examples):,} examples"
    now = conditions(trainer.accelerator.device, trainer.accelerator.num_processes)
    lines.append(
        f"- {trainer.step} optimizer steps on {trainer.num_tokens:,} response tokens in {number(trainer.seconds)} s, "
        f"evaluation not counted, on {_code(now['device'])} (processes: {now['processes']}, threads of each: {now['threads']})"
    )
    return "\n".join(lines)


def _scores(results: Mapping[str, Evaluation], evaluated: Mapping[str, Any]) -> str:
    if not results:
        return "None: the run was not evaluated."
    some = next(iter(results.values()))
    names = [some.primary, *(name for name in some.scores if name != some.primary)]
    rows = [["score", *results, "examples"], ["---", *("---:" for _ in results), "---:"]]
    for name in names:
        found = [result.summary[name] for result in results.values()]
        rows.append([_code(name), *map(estimate_text, found), str(max(each.examples for each in found))])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    settings = "\n".join(f"- {name}: {_code(value)}" for name, value in evaluated.items())
    return (
        f"Mean over the examples [95 % interval]; {FEW} over fewer than {FEW_EXAMPLES} examples, - over none.\n\n{table}\n\n"
        f"All that they depend on:\n\n{settings}"
    )


def _recipe(config: TrainConfig) -> str:
    packages = ["torch", "transformers", *(["peft"] if config.use_peft else [])]
    versions = ", ".join([f"switchkd {__version__}", *(f"{package} {version(package)}" for package in packages)])
    settings = yaml.safe_dump(to_dict(public_settings(config)), sort_keys=False)
    fence = _fence(settings, 3)
    return (
        f"{versions}. To make it again, write the settings into `config.yaml`. Models and files that lay on a disk are "
        "named there by the last part of their path: put in where yours lie.\n\n"
        "```bash\nswitchkd train config.yaml --output-dir runs/again\n```\n\n"
        f"<details><summary>config.yaml</summary>\n\n{fence}yaml\n{settings}{fence}\n\n</details>"
    )


def _plain(text: str) -> str:
    """A line in which no character is Markdown."""
    return re.sub(r"([\\`*_\[\]<>|~&#])", r"\\\1", " ".join(text.split()))


def _code(text: Any) -> str:
    """A code span, in which no character is Markdown."""
    line = " ".join(str(text).split()) or "-"
    fence, space = _fence(line, 1), " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than ``text`` has in a row."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


# --- what names others may see ------------------------------------------------------------------------------------


def public_name(name: str) -> str:
    """A model's or file's name as others may read it: of a path on this machine the last part alone, of an address nothing."""
    if is_address(name):
        return "a model behind a server"
    path = Path(name)
    local = name.startswith(("/", "~", ".")) or ("/" in name and path.exists())
    return path.name or name if local else name


def _public(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return public_name(value) if isinstance(value, str) else tuple(map(public_name, value))


def public_settings(config: TrainConfig) -> TrainConfig:
    """The settings of a run with `public_name` in the place of every model, file and folder."""
    fields = [f.name for f in dataclasses.fields(config) if f.name.endswith(("_path", "_file", "_dir"))]
    changed: dict[str, Any] = {name: _public(getattr(config, name)) for name in fields}
    changed |= {"teacher_files": "", "teacher_writer": ""}  # of a teacher whose address is left out too
    changed["teachers"] = {name: public_name(source) for name, source in config.teachers.items()}
    return dataclasses.replace(config, **changed)
