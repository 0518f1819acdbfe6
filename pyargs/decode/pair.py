"""The two models of an engine: loading them, checking that they fit each other, and checking what is asked of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from pyargs.decode.adjust import Adjust
from pyargs.decode.bridge import Bridge
from pyargs.decode.request import SEEDS, Request, check_room, ids_of, integer, number, numbered, seeds, stop_tokens, weights
from pyargs.errors import PyargsError, UnknownUser, did_you_mean
from pyargs.lm.bits import BITS
from pyargs.lm.called import Called
from pyargs.lm.loading import load_lm, same_tokenizer
from pyargs.lm.structure import check_whole, unwrapped
from pyargs.lm.tokenize import as_messages, encode_prompt, shorten
from pyargs.models import load_model
from pyargs.models.folder import locate, read_config
from pyargs.models.reward_model import RewardModel
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import UserPolicy
from pyargs.ops.topk_logprobs import MAX_K
from pyargs.user_ids import user_ids


def load_pair(policy, model, *, dtype="float32", backbone: str | None = None):
    """A policy and the model that guides it, as `Engine` takes them; weights that both use are loaded once.

    backbone: the place that the model's backbone was moved to. A UserPolicy takes no policy: its own language model is
    returned as the policy.
    """
    if dtype not in ("float32", torch.float32) and not isinstance(policy, (str, Path)):
        raise PyargsError(
            f"dtype={dtype!r} is of a policy that is loaded by name: give that, or what load_lm(name, dtype={dtype!r}) returns"
        )
    if isinstance(policy, (RewardModel, TokenReward)) or not isinstance(policy, (str, Path, nn.Module, type(None))):
        raise PyargsError(
            "the policy comes first: an embedded name, a folder, a hub name, or a model of transformers (the first of the two "
            f"that load_lm returns), not a {type(policy).__name__}"
        )
    if isinstance(model, (str, Path)):
        return _loaded(policy, str(model), dtype, backbone)
    if model is not None and not isinstance(model, (RewardModel, TokenReward, UserPolicy)):
        raise PyargsError(
            f"a model is a RewardModel, TokenReward or UserPolicy, or a folder of one, not a {type(model).__name__}"
        )
    if isinstance(policy, UserPolicy) and model is None:
        policy, model = None, policy
    if isinstance(model, UserPolicy):
        if policy is not None and policy is not model.lm:
            raise PyargsError("a UserPolicy answers by itself: give None in the place of the policy")
        return model.lm, model
    if policy is None:
        raise PyargsError("name the policy: an embedded name, a folder, a hub name, or a model of transformers")
    return (load_lm(str(policy), dtype=dtype)[0] if isinstance(policy, (str, Path)) else policy), model


def _loaded(policy, model: str, dtype, backbone: str | None):
    config = read_config(locate(model))
    kind = f"{model} is a {config['kind'].replace('_', ' ')} ({config.get('method')})"
    if config["kind"] == "user_policy":
        if policy is not None:
            raise PyargsError(f"{model} is a policy itself ({config.get('method')}): leave --policy out")
        own = load_model(model, backbone=backbone).merge()
        return own.lm, own
    if policy is None:
        raise PyargsError(f"{kind}: name the --policy that it guides")
    lm = load_lm(str(policy), dtype=dtype)[0] if not isinstance(policy, nn.Module) else policy
    by_name = not isinstance(policy, nn.Module) and (backbone or config.get("backbone")) == str(policy)
    few = dtype in BITS  # of the stack; the modules are float32
    if config["kind"] == "reward_model" and by_name and config.get("dtype") == ("float32" if few else dtype):
        own = load_model(model, backbone=lm.get_decoder(), tokenizer=lm.tokenizer, device=lm.device)
        return lm, own if lm.device.type == "cuda" or few else own.merge()  # the weights are read once for both
    return lm, load_model(model, backbone=backbone).merge()


LONGEST = 2**20
"""The most tokens of an answer, also for models without a limit, since all of a sample's noise is drawn in advance."""


