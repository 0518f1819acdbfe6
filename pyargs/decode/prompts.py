"""Text at the edge of the decoders: models as they are decoded with, and answers to any number of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pyargs import files
from pyargs.decode import args, best_of_n, genarm, unguided
from pyargs.decode.backends import cpu
from pyargs.decode.request import numbered, weights
from pyargs.errors import PyargsError
from pyargs.files import short_hash
from pyargs.lm import hub
from pyargs.lm.loading import load_lm
from pyargs.lm.structure import eager
from pyargs.lm.tokenize import encode_prompt, left_pad
from pyargs.models import load_model
from pyargs.models.folder import device_or_default, locate, read_config
from pyargs.models.token_reward import TokenReward
from pyargs.models.user_policy import UserPolicy
from pyargs.ops.library import has_extension
from pyargs.progress import progress_bar
from pyargs.store import Store
from pyargs.types import Decoded
from pyargs.user_ids import user_ids


def load_pair(policy: str | None, model: str, *, dtype: str = "float32", backbone: str | None = None):
    """A policy and the model that guides it; weights that both rest on are loaded once.

    backbone: the place that the model's backbone was moved to.

    A UserPolicy answers by itself: it takes no policy, and its own language model stands in the place of one.
    """
    config = read_config(locate(model))
    if config["kind"] == "user_policy":
        if policy is not None:
            raise PyargsError(f"{model} is a policy itself ({config.get('method')}): leave --policy out")
        own = load_model(model, backbone=backbone).merge()
        return own.lm, own
    if policy is None:
        raise PyargsError(
            f"{model} is a {config['kind'].replace('_', ' ')} ({config.get('method')}): name the --policy that it guides"
        )
    lm, tokenizer = load_lm(policy, dtype=dtype)
    if config["kind"] == "reward_model" and (backbone or config.get("backbone")) == policy and config.get("dtype") == dtype:
        own = load_model(model, backbone=lm.get_decoder(), tokenizer=tokenizer, device=lm.device)
        return lm, own if lm.device.type == "cuda" else own.merge()  # a GPU reads the weights once for both
    return lm, load_model(model, backbone=backbone).merge()


def decode_prompts(
    policy, model, prompts, users, *, batch_size: int = 8, best_of: int = 0, progress: str = "decode", **more
) -> Iterator[tuple[list[int], list[list[int]], Decoded]]:
    """Answers to any number of prompts, batch by batch of similar prompts, each for its user, in any order.

    A RewardModel guides through `args`, or picks the best of `best_of` samples; a TokenReward likewise through `tokenwise`; a
    UserPolicy answers by itself. prompts: str or messages; users: one id each; reward_weight: one for all, or a list with one
    for each; seed: each prompt samples by this and its number, whatever batch it is in; the rest as for `pyargs.generate`.
    Yields (numbers of the prompts, their ids, Decoded).
    """
    tokenizer, room = model.tokenizer, model.about.get("max_length")
    own = isinstance(model, UserPolicy)
    prompts, users = list(prompts), user_ids(users)
    if len(prompts) != len(users):
        raise PyargsError(f"{len(prompts)} prompts but {len(users)} users: name one user for each prompt")
    encoded = [
        model.prompt_ids(prompt, user, room) if own else encode_prompt(tokenizer, prompt, room)
        for prompt, user in zip(prompts, users, strict=True)
    ]
    token_reward, everything = isinstance(model, TokenReward), more.get("num_candidates", 0) is None
    if best_of and own:
        raise PyargsError("best_of needs a reward model to pick with: this model answers by itself")
    if best_of and more.get("do_sample"):
        raise PyargsError("best_of samples anyway: leave do_sample out")
    if everything and not (token_reward and not best_of):
        raise PyargsError("only a TokenReward (GenARM) that guides has rewards for the whole vocabulary: leave it out")
    if more.get("eos_reward", "") is None:
        del more["eos_reward"]  # the decoder's own
    elif "eos_reward" in more and (own or token_reward or best_of):
        raise PyargsError("eos_reward is about the head of a RewardModel that guides: leave it out")
    if more.get("temperature", 0.0) is None:
        del more["temperature"]  # each decoder's own
    weight, seed = more.pop("reward_weight", None), more.pop("seed", 0)
    each = None if weight is None else weights(weight, len(encoded)).expand(len(encoded)).tolist()
    sampled = own and more.get("do_sample")
    batch_size = 1 if best_of or sampled else batch_size  # transformers samples a whole batch by one seed
    # One user's demonstrations are read once where the user's prompts are neighbours.
    alike = own and model.demonstrations is not None and cpu.possible(model.lm)
    order = sorted(range(len(encoded)), key=lambda i: encoded[i] if alike else len(encoded[i]))
    with progress_bar(total=len(order), desc=progress, unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            take = order[start : start + batch_size]
            some, their, seeds = [encoded[i] for i in take], [users[i] for i in take], [numbered(seed, i) for i in take]
            length = {name: more[name] for name in ("max_new_tokens", "temperature") if name in more}
            if best_of:
                (decoded,), _ = best_of_n.generate(policy, model, some, their, n=best_of, seed=seeds, **length)
            elif own:
                decoded = unguided.generate(model, some, their, do_sample=bool(sampled), seed=seeds[0], **length)
            else:
                generate = genarm.generate if token_reward else args.generate
                ids, mask = left_pad(some, pad_id=0)
                decoded = generate(
                    policy, model, ids, mask, their, reward_weight=each and [each[i] for i in take], seed=seeds, **more
                )
            yield take, some, decoded
            bar.update(len(take))


def greedy_answers(
    policy: str,
    prompts: Sequence[str],
    *,
    dtype: str = "float32",
    max_new_tokens: int = 64,
    max_tokens: int = 512,
    batch_size: int = 8,
) -> list[str]:
    """The policy's own greedy answer to each prompt, kept in `$PYARGS_CACHE/answers`: a killed run goes on where it was.

    policy: embedded name, local folder or hub name; max_tokens: longest prompt, cut as `encode_prompt` does.
    """
    settings = {"policy": hub.identity(policy), "dtype": dtype, "max_new_tokens": max_new_tokens, "max_tokens": max_tokens}
    settings |= {"native": has_extension and not eager(), "device": device_or_default(None).type}  # which may round otherwise
    with Store(files.cache_dir() / "answers" / f"{short_hash(settings)}.sqlite") as store:
        found = store.get(prompts)
        missing = sorted(set(prompts) - found.keys())
        if missing:
            model = UserPolicy(*load_lm(policy, dtype=dtype), about={"max_length": max_tokens})
            users = [""] * len(missing)  # it knows none
            for numbers, _, decoded in decode_prompts(
                None, model, missing, users, batch_size=batch_size, max_new_tokens=max_new_tokens, progress="answers"
            ):
                texts = decoded.texts(model.tokenizer)
                new = {missing[i]: text.encode() for i, text in zip(numbers, texts, strict=True)}
                store.put(new)
                found |= new
    return [found[prompt].decode() for prompt in prompts]
