"""The reward model: Bradley-Terry on preferences, by a scalar head at the end of each answer (arXiv 2411.15124, section 6.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
    """Learn to tell chosen from rejected. `batch_size` pairs make one optimizer step, over all ranks."""

    token_loss: ClassVar[bool] = False

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()  # never trained on; its accuracy is reported
    batch_size: int = 256  # pairs
    epochs: float = 1.0
    max_length: int = 2048  # tokens of one half, the prompt included
    too_long: TooLong = "error"  # what to do beyond it; a half that is truncated on the right is scored at its last token
    bad_rows: BadRows = "error"  # what to do with a row that is no preference; dropped ones are counted
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in ("batch_size", "epochs", "max_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be positive and finite; use 1 or more")

    def requirements(self, launch: Launch) -> Requirements:
        """What engine/config/checks.py looks at before a run starts."""
        longest, update = Limit.by("algorithm.max_length", self.max_length), Limit.by("algorithm.batch_size", self.batch_size)
        return Requirements("scalar", longest, update, seqs_per_unit=2)

    def workload(self) -> Workload:
        """For the dry run."""
        return Workload(
            lengths="preference",
            sequences=2 * self.batch_size,
            max_length=self.max_length,
            samples=self.batch_size,
            token_loss=self.token_loss,
            sequences_per_sample=2,
            passes=self.epochs,
        )

    def start(self, policy: Policy, run: Run) -> Supervised:
        """Tokenise what is not in the cache yet. Raises ValueError for data that cannot be read or does not fit."""
        from engine.algorithms.supervised import Supervised
        from engine.data.mixture import Mixture
        from engine.data.pairs import grouped, prepare_pairs
        from engine.data.prepare import open_chat, prepare_all
        from engine.losses import reward_bt

        chat = open_chat(run.model, policy.folder, self.chat_template)
        sources = (*self.sources, *self.held_out)
        options = {"max_length": self.max_length, "too_long": self.too_long, "bad_rows": self.bad_rows}
        pairs = prepare_all(policy.world, sources, lambda source, cache: prepare_pairs(source, chat, **options, whole=True, cache=cache))
        for source, found in zip(sources, pairs, strict=True):
            found.check_fit(source.path, run.microbatch_tokens)
        trained, held_out = pairs[: len(self.sources)], pairs[len(self.sources) :]
        mixture = Mixture(trained, [source.weight for source in self.sources], run.seed)
        head = [f"{policy.folder} is a language model: its scalar head is drawn from N(0, 1 / sqrt({policy.model.hidden + 1}))"]
        return Supervised(
            policy=policy,
            loss=reward_bt,
            batches=lambda step: grouped(mixture.batch(step, self.batch_size)),
            budget=run.tokens_per_microbatch,
            steps=math.ceil(self.epochs * len(mixture) / self.batch_size),
            held_out=grouped([found[i] for found in held_out for i in range(len(found))]),
            tokenizer=_padded_apart(chat.tokenizer),
            notes=head * policy.has_fresh_head + [found.counts.note(source.path) for source, found in zip(sources, pairs, strict=True)],
        )


def _padded_apart(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With padding that ends no sequence: transformers scores the last token that is not padding."""
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        others = [token for token in (tokenizer.unk_token, tokenizer.bos_token) if token not in (None, tokenizer.eos_token)]
        if not others:
            raise ValueError(
                f"the tokenizer pads with {tokenizer.pad_token!r}; a reward model needs another pad_token, which ends no sequence"
            )
        tokenizer.pad_token = others[0]
    return tokenizer
