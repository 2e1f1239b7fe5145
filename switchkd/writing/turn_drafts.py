"""What a writer would go on with, and where in it the text may change hands."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from switchkd.writing.turn_texts import TurnText


@dataclass
class Draft:
    """A row's next tokens as its writer draws them, and the places before some of them, in order.

    ``tails[i]`` is how the text ends at a place, ``offsets[i]`` how many tokens of ``read``, the words before it as the other reads
    them, lie before it. ``broken`` is the first token whose law is not finite.
    """

    row: int
    text: TurnText
    tokens: list[int]
    places: list[int] = field(default_factory=list)
    tails: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    broken: int | None = None

    @staticmethod
    def first(row: int, text: TurnText) -> "Draft":
        """Of a text of which nothing is written: the place before its first word."""
        return Draft(row, text, [], [0], [b""], [0])

    @staticmethod
    def of(row: int, text: TurnText, tokens: Sequence[int], broken: Sequence[int]) -> "Draft":
        """Of tokens that the text's writer has drawn; ``broken`` says for each whether its law is not finite."""
        assert text.writer is not None
        draft, bridge, who = Draft(row, text, list(tokens)), text.bridge, text.writer
        side, begins = bridge.sides[who], bridge.beginnings[who].begins
        tail, spelt, budget = text.tail, text.spelt, text.budget - len(text.reading(1 - who))
        for k, token in enumerate(draft.tokens):
            if broken[k]:
                draft.broken = k
                break
            if begins(tail, token):
                draft.read += bridge.word(1 - who, spelt)
                if len(draft.read) >= budget:  # the text ends before
                    break
                draft.places.append(k)
                draft.tails.append(tail)
                draft.offsets.append(len(draft.read))
                spelt = b""
                if token in side.ends.ids:
                    break
            data = side.spelling.bytes_of[token]
            tail, spelt = (tail + data)[-8:], spelt + data
        return draft


@dataclass(frozen=True)
class Said:
    """What the rule said at a place: whether it is decided now, the rule was asked, whom it names, divergence and threshold, and
    whether student or teacher is not a number there."""

    decided: bool
    asked: bool
    speaker: int
    divergence: float
    threshold: float
    broken: tuple[bool, bool]

    @staticmethod
    def of(numbers: Sequence[float]) -> "Said":
        decided, asked, speaker, divergence, threshold, *broken = numbers
        return Said(bool(decided), bool(asked), int(speaker), divergence, threshold, (bool(broken[0]), bool(broken[1])))


def keep(draft: Draft, said: Sequence[Said]) -> tuple[int, int | None]:
    """Write down the tokens of a draft up to the place at which another writes, or the row ends.

    Returns how many are kept, and which place that is, if there is one: the word before it is closed then, and whoever writes now
    is to draw.
    """
    text = draft.text
    writer, at_place = text.writer, {k: i for i, k in enumerate(draft.places)}
    for k, token in enumerate(draft.tokens or [-1]):
        if k == draft.broken:
            assert writer is not None
            text.fail(writer)
        elif (place := at_place.get(k)) is not None:
            here = said[place]
            if not here.decided:
                if any(here.broken):
                    text.close()
                    text.fail(here.broken.index(True))
                return k, None
            text.close()
            text.turns += here.asked
            if here.speaker != writer:
                text.said = here.divergence, here.threshold
                return k, place
            text.begin(token, here.speaker, here.divergence, here.threshold)
        else:
            text.go_on(token)
        if text.stop_reason:
            return k + 1, None
    return len(draft.tokens), None
