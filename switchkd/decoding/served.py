"""Text whose teacher is behind a server: it reads whole texts at a time, and is not asked at single tokens."""

from collections.abc import Callable
from dataclasses import replace

from switchkd.base.errors import ConfigError
from switchkd.decoding.rollouts import Rollouts
from switchkd.decoding.rows import Job
from switchkd.methods.policy import TEACHER, Policy, StudentOnly
from switchkd.methods.rules import name_of


def decode_served(job: Job, by_engine: Callable[[Job], Rollouts]) -> Rollouts:
    """``decode_job`` of a job whose teacher is a `ServedModel`; ``by_engine`` decodes one whose models are both here.

    Raises ConfigError for a rule that may ask the teacher.
    """
    check_served(job.settings.policy, job.teacher.server.address)
    return by_engine(by_student(job))


def by_student(job: Job) -> Job:
    """The same rows written by the student alone, which sits in the engine's other seat too, where nobody asks it."""
    return replace(job, teacher=job.student, settings=replace(job.settings, policy=StudentOnly(), keep_hidden=False))


def check_served(policy: Policy, address: str) -> None:
    """Raise ConfigError for a rule that may ask the teacher at a token, whose teacher is behind the server at ``address``."""
    has_state = type(policy).init is not Policy.init
    if has_state or policy.reads(())[TEACHER] is not False:
        raise ConfigError(
            f"the policy {name_of(policy)} asks the teacher at every token, and the teacher behind {address} reads a whole text at "
            "a time. Take the teacher into the process (its folder or hub name as --teacher; over several GPUs with "
            "--teacher-tensor-parallel), or a method whose text the student writes, or the data: on_policy, gkd, distillm, kd …"
        )
