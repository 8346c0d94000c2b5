"""TRL's DPOTrainer on our tokens, so that both trainers get the same pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.pairs import Pair


def rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The pairs in the format of DPOTrainer after tokenisation, without the tokens after the last one with loss. If the pairs have
    reference log-probs, their sums are included.
    """
    rows = []
    for pair in pairs:
        first, last = zip(*(np.flatnonzero(half.mask)[[0, -1]] for half in pair), strict=True)
        assert first[0] == first[1], "the halves' prompts differ"
        ids = [half.tokens[first[0] + 1 : end + 2].tolist() for half, end in zip(pair, last, strict=True)]
        row = {"prompt_ids": pair[0].tokens[: first[0] + 1].tolist(), "chosen_ids": ids[0], "rejected_ids": ids[1]}
        for name, half in zip(("ref_chosen_logps", "ref_rejected_logps"), pair, strict=True):
            if half.ref_logprob is not None:
                row[name] = float(half.ref_logprob.astype(np.float64) @ half.mask)
        rows.append(row)
    return rows


def trainer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], out: str, callbacks: list[Any] | None = None, **settings: Any) -> Any:
    """TRL's DPOTrainer over `rows` in fp32 on CPU. Reference log-probs in the rows are used as they are. Raises ImportError without TRL."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *arguments: Any) -> Any:
            return dataset if "ref_chosen_logps" in dataset.column_names else super()._precompute_ref_logps(dataset, *arguments)

    defaults = {"use_cpu": True, "bf16": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "max_length": None}
    config = DPOConfig(out, precompute_ref_log_probs=True, **defaults | settings)
    return Tokenised(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=callbacks)
