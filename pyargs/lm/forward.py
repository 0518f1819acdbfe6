"""Passes of any decoder-only model of transformers: over packed responses, or step by step behind a cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyargs.errors import PyargsError
from pyargs.lm.bits import check_plain
from pyargs.lm.cache import additive, alike, cache_name, can_share, check_layers, evaluating, parameters, positions
from pyargs.lm.structure import PROBING, logits_divisor, outline, structure, unwrapped
from pyargs.lm.tokenize import Packed, pack
from pyargs.progress import progress_bar


def border(model: nn.Module) -> int | None:
    """The length from which rotary embeddings have other frequencies (longrope); None where they never change."""
    turns = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for rope in (turns, *(value for value in turns.values() if isinstance(value, dict))):
        if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings"):
            return rope["original_max_position_embeddings"]
    return None


def check_lengths(model: nn.Module, shortest: int, longest: int) -> None:
    """Raises PyargsError where a batch has texts on both sides of the length at which rotary embeddings change (longrope): the
    longest row would set the embeddings of all rows, and what is in a cache would keep the old ones."""
    place = border(model)
    if place and shortest <= place < longest:
        raise PyargsError(
            f"{type(model).__name__} counts positions otherwise in texts of more than {place} tokens (longrope), all "
            f"rows of a batch alike: keep prompts with answers on one side of it (here {shortest} to {longest} tokens)"
        )


def packed_states(decoder: nn.Module, packed: Packed, inputs_embeds: Tensor | None = None) -> Tensor:
    """Last-layer hidden states [R, L, D] of a packed batch; `decoder` is a model without its output layer.

    inputs_embeds [R, L, D]: what stands in the place of the ids' embeddings (soft prompts).
    """
    return _packed_pass(decoder, packed, inputs_embeds).last_hidden_state


def _packed_pass(model: nn.Module, packed: Packed, inputs_embeds: Tensor | None):
    check_plain(model)
    inputs = {"input_ids": packed.input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
    if "longrope" in str(getattr(model.config, "rope_parameters", None)):  # asks the device
        length = packed.prompt_end + packed.end - packed.start
        check_lengths(model, int(length.min()), int(length.max()))
    if packed.attention_mask is None:  # one response a row, padding on the right: a causal pass never sees the padding
        return model(**inputs, use_cache=False)
    return model(
        **inputs, attention_mask=additive(packed.attention_mask, model), position_ids=packed.position_ids, use_cache=False
    )


def spans(states: Tensor, packed: Packed, *, predicting: bool = False) -> tuple[Tensor, Tensor]:
    """States of each response's tokens, padded: [S, T, ...] and mask [S, T].

    predicting: the state that predicts each token instead (of the prompt's last token for the first one).
    """
    length = packed.end - packed.start
    offset = torch.arange(int(length.max()), device=states.device)
    mask = offset < length.unsqueeze(1)
    place = packed.start.unsqueeze(1) + offset - (1 if predicting else 0)
    if predicting:
        place[:, 0] = packed.prompt_end - 1
    place = place.clamp(max=states.shape[1] - 1)
    return states[packed.row.unsqueeze(1), place], mask


Sequences = Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]


ROW = 512
"""Tokens of a packed row beyond which further responses to the same prompt go to another row with the prompt repeated: the
attention mask grows with the square of the row."""


def batches(
    groups: Sequences, decoder: nn.Module, max_tokens: int, progress: str
) -> Iterator[tuple[list[tuple[int, int]], Packed]]:
    """Prompts with their responses in packed batches of similar length.

    At most `max_tokens` padded tokens make a batch (one row at least), which bounds the memory of a pass. Yields (group,
    response) for each response of the batch, and the batch.
    """
    rows: list[tuple[int, list[int]]] = []  # a group and some of its responses
    size: list[int] = []
    for group, (prompt, several) in enumerate(groups):
        for number, response in enumerate(several):
            if number == 0 or size[-1] + len(response) > max(ROW, len(prompt) + len(several[number - 1]) + len(response)):
                rows.append((group, []))
                size.append(len(prompt))
            rows[-1][1].append(number)
            size[-1] += len(response)
    order = sorted(range(len(rows)), key=size.__getitem__)
    share = can_share(decoder)
    with progress_bar(total=len(rows), desc=progress, unit="row", hide=len(rows) < 32) as bar:
        while order:
            take = [order.pop()]
            while order and size[take[0]] * (len(take) + 1) <= max_tokens:
                take.append(order.pop())
            some = [rows[i] for i in take]
            packed = pack(
                [groups[g][0] for g, _ in some], [[groups[g][1][n] for n in numbers] for g, numbers in some], share=share
            )
            yield [(g, n) for g, numbers in some for n in numbers], packed
            bar.update(len(take))


def token_logprobs(model: nn.Module, packed: Packed, inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log pi(y_t | x, y_<t) of packed responses, float32 [S, T] with 0 where the mask [S, T] is false.

    The output layer is applied to the positions that predict a response token only, 512 at a time, and with gradients each
    such part is computed again in the backward pass: no [T, V] tensor of a whole batch ever exists. Where the logits are more
    than that layer's (`plain_output_layer`), the whole model is called, and one does.
    """
    plain = plain_output_layer(model)
    found = (
        packed_states(model.get_decoder(), packed, inputs_embeds)
        if plain
        else _packed_pass(model, packed, inputs_embeds).logits
    )
    found, mask = spans(found, packed, predicting=True)
    tokens, _ = spans(packed.input_ids, packed)

    def part(found: Tensor, ids: Tensor) -> Tensor:
        logits = logits_of(model, found) if plain else found
        return logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    scores = [
        checkpoint(part, one, ids, use_reentrant=False) if one.requires_grad else part(one, ids)
        for one, ids in zip(found[mask].split(512), tokens[mask].split(512), strict=True)
    ]
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(mask, torch.cat(scores)), mask


def logits_of(model: nn.Module, states: Tensor) -> Tensor:
    """Logits [..., V] of last states [..., D] where `plain_output_layer` says that these are all it takes."""
    logits, divisor = model.get_output_embeddings()(states), logits_divisor(model)
    return logits if divisor == 1 else logits / divisor


_plain: WeakKeyDictionary[nn.Module, tuple[dict, bool]] = WeakKeyDictionary()


def plain_output_layer(model: nn.Module) -> bool:
    """Whether the model's logits are its output layer times its last state, divided by `logits_divisor`, without soft caps,
    other scales or hooks.

    Tried once, and again when the model's config or attributes have changed. In the trial the output layer gives large
    numbers, which any later cap, scale or shift would change.
    """
    try:
        now = structure(model, below=False) | {"divisor": (divisor := logits_divisor(model))}
    except PyargsError:
        return False
    before, plain = _plain.get(model, (None, False))
    if before != now:
        seen, said, thread = [], [], threading.get_ident()

        def instead(_, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
            if threading.get_ident() != thread:  # another thread's pass is as ever
                return None
            seen.append(inputs[0])
            said.append(torch.linspace(-1e4, 1e4, output.numel(), dtype=output.dtype, device=output.device).view_as(output))
            return said[0]

        probe = torch.arange(4, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
        with PROBING:
            hook = model.get_output_embeddings().register_forward_hook(instead)
            try:
                with torch.no_grad(), evaluating(model):
                    logits, states = model(probe).logits, model.get_decoder()(probe).last_hidden_state
            finally:
                hook.remove()
        same = len(said) == 1 and said[0].shape == logits.shape and torch.equal((said[0] / divisor).float(), logits.float())
        plain = same and alike(seen[0], states)
        _plain[model] = now, plain
    return plain


def embedded(model, prompts: Sequence[Sequence[int]], soft: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [B, T, D] of prompts with `soft` [B, L, D] before them, padded on the left, and their mask int64 [B, T]."""
    table = model.get_input_embeddings()
    embeddings = [table(torch.tensor(list(prompt), device=model.device)) for prompt in prompts]
    parts = [torch.cat([before.to(text), text]) for before, text in zip(soft, embeddings, strict=True)]
    longest = max(map(len, parts))
    embeds = torch.stack([torch.cat([p.new_zeros(longest - len(p), p.shape[1]), p]) for p in parts])
    mask = torch.stack([torch.arange(longest, device=model.device) >= longest - len(p) for p in parts]).long()
    return embeds, mask


def forward_step(model, ids: Tensor, mask: Tensor, cache, padded: bool, **more):
    """One pass over new tokens [B, n], or their embeddings [B, n, D], behind a cache (None at first): output and cache.

    mask [B, all tokens so far]; padded: whether it has zeros. For any model of transformers, whatever it calls its cache.
    Raises PyargsError for models that take no cache, or that a cache or padding changes.
    """
    model = unwrapped(model)
    if cache is None:
        check_layers(model)
    # Without padding a mask only costs time.
    masked = padded and (mask.shape[1] == ids.shape[1] or masks_every_step(model))
    return _step(model, ids, mask, cache, masked, **more)


def _step(model, ids: Tensor, mask: Tensor, cache, masked: bool, **more):
    known, name = parameters(type(model)), cache_name(model)
    inputs = {"inputs_embeds" if ids.is_floating_point() else "input_ids": ids, name: cache, "use_cache": True, **more}
    if masked:
        inputs["attention_mask"] = mask
    inputs["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    output = model(**{key: value for key, value in inputs.items() if key in known})
    if output.get(name) is None:
        raise PyargsError(f"{type(model).__name__} keeps its state to itself and returns no cache: it can not serve here")
    return output, output[name]


_every_step: WeakKeyDictionary[nn.Module, tuple[list, bool | None]] = WeakKeyDictionary()
"""By model: its modules when it was tried, and what `_right_when_padded` found."""


def masks_every_step(model) -> bool:
    """Whether the model needs the mask of a padded batch at every step, as attention does, or only with the prompt, as models
    with a state do. Tried on a few tokens, and again when its modules have changed.

    Raises PyargsError for a model that gives padded rows other states in both ways.
    """
    now = outline(model)
    before, found = _every_step.get(model, (None, None))
    if before != now:
        found = next((every for every in (True, False) if _right_when_padded(model, every)), None)
        _every_step[model] = now, found
    if found is None:
        raise PyargsError(
            f"{type(model).__name__} does not leave padding out: its answer to a short prompt would depend on the longer ones "
            "beside it. Give prompts of one length, or one prompt at a time (max_rows=1)"
        )
    return found


@torch.no_grad()
def _right_when_padded(model, every_step: bool) -> bool:
    """Whether a padded row beside a longer one has the same states as alone. Both are read token by token, so that a hook on
    the newest token, say, acts alike."""
    ids = (torch.arange(16, device=model.device) % model.config.get_text_config(decoder=True).vocab_size).view(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        cache, got, padded = None, [], not bool(mask.all())
        for start, end in ((0, -2), (-2, -1), (-1, None)):
            masked = padded and (start == 0 or every_step)
            output, cache = _step(model, ids[:, start:end], mask[:, :end], cache, masked)
            got.append(output[0][:, -1])
        return torch.stack(got, 1)

    with evaluating(model):
        alone = torch.cat([read(ids[row : row + 1, start:], mask[row : row + 1, start:]) for row, start in enumerate((4, 0))])
        try:
            return alike(read(ids, mask), alone)
        except PyargsError:
            raise
        except Exception:  # whatever another package's model stumbles over: this is not the way to call it
            return False
