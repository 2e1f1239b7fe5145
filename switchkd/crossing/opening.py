"""A bridge for a teacher that is loaded: its ends, and what there is to say of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from switchkd.base.errors import ConfigError
from switchkd.crossing.bridge import Bridge, Side
from switchkd.data.settings import AUTO, Template
from switchkd.forward.ends import declared_ends, merged_by, pair_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_bridge(
    student: Side,
    teacher: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    template: str | Template = AUTO,
    marks: Mapping[str, str] | None = None,
) -> tuple[Bridge, tuple[str, ...]]:
    """The bridge to a teacher with ``tokenizer`` and logits for ``vocab_size`` ids, and sentences about it.

    Several ends of its texts count as one event. Raises what `Bridge` and `declared_ends` do.
    """
    own, note = declared_ends(teacher, tokenizer, vocab_size)
    ends, told = pair_ends(
        {"teacher": own}, tokenizer, of_its_own(template), merged_by(teacher) is not None or len(own) > 1
    )
    ends.declare(teacher)
    bridge = Bridge(student, Side(tokenizer, vocab_size, ends, "teacher"), marks or {})
    return bridge, (*([note] if note else []), *told, *differing(bridge, template))


def of_its_own(template: str | Template) -> Template:
    """The template as a tokenizer of its own has it: a text that replaces the student's chat template is not for the teacher's."""
    given = Template.of(template)
    return Template(given.name, given.date)


def differing(bridge: Bridge, template: str | Template) -> tuple[str, ...]:
    """What a user must know of a pair with two tokenizers, in sentences."""
    _, matched, _ = bridge.describe()
    found = [
        f"note: teacher and student have different tokenizers, and compare what both can say: {matched}. A rule that hands over "
        "does so between words (docs/cross_tokenizer.md)"
    ]
    for side in bridge.sides if Template.of(template).name == "chat" else ():
        if not side.tokenizer.chat_template and not (side is bridge.student and Template.of(template).jinja):
            raise ConfigError(
                f"template 'chat': the {side.role}'s tokenizer has no chat template, and with two tokenizers it cannot take the "
                "other's; leave template 'auto', under which it reads the Alpaca prompt, or give it one"
            )
    names = [of_its_own(template).resolved(side.tokenizer).name for side in bridge.sides]
    if names[0] != names[1]:
        found.append(
            f"note: the student reads prompts under the template {names[0]!r} and the teacher under {names[1]!r}, since only "
            "one of them has a chat template"
        )
    return tuple(found)
