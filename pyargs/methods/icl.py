"""ICL: nothing is trained; the user's support pairs stand in the prompt, at random (ICL) or by similarity (ICL-RAG).

With no shots this is the zero-shot baseline: the policy as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyargs.config import option
from pyargs.models.demonstrations import Demonstrations, last_user_text
from pyargs.models.user_policy import UserPolicy
from pyargs.training.config import ModelConfig
from pyargs.user_ids import user_id


@dataclass
class Config(ModelConfig):
    shots: int = option(8, "demonstrations in the prompt (paper); 0 is zero-shot", least=0)
    retrieve: str = option(
        "random",
        "random: the same seeded choice for all prompts of a user (ICL); bm25, minilm or any model of "
        "sentence-transformers: the pairs with the nearest prompts (ICL-RAG; the paper does not name its retriever)",
    )
    show: str = option(
        "pair", "pair: both responses of a demonstration; chosen: the preferred one (paper silent)", choices=["pair", "chosen"]
    )
    content_tokens: int = option(200, "longest prompt shown in a demonstration (paper silent)", least=1)
    instruction: str = option("", "text that all prompts begin with, to be said once before the demonstrations (paper silent)")
    prompt_name: str = option("Prompt", "what a prompt is called in the demonstrations: Post, Abstract ... (paper silent)")
    response_name: str = option("", "what a response is called: summary, title, reply ... (paper silent)")
    demonstration_tokens: int = option(
        1536,
        "tokens for demonstrations, beyond max_length; where they need more, the farthest go first (paper silent)",
        least=0,
    )


def build(lm, tokenizer, users: list[str], config: Config) -> UserPolicy:
    shown = Demonstrations(
        shots=config.shots,
        retrieve=config.retrieve,
        show=config.show,
        content_tokens=config.content_tokens,
        instruction=config.instruction,
        demonstration_tokens=config.demonstration_tokens,
        seed=config.seed,
        prompt_name=config.prompt_name,
        response_name=config.response_name,
    )
    return UserPolicy(lm, tokenizer, demonstrations=shown if config.shots else None)


def support(model: UserPolicy, rows) -> list[dict]:
    return list(rows)


def adapt(model: UserPolicy, support: list[dict], ids: list[str], config: Config) -> dict[str, Tensor]:
    """The support pairs become what may be shown; there are no vectors."""
    if model.demonstrations is not None:
        for user in map(user_id, ids):
            model.demonstrations.of_user[user] = [
                {"prompt": last_user_text(row["prompt"]), "chosen": row["chosen"], "rejected": row["rejected"]}
                for row in support
                if user_id(row["user_id"]) == user
            ]
    return {}
