"""Load tokenizers from a folder or by built-in name, and compute a hash that identifies a tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.data.template import TULU
from engine.data.wordproblems import words
from engine.files import plain_file, read_object, refusing

_SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
_UNKNOWN = "<|unknown|>"
_WORD = Regex(r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s")  # numbers are split into digits


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a local folder, or a built-in one.

    "bytes": ids 0-255 are the bytes of UTF-8, followed by <|pad|>, <|user|>, <|assistant|> and <|end|>. "words": the words and digits of
    engine/data/wordproblems.py, 111 ids; any other word is <|unknown|>.
    Raises ValueError for any other name, for a folder without a tokenizer.json, and for one that is damaged or wants to run its own code.
    """
    if name_or_folder == "bytes":
        return _bytes()
    if name_or_folder == "words":
        return _words()
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise ValueError(f"tokenizer={name_or_folder!r} is neither 'bytes', 'words' nor a folder; give one of these")
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"tokenizer={name_or_folder!r} has no tokenizer.json; write one with tokenizer.save_pretrained")
    _check_files(folder)
    with refusing(folder, "its tokenizer cannot be loaded: fetch the folder again"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer("a")  # settings of wrong types show only in use
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"tokenizer={name_or_folder!r} is a {type(tokenizer).__name__}; a fast tokenizer is required; save one with tokenizer.json"
        )
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raise ValueError for what transformers would follow, open or run: links out of the folder, pipes, devices, and code of the folder."""
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model"):
            plain_file(folder, path.name)
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and read_object(folder / name, "a JSON object of settings").get("auto_map") is not None:
            raise ValueError(
                f"{folder / name}: auto_map is not supported: the folder wants to run code of its own; remove it to go without"
            )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The rows that an embedding needs for this tokenizer: its largest id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over everything that determines ids: model, added tokens, pipeline, and the special tokens. Excludes the chat template."""
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # state of the latest call, not part of the tokenizer
        del pipeline[setting]
    content = json.dumps([pipeline, tokenizer.special_tokens_map], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _words() -> PreTrainedTokenizerFast:
    known = ["\n", " ", *(space + word for word in words() for space in ("", " "))]
    vocabulary = {token: id for id, token in enumerate([*_SPECIAL, _UNKNOWN, *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(_WORD, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrapped(tokenizer, unk_token=_UNKNOWN)


def _bytes() -> PreTrainedTokenizerFast:
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}  # the token names that byte fallback uses
    tokenizer = Tokenizer(models.BPE(vocab=bytes_, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TULU,
        clean_up_tokenization_spaces=False,
        **tokens,
    )
