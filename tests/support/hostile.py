"""What is wrong with a model folder or a GGUF file: changes to a small good one, each with what the loader must say ("": it loads)."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Change = Callable[[Path], object]
Case = tuple[str, Change, str]  # name, change to the folder, part of the error

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def put(name: str, content: str | bytes) -> Change:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def fields(name: str, **changes: Any) -> Change:
    """Change fields of a JSON file; ... removes one."""

    def change(folder: Path) -> None:
        there = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({k: v for k, v in (there | changes).items() if v is not ...}))

    return change


def replaced(name: str, make: Callable[[Path], object]) -> Change:
    """Remove a file and make something else of its name."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def sparse(size: int) -> Callable[[Path], object]:
    return lambda path: (path.touch(), os.truncate(path, size))


def header(change: Callable[[dict[str, Any]], object] | None = None, text: bytes | None = None, length: int | None = None) -> Change:
    """Change the header of the safetensors file: its entries, its bytes, or the length that it claims."""

    def write(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        entries, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        if change:
            change(entries)
        new = text if text is not None else json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new) if length is None else length) + new + data)

    return write


def entry(name: str = "model.norm.weight", **changes: Any) -> Change:
    return header(lambda entries: entries[name].update(changes))


def resized(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def sharded(change: Callable[[Path, dict[str, Any]], object] = lambda folder, index: None, *, single: bool = False) -> Change:
    """The weights in two files with an index, which `change` may change; `single`: beside the one file."""

    def split(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        if not single:
            (folder / WEIGHTS).unlink()
        names, index = sorted(tensors), {}
        for i, part in enumerate((names[:5], names[5:]), 1):
            save_file({name: tensors[name] for name in part}, folder / f"model-{i}.safetensors")
            index |= dict.fromkeys(part, f"model-{i}.safetensors")
        change(folder, index)
        if not os.path.lexists(folder / INDEX):
            (folder / INDEX).write_text(json.dumps({"weight_map": index}))

    return split


def mapped(value: Any) -> Change:
    """An index that places one tensor in `value`."""
    return sharded(lambda folder, index: index.update({"model.norm.weight": value}))


DEEP = 100_000
TEXTS: list[tuple[str, str | bytes]] = [
    ("empty", ""),
    ("half", '{"model_type": "llama"'),
    ("list", "[]"),
    ("null", "null"),
    ("text", '"llama"'),
    ("deep list", "[" * DEEP),
    ("deep object", '{"a":' * DEEP),
    ("not UTF-8", b'{"model_type": "llama\xff"}'),
    ("UTF-16", '{"model_type": "llama"}'.encode("utf-16")),
    ("duplicate key", '{"model_type": "llama", "hidden_size": 8, "hidden_size": 9}'),
    ("half a pair", '{"model_type": "\\ud800"}'),
    ("long number", '{"hidden_size": ' + "9" * 5000 + "}"),
]
PLACES: list[tuple[str, Callable[[Path], object]]] = [
    ("directory", Path.mkdir),
    ("pipe", os.mkfifo),
    ("device", link("/dev/zero")),
    ("link out", link("/etc/hostname")),
    ("dangling link", link("nowhere")),
    ("link to itself", lambda path: path.symlink_to(path.name)),
]
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "head_dim", "max_position_embeddings"),
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
NUMBERS: list[tuple[str, Any]] = [
    *(("rope_theta", value) for value in (0, -1, float("nan"), float("inf"), "10000", 1e-9, [1], True)),
    *(("rms_norm_eps", value) for value in (0, -1e-5, float("nan"), float("inf"), "1e-5", 2, {})),
    *(("tie_word_embeddings", value) for value in ("yes", 1, [])),
    *(("architectures", value) for value in ("LlamaForCausalLM", 5, {"a": 1})),
    *(("model_type", value) for value in (None, "gpt2", ["llama"], "llama\n")),
    *(("rope_scaling", value) for value in ("yarn", 5, {"rope_type": "yarn"}, {"rope_type": ["llama3"]}, {"rope_type": "llama3"})),
    *(
        ("rope_scaling", LLAMA3 | change)
        for change in ({"factor": 0}, {"factor": float("nan")}, {"high_freq_factor": 1.0}, {"factor": "8"})
    ),
    ("attention_bias", "false"),
    ("hidden_act", ["silu"]),
    ("auto_map", {"AutoConfig": "evil.Config"}),
    ("quantization_config", {"quant_method": "fp8"}),
]


def _config(name: str, value: Any) -> Case:
    expected = "rope" if name == "rope_scaling" else name
    return f"config {name}={value!r:.150}", fields("config.json", **{name: value}), expected


CONFIGS: list[Case] = [
    *((f"config.json {name}", put("config.json", text), "config.json") for name, text in TEXTS),
    *((f"config.json {name}", replaced("config.json", make), "config.json") for name, make in PLACES),
    ("config.json of a TiB", replaced("config.json", sparse(1 << 40)), "too many"),
    *(
        (f"config {name}={value!r}", fields("config.json", **{name: value}), name)
        for name in SIZES
        for value in ("64", 8.5, True, -16, 0, 10**12, 2**70, [8], {})
    ),
    *((f"config {name} missing", fields("config.json", **{name: ...}), name) for name in SIZES[:4]),
    *(_config(name, value) for name, value in NUMBERS),
    ("config partial rope", fields("config.json", rope_scaling={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    ("config head_dim=3", fields("config.json", head_dim=3), "must be even"),
    ("config two labels", fields("config.json", architectures=["LlamaForSequenceClassification"]), "2 labels"),
    ("config labels=1", fields("config.json", architectures=["LlamaForSequenceClassification"], id2label=1), "id2label"),
    ("config of more layers", fields("config.json", num_hidden_layers=4096), "are missing from its safetensors"),
    ("config of other heads", fields("config.json", num_key_value_heads=2), "has shape (4, 8), but config.json requires (8, 8)"),
    ("config with unknown fields", fields("config.json", anything=float("inf"), nested={"a": [1]}), ""),
    (
        "config as a link within the folder",
        lambda folder: ((folder / "config.json").rename(folder / "c"), (folder / "config.json").symlink_to("c")),
        "",
    ),
]

_ENTRY = b'{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
WEIGHT_FILES: list[Case] = [
    *((f"weights {name}", replaced(WEIGHTS, make), WEIGHTS) for name, make in PLACES),
    ("weights of a TiB of zeros", replaced(WEIGHTS, sparse(1 << 40)), WEIGHTS),
    ("weights empty", put(WEIGHTS, b""), WEIGHTS),
    ("weights of 7 bytes", put(WEIGHTS, b"\0" * 7), WEIGHTS),
    *((f"header of {length} bytes", header(length=length), WEIGHTS) for length in (0, 1, 1 << 20, 100_000_001, 2**63, 2**64 - 1)),
    ("header not JSON", header(text=b"{nonsense"), WEIGHTS),
    ("header a list", header(text=b"[]"), WEIGHTS),
    ("header not UTF-8", header(text=b'{"\xff": 1}'), WEIGHTS),
    ("header deep", header(text=b'{"a":' * DEEP), WEIGHTS),
    ("header empty object", header(text=b"{}"), WEIGHTS),
    ("tensor twice in the header", header(text=b'{"a": %s, "a": %s}' % (_ENTRY % (0, 4), _ENTRY % (4, 8))), WEIGHTS),
    ("metadata no texts", header(lambda entries: entries.update({"__metadata__": {"a": 1}})), WEIGHTS),
    ("dtype F64 in half the bytes", entry(dtype="F64"), WEIGHTS),
    ("dtype F128", entry(dtype="F128"), WEIGHTS),
    ("dtype a number", entry(dtype=32), WEIGHTS),
    ("dtype missing", header(lambda entries: entries["model.norm.weight"].pop("dtype")), WEIGHTS),
    ("dtype I32", entry(dtype="I32"), "has type I32"),
    ("dtype U32", entry(dtype="U32"), "has type U32"),
    ("dtype C64 of half the length", entry(dtype="C64", shape=[4]), "model.norm.weight has"),
    ("shape negative", entry(shape=[-8]), WEIGHTS),
    ("shape fractional", entry(shape=[8.0]), WEIGHTS),
    ("shape of text", entry(shape=["8"]), WEIGHTS),
    ("shape that overflows", entry(shape=[2**62, 2**62]), WEIGHTS),
    ("shape too large", entry(shape=[9]), WEIGHTS),
    ("shape of another rank", entry(shape=[2, 4]), "has shape (2, 4)"),
    ("shape missing", header(lambda entries: entries["model.norm.weight"].pop("shape")), WEIGHTS),
    ("offsets overlap", entry(data_offsets=[0, 32]), WEIGHTS),
    ("offsets reversed", entry(data_offsets=[32, 0]), WEIGHTS),
    ("offsets beyond the end", entry(data_offsets=[1 << 40, (1 << 40) + 32]), WEIGHTS),
    ("offsets negative", entry(data_offsets=[-32, 0]), WEIGHTS),
    ("offsets of one", entry(data_offsets=[0]), WEIGHTS),
    ("trailing bytes", resized(lambda content: content + b"extra"), WEIGHTS),
    ("cut by a byte", resized(lambda content: content[:-1]), WEIGHTS),
    ("cut in the header", resized(lambda content: content[:100]), WEIGHTS),
    ("unknown tensor", header(lambda entries: entries.update({"evil": entries.pop("model.norm.weight")})), "model.norm.weight"),
    (
        "tensor of an endless name",
        header(lambda entries: entries.update({"x" * 10**6: entries.pop("model.norm.weight")})),
        "model.norm.weight",
    ),
]

INDEXES: list[Case] = [
    ("two shards", sharded(), ""),
    *((f"index {name}", sharded(lambda folder, _, text=text: put(INDEX, text)(folder)), INDEX) for name, text in TEXTS),
    *((f"index {name}", sharded(lambda folder, _, make=make: make(folder / INDEX)), "model.safetensors") for name, make in PLACES),
    *(
        (f"shard {value!r:.40}", mapped(value), INDEX)
        for value in (
            "../model-1.safetensors",
            "/etc/passwd",
            "/tmp/x.safetensors",
            "",
            ".",
            "..",
            "a/b.safetensors",
            "config.json",
            "x\0.safetensors",
            "x" * 300 + ".safetensors",
            1,
            None,
            [],
            {},
            True,
            "./model-1.safetensors",
        )
    ),
    ("shard with a backslash", mapped("..\\model-1.safetensors"), "is missing"),
    ("shard missing", mapped("model-3.safetensors"), "model-3.safetensors is missing"),
    ("shard of another tensor", mapped("model-1.safetensors"), "the index lists model.norm.weight in this file"),
    *(
        (f"shard a {name}", sharded(lambda folder, _, make=make: replaced("model-2.safetensors", make)(folder)), "model-2.safetensors")
        for name, make in PLACES
    ),
    ("index without a map", sharded(lambda folder, _: put(INDEX, '{"metadata": {}}')(folder)), "needs a weight_map"),
    ("index with a list", sharded(lambda folder, _: put(INDEX, '{"weight_map": []}')(folder)), "needs a weight_map"),
    ("index of nothing", sharded(lambda folder, _: put(INDEX, '{"weight_map": {}}')(folder)), "needs a weight_map"),
    ("index without a tensor", sharded(lambda folder, index: index.pop("model.norm.weight")), "model.norm.weight"),
    ("index with another tensor", sharded(lambda folder, index: index.update(evil="model-1.safetensors")), "lists evil in this file"),
    (
        "tensor in two shards",
        sharded(lambda folder, index: (folder / "model-1.safetensors").write_bytes((folder / "model-2.safetensors").read_bytes())),
        "is in model-1.safetensors too",
    ),
    ("one file and an index", sharded(single=True), ""),
    ("one file and a broken index", sharded(lambda folder, _: put(INDEX, "{")(folder), single=True), ""),
    ("one file and an index that leads out", sharded(lambda folder, index: index.update({"model.norm.weight": "../x"}), single=True), ""),
    ("neither file nor index", lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors"),
]


def _vocabulary(change: Callable[[dict[str, Any]], object]) -> Change:
    def write(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content["model"]["vocab"])
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return write


def _added(**changes: Any) -> Change:
    def write(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        content["added_tokens"].append(content["added_tokens"][0] | {"content": "<x>"} | changes)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return write


SETTINGS = "tokenizer_config.json"
TOKENIZERS: list[Case] = [
    *((f"tokenizer.json {name}", put("tokenizer.json", text), "okenizer") for name, text in TEXTS if name != "duplicate key"),
    *((f"tokenizer.json {name}", replaced("tokenizer.json", make), "tokenizer.json") for name, make in PLACES),
    *((f"{SETTINGS} {name}", put(SETTINGS, text), "" if name == "half a pair" else SETTINGS) for name, text in TEXTS),
    *((f"{SETTINGS} {name}", replaced(SETTINGS, make), SETTINGS) for name, make in PLACES),
    *((f"chat_template.jinja {name}", replaced("chat_template.jinja", make), "chat_template.jinja") for name, make in PLACES),
    ("model of an unknown type", fields("tokenizer.json", model={"type": "Evil"}), "okenizer"),
    ("model a list", fields("tokenizer.json", model=[]), "okenizer"),
    (
        "broken regular expression",
        fields("tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "okenizer",
    ),
    ("merge of unknown tokens", fields("tokenizer.json", model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}), "okenizer"),
    ("id beyond the embedding", _vocabulary(lambda vocab: vocab.update(extra=260)), "more than the model's vocabulary of 260"),
    ("id of 31 bits", _vocabulary(lambda vocab: vocab.update(extra=2**31)), "more than the model's vocabulary of 260"),
    ("id of 32 bits", _vocabulary(lambda vocab: vocab.update(extra=2**32)), "okenizer"),
    ("id negative", _vocabulary(lambda vocab: vocab.update(extra=-1)), "okenizer"),
    ("id of text", _vocabulary(lambda vocab: vocab.update(extra="5")), "okenizer"),
    ("added token beyond the embedding", _added(id=260), "more than the model's vocabulary of 260"),
    ("added token without an id", _added(id=None), "okenizer"),
    ("code as a map", fields(SETTINGS, auto_map={"AutoTokenizer": ["evil.Evil", None]}), "auto_map is not supported"),
    ("code as a list", fields(SETTINGS, auto_map=["evil.Evil", None]), "auto_map is not supported"),
    ("code elsewhere", fields(SETTINGS, auto_map={"AutoTokenizer": ["evil/repo--evil.Evil", None]}), "auto_map is not supported"),
    ("class a number", fields(SETTINGS, tokenizer_class=5), "okenizer"),
    *((f"length {value!r}", fields(SETTINGS, model_max_length=value), "okenizer") for value in ("512", [], {})),
    ("eos a number", fields(SETTINGS, eos_token=5), "okenizer"),
    ("eos a list", fields(SETTINGS, eos_token=["a"]), "okenizer"),
    ("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
]

FOLDERS = [*CONFIGS, *WEIGHT_FILES, *INDEXES, *TOKENIZERS]
