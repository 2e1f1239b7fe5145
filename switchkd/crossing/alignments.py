"""Alignments by name, and which objectives each can be used with."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from switchkd.base.errors import ConfigError, nearest
from switchkd.crossing.bridge import Bridge
from switchkd.crossing.laws import Alignment, SharedLaw, SortedLaw
from switchkd.crossing.prefix import PrefixLaw
from switchkd.methods.objective import Objective, Tokens
from switchkd.methods.policy import REFERENCE, STUDENT, TEACHER
from switchkd.methods.rules import name_of

ALIGNMENTS: dict[str, Callable[[Bridge, torch.device], Alignment]] = {
    "strict": SharedLaw.of,
    "prefix": PrefixLaw.of,
    "sorted": SortedLaw.of,
}
# Laws of a teacher and a student with no mass where an alignment may leave a model without any; at the last event both have none.
_P, _Q = (0.7, 0.3, 0.0, 0.0), (0.2, 0.3, 0.5, 0.0)
_LAWS: dict[str, list[tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "strict": [],
    "prefix": [(_P, _Q)],
    "sorted": [(_P, _Q), (_Q, _P)],
}


def alignment_of(name: str, bridge: Bridge, device: torch.device) -> Alignment:
    """The alignment ``name`` of the two sides of a bridge. Raises ConfigError for an unknown name."""
    _check_name(name)
    return ALIGNMENTS[name](bridge, device)


def check_objective(name: str, objective: Objective) -> None:
    """Whether an objective has a meaning with the alignment ``name``: found out by asking it about laws with empty events.

    Raises:
        ConfigError: the name is unknown; the objective is infinite where a model gives an event no mass, as the alignment makes
            it do; or it asks for the probability of the token written, which has no place among ranks.
    """
    _check_name(name)
    if not objective.reads_teacher:
        return
    # One that changes over training is asked as it begins and as it ends.
    last = objective.at(objective.remember(objective.memory(), 1.0, progress=1.0))
    for asked, (p, q) in product((objective, last), _LAWS[name]):
        if not all(value.isfinite().all() for value in _value_and_gradient(asked, p, q)):
            raise ConfigError(
                f"the objective {name_of(objective)} is infinite where one of the laws has no mass, which the alignment {name} "
                f"makes it have; {_way_out(name)}"
            )
        values = _value_and_gradient(asked, p, q)[0].view(3, -1)
        if name == "sorted" and not values.allclose(values[:1]):
            raise ConfigError(
                f"the objective {name_of(objective)} looks at the token written, which the alignment sorted does not know; "
                f"{_way_out(name)}"
            )


def _value_and_gradient(objective: Objective, p: tuple[float, ...], q: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Of the loss of the first three events as the token written, and of each speaker."""
    ids, speakers = torch.tensor([*product(range(3), (STUDENT, TEACHER, REFERENCE))]).unbind(1)
    logp, logq = (torch.tensor(law, dtype=torch.float64).log().expand(len(ids), -1) for law in (p, q))
    logq = logq.clone().requires_grad_()
    tokens = Tokens(ids, speakers, torch.arange(len(ids))).by_text()
    if objective.looks_ahead:
        written = (objective.soften(logs.detach()).gather(1, ids.unsqueeze(1))[:, 0] for logs in (logp, logq))
        tokens = objective.look_ahead(replace(tokens, rows=torch.zeros_like(ids)), *written)
    values = objective.loss(logp, logq, tokens)
    (gradient,) = torch.autograd.grad(values.sum(), logq)
    return values.detach(), gradient


def _way_out(name: str) -> str:
    takes = "forward_kl, jsd, tvd or a skew KL" if name == "prefix" else "tvd or jsd"
    return f"take {takes}, or the alignment strict, which takes every objective"


def _check_name(name: str) -> None:
    if name not in ALIGNMENTS:
        raise ConfigError(f"unknown alignment {name!r}{nearest(name, ALIGNMENTS)}")
