"""The models of a pair, each from what names it: a hub name or folder, an adapter, the student's base, a server's address."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from switchkd.base.errors import SwitchKDError
from switchkd.base.storage import expanded
from switchkd.models.loading import adapter_base, is_adapter, load_config, load_model, located
from switchkd.models.settings import BASE, Place, dtype_name, is_address

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from switchkd.models.settings import ModelConfig


@contextmanager
def naming(teacher: str) -> Iterator[None]:
    """What is wrong with a named teacher is said with its name."""
    try:
        yield
    except SwitchKDError as error:
        if not teacher:
            raise
        raise type(error)(f"teacher {teacher!r}: {error}") from error


def folder_dtype(name: str) -> str:
    """What a model's config.json says that its weights are in; float32 where it says nothing. Of an adapter, its base's."""
    source, is_local = located(adapter_base(name))
    dtype = load_config(source, is_local).dtype
    return "float32" if dtype is None else dtype_name(dtype)


def files_of(source: str, files: str) -> str:
    """Where the files of a teacher lie, which may be behind a server."""
    if not is_address(source):
        return source
    from switchkd.models.served_teacher import served_files

    return served_files(source, files)


def _load_teacher(name: str, dtype: str, device: str, student: "PreTrainedModel", place: Place) -> "PreTrainedModel":
    if name != BASE:
        return load_model(name, dtype, device, place=place).requires_grad_(False)
    from switchkd.forward.base_model import BaseModel

    return BaseModel(student)


def load_teachers(
    sources: Mapping[str, str],
    dtype: str,
    device: str,
    student: "PreTrainedModel",
    place: Place,
    files: Mapping[str, str],
    tokenizers: "Mapping[str, PreTrainedTokenizerBase]",
    writer: str,
) -> "dict[str, PreTrainedModel]":
    """The teachers by name, one model for equal sources; ``files`` are where the tokenizers of each came from.

    ``writer`` writes as the default one.
    """
    models: dict[str, PreTrainedModel] = {}
    for name, source in sources.items():
        same = next((other for other in models if _same_model(sources[other], source)), None)
        with naming(name):
            if same is not None:
                models[name] = models[same]
            elif is_address(source):
                from switchkd.models.served_teacher import load_served

                models[name] = load_served(source, tokenizers[name], dtype, device, files[name], "" if name else writer)
            else:
                models[name] = _load_teacher(source, dtype, device, student, place)
    return models


def load_student(
    name: str, dtype: str, device: str | None, lora: "ModelConfig | None", seed: int
) -> "tuple[PreTrainedModel, tuple[str, ...]]":
    """The student, and what there is to say of it."""
    from switchkd.forward.text_path import freeze_beside_text, frozen_note

    if lora is None:
        model = load_model(name, dtype, device)
        beside = freeze_beside_text(model)
    else:
        from switchkd.models.adapters import add_adapter, open_adapter

        model = load_model(adapter_base(name), dtype, device, lora.load_in_4bit)
        beside = freeze_beside_text(model)
        if is_adapter(name):
            open_adapter(model, Path(name), asked=lora)
            freeze_beside_text(model)  # what another hand has adapted there
        else:
            add_adapter(model, lora, seed, beside)
    return model, (frozen_note(beside),) if beside else ()


def _same_model(one: str, other: str) -> bool:
    folders = [Path(expanded(name)) for name in (one, other)]
    return one == other or (
        BASE not in (one, other) and all(map(Path.is_dir, folders)) and folders[0].samefile(folders[1])
    )
