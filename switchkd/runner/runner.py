"""One model at work on a batch of rows: what it keeps from forward to forward, and from one decoding to the next.

Lengths stand twice: as tensors on the model's device, from which forwards are made, and as numpy arrays on the host, from which
it is known how wide a forward must be. Nothing here waits for the device.

Shapes: B rows, b rows of a forward, T tokens of each, V vocabulary.
"""

from contextlib import ExitStack
from functools import cached_property
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from switchkd.runner.architecture import context_length, has_router_logits, keeps_state, number_of_states
from switchkd.runner.attention import attention_of
from switchkd.runner.cache import CACHE, Places, RaggedCache, attention_windows, index
from switchkd.runner.fast_layers import FastLayers
from switchkd.runner.graphs import Graphs
from switchkd.runner.modes import head_inputs

# A row with so many unread tokens before its last catches up in a forward of its own; with fewer, within the block's.
_JOINED = 2
# Tokens of a forward that catches up: long prompts are read in pieces, so that what a forward holds is bounded.
PREFILL_TOKENS = 8192
# The mark of a row whose state was not marked: beyond any text, so that rolling back begins anew.
_UNMARKED = 2**62
# Slots of buffers that are kept are a multiple of this.
_ROUND = 256
# Models whose layers go on from a state by one token at a time alone, as their proof has found.
ONE_BY_ONE: WeakSet[PreTrainedModel] = WeakSet()


