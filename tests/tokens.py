"""Tiny tokenizers of the usual kinds: byte-level BPE (GPT-2, Llama 3), sentencepiece (Llama 2, Gemma), unigram (T5)."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "the cat sat on the mat and the dog ate the hat",
    "What makes a good cup of tea?  Hot water, good leaves,\n\n  and time...",
    "Grüße aus Köln, naïve café, 日本語 and emoji 🙂🙂 👩‍🔬",
    "def f(x):\n    return x + 1  # 12345",
] * 3
TEMPLATES = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}",
    "{% for message in messages %}{{ '[' + message['role'] + ']: ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]:' }}{% endif %}",
)
SPECIAL = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


@cache
def byte_level(size: int = 330):
    """Tokens of bytes; a character may be cut anywhere."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
    tokenizer.chat_template = TEMPLATES[0]
    return tokenizer


@cache
def sentencepiece(size: int = 400):
    """Tokens of characters, with a space in front of the text, and of single bytes for what it does not know."""
    space, special = "▁", ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size - 256, special_tokens=special, show_progress=False)
    trained.train_from_iterator(TEXTS[:2], trainer)
    found = trained.get_vocab()
    kept = sorted(found, key=found.get)
    vocab = {token: place for place, token in enumerate([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *kept[3:]])}
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
    tokenizer.chat_template = TEMPLATES[1]
    return tokenizer


@cache
def unigram(size: int = 120):
    """As T5 and older models have it: what it does not know is one unknown token."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    inner.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIAL)
    tokenizer.chat_template = TEMPLATES[0]
    return tokenizer


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece, "unigram": unigram}
