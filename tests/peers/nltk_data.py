"""The English Punkt model for NLTK without a download: package `punkt`, which this project depends on, contains it."""

from __future__ import annotations

from pathlib import Path

from punkt import load_model


def write_punkt_tab(folder: Path) -> None:
    """Write the model into `folder` as NLTK's resource tokenizers/punkt_tab/english. `folder` then belongs on nltk.data.path."""
    model, english = load_model("english"), folder / "tokenizers/punkt_tab/english"
    english.mkdir(parents=True)
    rows = {
        "collocations.tab": ["\t".join(pair) for pair in sorted(model.collocations)],
        "sent_starters.txt": sorted(model.sent_starters),
        "abbrev_types.txt": sorted(model.abbrev_types),
        "ortho_context.tab": [f"{word}\t{flags}" for word, flags in sorted(model.ortho_context.items())],
    }
    for name, lines in rows.items():
        (english / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
