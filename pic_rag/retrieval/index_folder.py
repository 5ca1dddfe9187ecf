"""The folder a retriever is kept in: data files named after their content, and `retriever.json`, which names them.

Readers and a killed process see the old state or the new one: the one replacement of `retriever.json` makes the new
files count. This file does not know what is in the data files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "retriever.json"
FORMAT_VERSION = 1
_PARTIAL_SECONDS = 3600
_NAME_DIGITS = 16  # of the hash of its content, in a data file's name


class RetrieverError(ValueError):
    """A saved retriever that cannot be used; the message names the folder and the remedy."""


def updating(folder: Path) -> FileLock:
    """A lock for whoever loads a folder, changes it and saves it again; it makes the folder if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "update.lock")


def read_state(folder: Path) -> str | None:
    """What tells one saved state of a folder from another; None where none is."""
    try:
        return _sha256((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None


def write_folder(
    folder: Path, settings: Mapping[str, Any], files: Mapping[str, bytes], known: str | None = None
) -> str | None:
    """Write the state; files of an older one go, those of others stay.

    Args:
        folder: made if it is not there.
        settings: JSON values that `read_folder` gives back.
        files: data by name, such as `index.faiss`.
        known: the `read_state` that this one follows; None: it replaces whatever is there.

    Returns:
        The new `read_state`.

    Raises:
        RetrieverError: somebody else has saved a state after the one that is known.
    """
    named = {_content_name(name, data): data for name, data in files.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        **settings,
        "files": {name.partition(".")[0]: {"name": name, "sha256": _sha256(data)} for name, data in named.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "retriever.lock"):
        if known is not None and read_state(folder) not in (known, None):
            raise RetrieverError(
                f"The retriever in '{folder}' must still be the one that was loaded or saved here, got one that "
                "somebody else has saved since. Load it again and add the documents to that, or save to another folder."
            )
        for name, data in named.items():
            write_file(folder / name, data)
        write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sweep(folder, files, named)
        return read_state(folder)


def _sweep(folder: Path, files: Iterable[str], named: Collection[str]) -> None:
    """Remove data files of older states."""
    stems = (name.split(".") for name in files)
    written = [rf"{stem}\.[0-9a-f]{{{_NAME_DIGITS}}}\.{suffix}" for stem, suffix in stems]
    for path in folder.iterdir():
        if re.fullmatch("|".join(written), path.name) and path.name not in named:
            path.unlink()


def read_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, bytes]]:
    """One state of a folder, whole: its `read_state`, what `write_folder` was given as settings, and its data by stem.

    Raises:
        RetrieverError: the folder holds no retriever, one of another format, or a file that is not as it was written.
    """
    while True:
        try:
            written = (folder / MANIFEST).read_bytes()
        except FileNotFoundError as error:
            raise damaged(folder, f"no '{MANIFEST}'") from error
        manifest = _parse(folder, written)
        try:
            return _sha256(written), manifest, {stem: _read(folder, manifest, stem) for stem in manifest["files"]}
        except RetrieverError:
            if read_state(folder) == _sha256(written):
                raise  # else somebody has saved meanwhile, and the files are those of the newer state


def _parse(folder: Path, written: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(written)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"an unreadable '{MANIFEST}' ({error})") from error
    if version != FORMAT_VERSION:
        raise damaged(folder, f"format_version {version!r} where this pic-rag reads {FORMAT_VERSION}")
    missing = {"embedder", "passage_characters", "overlap_characters", "files"} - manifest.keys()
    if missing:
        raise damaged(folder, f"a '{MANIFEST}' without '{min(missing)}'")
    if not isinstance(manifest["files"], dict):
        raise damaged(folder, f"a '{MANIFEST}' without names of files")
    return manifest


def _read(folder: Path, manifest: Mapping[str, Any], stem: str) -> bytes:
    """A data file, checked."""
    try:
        record = manifest["files"][stem]
        expected = record["sha256"]
        data = (folder / Path(record["name"]).name).read_bytes()
    except FileNotFoundError as error:
        raise damaged(folder, f"no '{record['name']}'") from error
    except (KeyError, TypeError) as error:
        raise damaged(folder, f"a '{MANIFEST}' without the file of its {stem}") from error
    if _sha256(data) != expected:
        raise damaged(folder, f"a '{record['name']}' of another content")
    return data


def damaged(folder: Path, got: str) -> RetrieverError:
    """The error for a folder that cannot be used."""
    return RetrieverError(
        f"The folder '{folder}' must hold a retriever as `Retriever.save` wrote it, got {got}. "
        "Load again if it was just being saved, else add the documents to a new Retriever and save that."
    )


def _content_name(name: str, data: bytes) -> str:
    stem, suffix = name.split(".")
    return f"{stem}.{_sha256(data)[:_NAME_DIGITS]}.{suffix}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file that readers see whole, as it was or as it is now."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("xb") as writer:
            writer.write(data)
            writer.flush()
            os.fsync(writer.fileno())
        partial.replace(path)
        _sweep_partials(path.parent)
    except OSError as error:
        if error.filename is None:  # the disk is full, or broken
            reason = f"{error.strerror}. What was there is as it was: free disk space, or save to another folder"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _sweep_partials(folder: Path) -> None:
    """Remove what killed processes have left half-written; young ones may be somebody's who writes just now."""
    for partial in folder.glob(f"*.{'[0-9a-f]' * 32}.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > _PARTIAL_SECONDS:
                partial.unlink()