class Runner:
    """A causal language model over a ragged cache: ``read[row]`` tokens of each row of ``texts`` have been read by it.

    ``forwards`` counts rows times forwards of ``extend``, ``prefill_tokens`` the tokens read before the last known one.
    With ``keep_hidden``, ``hidden`` holds what entered the output layer in the last forward, ``[b, T, hidden size]``.

    Args:
        dtype: of the masks, as of what attends; the model's own by default.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype or model.dtype
        self.device = next(model.parameters()).device
        self.windows = attention_windows(model)
        self.keeps_state = keeps_state(model.config)
        self.attention = attention_of(model, self.windows, self.dtype)
        self.context = context_length(model)
        # A balancing loss of the routers, for which a mask of four dimensions would be too many.
        self.extra = {"output_router_logits": False} if has_router_logits(model) else {}
        self.forwards = self.prefill_tokens = 0
        self.hidden = torch.empty(0)
        self.graphs = Graphs()
        self.cache: RaggedCache
        self.keeps: tuple[int, bool] | None = None  # what the buffers that are kept for graphs were made for

    @cached_property
    def fast(self) -> FastLayers:
        """The model's layers as decoding wants them, within ``with runner.fast():``."""
        return FastLayers(self.model)

    def open(
        self,
        rows: int,
        slots: int,
        vocab_size: int,
        texts: Tensor | None = None,
        keep_hidden: bool = False,
        graphs: bool = False,
    ) -> None:
        """Make room for ``rows`` rows of ``slots`` tokens, of which nothing has been read.

        ``texts`` ``[rows, slots]`` may be shared with another model. With ``graphs`` buffers stay from one opening to the next, and
        so does what was recorded on them.
        """
        self.forwards = self.prefill_tokens = 0
        graphs &= not self.keeps_state  # whose pieces of a text have many lengths
        kept = self.cache if graphs and self.keeps == (vocab_size, keep_hidden) else None
        if kept is None or kept.rows < rows or kept.slots < slots:
            self.graphs.forget()
            slots = -(-slots // _ROUND) * _ROUND if graphs else slots  # the next texts may be somewhat longer
            kinds = [kind for kind, _ in self.windows]
            self.cache = RaggedCache(kinds, number_of_states(self.model.config), rows, slots, self.device)
            self.columns = torch.arange(max(slots + 1, rows), device=self.device)
        self.vocab_size, self.keep_hidden = vocab_size, keep_hidden
        self.keeps = (vocab_size, keep_hidden) if graphs else None
        self.texts = torch.zeros(rows, slots, dtype=torch.int64, device=self.device) if texts is None else texts
        self.read, self.marks = np.zeros(rows, dtype=np.int64), np.full(rows, _UNMARKED)
        self.marked = np.zeros(rows, dtype=bool)

    def close(self) -> None:
        """Let go of the buffers, but of those that are kept for graphs; what is counted stays."""
        del self.texts
        if self.keeps is None:
            del self.cache, self.columns

    def clear(self, row: int) -> None:
        """Zero what lies behind a row's tokens. A masked slot that holds NaN or infinity would still give 0 · NaN = NaN."""
        for layer in self.cache.stores:
            layer.clear(row, int(self.read[row]))

    def restart(self, row: int) -> None:
        """Nothing of a row counts as read any more, and what was marked is another text's."""
        self.read[row], self.marks[row] = 0, _UNMARKED
        for layer in self.cache.states:
            layer.restart(row)

    def roll_back(self, most: np.ndarray) -> None:
        """Of each row's text at most so many tokens count as read, ``[rows]``.

        Slots are simply written over. A state goes back to where it was marked; what of the text it had read since is read again.
        """
        if not self.keeps_state:
            self.read = np.minimum(self.read, most)
            return
        cut = np.flatnonzero(self.read > most)
        for row in cut[self.marks[cut] > most[cut]].tolist():
            self.restart(row)
        cut = cut[self.marks[cut] <= most[cut]]
        if len(cut):
            rows = Places.at(cut, self.columns)
            for layer in self.cache.states:
                layer.restore(rows)
            self.read[cut] = self.marks[cut]

    def _mark(self, rows: Places) -> None:
        """Copy the states of rows that are about to read drafts, unless that was done since they caught up."""
        if self.keeps_state and not self.marked[rows.host].all():
            for layer in self.cache.states:
                layer.mark(rows)
            self.marks[rows.host], self.marked[rows.host] = self.read[rows.host], True

    def move(self, to: Places, source: Places) -> None:
        """Rows go to other places, where nobody needs what was there; ``texts`` are moved by whoever shares them out."""
        for layer in self.cache.stores:
            layer.move(to.device, source.device)
        self.read[to.host] = self.read[source.host]

    def catch_up(self, rows: Places, ends_b: Tensor, ends: np.ndarray) -> None:
        """Read what rows that are far behind have not read of their text, the first ``ends`` tokens, but the last of it.

        A new prompt catches up from nothing. A row that lags by a token or two is left to ``extend``.
        """
        if self.keeps_state:
            self._catch_up_in_step(rows, ends - 1)
            return
        behind = ends - 1 - self.read[rows.host]
        far = np.flatnonzero(behind >= _JOINED)
        far = far[np.argsort(-behind[far], kind="stable")]
        while len(far):  # in groups of nearly equal length, so that little padding is read
            count = max(1, min(int((behind[far] >= 0.8 * behind[far[0]]).sum()), PREFILL_TOKENS))
            group, far = np.sort(far[:count]), far[count:]
            some = Places.at(group, self.columns)
            here = rows if len(group) == len(ends) else Places.at(rows.host[group], self.columns)
            self._read_on(here, some.of(ends_b), ends[group] - 1)

    def _catch_up_in_step(self, rows: Places, ends: np.ndarray) -> None:
        """Read rows up to ``ends``, in forwards whose rows all read as many tokens: a state would take up padding."""
        self.marked[rows.host] = False
        while (behind := ends - self.read[rows.host]).any():
            group, width = self._in_step(behind, self.read[rows.host] == 0)
            here = rows if len(group) == len(ends) else Places.at(rows.host[group], self.columns)
            until = self.read[here.host] + width
            self.prefill_tokens += width * len(group)
            self._forward(here, index(until, self.columns), until, width, None, keep=1)
            self.read[here.host] = until

    def _in_step(self, behind: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, int]:
        """Which rows the next forward reads on, and how many tokens of each."""
        if self.model not in ONE_BY_ONE:
            # A power of two, for all that have so much left, so that there are few forwards.
            width = min(2 ** int(behind.max()).bit_length() // 2, PREFILL_TOKENS)
            group = behind >= width
        elif (new & (behind > 0)).any():
            width = int(behind[new].max())
            group = new & (behind == width)
        else:
            width, group = 1, behind > 0
        return np.flatnonzero(group)[: max(PREFILL_TOKENS // width, 1)], width

    def _read_on(self, rows: Places, ends_b: Tensor, ends: np.ndarray) -> None:
        """Read rows up to ``ends`` (on the device, one token more), in pieces."""
        behind = ends - self.read[rows.host]
        self.prefill_tokens += int(behind.sum())
        left, piece = int(behind.max()), max(1, PREFILL_TOKENS // len(ends))
        while left:
            width = min(piece, left)
            left -= width
            self._forward(rows, ends_b - 1 - left, ends - left, width, None, keep=1)
        self.read[rows.host] = ends

    def extend(
        self, rows: Places, ends_b: Tensor, ends: np.ndarray, drafts_bT: Tensor | None, tail: bool = True
    ) -> Tensor:
        """Read the rest of each row's text, its first ``ends`` tokens, and then its T drafts: logits ``[b, T + 1, V]``.

        The first of the T + 1 follow the text, the others the drafts. Without ``tail`` the drafts alone are read, which begin at
        ``ends``: logits ``[b, T, V]``.
        """
        width = int(self.unread(rows, ends).max()) if tail else 0
        if drafts_bT is not None:
            self._mark(rows)
        drafts = 0 if drafts_bT is None else drafts_bT.shape[1]
        if drafts_bT is not None and self.model in ONE_BY_ONE:
            logits = self._one_by_one(rows, ends_b, ends, width, drafts_bT)
            self.has_read(rows, ends, drafts, width + drafts, tail)
        else:
            logits = self._forward(rows, ends_b, ends, width, drafts_bT, drafts + tail)
            self.has_read(rows, ends, drafts, tail=tail)
        return logits

    def _one_by_one(self, rows: Places, ends_b: Tensor, ends: np.ndarray, width: int, drafts_bT: Tensor) -> Tensor:
        """``extend`` by a forward for each token."""
        logits, hidden, before = [], [], self.read[rows.host]
        for at in range(-width, drafts_bT.shape[1]):
            draft, read = drafts_bT[:, at : at + 1] if at >= 0 else None, max(at, 0)
            logits.append(self._forward(rows, ends_b + read, ends + read, int(at < 0), draft, keep=1))
            hidden.append(self.hidden)
            self.read[rows.host] += 1  # the next one goes on from this one's state
        self.read[rows.host] = before
        self.hidden = torch.cat(hidden, 1) if self.keep_hidden else self.hidden
        return torch.cat(logits, 1)

    def unread(self, rows: Places, ends: np.ndarray) -> np.ndarray:
        """Tokens of each row's first ``ends`` that are left to read."""
        return ends - self.read[rows.host]

    def has_read(self, rows: Places, ends: np.ndarray, drafts: int, forwards: int = 1, tail: bool = True) -> None:
        """Note what was read in so many forwards, by ``extend`` or as it was recorded."""
        self.forwards += forwards * len(ends)
        if tail:
            self.prefill_tokens += int(self.unread(rows, ends).sum()) - len(ends)
        self.read[rows.host] = ends + drafts

    def step(self, last_b1: Tensor, ends_b: Tensor, drafts_bT: Tensor | None) -> Tensor:
        """``extend`` of the first b rows, all of whose text but the last token is read, as it can be recorded: logits
        ``[b, T + 1, V]``.

        Nothing of it depends on lengths that the host knows: all slots are looked at.
        """
        tokens = last_b1 if drafts_bT is None else torch.cat([last_b1, drafts_bT], 1)
        positions = (ends_b - 1).unsqueeze(1) + self.columns[: tokens.shape[1]]
        slots = positions.clamp(min=0, max=self.cache.slots)
        self.cache.aim(Places.first(len(tokens)), slots, self.cache.slots)
        most = min(self.context, self.cache.slots) - 1
        ends_b = ends_b + drafts_bT.shape[1] if drafts_bT is not None else ends_b
        return self.run(tokens, positions.clamp(min=0, max=int(most)), ends_b, tokens.shape[1])

    def _forward(
        self, rows: Places, ends_b: Tensor, ends: np.ndarray, width: int, drafts_bT: Tensor | None, keep: int
    ) -> Tensor:
        """Read the last ``width`` tokens of the texts, and drafts. All rows end in one column.

        A row that has fewer unread tokens than another reads some again, which changes nothing in its cache.
        """
        drafts = 0 if drafts_bT is None else drafts_bT.shape[1]
        steps = width + drafts
        first = ends_b + (drafts - steps) if drafts != steps else ends_b
        positions = first.unsqueeze(1) if steps == 1 else first.unsqueeze(1) + self.columns[:steps]
        slots = positions
        if int(ends.min()) < width:  # such a row has padding before its first token
            slots = torch.where(positions >= 0, positions, self.cache.slots)
            positions = positions.clamp(min=0)
        tokens = []
        if width:
            tail, texts = positions[:, :width], self.texts
            tokens.append(
                texts[: len(ends)].gather(1, tail) if rows.device is None else texts[rows.device[:, None], tail]
            )
        if drafts_bT is not None:
            tokens.append(drafts_bT)
        last = int(ends.max()) + drafts
        if last > self.context:  # drafts beyond a row's budget, which mean nothing, may lie beyond learned positions
            positions = positions.clamp(max=int(self.context) - 1)
        self.cache.aim(rows, slots, last)
        ids = tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1)
        even = int(ends.min()) + drafts == last
        return self.run(ids, positions, ends_b + drafts if drafts else ends_b, keep, even)

    def run(self, tokens: Tensor, positions: Tensor, ends_b: Tensor, keep: int, even: bool = False) -> Tensor:
        """One forward over the slots that the cache is aimed at: logits ``[b, keep, V]``.

        ``ends_b`` are behind the last column of each row; ``even``: they are known to be equal.
        """
        rows, states = self.cache.forward_rows, self.cache.states
        begun = bool(states) and bool(self.read[rows.host].any())
        for layer in states:
            layer.begin(rows, begun)
        with ExitStack() as stack:
            entered: list[Tensor] = []
            if self.keep_hidden or (keep < tokens.shape[1] and hasattr(self.model, "get_output_embeddings")):
                # Of some columns models hand out a view, for which torch on a CPU may copy the output layer's weight for each row.
                entered = stack.enter_context(head_inputs(self.model, Tensor.contiguous))
            stack.enter_context(self.attention.active())
            output = self.model(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=keep,
                **self.attention.inputs(positions, ends_b, self.cache.end, even),
                **self.extra,
                **{CACHE: self.cache},
            )
        for layer in states:
            layer.end(rows)
        self.hidden = entered[-1] if self.keep_hidden else self.hidden
        return output.logits[..., : self.vocab_size]
