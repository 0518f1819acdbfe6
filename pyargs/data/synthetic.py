"""Planted users: data with a known right answer, for tests and the smoke run. Three builders:

`load`              pairs of pseudo-text over a tiny vocabulary; each user follows a rule on the kinds of words
`planted_features`  random hidden states with planted heads and mixtures: methods without a language model
`tiny_lm`           a random language model with a tokenizer that knows the vocabulary of `load`

The rule of `load`: there are `rank` directions, each a contrast of two kinds of words (animals minus tools, colors
minus foods, ...). A user follows one direction with one sign and prefers the response with more words on that side.
Both signs are equally common, so that a reward without a user is right half of the time, and one with the right user
nearly always.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyargs.data import schema
from pyargs.errors import PyargsError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

KINDS = {
    "animals": "cat dog fox owl bee hen cow ant".split(),
    "tools": "saw axe nail rope drill hammer bolt wrench".split(),
    "colors": "red blue green gold pink gray white black".split(),
    "foods": "rice bread soup corn plum egg cake bean".split(),
    "weather": "rain snow wind fog hail storm sun frost".split(),
    "places": "hill lake town farm coast field road bridge".split(),
}
FILLERS = "the a of and with near under over some every this that".split()
PROMPT_WORDS = "tell write say describe list name show give about for me please short long new old one two".split()
WORDS = [*PROMPT_WORDS, *FILLERS, *(word for words in KINDS.values() for word in words)]
# ChatML with no default system prompt; pad is eos, as in SmolLM2, so that code which derives masks from the pad id
# fails.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def directions(rank: int = 2) -> list[tuple[str, str]]:
    """The kinds of words that each direction sets against each other; `rank` is 1, 2 or 3."""
    kinds = list(KINDS)
    if not 1 <= rank <= len(kinds) // 2:
        raise PyargsError(f"rank is 1 to {len(kinds) // 2}, not {rank}.")
    return [(kinds[2 * i], kinds[2 * i + 1]) for i in range(rank)]


def score(text: str, direction: tuple[str, str]) -> int:
    """Words of the direction's first kind minus words of its second: the planted reward of a user with sign +1."""
    words = text.split()
    return sum(word in KINDS[direction[0]] for word in words) - sum(word in KINDS[direction[1]] for word in words)


def rule(user: int, rank: int = 2) -> tuple[tuple[str, str], int]:
    """(direction, sign) of the user with this number: +1, +2, ..., -1, -2, ... in turn."""
    return directions(rank)[user % rank], 1 if user // rank % 2 == 0 else -1


