"""TRL's DPOTrainer on tokens of ours: whoever computes, it is the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.pairs import Pair


def rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The pairs as DPOTrainer has them when it has tokenised and scored them; whatever follows an answer's last counted token is left out.

    With ref_logprob there are also its sums.
    """
    found = []
    for pair in pairs:
        first, last = zip(*(np.flatnonzero(half.mask)[[0, -1]] for half in pair), strict=True)
        assert first[0] == first[1], "the halves' prompts differ"
        ids = [half.tokens[first[0] + 1 : end + 2].tolist() for half, end in zip(pair, last, strict=True)]
        row = {"prompt_ids": pair[0].tokens[: first[0] + 1].tolist(), "chosen_ids": ids[0], "rejected_ids": ids[1]}
        for name, half in zip(("ref_chosen_logps", "ref_rejected_logps"), pair, strict=True):
            if half.ref_logprob is not None:
                row[name] = float(half.ref_logprob.astype(np.float64) @ half.mask)
        found.append(row)
    return found


def trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], out: str, callbacks: list[Any] | None = None, **settings: Any) -> Any:
    """A DPOTrainer of TRL over `rows` in fp32 on CPU; those with reference sums are not scored again. Raises ImportError without TRL."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *given: Any) -> Any:
            return dataset if "ref_chosen_logps" in dataset.column_names else super()._precompute_ref_logps(dataset, *given)

    defaults = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_length": None}
    config = DPOConfig(out, precompute_ref_log_probs=True, **defaults | settings)
    return Tokenised(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=callbacks)
