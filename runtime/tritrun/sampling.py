"""How the next token is drawn from a model's predictions, by llama.cpp's samplers."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tritcore.errors import TritError

_PENALIZED = 64  # the last tokens, which penalties count


@dataclass(frozen=True)
class Sampling:
    """Settings of the samplers, with llama.cpp's usual values.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: draw from this many tokens; 0 for all.
        top_p: draw from the likeliest tokens that have this probability together.
        min_p: leave out tokens with less than this share of the likeliest one's probability.
        repeat_penalty: divides the logits of tokens among the last 64; 1 leaves them.
        presence_penalty, frequency_penalty: taken from those logits, once, and for each time.
        grammar: in GBNF, that the answer obeys; None leaves it free.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: str | None = None
    seed: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens matter."""
        return (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


GREEDY = Sampling(temperature=0)


def make_sampler(cpp: ModuleType, vocab: Any, sampling: Sampling, prompt: Sequence[int]) -> Any:
    """A chain of llama.cpp's samplers, to be freed.

    Args:
        prompt: tokens before the answer, which penalties count too.

    Raises:
        TritError: the grammar is none.
    """
    steps = []
    if sampling.grammar is not None:
        grammar = cpp.llama_sampler_init_grammar(vocab, sampling.grammar.encode(), b"root")
        if not grammar:
            raise TritError("the grammar is not valid GBNF, or has no rule 'root'")
        steps.append(grammar)
    if sampling.has_penalties:
        penalties = cpp.llama_sampler_init_penalties(
            cpp.llama_vocab_n_tokens(vocab),
            _PENALIZED,
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        for token in prompt[-_PENALIZED:]:
            cpp.llama_sampler_accept(penalties, token)
        steps.append(penalties)
    if sampling.temperature == 0:
        steps.append(cpp.llama_sampler_init_greedy())
    else:
        steps += [
            cpp.llama_sampler_init_top_k(sampling.top_k),
            cpp.llama_sampler_init_top_p(sampling.top_p, 1),
            cpp.llama_sampler_init_min_p(sampling.min_p, 1),
            cpp.llama_sampler_init_temp(sampling.temperature),
            cpp.llama_sampler_init_dist(sampling.seed),
        ]
    chain = cpp.llama_sampler_chain_init(cpp.llama_sampler_chain_default_params())
    for step in steps:
        cpp.llama_sampler_chain_add(chain, step)
    return chain
