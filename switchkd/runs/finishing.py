"""What the end of a run does with its student, and the same tried before the first step, so that nothing fails there at last."""

import gc

import torch
from transformers import PreTrainedModel

from switchkd.base.errors import ModelError, NoMemoryError, SwitchKDError
from switchkd.base.memory import out_of_memory
from switchkd.base.storage import scratch_folder
from switchkd.models.adapters import merged
from switchkd.models.loading import load_model
from switchkd.models.saved_student import STUDENT, Stamp
from switchkd.models.settings import cast_weights, dtype_name
from switchkd.runs.model_card import model_card
from switchkd.training.checkpoint import Weights, save_model
from switchkd.training.trainer import Trainer


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