@dataclass
class Pair:
    """A policy and what guides it. tokenizer: the policy's, None where none is known; vocabulary: how many tokens can be
    chosen; best_of: see `Engine`; unit: gives the model's reward_std under the policy; bridge: to a reward model with another
    tokenizer."""

    policy: nn.Module
    model: RewardModel | TokenReward | UserPolicy | None
    tokenizer: object
    vocabulary: int
    best_of: int
    unit: Callable[[], float] | None = None
    bridge: Bridge | None = None

    @property
    def guided(self) -> bool:
        """Whether rewards take part in the choice of each token."""
        return isinstance(self.model, (RewardModel, TokenReward)) and not self.best_of

    @property
    def soft(self) -> int:
        """Places that a user's soft prompt takes before the prompt."""
        soft = getattr(self.model, "soft", None)
        return 0 if soft is None else soft.centres.shape[1]

    @property
    def by_text(self) -> bool:
        """Whether the reward model reads texts of its own: a function, or one with another tokenizer."""
        return self.bridge is not None or isinstance(getattr(self.model, "backbone", None), Called)

    def language_models(self) -> list[nn.Module]:
        """The models that a step runs on the policy's tokens, the policy first."""
        if not self.guided or self.by_text:
            return [self.policy]
        return [self.policy, unwrapped(self.model.lm) if isinstance(self.model, TokenReward) else self.model.backbone]

    def modules(self) -> list[nn.Module]:
        """All modules that a step computes with."""
        head = [self.model.head] if self.guided and isinstance(self.model, RewardModel) else []
        bridged = [self.model.backbone] if self.guided and self.bridge and not isinstance(self.model.backbone, Called) else []
        return self.language_models() + bridged + head

    def encode(self, prompt, user: str) -> list[int]:
        """Ids of a prompt; ids stay as they are."""
        return self._encoded(prompt, user)[0]

    def _encoded(self, prompt, user: str, theirs=None) -> tuple[list[int], list[int] | None]:
        """Ids of a prompt, and those of a reward model with another tokenizer, of the same messages. theirs: what it reads
        instead. Of ids alone it reads the text, without their special tokens."""
        if theirs is not None and self.bridge is None:
            raise PyargsError("guide_prompt is for a reward model with another tokenizer than the policy's: leave it out")
        messages = isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], dict)
        if not isinstance(prompt, str) and not messages:
            (ids,) = ids_of([prompt], min(len(lm.get_input_embeddings().weight) for lm in self.language_models()))
            return ids, self._theirs(theirs, ids)
        if self.tokenizer is None:
            raise PyargsError("without a tokenizer a prompt is a list of token ids: give Engine the tokenizer")
        most = None if self.model is None else self.model.about.get("max_length")
        if isinstance(self.model, UserPolicy):
            return self.model.prompt_ids(prompt, user, most), None
        kept, ids = shorten(self.tokenizer if self.bridge is None else self.bridge.theirs, prompt, most)
        if kept != as_messages(prompt):
            warnings.warn(
                f"prompts of more than {most} tokens, the model's max_length, are shortened: the oldest turns go first, "
                "then the end of the last one",
                stacklevel=5,
            )
        if self.bridge is None:
            return ids, None
        return encode_prompt(self.tokenizer, kept), ids if theirs is None else self._theirs(theirs, ids)

    def _theirs(self, given, ids: list[int]) -> list[int] | None:
        """The reward model's ids of a prompt with these ids: of what was given for it, else of their text."""
        if self.bridge is None or given is None:
            return None if self.bridge is None else self.bridge.prompt(ids)
        if isinstance(given, str) or given and isinstance(given[0], dict):
            return encode_prompt(self.bridge.theirs, given, self.model.about.get("max_length"))
        called = isinstance(self.model.backbone, Called)
        known = len(self.bridge.theirs) if called else len(self.model.backbone.get_input_embeddings().weight)
        (theirs,) = ids_of([given], known)
        return theirs

    def check_user(self, user: str) -> None:
        """Raises UnknownUser for a user without parameters, where the model is not the same for everyone."""
        if self.model is None or isinstance(self.model, UserPolicy) and not self.soft:
            return
        if user == "" and self.model.users.personal and "" not in self.model.users.ids:
            raise UnknownUser("the model is another one for each user: name the user whose reward guides")
        self.model.users.rows([user])

    def request(
        self,
        prompt,
        user: str,
        *,
        strength: float | None = None,
        reward_weight: float | None = None,
        reward_clip: float | None = None,
        num_candidates: int | str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop: int | Sequence[int] | None = None,
        seed: int | None = None,
        logprobs: int = 0,
        adjust: Adjust | None = None,
        guide_prompt=None,
    ) -> Request:
        ids, theirs = self._encoded(prompt, user, guide_prompt)
        if not ids or theirs is not None and not theirs:
            raise PyargsError("a prompt without a token has nothing to answer: give each at least one")
        self.check_user(user)
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
        if max_new_tokens > LONGEST:
            raise PyargsError(f"max_new_tokens is at most {LONGEST}, got {max_new_tokens}")
        for lm in self.language_models():
            check_room(lm, len(ids) + self.soft, len(ids) + self.soft, max_new_tokens)
        if theirs is not None and not isinstance(self.model.backbone, Called):
            check_room(self.model.backbone, len(theirs), len(theirs), max_new_tokens)
        if adjust is not None and not callable(adjust):
            raise PyargsError(f"adjust is a function of the rows' tokens and logits, got {adjust!r:.60}")
        if self.best_of and not temperature:
            temperature = 1.0
        if self.best_of and logprobs:
            raise PyargsError("best_of keeps one of several whole answers, and tells no logprobs: leave them out")
        return Request(
            prompt=tuple(ids),
            user=user,
            reward_weight=self.raw_weight(strength, reward_weight) if self.guided else _nothing(strength, reward_weight),
            reward_clip=self._clip(reward_clip),
            num_candidates=self._candidates(num_candidates),
            max_new_tokens=max_new_tokens,
            temperature=number("temperature", temperature, 0.0),
            top_p=number("top_p", top_p, 0.0, 1.0, above=True),
            min_p=number("min_p", min_p, 0.0, 1.0),
            stop=stop_tokens(self.policy, stop),
            seed=integer("seed", _drawn() if seed is None else seed, *SEEDS),
            logprobs=integer("logprobs", logprobs, 0, min(MAX_K, self.vocabulary)),
            adjust=adjust,
            theirs=None if theirs is None else tuple(theirs),
        )

    def requests(self, prompts, users=None, *, strength=None, reward_weight=None, seed=None, **wish) -> list[Request]:
        """A request for each prompt, from the arguments of `Engine.generate`."""
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise PyargsError(f"prompts is a list with one prompt for each answer, got {prompts!r:.60}: write [prompt]")
        prompts, wish = list(prompts), known_wishes(wish)
        users = [""] * len(prompts) if users is None else user_ids(users)
        if len(prompts) != len(users):
            raise PyargsError(f"{len(prompts)} prompts but {len(users)} users: name one user for each prompt")
        raw, strong = (
            None if one is None else weights(one, len(prompts), name).expand(len(prompts)).tolist()
            for name, one in (("reward_weight", reward_weight), ("strength", strength))
        )
        given = seeds(seed, len(prompts))
        own = (
            given if isinstance(given, list) else [given if given is None else numbered(given, i) for i in range(len(prompts))]
        )
        return [
            self.request(prompt, user, reward_weight=raw and raw[i], strength=strong and strong[i], seed=own[i], **wish)
            for i, (prompt, user) in enumerate(zip(prompts, users, strict=True))
        ]

    def _clip(self, asked: float | None) -> float | None:
        if asked is None:
            return None
        if not self.guided or isinstance(self.model, TokenReward):
            raise PyargsError("reward_clip is for a RewardModel that guides: leave it out")
        return number("reward_clip", asked, 0.0, above=True)

    def _candidates(self, asked: int | str | None) -> int | None:
        if not self.guided:
            if asked is not None:
                raise PyargsError("num_candidates is for a reward model that guides: leave it out")
            return None
        if asked == "all":
            if not isinstance(self.model, TokenReward):
                raise PyargsError(
                    "only a TokenReward (GenARM) has rewards for the whole vocabulary: name how many a head is to score"
                )
            return None
        most = min(MAX_K, self.vocabulary)
        return integer("num_candidates", min(10, most) if asked is None else asked, 1, most)

    def raw_weight(self, strength, reward_weight) -> float:
        """The raw w of a request."""
        if reward_weight is not None:
            if strength is not None:
                raise PyargsError("strength and reward_weight are one thing in two units: give one of them")
            return weights(reward_weight, 1).item()
        strength = weights(1.0 if strength is None else strength, 1, "strength").item()
        return strength / self.unit() if strength else 0.0


