"""From the body of a call to what the engine is asked: prompts as ids, the user, and each request's arguments."""

from __future__ import annotations

import math
from typing import NamedTuple

from pyargs.decode.pair import Pair
from pyargs.decode.request import check_room, numbered, positions
from pyargs.errors import FEW, PyargsError, UnknownUser, did_you_mean
from pyargs.lm.tokenize import encode_prompt, raw_ids
from pyargs.models.reward_model import RewardModel
from pyargs.serve.wire import Chat, Completion, WireError, unknown_user

TOKENS = 256
"""An answer's length where the call names none, if the model has room for so many."""


CHARACTERS = 16
"""Of a text, for each token that the model has room for; more are refused unread. English has four or five a token."""


class Plan(NamedTuple):
    """prompts: ids, one for each choice. user: "" where nobody is named. wishes: arguments of `Engine.submit`.
    reward_weight: w of eq. 1, None where no reward is asked for."""

    prompts: list[list[int]]
    user: str
    wishes: list[dict]
    reward_weight: float | None


def plan(pair: Pair, body: Chat | Completion, key=None) -> Plan:
    """What a call asks of an engine. Takes as long as reading the prompts takes: not for the event loop.

    key: who asks; None may ask for everyone. Raises WireError, before anything is computed.
    """
    user = body.user or ""
    if user:
        check_user(pair, user, key)
    try:
        wish, rewarded = _wish(pair, body, user)
        weight = None
        if rewarded:
            weight = wish["reward_weight"] = pair.raw_weight(wish.pop("strength", None), wish.get("reward_weight"))
        texts = [[message.plain() for message in body.messages]] if isinstance(body, Chat) else body.prompts
        prompts = [_ids(pair, text, user) for text in texts]
        most = [_most(pair, len(ids), body.limit) for ids in prompts]
        theirs = [_theirs(pair, text) for text in texts]
    except PyargsError as error:
        raise refused(error) from error
    each = [one for one in zip(prompts, most, theirs, strict=True) for _ in range(body.n or 1)]
    seeds = [{} if body.seed is None else {"seed": numbered(body.seed, i)} for i in range(len(each))]
    wishes = [{**wish, **seed, **more, "max_new_tokens": length} for seed, (_, length, more) in zip(seeds, each, strict=True)]
    return Plan([ids for ids, *_ in each], user, wishes, weight)


def refused(error: PyargsError) -> WireError:
    """The error of a request that the engine does not take. It names nobody."""
    if isinstance(error, UnknownUser):  # removed since
        return unknown_user()
    return WireError(422, str(error), code="invalid_value")


def personal(pair: Pair) -> bool:
    """Whether the model is another one for each user. Where it is not, the name of a user is a label."""
    model = pair.model
    return model is not None and (model.users.personal or getattr(model, "demonstrations", None) is not None)


def takes(pair: Pair) -> dict:
    """What a call may say beside OpenAI's fields, and whether it has to name a user."""
    rewarded = ["reward_weight", "num_candidates"] if pair.guided else []
    if pair.guided and pair.model.about.get("reward_std") is not None:  # the unit of strength
        rewarded.insert(0, "strength")
    if pair.guided and isinstance(pair.model, RewardModel):
        rewarded.append("reward_clip")
    return {"fields": [*rewarded, "min_p"], "needs_user": pair.soft > 0}


def check_user(pair: Pair, user: str, key=None) -> None:
    """Raises WireError for a user who is unknown or not the key's."""
    there = not personal(pair) or user in pair.model.known_users
    if not there or (key is not None and not key.may(user)):
        raise unknown(pair, user, key)


def unknown(pair: Pair, user: str, key=None) -> WireError:
    """The error of a user who is not there, or not for this key, with near names among those that the key may see."""
    known = {} if pair.model is None else pair.model.known_users
    seen = known if key is None else key.among(known)
    if len(seen) <= FEW:
        seen = [one for one in seen if one]  # nobody's vectors have the name ""
    return unknown_user(did_you_mean(user, seen) if len(user) > 1 or len(seen) <= FEW else "")


