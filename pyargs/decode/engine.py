"""The entrance to the decoder: text or ids, any kind of model, one batch or requests that come and go."""

from __future__ import annotations

import logging
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pyargs.decode import backends, best_of_n, strength
from pyargs.decode.adjust import adjusted
from pyargs.decode.answer import Answer, Event, Ticket
from pyargs.decode.backends import cuda_graph
from pyargs.decode.pair import check_pair, known_wishes, load_pair
from pyargs.decode.request import Request, integer
from pyargs.decode.rows import Choice
from pyargs.decode.scheduler import Scheduler
from pyargs.decode.steps import Steps
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.bits import check_plain
from pyargs.lm.forward import border
from pyargs.lm.structure import Watch, asked_backend, unwrapped
from pyargs.models.reward_model import RewardModel
from pyargs.progress import progress_bar
from pyargs.user_ids import user_id

log = logging.getLogger("pyargs")


class Engine:
    """Answers prompts for their users, many at a time.

    policy: an embedded name, a folder, a hub name, or a causal language model of transformers; None where `model` is a
    UserPolicy, which answers by itself.
    model: a RewardModel or TokenReward that guides the policy, a UserPolicy, a folder of one of these, or None for the policy
    alone.
    backend: "cpu" (the CPU stack), "cuda-graph", "eager" (transformers' own passes) or "auto", the fastest that computes
    these models. It is chosen here, once, and logged with its reason. `PYARGS_BACKEND` overrides it.
    max_rows: requests that are answered at a time; others wait. dtype: of a policy that is loaded by name.
    best_of: N > 0 samples N whole answers from the policy and keeps the one that the model rewards most, instead of guiding.
    eos_reward: what a stop token earns under a RewardModel that guides; "before" (the default): the reward of the text so far,
    since a head is never trained on the state after a stop token; "state": the reward of that state.
    tokenizer: the policy's, where the policy is given as a model and pyargs has not loaded it.
    prefill_tokens: the most tokens of prompts that a step reads, so that a long prompt does not hold up the others: its parts
    end at multiples of it. None reads prompts whole. So are those of models with longrope, or whose candidates cannot share a
    prefix, and those behind a soft prompt.

    A request's answer does not depend on the others, whenever they come and go. Threads may share an engine. With "cuda-graph"
    events come some steps late, so that nothing waits for the GPU.
    Raises PyargsError where policy and model do not fit each other, or the backend cannot compute them.
    """

    def __init__(
        self,
        policy,
        model=None,
        *,
        backend: str = "auto",
        max_rows: int = 8,
        dtype: str | torch.dtype = "float32",
        best_of: int = 0,
        eos_reward: str | None = None,
        tokenizer=None,
        prefill_tokens: int | None = None,
    ):
        if eos_reward not in (None, "before", "state"):
            raise PyargsError(f"eos_reward is 'before' or 'state', not {eos_reward!r}")
        policy, model = load_pair(policy, model, dtype=dtype)
        self.pair = check_pair(unwrapped(policy), model, tokenizer, integer("best_of", best_of, 0))
        if eos_reward is not None and not (self.pair.guided and isinstance(model, RewardModel)):
            raise PyargsError("eos_reward is about the head of a RewardModel that guides: leave it out")
        self.pair.unit = self._unit
        self.max_rows, self.eos_reward = integer("max_rows", max_rows, 1), eos_reward or "before"
        self._asked, self._lock, self._count = backend, threading.RLock(), 0
        self.prefill_tokens = None if prefill_tokens is None else integer("prefill_tokens", prefill_tokens, 1)
        self._tickets: dict[int, Ticket] = {}
        self._groups: dict[int, best_of_n.Group] = {}
        self._scheduler = Scheduler(self.max_rows)
        self._stepping, self._late = False, deque()  # what is cancelled in the middle of a step ends behind it
        self._told: set[int] = set()  # requests whose events `step` returns
        self._events: list[Event] = []  # that it has not returned yet
        self.refresh()

    # -- asking --------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence,
        users: Sequence[str] | None = None,
        *,
        strength: float | Sequence[float] | None = None,
        reward_weight: float | Sequence[float] | Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        progress: str | None = None,
        **wish,
    ) -> list[Answer]:
        """Answers to prompts, in their order.

        prompts: each a str, messages, or a list of token ids. users: one id each; may be left out where the model is the same
        for everyone. strength, reward_weight, seed: one for all, or one each; from one int `seed` each prompt gets its own, by
        its number. progress: the name of a progress bar. wish: the other arguments of `submit`.
        Raises PyargsError for what `submit` refuses, before anything is computed, and where nothing could be chosen.
        """
        requests = self.pair.requests(prompts, users, strength=strength, reward_weight=reward_weight, seed=seed, **wish)
        # Prompts that begin alike, as with one user's demonstrations, are neighbours: the CPU stack reads that part once.
        left, mine = deque(sorted(enumerate(requests), key=lambda one: one[1].prompt)), {}
        found: list[Answer | None] = [None] * len(requests)
        with progress_bar(total=len(requests), desc=progress or "answers", unit="prompt", hide=progress is None) as bar:
            try:
                while left or mine:
                    with self._lock:
                        while left and self._has_room(mine):
                            place, request = left.popleft()
                            mine[self._add(request)] = place
                        self._step()
                        for number in [number for number in mine if self._done(number)]:
                            found[mine[number]] = self._take(number)
                            del mine[number]
                            bar.update(1)
            finally:
                for number in mine:  # an error
                    self.cancel(number)
                    for part in self._groups.pop(number).parts if number in self._groups else [number]:
                        self._tickets.pop(part, None)
        return found

    def submit(self, prompt, user: str = "", **wish) -> int:
        """Adds a request and returns its number; `step` computes it.

        prompt: a str, messages, or a list of token ids. user: whose reward guides.
        strength: w in units of 1 / reward_std, which the model carries; 1 by default.
        reward_weight: w itself, the raw weight of eq. 1. Give one of the two; 0 is exactly the policy's own choice.
        reward_clip: c > 0: rewards are clipped so that |w r| <= c. A greedy choice then skips the candidates whose log-prob is
        more than 2 c behind the best one, since none of them can win; a sample tries all. For a RewardModel; none by default.
        num_candidates: k, 10 by default (the example value of ARGS; the paper is silent), or "all" for a TokenReward.
        max_new_tokens: 64 by default.
        temperature: 0 takes the best score; above it the token is a sample of softmax(score / temperature).
        top_p, min_p: filters on the policy's k candidates, before rewards and temperature. What they leave out, such as a
        token less than min_p times as likely as the likeliest, has no reward, and is not computed on a CPU.
        stop: token ids that end the answer, the policy's own by default.
        seed: of the sampling; drawn from torch's generator by default.
        logprobs: how many of the policy's likeliest tokens `told` of events and answers has beside each token; 0 by default.
        adjust: changes the policy's logits before the candidates are taken (`pyargs.decode.adjust.Adjust`); log-probabilities
        are then those of the changed ones. A captured step refuses it.
        guide_prompt: what a reward model with another tokenizer reads in the place of the prompt: a str, messages, or its own
        ids. By default it reads the same text or messages in its own chat template, and of ids the text, without a template.

        Raises PyargsError on wrong input (UnknownUser for a user without parameters).
        """
        request = self.pair.request(prompt, user_id(user), **known_wishes(wish))
        with self._lock:
            self._told.add(number := self._add(request))
            return number

    def step(self) -> list[Event]:
        """Admits waiting requests and computes one token of each that is being answered. Returns the events of requests of
        `submit` since the last call, also of steps that another thread computed.

        Raises PyargsError that names `refresh` when a model has changed. A request in which nothing could be chosen ends, and
        its event and `answer` have the error.
        """
        with self._lock:
            self._step()
            return self.events()

    def events(self) -> list[Event]:
        """The events that no `step` has returned yet: behind one that failed, of those that it has ended."""
        with self._lock:
            events, self._events = self._events, []
            return events

    def cancel(self, number: int) -> None:
        """Ends a request with the tokens that it has; one that has ended stays as it is. Raises PyargsError for a number that
        no request has had."""
        with self._lock:
            if integer("number", number, 0) >= self._count:
                raise PyargsError(f"there is no request {number}")
            if number in self._groups:
                for part in self._groups[number].parts:
                    self.cancel(part)
                return
            ticket = self._tickets.get(number)
            if ticket is None or ticket.answer is not None or ticket.error is not None:
                return
            if self._stepping:  # by a collected stream or a signal, in the middle of things
                return self._late.append(number)
            if number in self._scheduler.inside:
                self._read(self._rows.flush())
                if self._done(number):
                    return
            self._leave([number])
            ticket.finish("cancelled", self.pair.tokenizer, self.backend)
            if ticket.left:
                del self._tickets[number]
                return
            self._tell([Event(number, None, 0.0, 0, ticket.answer, None)])

    def stream(self, prompt, user: str = "", **wish) -> Iterator[Event]:
        """The events of one request as they come; arguments as for `submit`. Other requests are computed meanwhile. Closing
        the iterator cancels the request."""
        if self.pair.best_of:
            raise PyargsError("best_of samples whole answers: there is nothing to stream, use generate")
        request = self.pair.request(prompt, user_id(user), **known_wishes(wish))
        with self._lock:
            ticket = self._tickets[self._add(request)]
            ticket.events = deque()
        stream = self._listen(ticket)
        next(stream)  # it has begun, so that it is cancelled also where nobody listens at all
        return stream

    def answer(self, number: int) -> Answer | None:
        """The answer to a request of `submit`; None while it has not ended. Raises the error that ended it, if there was one.

        Each answer is kept until it is taken here, and is taken once, even if an event of `step` has shown it."""
        with self._lock:
            if number not in self._tickets and number not in self._groups:
                raise PyargsError(f"there is no request {number} (or its answer has been taken)")
            return self._take(number) if self._done(number) else None

    @property
    def busy(self) -> bool:
        """Whether any request waits, is being answered, or has events that no `step` has returned."""
        with self._lock:
            return bool(self._scheduler.inside or self._scheduler.waiting or self._events)

    def refresh(self) -> None:
        """Takes the models as they are now and chooses the backend again. Requests that are being answered are cancelled."""
        with self._lock:
            for number in self._scheduler.inside:
                self.cancel(number)
            self._rows, self._borders = self._made(), [at for lm in self.pair.language_models() if (at := border(lm))]
            self._watch = Watch(*self.pair.modules(), but=getattr(self.pair.model, "users", None))

    # -- what it is made of --------------------------------------------------------------------------------------------

    def _made(self):
        """The steps of these models, on the backend that is chosen for them."""
        pair, models = self.pair, self.pair.language_models()
        # The other backends read ids, and a soft prompt has none.
        asked = "eager" if pair.soft and self._asked == "auto" else self._asked
        if pair.soft:
            check_plain(pair.policy)
        chosen = backends.resolve(asked, *models, guide=pair.model if pair.guided else None, by_text=pair.by_text)
        self.backend, self.reason, self._closed = chosen.name, chosen.reason, not chosen.shared
        log.info("backend %s: %s", chosen.name, chosen.reason)
        return backends.steps(chosen, pair, self.max_rows, self.eos_reward, self._adjusted)

    def _adjusted(self, requests: Sequence[Request], logits: Tensor) -> Tensor:
        # By the requests themselves: those who are coming in count as here already, while the others' logits are computed.
        tickets = {id(self._tickets[number].request): self._tickets[number] for number in self._scheduler.here}
        return adjusted([tickets[id(one)] for one in requests], logits)

    def _check_unchanged(self) -> None:
        """Raises PyargsError when a model is no longer what the backend was made for."""
        idle = not self._scheduler.inside and self._scheduler.waiting  # then there is time to read the weights
        if self._watch.changed() or idle and not self._rows.current():
            raise PyargsError(
                "a model has changed since the engine was made (weights, modules or hooks): call engine.refresh()"
            )

    def raw_weight(self, strength: float | None = None) -> float:
        """The reward_weight that a strength (1 by default) stands for."""
        return self.pair.raw_weight(strength, None)

    def _unit(self) -> float:
        """reward_std of the model under the policy; measured where it is not known."""
        unguided = partial(self.generate, reward_weight=0.0, max_new_tokens=strength.TOKENS)
        return strength.unit(self.pair.policy, self.pair.model, unguided)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One step of all rows. The tensors that it keeps are ordinary ones, even under the caller's inference mode."""
        self._check_unchanged()
        self._stepping = True
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._compute()
        except BaseException as error:
            self._lose(error)
            raise
        finally:
            self._stepping = False
            while self._late:
                self.cancel(self._late.popleft())

    def _compute(self) -> None:
        if self._scheduler.reading is not None or self._scheduler.next is not None:
            self._read(self._rows.flush())
            scheduler, before = self._scheduler, len(self._scheduler.here)
            begun = scheduler.reading
            come = [] if self._closed and before else scheduler.admit(self._fit, self._size, self._most_tokens())
            while come and not self._joined(come):
                scheduler.leave(unknown := [number for number in come if self._done(number)])
                come = scheduler.here[before:]  # they stood behind the rows that are here, which keep their places
                if begun in unknown:
                    self._rows.unread()
            if (long := scheduler.reading) is not None:
                scheduler.read = self._rows.read(self._tickets[long].request.prompt, scheduler.end, self._places())
        if self._scheduler.here:
            self._read(self._next())

    def _size(self, number: int) -> int:
        return len(self._tickets[number].request.prompt)

    def _most_tokens(self) -> int | None:
        """The most tokens of prompts in a step. A copied cache and a soft prompt are made of whole prompts; with longrope each
        part would have the angles of its own length."""
        return None if self._closed or self.pair.soft or self._borders else self.prefill_tokens

    def _joined(self, numbers: list[int]) -> bool:
        """Whether these admitted requests have come in. None has where a user was removed since the request was made: those of
        that user end with the error. Another thread may remove users at any time, so that who looks them up finds out."""
        try:
            self._rows.join([self._tickets[number].request for number in numbers], self._places())
            return True
        except UnknownUser as error:
            gone = [number for number in numbers if self._tickets[number].request.user == error.user]
            if not gone:
                raise
            for number in gone:
                self._tickets[number].error = error
            self._tell([Event(number, None, 0.0, 0, None, error) for number in gone])
            return False

    def _lose(self, error: BaseException) -> None:
        """After an error in the middle of a step the rows' states are unknown, so all of them end with that error."""
        for number in self._scheduler.inside:
            ticket = self._tickets[number]
            if ticket.answer is None:
                ticket.error = PyargsError(f"a step failed, with this request in it: {error}")
                ticket.error.__cause__ = error
                self._tell([Event(number, None, 0.0, 0, None, ticket.error)])
        self._scheduler.leave(self._scheduler.inside)
        if not self._rows.recover(error):
            self._rows = self._made()

    def _has_room(self, mine: dict) -> bool:
        """Whether a call of `generate` may add one more request. It keeps one waiting, so that others' come between."""
        here = set(self._scheduler.inside)
        full = len(here) + self._scheduler.waiting >= self.max_rows
        return not full or not any(number not in here for number in mine if number in self._tickets)

    def _fit(self, number: int) -> bool:
        """Whether a request may share passes with those inside: with longrope, the longest row sets the rotary embeddings of
        all."""
        several = [*self._scheduler.inside, number]
        lengths = [len(self._tickets[one].request.prompt) + self.pair.soft for one in several]
        return all(len({length > at for length in lengths}) == 1 for at in self._borders)

    def _places(self) -> int:
        """Places that a row of the cache needs: the longest prompt and answer, and the most candidates of a step."""
        here = [self._tickets[number].request for number in self._scheduler.inside]
        longest = max(len(one.prompt) + self.pair.soft + one.max_new_tokens for one in here)
        return longest + max(max(one.num_candidates or 1, one.logprobs) for one in here)

    def _next(self) -> list[Choice]:
        """One step of the rows that are here. If its capture fails, the eager backend continues."""
        try:
            return self._rows.step()
        except cuda_graph.Refused as refused:
            if (asked_backend() or self._asked) == "cuda-graph":
                raise
            self.backend, self.reason = "eager", str(refused)
            warnings.warn(f"backend eager, which is slower: {refused}", stacklevel=4)
            self._rows = Steps(self._rows.rows)
            return self._rows.step()

    def _read(self, choices: list[Choice]) -> None:
        """Notes what was chosen for the requests that are here; those that have ended leave."""
        self._note_all(choices)
        if any(map(self._done, self._scheduler.here)):
            self._note_all(self._rows.flush())
            self._leave([number for number in self._scheduler.here if self._done(number)])

    def _note_all(self, choices: list[Choice]) -> None:
        events = []
        for choice in choices:
            chosen = zip(*choice.lists(), strict=True)
            for position, (number, one) in enumerate(zip(self._scheduler.here, chosen, strict=True)):
                if not self._done(number):
                    ticket = self._tickets[number]
                    events.append(ticket.note(position, *one, tokenizer=self.pair.tokenizer, backend=self.backend))
        self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        """Hands events to the streams and to the next `step`."""
        for event in events:
            if (own := self._tickets[event.number].events) is not None:
                own.append(event)
        self._events += [event for event in self._of_callers(events) if event.number in self._told]

    def _of_callers(self, events: list[Event]) -> list[Event]:
        """The events of requests that somebody asked for; those of a group's samples are the group's, once all have ended."""
        if not self._groups:
            return events
        parts = {part: number for number, group in self._groups.items() for part in group.parts}
        ended = dict.fromkeys(parts[event.number] for event in events if event.number in parts)
        return [event for event in events if event.number not in parts] + [
            Event(number, None, 0.0, 0, *self._picked(number)) for number in ended if self._done(number)
        ]

    def _picked(self, number: int) -> tuple[Answer | None, PyargsError | None]:
        """The best of a group's samples, all of which have ended, or why there is none."""
        group = self._groups[number]
        if group.answer is None and group.error is None:
            try:
                group.answer = best_of_n.pick(self.pair, number, group.request, list(map(self._answer, group.parts)))
            except PyargsError as error:
                group.error = error
        return group.answer, group.error

    def _leave(self, numbers: list[int]) -> None:
        before = list(self._scheduler.here)
        if self._scheduler.reading in numbers:
            self._rows.unread()
        order = self._scheduler.leave(numbers)
        if len(order) < len(before):
            self._rows.keep(order)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _add(self, request: Request) -> int:
        if self.backend == "cuda-graph":
            cuda_graph.check_adjust([request])
        if self.pair.best_of:
            return self._add_group(request)
        number, self._count = self._count, self._count + 1
        self._tickets[number] = Ticket(number, request)
        self._scheduler.add(number, request.user)
        return number

    def _add_group(self, request: Request) -> int:
        number, self._count = self._count, self._count + 1
        parts = []
        for one in best_of_n.samples(request, self.pair.best_of):
            part, self._count = self._count, self._count + 1
            self._tickets[part] = Ticket(part, one)
            self._scheduler.add(part, request.user)  # whose turn it is
            parts.append(part)
        self._groups[number] = best_of_n.Group(request, parts)
        return number

    def _done(self, number: int) -> bool:
        if number in self._groups:
            group = self._groups[number]
            return group.answer is not None or group.error is not None or all(map(self._done, group.parts))
        ticket = self._tickets[number]
        return ticket.answer is not None or ticket.error is not None

    def _take(self, number: int) -> Answer:
        """The answer to a request that has ended, which is forgotten."""
        self._told.discard(number)
        if number in self._groups:
            answer, error = self._picked(number)
            for part in self._groups.pop(number).parts:
                del self._tickets[part]
            if error is not None:
                raise error
            return answer
        try:
            return self._answer(number)
        finally:
            del self._tickets[number]

    def _answer(self, number: int) -> Answer:
        ticket = self._tickets[number]
        if ticket.error is not None:
            raise ticket.error
        return ticket.answer

    def _listen(self, ticket: Ticket) -> Iterator[Event]:
        try:
            yield None
            while True:
                with self._lock:
                    while not ticket.events and ticket.error is None:
                        self._step()
                    if ticket.error is not None:
                        raise ticket.error
                    event = ticket.events.popleft()
                yield event
                if event.answer is not None:
                    return
        finally:
            self.cancel(ticket.number)
            if ticket.answer is not None or ticket.error is not None:
                self._tickets.pop(ticket.number, None)
            else:
                ticket.left = True
