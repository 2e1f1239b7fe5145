"""What the end of a run does with its student, and the same tried before the first step, so that nothing fails there at last;
and how a student that lies there is put on the Hugging Face Hub.
"""

import gc
import glob
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel

from switchkd.base.errors import CheckpointError, ConfigError, HubError, ModelError, NoMemoryError, SwitchKDError
from switchkd.base.manifest import CARD, MANIFEST, read_manifest, verify
from switchkd.base.memory import out_of_memory
from switchkd.base.storage import expanded, scratch_folder
from switchkd.models.adapters import merged
from switchkd.models.loading import MADE, adapter_base, is_adapter, load_model
from switchkd.models.saved_student import STUDENT, SavedStudent, Stamp
from switchkd.models.settings import cast_weights, dtype_name
from switchkd.runs.model_card import model_card
from switchkd.training.checkpoint import Weights, save_model
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

# What a library would read beside the files that it is asked for: of an older student, nothing of it may stay on the hub.
_REPLACED = ["*.safetensors", "*.json", "*.jinja"]


def save_student(trainer: Trainer, folder: str, weights: Weights, dtype: torch.dtype) -> PreTrainedModel:
    """Save the student, which has these ``weights``, in ``folder`` of the run; returns the model that lies there.

    It is saved in ``dtype``, and multiplies as the run does, so that it can be scored.
    """
    student, tokenizer = trainer.student, trainer.pair.tokenizer
    stamp = Stamp(step=trainer.step, weights_of_step=int(trainer.best["step"]) if trainer.best else trainer.step)
    if not trainer.config.merge:
        save_model(trainer.run / folder, student, tokenizer, weights, dtype, stamp)
        return student
    plain = merged(student, weights, dtype)
    save_model(trainer.run / folder, plain, tokenizer, {}, dtype, stamp)
    cast_weights(plain, student.dtype)
    return plain


def scored_student(trainer: Trainer, weights: Weights) -> PreTrainedModel:
    """What ``save_student`` returns in the main process at the end of a run, for another one that scores it too."""
    if not trainer.config.merge:
        return trainer.student
    plain = merged(trainer.student, weights, trainer.save_dtype)
    cast_weights(plain, trainer.student.dtype)
    return plain


def rehearse(trainer: Trainer, weights: Weights) -> None:
    """Write the card, and merge, save and open the student, as the run's end will. (The first checkpoint tries what else is saved.)

    Raises ModelError or NoMemoryError for what cannot be done.
    """
    model_card(trainer, {}, {})
    if not trainer.config.merge:
        return
    try:
        with scratch_folder(trainer.run) as folder:
            save_student(trainer, f"{folder.name}/{STUDENT}", weights, trainer.save_dtype)
            gc.collect()  # a copy of the model in memory
            load_model(str(folder / STUDENT), dtype_name(trainer.save_dtype), str(trainer.student.device))
    except SwitchKDError:
        raise
    except Exception as error:
        words = f"tried before the first step: the adapter cannot be merged into the student ({type(error).__name__}: {error})"
        if out_of_memory(error):
            raise NoMemoryError(f"{words}; that takes the student's memory once more: leave merge out") from error
        raise ModelError(f"{words}; leave merge out, and merge it with peft") from error


# --- to the hub ---------------------------------------------------------------------------------------------------


def check_push(name: str, config: TrainConfig | None = None) -> None:
    """Raise ConfigError if no student, or not that of a run with these settings, can be pushed under this name: as far as that is
    known before a hub is asked."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub {name!r} is no name on the hub: {error}; give my-name/my-student") from error
    if constants.is_offline_mode():
        raise ConfigError(
            f"push_to_hub {name!r}, and HF_HUB_OFFLINE is set: unset it, or push later with `switchkd push`"
        )
    if get_token() is None:
        raise ConfigError(
            f"push_to_hub {name!r} needs a token that may write, and there is none: log in with `hf auth login`, or set HF_TOKEN"
        )
    if config is not None and config.use_peft and not config.merge:
        base = config.student_model_name_or_path
        _check_base(base if base in MADE else adapter_base(base))


def _check_base(base: str) -> None:
    if base in MADE or Path(expanded(base)).exists() or Path(base).is_absolute():
        raise ConfigError(
            f"the student is an adapter on {base}, which nobody else has, and adapter_config.json would tell its folder: train "
            "with --merge, or name the base as it is on the hub"
        )


def push(place: Path, name: str, private: bool = True) -> str:
    """Put the student of a run, ``place`` or its ``student/``, on the hub under this name; returns its address there.

    The files that the run wrote into ``student/`` go up, and nothing else of the run. Those of an older student that are there and
    that a library would read are taken away.

    Raises:
        ConfigError: as ``check_push``.
        CheckpointError: there is no student that a run saved, or it is not as it was written.
        HubError: the hub cannot be reached, or refuses.
    """
    run = place.parent if place.name == STUDENT else place
    check_push(name)
    student = SavedStudent.of(run)
    if student is None:
        raise CheckpointError(
            f"{place} holds no student that a run saved; name the directory of a run that has come to its end"
        )
    verify(student.folder)
    if is_adapter(student.folder):
        _check_base(adapter_base(str(student.folder)))
    files = [*read_manifest(student.folder), MANIFEST, CARD]
    try:
        api = HfApi()
        repo = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=student.folder,
            allow_patterns=[glob.escape(file) for file in files],
            delete_patterns=_REPLACED,
            commit_message=f"The student of step {student.step}, distilled with switchkd",
        )
    except Exception as error:  # of a network, of the hub, of a disk: each library below has its own
        raise HubError(
            f"the student could not be put on the hub as {name} ({type(error).__name__}: {error}). It lies in {student.folder}; "
            f"look at the network, and whether the token may write there, and try again: switchkd push {run} {name}"
        ) from error
    return str(repo)
