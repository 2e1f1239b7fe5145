"""What goes out with a student names no folder of the machine that it was made on."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from switchkd.config import TrainConfig

TOKENIZER_CONFIG = "tokenizer_config.json"
# How transformers found a tokenizer here, which it writes down with it.
HOW_FOUND = ("name_or_path", "is_local", "local_files_only", "cache_dir")


def public_name(name: str) -> str:
    """A model's or file's name as others may read it: of a path on this machine the last part alone."""
    path = Path(name)
    local = name.startswith(("/", "~", ".")) or ("/" in name and path.exists())
    return path.name or name if local else name


def public_settings(config: "TrainConfig") -> "TrainConfig":
    """The settings of a run with `public_name` in the place of every model, file and folder."""
    fields = [f.name for f in dataclasses.fields(config) if f.name.endswith(("_path", "_file", "_dir"))]
    changed: dict[str, Any] = {name: public_name(getattr(config, name)) for name in fields}
    changed["teachers"] = {name: public_name(source) for name, source in config.teachers.items()}
    return dataclasses.replace(config, **changed)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Save a tokenizer for ``from_pretrained``, without a word on where it was found."""
    tokenizer.save_pretrained(folder)
    file = folder / TOKENIZER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in HOW_FOUND and not _is_path(value)}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("/") and "\n" not in value and len(Path(value).parts) > 2
