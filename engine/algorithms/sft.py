"""Supervised fine-tuning: mean cross-entropy over the assistant's tokens of the whole batch (arXiv 2411.15124, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from engine.algorithms.workload import Workload
from engine.config import Run
from engine.config.checks import Launch, Limit, Requirements
from engine.config.choices import TooLong
from engine.data.rows import Source

if TYPE_CHECKING:
    from engine.algorithms.supervised import Supervised
    from engine.megatron.policy import Policy


@dataclass(frozen=True)
class SFT:
    """Settings of supervised fine-tuning on conversations."""

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()  # never trained on; their loss is reported
    batch_size: int = 128  # sequences per optimizer step, over all ranks
    epochs: float = 1.0  # passes over the sources, by weight; may be fractional
    max_length: int = 4096  # predicted tokens of one sequence
    too_long: TooLong = "error"  # for longer sequences: "error", "drop" or "truncate" (on the right); dropped and truncated are counted
    chat_template: str = ""  # "tulu", "chatml" or Jinja source; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in ("batch_size", "epochs", "max_length"):
            if not 0 < getattr(self, name) <= 1e9:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be positive and at most 1e9; use 1 or more")

    def requirements(self, launch: Launch) -> Requirements:
        """Limits for the launch checks (engine/config/checks.py)."""
        return Requirements("lm", Limit.by("algorithm.max_length", self.max_length), Limit.by("algorithm.batch_size", self.batch_size))

    def workload(self) -> Workload:
        """The computation of one step, for the dry run."""
        return Workload("conversation", self.batch_size, self.max_length, self.batch_size, token_loss=True, passes=self.epochs)

    def start(self, policy: Policy, run: Run) -> Supervised:
        """Tokenize sources that are not cached yet. Raises ValueError if data cannot be read or exceeds a limit."""
        from engine.algorithms.supervised import Supervised
        from engine.data.corpus import prepare
        from engine.data.mixture import Mixture
        from engine.data.prepare import open_chat, prepare_all
        from engine.data.stops import known_stops
        from engine.losses import SFT_LOSS

        chat = open_chat(run.model, policy.folder, policy.model.vocab, self.chat_template)
        sources = (*self.sources, *self.held_out)
        corpora = prepare_all(
            policy.world,
            sources,
            lambda source, cache: prepare(source, chat, max_length=self.max_length, too_long=self.too_long, cache=cache),
        )
        trained, held_out = corpora[: len(self.sources)], corpora[len(self.sources) :]
        mixture = Mixture(trained, [source.weight for source in self.sources], run.seed)
        return Supervised(
            policy=policy,
            loss=SFT_LOSS,
            batches=partial(mixture.batch, size=self.batch_size),
            budget=run.tokens_per_microbatch,
            steps=math.ceil(self.epochs * len(mixture) / self.batch_size),
            held_out=[corpus[i] for corpus in held_out for i in range(len(corpus))],
            chat=chat,
            stop=known_stops(chat, policy.folder),
            data=[(source.path, corpus.digest) for source, corpus in zip(sources, corpora, strict=True)],
            notes=[*chat.warnings, *(corpus.counts.note(source.path) for source, corpus in zip(sources, corpora, strict=True))],
        )
