"""Direct preference optimization (arXiv 2305.18290), by default length-normalized as in Tülu 3 (arXiv 2411.15124, section 5).

No reference model is kept in memory: the policy computes its log-probs once, before the first step, and caches them in out/reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from engine.algorithms.workload import Workload
from engine.config import Run
from engine.config.checks import Launch, Limit, Requirements
from engine.config.choices import BadRows, TooLong
from engine.data.rows import Source

if TYPE_CHECKING:
    from engine.algorithms.supervised import Supervised
    from engine.data.pairs import Pairs
    from engine.megatron.policy import Policy


@dataclass(frozen=True)
class DPO:
    """Settings of direct preference optimization."""

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()  # never trained on; their loss, accuracy and margin are reported
    batch_size: int = 128  # pairs per optimizer step, over all ranks
    beta: float = 5.0  # scale of the rewards; use about 0.1 with normalize=False
    normalize: bool = True  # rewards are means over the response's tokens; False: sums (plain DPO)
    label_smoothing: float = 0.0  # assumed share of pairs with swapped labels, in [0, 0.5)
    nll_weight: float = 0.0  # coefficient of the chosen response's negative log-likelihood per token; 0: no such term
    tulu3_compat: bool = False  # Tülu 3's labels: all assistant turns are trained and counted, not only those that differ in a pair
    epochs: float = 1.0  # passes over the sources, by weight; may be fractional
    max_length: int = 2048  # predicted tokens of prompt and response, for chosen and rejected each
    too_long: TooLong = "error"  # for longer pairs: "error", "drop" or "truncate" (both on the right); dropped and truncated are counted
    bad_rows: BadRows = "error"  # for rows that are not a valid pair: "error" or "drop"; dropped ones are counted
    chat_template: str = ""  # "tulu", "chatml" or Jinja source; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in ("batch_size", "beta", "epochs", "max_length"):
            if not 0 < getattr(self, name) <= 1e9:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be positive and at most 1e9; use 1 or more")
        if not 0 <= self.label_smoothing < 0.5 or self.nll_weight < 0:
            raise ValueError(
                f"algorithm.label_smoothing={self.label_smoothing} must be in [0, 0.5) and nll_weight={self.nll_weight} at least 0; "
                "use 0 to switch either off"
            )

    def requirements(self, launch: Launch) -> Requirements:
        """Limits for the launch checks (engine/config/checks.py)."""
        longest, update = Limit.by("algorithm.max_length", self.max_length), Limit.by("algorithm.batch_size", self.batch_size)
        return Requirements("lm", longest, update, seqs_per_unit=2)

    def workload(self) -> Workload:
        """The computation of one step, for the dry run."""
        return replace(Workload.of_pairs(self.batch_size, self.max_length, self.epochs), token_values=1, reference="cached")

    def start(self, policy: Policy, run: Run) -> Supervised:
        """Tokenize the pairs and compute the reference's log-probs, unless cached.

        Raises ValueError if data cannot be read or exceeds a limit, or if cached log-probs belong to other weights or data.
        """
        from engine import losses
        from engine.algorithms.supervised import Supervised
        from engine.data.mixture import Mixture
        from engine.data.pairs import Pairs, grouped, prepare_pairs
        from engine.data.prepare import open_chat, prepare_all
        from engine.data.stops import known_stops
        from engine.rollout.scoring import cached_logprobs

        chat = open_chat(run.model, policy.folder, policy.model.vocab, self.chat_template)
        sources = (*self.sources, *self.held_out)
        options = {"max_length": self.max_length, "too_long": self.too_long, "bad_rows": self.bad_rows, "all_turns": self.tulu3_compat}
        prepared = prepare_all(policy.world, sources, lambda source, cache: prepare_pairs(source, chat, cache=cache, **options))
        for source, pairs in zip(sources, prepared, strict=True):
            pairs.check_fit(source.path, run.microbatch_tokens)
        corpora = [pairs.corpus for pairs in prepared]
        log = partial(print, flush=True) if policy.world.rank == 0 else lambda _: None
        ref_logprobs = cached_logprobs(Path(run.out) / "reference", policy, corpora, run.tokens_per_microbatch, log)
        trained, held_out = _split(list(map(Pairs, corpora, ref_logprobs)), len(self.sources))
        mixture = Mixture(trained, [source.weight for source in self.sources], run.seed)
        return Supervised(
            policy=policy,
            batches=lambda step: grouped(mixture.batch(step, self.batch_size)),
            budget=run.tokens_per_microbatch,
            steps=math.ceil(self.epochs * len(mixture) / self.batch_size),
            held_out=grouped([pairs[i] for pairs in held_out for i in range(len(pairs))]),
            chat=chat,
            stop=known_stops(chat, policy.folder),
            data=[(source.path, corpus.digest) for source, corpus in zip(sources, corpora, strict=True)],
            notes=[*chat.warnings, *(pairs.counts.note(source.path) for source, pairs in zip(sources, prepared, strict=True))],
            loss=partial(
                losses.dpo,
                beta=self.beta,
                label_smoothing=self.label_smoothing,
                normalize=self.normalize,
                nll_weight=self.nll_weight,
            ),
        )


def _split(pairs: list[Pairs], at: int) -> tuple[list[Pairs], list[Pairs]]:
    return pairs[:at], pairs[at:]
