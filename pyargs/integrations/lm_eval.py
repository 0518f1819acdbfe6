"""`lm_eval.simple_evaluate(model=GuidedLM(policy, model, user="ada"), tasks=[...])`: benchmarks of a guided policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pyargs.decode.engine import Engine
from pyargs.decode.request import positions
from pyargs.errors import PyargsError, extra
from pyargs.models.user_policy import UserPolicy
from pyargs.progress import progress_bar
from pyargs.scoring import response_logprobs
from pyargs.serve.text import Writer

with extra("lm_eval", "lm_eval's benchmarks"):
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

LONGEST, ANSWER = 2048, 256
"""Tokens of a context where the model has no limit, and of an answer where a task names none (both lm_eval's own)."""


class GuidedLM(TemplateLM):
    """A policy, and the model that guides it, as lm_eval asks language models.

    policy, model, backend, max_rows, tokenizer: as for `Engine`. user: whose reward guides: an id, or a function from a task's
    document to one. strength, reward_weight, num_candidates: as for `Engine.submit`.

    A continuation is ranked by the decoder's own score, the sum of log pi + w r over its tokens (eqs. 5 and 6 of the paper,
    what `policy_accuracy` calls "paper"): at w = 0 that is its log-likelihood, else it is none, and a perplexity is refused.
    It is greedy where the engine answers with its tokens. Answers are the engine's, cut at the task's stop strings.

    Raises PyargsError for a UserPolicy, which answers users by prompts of its own, and for what a task asks of generation that
    the engine does not do.
    """

    def __init__(
        self,
        policy,
        model=None,
        *,
        user: str | Callable[[dict], str] = "",
        strength: float | None = None,
        reward_weight: float | None = None,
        num_candidates: int | str | None = None,
        backend: str = "auto",
        max_rows: int = 8,
        tokenizer=None,
    ):
        super().__init__()
        self.engine = Engine(policy, model, backend=backend, max_rows=max_rows, tokenizer=tokenizer)
        pair = self.engine.pair
        if isinstance(pair.model, UserPolicy):
            raise PyargsError("a UserPolicy writes prompts of its own for each user: evaluate its answers (pyargs evaluate)")
        if pair.bridge is not None:
            raise PyargsError(
                "policy and reward model have different tokenizers, so that continuations have no rewards by token"
            )
        if pair.tokenizer is None:
            raise PyargsError("tasks are texts: give the tokenizer of the policy")
        asked = {"strength": strength, "reward_weight": reward_weight, "num_candidates": num_candidates}
        self.wish = {name: value for name, value in asked.items() if value is not None}
        pair.request([0], user if isinstance(user, str) else next(iter(pair.model.known_users), ""), **self.wish)
        self.user, self.tokenizer, self._device = user, pair.tokenizer, pair.policy.device
        self.weight = pair.raw_weight(strength, reward_weight) if pair.guided else 0.0
        self.max_length = positions(pair.policy) or LONGEST

    # -- what TemplateLM asks for --------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:  # a chat template has written the start token already
            start = self.tokenizer.bos_token
            add_special_tokens = not (start and string.startswith(start))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -- requests ------------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(score of the continuation, whether it is what the engine answers) for each (context, continuation)."""
        pairs = [(one.args, *self._pair(*one.args)) for one in requests]
        return self._loglikelihood_tokens(pairs, users=[self._user(one.doc) for one in requests])

    def _loglikelihood_tokens(self, requests: Sequence, users: Sequence[str] | None = None, **_) -> list[tuple[float, bool]]:
        users = [self._user({})] * len(requests) if users is None else users
        groups = [(self._last(context, len(continuation)), [continuation]) for _, context, continuation in requests]
        sums = [several[0].double().sum().item() for several in response_logprobs(self.engine.pair.policy, groups)]
        if self.weight:
            rewards = self.engine.pair.model.step_sums(groups, users)
            sums = [own + self.weight * several[0].item() for own, several in zip(sums, rewards, strict=True)]
        found = []
        for (words, *_), (context, (continuation,)), user, score in zip(requests, groups, users, sums, strict=True):
            answer = self.engine.generate([context], [user], max_new_tokens=len(continuation), stop=[], **self.wish)[0]
            found.append((score, answer.tokens == continuation))
            self.cache_hook.add_partial("loglikelihood", words, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts under the policy. Raises PyargsError where a reward guides it."""
        if self.weight:
            raise PyargsError("a guided policy has scores, not log-likelihoods: ask for reward_weight=0, the policy's own")
        found = []
        for one in requests:
            ids = self.tok_encode(one.args[0])
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            groups = [(context, [rest]) for context, rest in map(utils.make_disjoint_window, windows)]
            values = response_logprobs(self.engine.pair.policy, groups)
            found.append(sum(several[0].double().sum().item() for several in values))
            self.cache_hook.add_partial("loglikelihood_rolling", one.args, found[-1])
        return found

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        engine, going = self.engine, {}
        texts: list[list[str]] = [[] for _ in requests]
        for which, one in enumerate(requests):
            context, asked = one.args
            until, most, wish = _wish(asked)
            ids = self._last(self.tok_encode(context) or [self.prefix_token_id], most)
            number = engine.submit(ids, self._user(one.doc), max_new_tokens=most, **wish, **self.wish)
            going[number] = (which, Writer(self.tokenizer, until, strip=False))
        with progress_bar(total=len(requests), desc="answers", unit="request", hide=disable_tqdm) as bar:
            while going:
                for event in engine.step():
                    if event.number not in going:
                        continue
                    which, writer = going[event.number]
                    if event.error is not None:
                        raise event.error
                    answer = event.answer
                    if event.token is not None and (answer is None or answer.finish_reason != "stop"):
                        texts[which].append(writer.add(event.token))
                    if answer is not None:
                        texts[which].append(writer.rest())
                    if writer.stopped or answer is not None:
                        del going[event.number]
                        engine.cancel(event.number)
                        self.cache_hook.add_partial("generate_until", requests[which].args, "".join(texts[which]))
                        bar.update(1)
        return ["".join(text) for text in texts]

    def _user(self, doc: dict) -> str:
        return self.user if isinstance(self.user, str) else self.user(doc)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, with a token in front of the first one where there is no context."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return ([self.prefix_token_id], ids) if ids[0] != self.prefix_token_id else (ids[:1], ids[1:])

    def _last(self, context: list[int], following: int) -> list[int]:
        """The end of a context, as much as has room in front of so many tokens."""
        room = self.max_length - following
        if room < 1:
            raise PyargsError(f"{following} tokens and one in front of them exceed the model's {self.max_length} positions")
        return context[-room:]


def _wish(asked: dict) -> tuple[list[str], int, dict]:
    """Stop strings, tokens and the sampling that a task asks for, as `Engine.submit` names it."""
    asked = normalize_gen_kwargs(asked, ANSWER)
    until, most, sample = asked.pop("until"), asked.pop("max_gen_toks"), asked.pop("do_sample")
    wish = {name: asked.pop(name) for name in ("temperature", "top_p", "min_p", "seed") if name in asked}
    if not sample:
        wish = {}
    elif not wish.get("temperature"):
        wish["temperature"] = 1.0
    if asked.pop("top_k", None) not in (None, 0):
        raise PyargsError("top_k of a task: the engine takes candidates by num_candidates, which GuidedLM is given")
    if asked:
        raise PyargsError(f"a task asks generation for {', '.join(sorted(asked))}, which the engine does not do")
    return [stop for stop in until if stop], most, wish