def known_wishes(wish: dict) -> dict:
    """Returns `wish`. Raises PyargsError for a name that `Engine.submit` does not know."""
    known = list(inspect.signature(Pair.request).parameters)[3:]
    for name in wish:
        if name not in known:
            raise PyargsError(f"a request has no '{name}'." + did_you_mean(name, known))
    return wish


def check_guides(model: RewardModel) -> None:
    """Raises PyargsError for a head that has no reward of a token."""
    if model.separate_prompt:
        raise PyargsError("this model (PAL-B) ranks whole responses and guides no decoder: use variant A, or best_of")


def check_pair(policy, model, tokenizer, best_of: int) -> Pair:
    """The two as a Pair. Raises PyargsError where candidates can go from policy to reward model neither as ids nor as text."""
    check_whole(policy)
    theirs = getattr(model, "tokenizer", None)
    tokenizer = tokenizer if tokenizer is not None else getattr(policy, "tokenizer", None)  # `load_lm` leaves it there
    guided = isinstance(model, (RewardModel, TokenReward))
    if best_of and not guided:
        raise PyargsError("best_of needs a reward model to pick with: this model answers by itself")
    if isinstance(model, RewardModel) and not best_of:
        check_guides(model)
    if guided and tokenizer is None and theirs is not None and policy.name_or_path != model.backbone.name_or_path:
        warnings.warn(
            "whether policy and reward model have the same tokenizer is not known: pass tokenizer= (the policy's) to check it",
            stacklevel=4,
        )
    bridge = None
    if guided and tokenizer is not None and theirs is not None and not same_tokenizer(tokenizer, theirs):
        if isinstance(model, TokenReward):
            raise PyargsError(
                "policy and token reward have different tokenizers, and a token's reward is one of the same token: train it "
                "on a language model of the policy's family"
            )
        warnings.warn(
            "policy and reward model have different tokenizers: the reward model reads each candidate's text in its own "
            "tokens, which is slower",
            stacklevel=4,
        )
        bridge = Bridge(tokenizer, theirs)
    tokenizer = tokenizer if tokenizer is not None else theirs
    rows = policy.config.get_text_config(decoder=True).vocab_size  # of the logits; the last may be no token
    vocabulary = rows if tokenizer is None else min(rows, len(tokenizer))
    if guided and bridge is None and not isinstance(model.backbone, Called):
        known = min(len(lm.get_input_embeddings().weight) for lm in (policy, model.backbone))
        if vocabulary > known:
            raise PyargsError(
                f"the policy can choose among {vocabulary} tokens, but the reward model knows {known}: pass tokenizer= (the "
                "policy's) if the rest is padding, or take a reward model of the policy's family"
            )
    if isinstance(model, TokenReward) and model.lm.get_output_embeddings().weight.shape[0] < vocabulary:
        raise PyargsError("the token reward's output layer has fewer rows than the tokenizer has tokens")
    return Pair(policy, model, tokenizer, vocabulary, best_of, bridge=bridge)


def _nothing(*weights) -> float:
    if any(weight is not None for weight in weights):
        raise PyargsError("strength and reward_weight are for a reward model that guides: leave them out")
    return 0.0


def _drawn() -> int:
    """A seed from torch's generator, whose state goes on."""
    return int(torch.randint(2**62, (1,), device="cpu"))