def load(
    *,
    users: int = 8,
    pairs: int = 60,
    new_users: int = 4,
    support: int = 20,
    query: int = 20,
    rank: int = 2,
    words: int = 10,
    gap: int = 5,
    train_test: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Pairs of pseudo-text: `users` train users with `pairs` each, `new_users` with `support` + `query` each.

    Every response has `words` words, so length tells nothing; the two of a pair differ by at least `gap` in the user's
    planted score. Users are named "user_00" and "new_00" onwards and follow `rule` of their number.
    Columns as in `pyargs.data`, and `attribute`, such as "+animals-tools".
    """
    if not 1 <= gap <= words:
        raise PyargsError(f"gap is 1 to the number of words ({words}), not {gap}.")
    rows = []
    for kind, count, splits in (
        ("user", users, ["train"] * pairs),
        ("new", new_users, ["support"] * support + ["query"] * query),
    ):
        for number in range(count):
            rng = random.Random(f"{seed} {kind} {number}")
            direction, sign = rule(number, rank)
            for index, split in enumerate(splits):
                low, high = sorted(_two(rng, rank, direction, words, gap), key=lambda text: sign * score(text, direction))
                rows.append(
                    {
                        "user_id": f"{kind}_{number:02d}",
                        "prompt": " ".join(rng.sample(PROMPT_WORDS, 4)),
                        "chosen": high,
                        "rejected": low,
                        "split": split,
                        "pair_id": f"{kind}_{number:02d}-{index:03d}",
                        "attribute": ("+{}-{}" if sign > 0 else "-{}+{}").format(*direction),
                    }
                )
    return schema.to_dataset(schema.carve(schema.checked(rows), train_test=train_test, seed=seed))


def _two(rng: random.Random, rank: int, direction: tuple[str, str], words: int, gap: int) -> tuple[str, str]:
    """Two responses whose scores on the direction are at least `gap` apart."""
    while True:
        a, b = (_response(rng, rank, words) for _ in range(2))
        if abs(score(a, direction) - score(b, direction)) >= gap:
            return a, b


def _response(rng: random.Random, rank: int, words: int) -> str:
    """Fillers and words of all the directions' kinds, with a share of each kind that differs between responses."""
    kinds = [KINDS[kind] for direction in directions(rank) for kind in direction]
    shares = [rng.random() ** 2 for _ in kinds]
    pools = rng.choices([*kinds, FILLERS], weights=[*shares, 0.3], k=words)
    return " ".join(rng.choice(pool) for pool in pools)


class Planted(NamedTuple):
    """Pairs of hidden states with the heads that labelled them. K directions, U users, N = U * pairs, D dimensions."""

    chosen: Tensor  # [N, D] fp32
    rejected: Tensor  # [N, D] fp32
    user: Tensor  # [N] int64, 0 .. U-1, each `pairs` times
    directions: Tensor  # [K, D] fp32, orthonormal rows
    mixtures: Tensor  # [U, K] fp32, on the simplex

    @property
    def heads(self) -> Tensor:
        """Each user's reward vector `V^T w_u` [U, D] fp32."""
        return self.mixtures @ self.directions


def planted_features(
    dim: int = 32,
    users: int = 20,
    pairs: int = 50,
    rank: int = 3,
    *,
    concentration: float = 0.3,
    scale: float | None = None,
    seed: int = 0,
) -> Planted:
    """Standard normal hidden states, labelled by planted linear heads.

    The reward of user u is `<V^T w_u, h>` with orthonormal rows of V and w_u ~ Dirichlet(concentration): small
    values make users differ, large ones make them alike. `scale=None` labels without noise; otherwise the chosen
    state is drawn from Bradley-Terry with the reward times `scale`. Raises PyargsError if rank > dim.
    """
    import torch

    if not 1 <= rank <= dim:
        raise PyargsError(f"rank is 1 to dim ({dim}), not {rank}.")
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, rank, generator=rng, dtype=torch.float32, device="cpu")).Q.T.contiguous()
    # torch's own Dirichlet takes no generator; gamma variates divided by their sum are the same.
    gamma = torch._standard_gamma(
        torch.full((users, rank), concentration, dtype=torch.float32, device="cpu"), generator=rng
    ).clamp_min(1e-30)
    mixtures = gamma / gamma.sum(-1, keepdim=True)
    user = torch.arange(users, device="cpu").repeat_interleave(pairs)
    a, b = torch.randn(2, users * pairs, dim, generator=rng, dtype=torch.float32, device="cpu")
    gap = ((mixtures @ basis)[user] * (a - b)).sum(-1)
    if scale is None:
        first = gap > 0
    else:
        first = torch.rand(gap.shape, generator=rng, dtype=torch.float32, device="cpu") < torch.sigmoid(scale * gap)
    first = first[:, None]
    return Planted(torch.where(first, a, b), torch.where(first, b, a), user, basis, mixtures)


def tiny_lm(
    folder: str | Path,
    *,
    family: str = "llama",
    seed: int = 0,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    tie: bool = False,
    **config,
) -> Path:
    """A random causal language model with its tokenizer, saved in `folder` for `from_pretrained`; about 0.6 MB.

    family: "llama", "qwen2" or another decoder-only type of transformers with the usual size names. `config` goes to
    its configuration. Words of one kind (`KINDS`) have embeddings with a common part, as related words have in a
    trained model, so that a reward head can read the planted rule from the last state. ChatML template; pad == eos.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "tie_word_embeddings": tie,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | config)), dtype=torch.float32)
        table = model.get_input_embeddings().weight.data
        for words in KINDS.values():
            forms = [form for word in words for form in (word, " " + word)]
            rows = [tokenizer(form, add_special_tokens=False).input_ids for form in forms]
            table[torch.tensor(rows).flatten()] += 0.1 * torch.randn(width, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer():
    """The tokenizer of `tiny_lm`: byte-level BPE like that of SmolLM2 and Qwen2.5, but made without training.

    Every word of `load` is one token, with and without a space before it; any other text falls into smaller pieces,
    down to bytes, and comes back unchanged. About 550 tokens; returns a PreTrainedTokenizerFast.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: row for row, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges: dict[tuple[str, str], int] = {}
    space = "\u0120"  # how byte-level BPE writes a space
    for word in ("system", "user", "assistant", *WORDS):
        for form in (word, space + word):
            # A new merge ranks after all others, so that the words before it are still merged as they were.
            while len(pieces := _merged(list(form), merges)) > 1:
                merges[pieces[0], pieces[1]] = len(merges)
                vocab.setdefault(pieces[0] + pieces[1], len(vocab))
    inner = Tokenizer(models.BPE(vocab, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    unknown, start, end = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unknown, bos_token=start, eos_token=end, pad_token=end, model_max_length=2048
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _merged(pieces: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """What BPE makes of a word: the merge of lowest rank first, until none applies."""
    while True:
        ranks = [merges.get(pair, len(merges)) for pair in zip(pieces, pieces[1:], strict=False)]
        if not ranks or min(ranks) == len(merges):
            return pieces
        i = ranks.index(min(ranks))
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]
