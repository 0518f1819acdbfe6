"""`lm.generate(**inputs, custom_generate=pyargs.guide(model, users=[...]))`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from pyargs.decode.engine import Engine
from pyargs.decode.request import integer, numbered, sampling_temperature, seeds, stop_and_pad, weights
from pyargs.errors import PyargsError
from pyargs.integrations.batch import Batch
from pyargs.integrations.generation_config import (
    changes_logits,
    check_config,
    check_inputs,
    ends,
    rows_of,
    temperature_of,
)
from pyargs.user_ids import user_ids

FOLDER = str(Path(__file__).parent / "guided")
"""`custom_generate=FOLDER, trust_remote_code=True`, with the arguments of `generate` below."""


def guide(
    model,
    users: Sequence[str] | None = None,
    *,
    strength: float | Sequence[float] | None = None,
    reward_weight: float | Sequence[float] | Tensor | None = None,
    reward_clip: float | None = None,
    num_candidates: int | str = 10,
    candidate_min_p: float = 0.0,
    eos_reward: str | None = None,
    seed: int | Sequence[int] | None = None,
    tokenizer=None,
    backend: str = "auto",
    token_callback: Callable[[Tensor], None] | None = None,
    streamer=None,
):
    """A decoding loop for the `custom_generate` argument of `generate`; the language model is the policy.

    model: a RewardModel or TokenReward. users: one id for each prompt of the batch; may be left out where the model is the
    same for everyone. strength, reward_weight, seed: one for all prompts, or one each. reward_clip, num_candidates,
    eos_reward, tokenizer, backend: as for `pyargs.Engine`. candidate_min_p: what is `min_p` there, greedy or not: no candidate
    less than so many times as likely as the likeliest; `min_p` of `generate` is a filter of sampling. token_callback: called
    after each step with the tokens int64 [B], padding where a row has ended. streamer: a streamer of transformers, for one
    prompt, fed as by `generate`; it is ended also when decoding fails.
    Returns ids [B, T + N], or with return_dict_in_generate a GenerateDecoderOnlyOutput.

    The logits processors of `generate`, those of its config and the caller's, change the policy's logits before the candidates
    are taken. So do the filters of sampling, which see the tempered logits as in transformers. The score of a token is
    (log pi + w r) / temperature. Every stopping criterion is followed. `output_scores` has these scores on the candidates and
    -inf elsewhere. docs/embedding.md lists all arguments. Each call makes an engine, so the backend is chosen anew and logged.

    Raises PyargsError that names what else would change the answer, in the call or in the checkpoint's own generation config:
    beams, drafts, attentions to return. `streamer=`, `assistant_model=` and `synced_gpus=` of `generate` do nothing here, as
    transformers does not hand them to a custom loop, and `stop_strings=` finds no tokenizer there: `generate` has them.
    """
    users = None if users is None else user_ids(users)
    most = num_candidates if num_candidates == "all" else integer("num_candidates", num_candidates, 1)

    def custom_generate(lm, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **model_inputs):
        from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

        try:
            config = generation_config
            check_config(config, lm.generation_config)
            check_inputs(input_ids, model_inputs)
            prompts = rows_of(input_ids, model_inputs.get("attention_mask"))
            processors, criteria = LogitsProcessorList(logits_processor or []), StoppingCriteriaList(stopping_criteria or [])
            keep = [
                name for name in ("logits", "scores") if config.return_dict_in_generate and getattr(config, "output_" + name)
            ]
            if "scores" in keep and most == "all":
                raise PyargsError("output_scores needs num_candidates of 64 or less: pass that, or output_scores=False")
            if "scores" in keep and (candidate_min_p or reward_clip is not None):
                raise PyargsError("output_scores has scores of all candidates: leave candidate_min_p and reward_clip out")
            adjusts = bool(keep) or changes_logits(processors, config, most)
            length, stop = ends(criteria, config)
            _, pad = stop_and_pad(lm, [] if config.eos_token_id is None else config.eos_token_id, config.pad_token_id)
            feed = token_callback if streamer is None else _feeding(streamer, input_ids, token_callback)
            how = dict(max_rows=max(1, len(prompts)), eos_reward=eos_reward, tokenizer=tokenizer)
            engine = Engine(lm, model, backend=backend, **how)
            if not engine.pair.guided:
                raise PyargsError("a UserPolicy answers by itself and guides nobody: ask Engine(None, model)")
            if adjusts and engine.backend == "cuda-graph" and backend == "auto":
                engine = Engine(lm, model, backend="eager", **how)  # a captured step does not wait for the host
            copies = config.num_return_sequences or 1
            names = [""] * (len(prompts) // copies) if users is None else users
            wishes = _wishes(copies, names, strength, reward_weight, seed)
            if len(wishes) != len(prompts):
                raise PyargsError(f"{len(prompts)} prompts but {len(wishes)} users: name one user for each row")
            temperature = sampling_temperature(temperature_of(config))
            columns = lm.config.get_text_config(decoder=True).vocab_size
            batch = Batch(engine, input_ids, pad, processors, criteria, columns=columns, temperature=temperature, keep=keep)
            more = {"num_candidates": most, "max_new_tokens": max(1, length - input_ids.shape[1]), "stop": stop}
            more |= {"min_p": candidate_min_p, "reward_clip": reward_clip}
            more |= {"temperature": temperature} if config.do_sample else {}
            more |= {"adjust": batch.adjust} if adjusts else {}
            more |= {"logprobs": most} if "scores" in keep else {}
            for wish, prompt in zip(wishes, prompts, strict=True):
                weight = engine.pair.raw_weight(wish.pop("strength", None), wish.pop("reward_weight", None))
                wish |= {"prompt": prompt, "reward_weight": weight, **more}
            ids = batch.run(wishes, feed)
        finally:
            if streamer is not None:
                streamer.end()  # or whoever reads it would wait for ever
        if not config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(sequences=ids, **{name: getattr(batch, name) for name in keep})

    return custom_generate


def generate(model, *, reward_model, stopping_criteria=None, tokenizer=None, streamer=None, token_callback=None, **asked):
    """What `lm.generate(..., custom_generate=FOLDER, trust_remote_code=True, reward_model=..., users=[...])` runs.

    transformers gives it all arguments of the call, those of `guide` among them. So `streamer=` is followed, also for a batch
    if the streamer takes one, and `stop_strings=` with `tokenizer=`, the policy's. Raises what `guide` raises, and PyargsError
    for assistants, synced_gpus and token_healing.
    """
    from transformers.generation import StoppingCriteriaList, StopStringCriteria

    def feed(tokens: Tensor) -> None:
        if token_callback is not None:
            token_callback(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())

    try:
        for name in ("assistant_model", "assistant_tokenizer", "synced_gpus"):
            if asked.pop(name, None):
                raise PyargsError(f"reward-guided decoding has no {name}: leave it out")
        if first_of("token_healing", asked, model):
            raise PyargsError("reward-guided decoding does not heal tokens: pass token_healing=False")
        tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if (strings := first_of("stop_strings", asked, model)) is not None:
            if tokenizer is None:
                raise PyargsError("stop_strings are strings of a tokenizer: pass tokenizer=, the policy's")
            if not any(type(one) is StopStringCriteria for one in criteria):  # one's own stands in its place, as in `generate`
                criteria.append(StopStringCriteria(stop_strings=strings, tokenizer=tokenizer))
            asked["stop_strings"] = None
        own = {name: asked.pop(name) for name in inspect.signature(guide).parameters if name in asked}
        loop = guide(reward_model, **own, tokenizer=tokenizer, token_callback=feed)
        # The streamer gets the prompt from `generate`, and no more.
        return model.generate(custom_generate=loop, stopping_criteria=criteria, streamer=streamer, **asked)
    finally:
        if streamer is not None:
            streamer.end()


def first_of(name: str, asked: dict, lm):
    """What a call of `generate` has for a field of its config: the argument, else its config's, else the checkpoint's."""
    configs = asked.get("generation_config"), lm.generation_config
    if name in asked:
        return asked[name]
    return next((value for one in configs if (value := getattr(one, name, None)) is not None), None)


def _wishes(copies: int, users: list[str], strength, reward_weight, seed) -> list[dict]:
    """Arguments of `Engine.submit` for each row: user, weight and seed, with so many rows for each user."""
    names = [user for user in users for _ in range(copies)]
    found = [{"user": user} for user in names]
    for name, asked in (("strength", strength), ("reward_weight", reward_weight)):
        if asked is not None:
            for row, one in enumerate(weights(asked, len(users), name).expand(len(users)).repeat_interleave(copies).tolist()):
                found[row][name] = one
    given = seeds(seed, len(names))
    for row, wish in enumerate(found):
        wish["seed"] = given[row] if isinstance(given, list) else None if given is None else numbered(given, row)
    return found


def _feeding(streamer, input_ids: Tensor, also: Callable[[Tensor], None] | None) -> Callable[[Tensor], None]:
    """A token_callback that gives a streamer the prompt, now, and each token."""
    if len(input_ids) != 1:
        raise PyargsError(f"a streamer takes one prompt, not {len(input_ids)}: use token_callback for a batch")
    streamer.put(input_ids.cpu())

    def feed(tokens: Tensor) -> None:
        if also is not None:
            also(tokens)
        streamer.put(tokens.cpu())

    return feed
