"""Direct preference optimisation (arXiv 2305.18290), by default length-normalised as in Tülu 3 (arXiv 2411.15124, section 5): no
reference model is held, its log-probs are computed once, by the policy before its first step, and kept beside the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

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
    """Learn preferences. `batch_size` pairs make one optimizer step, over all ranks."""

    token_loss: ClassVar[bool] = False  # whether the loss is a sum over tokens: then the output layer makes its gradient

    sources: tuple[Source, ...]
    held_out: tuple[Source, ...] = ()  # never trained on; its loss, accuracy and margin are reported
    batch_size: int = 128
    beta: float = 5.0  # of a mean over tokens; a sum (normalize=False) wants about 0.1
    normalize: bool = True  # rewards are means over an answer's tokens; False: sums, plain DPO
    label_smoothing: float = 0.0  # the share of pairs thought to be the wrong way round
    nll_weight: float = 0.0  # of the chosen answer's negative log-likelihood a token, added to the loss
    epochs: float = 1.0
    max_length: int = 2048  # predicted tokens of one half, its prompt included
    too_long: TooLong = "error"  # what to do beyond it; truncate cuts both halves on the right; all are counted
    bad_rows: BadRows = "error"  # what to do with a row that is no pair; those dropped are counted
    chat_template: str = ""  # "tulu", "chatml" or jinja text; "": the tokenizer's own

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("algorithm.sources is empty; give at least one Source")
        for name in ("batch_size", "beta", "epochs", "max_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"algorithm.{name}={getattr(self, name)} must be positive and finite; use 1 or more")
        if not 0 <= self.label_smoothing < 0.5 or self.nll_weight < 0:
            raise ValueError(
                f"algorithm: label_smoothing={self.label_smoothing} must be in [0, 0.5), nll_weight={self.nll_weight} not negative"
            )

    def requirements(self, launch: Launch) -> Requirements:
        """What engine/config/checks.py looks at before a run starts."""
        longest, update = Limit.by("algorithm.max_length", self.max_length), Limit.by("algorithm.batch_size", self.batch_size)
        return Requirements("lm", longest, update, seqs_per_unit=2)

    def workload(self) -> Workload:
        """For the dry run."""
        return Workload(
            lengths="preference",
            sequences=2 * self.batch_size,
            max_length=self.max_length,
            samples=self.batch_size,
            token_loss=self.token_loss,
            sequences_per_sample=2,
            token_values=1,
            reference="cached",
            passes=self.epochs,
        )

    def start(self, policy: Policy, run: Run) -> Supervised:
        """Tokenise the pairs and compute the reference's log-probs, as far as earlier starts have not. Raises ValueError for data that
        cannot be read or does not fit, and for log-probs beside the run that are of other weights or data."""
        from engine import losses
        from engine.algorithms.supervised import Supervised
        from engine.data.mixture import Mixture
        from engine.data.pairs import Pairs, grouped, prepare_pairs
        from engine.data.prepare import open_chat, prepare_all
        from engine.rollout.scoring import cached_logprobs

        chat = open_chat(run.model, policy.folder, self.chat_template)
        sources = (*self.sources, *self.held_out)
        options = {"max_length": self.max_length, "too_long": self.too_long, "bad_rows": self.bad_rows}
        read = prepare_all(policy.world, sources, lambda source, cache: prepare_pairs(source, chat, cache=cache, **options))
        for source, pairs in zip(sources, read, strict=True):
            pairs.check_fit(source.path, run.microbatch_tokens)
        corpora = [pairs.corpus for pairs in read]
        say = partial(print, flush=True) if policy.world.rank == 0 else lambda _: None
        kept = cached_logprobs(Path(run.out) / "reference", policy, corpora, run.tokens_per_microbatch, say)
        trained, held_out = _split(list(map(Pairs, corpora, kept)), len(self.sources))
        mixture = Mixture(trained, [source.weight for source in self.sources], run.seed)
        return Supervised(
            policy=policy,
            batches=lambda step: grouped(mixture.batch(step, self.batch_size)),
            budget=run.tokens_per_microbatch,
            steps=math.ceil(self.epochs * len(mixture) / self.batch_size),
            held_out=grouped([pairs[i] for pairs in held_out for i in range(len(pairs))]),
            tokenizer=chat.tokenizer,
            notes=[pairs.counts.note(source.path) for source, pairs in zip(sources, read, strict=True)],
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
