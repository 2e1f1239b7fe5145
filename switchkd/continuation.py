"""Whether a run may go on: with the settings and the text that it was started with, but for what it is allowed to change."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from switchkd.checkpoint import write_file
from switchkd.config import FREE_ON_RESUME, TrainConfig, to_dict
from switchkd.data import TokenizedExample
from switchkd.errors import ConfigError
from switchkd.lock import LOCK
from switchkd.run_record import CONFIG, read_config
from switchkd.teacher_store import json_sha256

DATA = "data.json"


def check_run(run: Path, config: TrainConfig) -> None:
    """Raise ConfigError for a directory that holds something, or one to resume that was started with other settings."""
    if config.resume:
        before, now = to_dict(read_config(run)), to_dict(config)
        free = FREE_ON_RESUME | set(config.allow_change)
        _refuse(run, {k: f"{before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k] and k not in free})
    elif begun(run):
        raise ConfigError(f"{run} already exists and is not empty; choose another --output-dir, or go on with --resume")


def begun(run: Path) -> bool:
    """Whether a directory holds more than a run writes that was stopped before it had scored anything."""
    return run.exists() and any(path.name not in (CONFIG, DATA, LOCK) for path in run.iterdir())


def check_data(run: Path, config: TrainConfig, data: Mapping[str, Sequence[TokenizedExample]]) -> None:
    """Note in the run directory which text it is on, or raise ConfigError if it was started on other text.

    ``data`` is by the setting that names its file, which is also what allows it to change.
    """
    file, now = run / DATA, {name: _fingerprint(examples) for name, examples in data.items()}
    if config.resume and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = [k for k in now if before.get(k) != now[k] and k not in config.allow_change]
        _refuse(run, {k: f"other text behind it ({_words(before.get(k))} -> {_words(now[k])})" for k in differing})
    write_file(file, json.dumps(now, indent=1))


def _fingerprint(examples: Sequence[TokenizedExample]) -> dict[str, int | str]:
    """Number and checksum of the examples as the models read them."""
    rows = [(e.id, e.prompt_ids, e.completion_ids, e.references, e.teacher, e.teacher_prompt_ids) for e in examples]
    return {"examples": len(rows), "sha256": json_sha256(rows)}


def _words(fingerprint: Mapping[str, int | str] | None) -> str:
    return f"{fingerprint['examples']} examples, sha256 {str(fingerprint['sha256'])[:12]}…" if fingerprint else "none"


def _refuse(run: Path, differing: Mapping[str, str]) -> None:
    if differing:
        raise ConfigError(
            f"{run} was started otherwise: {'; '.join(f'{name}: {what}' for name, what in differing.items())}. Resume with what it "
            f"had, start anew, or allow it: --allow-change {' '.join(differing)}"
        )
