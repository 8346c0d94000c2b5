"""Reward model: Bradley-Terry loss on preferences, a scalar head at the last token of each response (arXiv 2411.15124, section 6.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.algorithms.workload import Workload
from engine.config import Run
from engine.config.checks import Launch, Limit, Requirements
from engine.config.choices import BadRows, TooLong
from engine.data.rows import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from engine.algorithms.supervised import Supervised
    from engine.megatron.policy import Policy


@dataclass(frozen=True)
class Reward:
    """Settings of reward model training."""

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()  # never trained on; their accuracy is reported
    batch_size: int = 256  # pairs per optimizer step, over all ranks
    epochs: float = 1.0  # passes over the sources, by weight; may be fractional
    max_length: int = 2048  # tokens of prompt and response, for chosen and rejected each
    too_long: TooLong = "error"  # for longer pairs: "error", "drop" or "truncate" (on the right, scored at the last token that is kept)
    bad_rows: BadRows = "error"  # for rows that are not a valid pair: "error" or "drop"; dropped ones are counted
    chat_template: str = ""  # "tulu", "chatml" or Jinja source; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in ("batch_size", "epochs", "max_length"):
            if not 0 < getattr(self, name) <= 1e9:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be positive and at most 1e9; use 1 or more")

    def requirements(self, launch: Launch) -> Requirements:
        """Limits for the launch checks (engine/config/checks.py)."""
        longest, update = Limit.by("algorithm.max_length", self.max_length), Limit.by("algorithm.batch_size", self.batch_size)
        return Requirements("scalar", longest, update, seqs_per_unit=2)

    def workload(self) -> Workload:
        """The computation of one step, for the dry run."""
        return Workload.of_pairs(self.batch_size, self.max_length, self.epochs)

    def start(self, policy: Policy, run: Run) -> Supervised:
        """Tokenize sources that are not cached yet. Raises ValueError if data cannot be read or exceeds a limit."""
        from engine.algorithms.supervised import Supervised
        from engine.data.mixture import Mixture
        from engine.data.pairs import grouped, prepare_pairs
        from engine.data.prepare import open_chat, prepare_all
        from engine.losses import reward_bt

        chat = open_chat(run.model, policy.folder, policy.model.vocab, self.chat_template)
        sources = (*self.sources, *self.held_out)
        options = {"max_length": self.max_length, "too_long": self.too_long, "bad_rows": self.bad_rows}
        pairs = prepare_all(policy.world, sources, lambda source, cache: prepare_pairs(source, chat, **options, whole=True, cache=cache))
        for source, source_pairs in zip(sources, pairs, strict=True):
            source_pairs.check_fit(source.path, run.microbatch_tokens)
        trained, held_out = pairs[: len(self.sources)], pairs[len(self.sources) :]
        mixture = Mixture(trained, [source.weight for source in self.sources], run.seed)
        head = [f"{policy.folder} is a language model: its scalar head is initialized from N(0, 1 / sqrt({policy.model.hidden + 1}))"]
        _set_pad_token(chat.tokenizer)
        return Supervised(
            policy=policy,
            loss=reward_bt,
            batches=lambda step: grouped(mixture.batch(step, self.batch_size)),
            budget=run.tokens_per_microbatch,
            steps=math.ceil(self.epochs * len(mixture) / self.batch_size),
            held_out=grouped([source_pairs[i] for source_pairs in held_out for i in range(len(source_pairs))]),
            chat=chat,
            stop=(),
            data=[(source.path, one.corpus.digest) for source, one in zip(sources, pairs, strict=True)],
            notes=[*head * policy.has_fresh_head, *(one.counts.note(source.path) for source, one in zip(sources, pairs, strict=True))],
        )


def _set_pad_token(tokenizer: PreTrainedTokenizerFast) -> None:
    """Make pad_token differ from eos_token: transformers scores the last token that is not padding."""
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = [token for token in (tokenizer.unk_token, tokenizer.bos_token) if token not in (None, tokenizer.eos_token)]
        if not others:
            raise ValueError(
                f"pad_token={tokenizer.pad_token!r} of the tokenizer must differ from eos_token for a reward model; set another pad_token"
            )
        tokenizer.pad_token = others[0]