def _wish(pair: Pair, body: Chat | Completion, user: str) -> tuple[dict, bool]:
    """Arguments of `Engine.submit` that all requests of a call have, and whether a reward is asked for."""
    names = ("top_p", "min_p", "num_candidates", "strength", "reward_weight", "reward_clip")
    wish = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.candidates_told is not None:
        wish["logprobs"] = max(1, body.candidates_told)
    wish["temperature"] = 1.0 if body.temperature is None else body.temperature
    if pair.soft and not user:
        raise WireError(422, "this model has a prompt of each user: name the user", param="user")
    if not pair.guided or user:
        return wish, pair.guided
    asked = body.strength or body.reward_weight
    if asked and personal(pair):
        name = "strength" if body.strength else "reward_weight"
        raise WireError(422, f"{name} is the weight of a user's reward: name the user, or leave it out", param=name)
    if not asked:
        wish.pop("strength", None)
        wish["reward_weight"] = 0.0
        if not wish["temperature"]:
            wish.setdefault("num_candidates", 1)  # the first one is the choice
    return wish, bool(asked)


def _ids(pair: Pair, prompt, user: str) -> list[int]:
    """Ids of messages, of a text as it is, or ids as they are. What is longer than the model was made for is refused, and
    not shortened."""
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        ids, chat = prompt, False
    else:
        chat = isinstance(prompt, list)
        _check_characters(pair, [message["content"] for message in prompt] if chat else [prompt])
        ids = encode_prompt(pair.tokenizer, prompt) if chat else raw_ids(pair.tokenizer, prompt)
    demonstrated = getattr(pair.model, "demonstrations", None) is not None
    if demonstrated and user and not chat:
        raise WireError(422, "this model knows a user by messages: ask /v1/chat/completions", param="prompt")
    most = None if pair.model is None or pair.bridge is not None else pair.model.about.get("max_length")
    if chat and most is not None and len(ids) > most:
        raise _too_long_to_reward(len(ids), most)
    return pair.encode(prompt, user) if demonstrated and user else ids


def _theirs(pair: Pair, prompt) -> dict:
    """What a reward model with another tokenizer reads: the same messages, or the same text as it is; of ids their text."""
    if pair.bridge is None or isinstance(prompt, list) and isinstance(prompt[0], int):
        return {}
    chat, most = isinstance(prompt, list), pair.model.about.get("max_length")
    ids = (encode_prompt if chat else raw_ids)(pair.bridge.theirs, prompt)
    if chat and most is not None and len(ids) > most:
        raise _too_long_to_reward(len(ids), most)
    return {"guide_prompt": ids}


def _too_long_to_reward(length: int, most: int) -> WireError:
    return too_long(f"the messages have {length} tokens, and the reward was trained with {most}: shorten them")


def _room(pair: Pair) -> float:
    """Tokens of prompt and answer that the models have positions for; inf where they have no limit."""
    return min((most for lm in pair.language_models() if (most := positions(lm))), default=math.inf)


def _check_characters(pair: Pair, texts: list[str]) -> None:
    """Raises WireError for texts that have no chance to fit: a megabyte takes seconds to read."""
    room, length = _room(pair), sum(map(len, texts))
    if length > CHARACTERS * room:
        raise too_long(f"the prompt has {length} characters, and the model has room for {room} tokens: shorten it")


def _most(pair: Pair, length: int, asked: int | None) -> int:
    """How many tokens an answer to a prompt of this length may have."""
    if not length:
        raise WireError(422, "a prompt without a token has nothing to go on with", param="prompt")
    length += pair.soft
    if asked is None:
        asked = max(1, min(TOKENS, _room(pair) - length))
    for lm in pair.language_models():
        try:
            check_room(lm, length, length, asked)
        except PyargsError as error:
            raise too_long(str(error)) from error
    return asked


def too_long(message: str) -> WireError:
    return WireError(400, message, param="messages", code="context_length_exceeded")
