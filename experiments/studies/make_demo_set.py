"""Makes `pyargs/data/demo/answers.jsonl.gz`: four sampled answers of SmolLM2-135M to each prompt of `prompts.txt`.

    python -m experiments.studies.make_demo_set

About ten minutes on two cores. Eight candidates per prompt are sampled, two with each of four hidden system prompts, and
four are kept: first the shortest and the longest mean word length, then the lowest and the highest first-person rate.
The model hardly follows the system prompts, so nothing relies on them; they and the selection only widen the
spread. What is stored is the plain prompt, and preferences are labelled by what is measured on the answers.

A run that was stopped goes on where it was (`--candidates`). The texts depend on the seed, on the model and, through
rounding, on the CPU and on the versions of torch and transformers; `made.json` records them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
import sys
from pathlib import Path

from pyargs import files

DEMO = Path(__file__).parents[2] / "pyargs" / "data" / "demo"
SYSTEM = (
    None,  # the chat template's own
    "You chat with a friend. Use short, simple, everyday words.",
    "You are a professor. Answer formally and precisely, with academic vocabulary.",
    "You are a person, not an assistant. Tell what I did, what I felt, and what my family and I like.",
)
DRAWS, KEEP = 2, 4
TEMPERATURE, TOP_K, MAX_NEW_TOKENS = 0.8, 50, 40
BATCH = 40  # prompts per batch; divides their number, so that a batch has one system prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument("--candidates", type=Path, help="where the candidates are kept (default: in the cache)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    import transformers

    from pyargs import files
    from pyargs.lm import hub

    prompts = (DEMO / "prompts.txt").read_text(encoding="utf-8").splitlines()
    folder = Path(hub.resolve(args.model))
    path = args.candidates or files.cache_dir() / f"demo-candidates-{args.seed}.jsonl"
    candidates = sample_all(prompts, folder, path, args.seed)
    rows = [
        {"prompt": i, "answer": j, "text": text}
        for i in range(len(prompts))
        for j, text in enumerate(select([row["text"] for row in candidates if row["prompt"] == i]))
    ]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (args.out / "answers.jsonl.gz").write_bytes(gzip.compress(data, 9, mtime=0))
    made = {
        "command": " ".join(["python", "-m", "experiments.studies.make_demo_set", *sys.argv[1:]]),
        "seed": args.seed,
        "model": args.model,
        "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "system_prompts": SYSTEM,
        "draws": DRAWS,
        "dtype": "bfloat16",
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "max_new_tokens": MAX_NEW_TOKENS,
        "answers": len(rows),
        "sha256": hashlib.sha256(data).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    files.write_json(args.out / "made.json", made)


def sample_all(prompts: list[str], folder: Path, path: Path, seed: int) -> list[dict]:
    """All candidates, each {"prompt": its number, "style", "text"}; those in the file already are not sampled again."""
    import torch
    import transformers
    from tqdm import tqdm

    jobs = [(style, i) for style in range(len(SYSTEM)) for _ in range(DRAWS) for i in range(len(prompts))]
    batches = [jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH)]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    lines = lines[: len(lines) // BATCH * BATCH]  # a batch has one seed: half of one is thrown away
    rows = [json.loads(line) for line in lines]
    if len(rows) == len(jobs):
        return rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16
    ).eval()  # samples: rounding is harmless
    files.write_text(path, "".join(lines))
    with open(path, "a", encoding="utf-8") as file:
        for number in tqdm(range(len(rows) // BATCH, len(batches)), unit="batch"):
            batch = batches[number]
            torch.manual_seed(seed * 100_003 + number)
            texts = sample(model, tokenizer, [prompts[i] for _, i in batch], SYSTEM[batch[0][0]])
            for (style, i), text in zip(batch, texts, strict=True):
                rows.append({"prompt": i, "style": style, "text": text})
                file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            file.flush()
    return rows


def sample(model, tokenizer, prompts: list[str], system: str | None) -> list[str]:
    """One sampled answer to each prompt."""
    import torch

    hint = [] if system is None else [{"role": "system", "content": system}]
    chats = [[*hint, {"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
    with torch.inference_mode():
        out = model.generate(**inputs, **settings, max_new_tokens=MAX_NEW_TOKENS)
    answers = out[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in answers]


def select(texts: list[str]) -> list[str]:
    """The four to keep, all different, in the order of the candidates."""
    from pyargs.data import demo

    rest = [text for text in dict.fromkeys(texts) if len(text.split()) >= 5]
    kept = []
    for name in ("word_length", "first_person"):
        for end in (min, max):
            kept.append(end(rest, key=lambda text: demo.attribute(name, text)))
            rest.remove(kept[-1])
    return sorted(kept, key=texts.index)


if __name__ == "__main__":
    main()
