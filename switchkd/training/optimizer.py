"""AdamW, its learning rate at every step, and how many steps there are."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from switchkd.base.errors import ConfigError
from switchkd.base.terminal import number
from switchkd.forward.sharding import full, is_sharded
from switchkd.models.adapters import has_adapter
from switchkd.models.settings import dtype_in, quantised
from switchkd.runner.architecture import num_parameters
from switchkd.training.settings import TrainConfig

# Peak learning rates by the parameters of a student, up to so many, when all of its weights are trained.
RATES = {200_000_000: 1e-4, 400_000_000: 3e-5, 2_000_000_000: 1e-5, 5_000_000_000: 5e-6}
RATE_ABOVE = 2e-6
OF_AN_ADAPTER = 10.0


def with_learning_rate(
    config: TrainConfig, student: PreTrainedModel, say: Callable[[str], None] = lambda line: None
) -> TrainConfig:
    """``config`` with a number for the learning rate: its own, or one that goes by the size of the student, which is said.

    The numbers are a place to start from and no measured optimum: round ones that lie among those that were published. SWITCH
    searched 5e-4, 1e-4 and 5e-5 for students below 1B, GPT-2 and OPT, and 5e-5, 1e-5 and 5e-6 above; Veto has 1e-5 for a student
    of 0.5B that is an instruct model, as have SKD and TRB; CA-OPD and Relay-OPD have 1e-6. The recipes' comments say which. That an
    adapter takes about ten times as much is from Thinking Machines Lab, LoRA Without Regret, 2025.
    """
    if config.learning_rate is not None:
        return config
    size, adapter = logical_parameters(student), has_adapter(student)
    rate = next((rate for most, rate in RATES.items() if size <= most), RATE_ABOVE)
    rate = float(f"{rate * OF_AN_ADAPTER:.1g}") if adapter else rate
    of = "the adapter of a student" if adapter else "a student"
    say(f"learning_rate {rate:g}: chosen for {of} of {_millions(size)} parameters; --learning-rate sets another")
    return replace(config, learning_rate=rate)


def logical_parameters(student: PreTrainedModel) -> int:
    """Parameters of the model itself, as its config says: without an adapter, and none of them packed into fewer bits."""
    if not has_adapter(student) and not quantised(student.config):
        return num_parameters(student)
    with torch.device("meta"):
        return num_parameters(type(student)(copy.deepcopy(student.config)))


def _millions(size: int) -> str:
    if size < 1e6:
        return f"{size:,}"
    return f"{number(size / 1e9, 2)}B" if size >= 1e9 else f"{number(size / 1e6)}M"


def learning_rate(config: TrainConfig, step: int, total_steps: float) -> float:
    """Rate of the update after ``step`` updates: warm-up, then ``lr_scheduler_type`` as transformers' scheduler of that name.

    As there, what falls would reach its end with the update after the last. Warm-up is one step ahead of theirs, so that no
    update has rate 0: ``learning_rate / warmup`` is the first, ``learning_rate`` the last of it. ``constant`` warms up too.
    """
    peak, warmup = config.peak_rate, _warmup(config, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.lr_scheduler_type.startswith("constant"):
        return peak
    done = (step - warmup) / max(total_steps - warmup, 1)
    if config.lr_scheduler_type == "linear":
        return peak * max(1 - done, 0.0)
    floor = config.min_lr + config.min_lr_rate * peak  # one of the two, or 0
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def _warmup(config: TrainConfig, total_steps: float) -> float:
    """Steps of warm-up; where they are a share of a run whose length nobody can tell yet, there is no end to them."""
    if config.warmup_steps or not config.warmup_ratio:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total_steps) if math.isfinite(total_steps) else math.inf


def schedule_progress(step: int, total_steps: float) -> float:
    """How far schedules over training are after ``step`` updates: 0 in the first step of a run, 1 in its last and behind it.

    A run of one step is at its start. ``total_steps`` may be an estimate: what is not whole takes one step more.
    """
    if math.isinf(total_steps):
        return 0.0
    last = math.ceil(total_steps * (1 - 1e-9)) - 1  # a quotient of whole numbers is whole but for rounding
    return min(step / last, 1.0) if last > 0 else float(step > 0)


def total_steps(config: TrainConfig, examples: int, rows_per_step: int) -> float:
    """Steps after which a run ends at the latest; infinite where a budget of tokens or time alone ends it."""
    if config.max_steps >= 0:
        return config.max_steps
    if config.max_train_tokens or config.max_train_seconds:
        return math.inf
    return math.ceil(config.num_train_epochs * examples / rows_per_step)


def adamw(weights: Sequence[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over ``weights``, which it updates, with its moments, in their own dtype.

    Raises:
        ConfigError: there are none, or some are narrower than float32, in which a small update is rounded away.
    """
    if not weights:
        raise ConfigError("the student has no trainable parameters")
    if narrow := {str(weight.dtype) for weight in weights if weight.element_size() < 4}:
        raise ConfigError(
            f"AdamW would update weights in {', '.join(sorted(narrow))}, in which an update much smaller than the weight is lost: "
            "give it masters in float32 (switchkd.training.optimizer.Masters)"
        )
    groups = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(groups, lr=config.peak_rate, betas=betas, eps=config.adam_epsilon, fused=True)
    # As the first update would make them; made here, the first checkpoint already has the size of all others.
    for weight in weights:
        step = torch.zeros((), dtype=torch.float32, device=weight.device)
        moments = {name: torch.zeros_like(weight, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": step, **moments}
    return optimizer


# --- the weights that are updated ---------------------------------------------------------------------------------


class Masters:
    """The trained weights of ``model`` as an optimizer updates them, in float32 or wider: ``named``, by their names in the model.

    ``compute`` is the dtype that the model's products are made in from now on; None leaves the model as it is. Where that is
    narrower than float32, or the model's weights are, the model keeps rounded copies, and each backward pass adds its gradients to
    the masters' at once, in the masters' dtype. Else, and in a model that is sharded, the model's own weights are the masters.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype | None = None):
        self.model = model
        self.named: dict[str, nn.Parameter] = {}
        self._copies: dict[str, nn.Parameter] = {}  # the model's own, where they are not the masters
        for name, parameter in model.named_parameters():
            dtype = parameter.dtype if is_sharded(model) else dtype_in(compute, model, name, parameter)
            if parameter.requires_grad:
                self.named[name] = self._master(name, parameter, dtype)
            elif dtype != parameter.dtype:
                parameter.data = parameter.data.to(dtype)

    def _master(self, name: str, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        wide = torch.promote_types(torch.promote_types(parameter.dtype, dtype), torch.float32)
        if wide == dtype:
            parameter.data = parameter.data.to(wide)
            return parameter
        if dtype == torch.float16:
            raise ConfigError(
                "a student in float16 cannot be trained: small gradients vanish in it; take bfloat16 or float32 (--dtype)"
            )
        master = nn.Parameter(parameter.data.to(wide))
        parameter.data = parameter.data.to(dtype)
        parameter.register_post_accumulate_grad_hook(partial(_hand_over, master))
        self._copies[name] = parameter
        return master

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of a master."""
        return max((weight.dtype for weight in self.named.values()), key=lambda dtype: dtype.itemsize)

    @torch.no_grad()
    def publish(self) -> None:
        """Make the model's copies those of the masters as they are now."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [self.named[name] for name in self._copies])

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights, by name, for those that the model has rounded copies of."""
        for name in self._copies:
            self.named[name].copy_(weights[name])
        self.publish()

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round masters and model to what ``dtype`` can hold, so that what is scored is what is saved in it."""
        for weight in self.named.values():
            weight.copy_(weight.to(dtype))
        self.publish()

    def whole(self) -> dict[str, Tensor]:
        """The masters; of a sharded model whole and on the host, and all ranks must ask, while it is in shards."""
        return {name: full(weight.detach()) for name, weight in self.named.items()}

    def sum_gradients(self, accelerator: Accelerator) -> None:
        """Make the gradients of all processes one sum, in the masters' dtype. A sharded model has done that in its backward pass.

        A weight that no process's text has reached keeps no gradient, as in one process.
        """
        if accelerator.num_processes == 1 or is_sharded(self.model):
            return
        weights = list(self.named.values())
        reached = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32)
        reached = accelerator.reduce(reached.to(accelerator.device), "sum")
        for weight, ranks in zip(weights, reached.tolist(), strict=True):
            if ranks:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                distributed.all_reduce(weight.grad)


@torch.no_grad()
def _hand_over(master: nn.Parameter, parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    if master.grad is None:
        master.grad = parameter.grad.to(master.dtype)
    else:
        master.grad += parameter.grad
    parameter.grad = None
