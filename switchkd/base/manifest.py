"""The mark of a folder that was written here: a manifest with size and SHA-256 of each of its files, written last.

It tells whether a folder is whole, and what in it is ours: nothing else is ever deleted.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any, TypedDict

from switchkd.base.errors import CheckpointError, DataError, SwitchKDWarning
from switchkd.base.plain import check_type, json_object, shown
from switchkd.base.storage import discard, set_aside

MANIFEST = "manifest.json"
STAMP = "student.json"  # of a student: which one it is
CARD = "README.md"  # and what is said of it, written when its scores are known, behind the manifest
_READ = (".safetensors", ".json", ".jinja")  # what a library would read beside the files that it is asked for


class Entry(TypedDict):
    """What the manifest says of a file."""

    size: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """Note all files of a folder, which is then whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What a folder should hold; raises CheckpointError if that cannot be told."""
    return read_record(folder / MANIFEST, dict[str, Entry])


def read_record(file: Path, kind: Any) -> Any:
    """A JSON object of this ``kind`` beside a manifest; raises CheckpointError if it is none."""
    try:
        found = json_object(file.read_bytes())
        check_type(found, kind)
    except OSError as error:
        raise CheckpointError(f"{file.parent} is not whole: {file.name} cannot be read: {error}") from error
    except DataError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return found


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises CheckpointError naming the first that differs, or would be read beside them."""
    manifest = read_manifest(folder)
    for name in foreign(folder):
        if Path(name).suffix in _READ:
            raise CheckpointError(f"{folder / name} was not written with its folder: take it out")
    for name, entry in manifest.items():
        path = folder / name
        try:
            inside = _inside(folder, name)
            whole = inside and path.stat().st_size == entry["size"] and file_sha256(path) == entry["sha256"]
        except (OSError, ValueError) as error:  # ValueError: no file has such a name
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not inside:
            raise CheckpointError(f"{folder / MANIFEST} names a file outside its folder, {shown(name)}")
        if not whole:
            raise CheckpointError(f"{path} is damaged: it is not as it was written")


def file_sha256(path: Path) -> str:
    """Checksum of a file's bytes, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def foreign(folder: Path) -> list[str]:
    """The files in a folder that were not written here: those that its manifest does not name, all if it has none to be read."""
    try:
        ours = {*read_manifest(folder), MANIFEST}
        ours |= {CARD} if STAMP in ours else set()
    except CheckpointError:
        ours = set()
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({str(path.relative_to(folder)) for path in found} - ours)


def take_away(folder: Path) -> None:
    """Delete a folder that was written here, of a link the link alone. What else lies in it is kept beside, with a warning."""
    if folder.is_symlink() or not (kept := foreign(folder)):
        discard(folder)
        return
    aside = put_aside(folder)
    if (aside / MANIFEST).is_file() and MANIFEST not in kept:
        for name in [*read_manifest(aside), MANIFEST]:
            if _inside(aside, name):
                (aside / name).unlink(missing_ok=True)
    _warn_of_kept(folder, kept, aside)


def make_room(folder: Path) -> None:
    """Put a folder aside, with a warning, if something lies in it that was not written here: it is about to be replaced."""
    if folder.is_dir() and (kept := foreign(folder)):
        _warn_of_kept(folder, kept, put_aside(folder))


def put_aside(folder: Path) -> Path:
    """Give a folder a name under which nothing looks for it, and return that; one put aside there before is taken away."""
    aside = folder.with_name(f"{folder.name}.set-aside")
    if os.path.lexists(aside):
        take_away(aside)
    return set_aside(folder, aside)


def _warn_of_kept(folder: Path, kept: list[str], aside: Path) -> None:
    more = f" and {len(kept) - 1} more files" if len(kept) > 1 else ""
    warnings.warn(
        f"{folder} holds {shown(kept[0])}{more}, which the run did not write; that is kept in {aside}",
        SwitchKDWarning,
        stacklevel=3,
    )


def _inside(folder: Path, name: str) -> bool:
    return (folder / name).resolve().is_relative_to(folder.resolve())


def json_sha256(value: Any) -> str:
    """Checksum of a JSON-ready value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
