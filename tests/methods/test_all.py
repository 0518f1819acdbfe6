"""What holds of every method of the folder, with a language model: seeded, saved, resumed, adapted and decoded alike."""

from __future__ import annotations

import warnings

import pytest
import torch
from small import METHODS, answers, config_of, scores

from pyargs import load_model
from pyargs.data import of_split
from pyargs.errors import PyargsError, UnknownUser
from pyargs.lm.loading import load_lm
from pyargs.lm.tokenize import encode_prompt, left_pad, pack
from pyargs.models.reward_model import RewardModel
from pyargs.training import adapt, hooks, trainer

# What methods.md and the paper say, held apart from the code.
DEFAULTS = {
    "global_rm": dict(hidden=64, head_lr=1e-4, lora_lr=5e-5, lora_rank=8, lora_alpha=16, rslora=True, pool="last",
                      step_reward="token", dtype="float32", max_length=512, batch_size=32, warmup=0.03, lora_dropout=0.0),
    "lore": dict(rank=8, head_lr=0.5, divisor=100, adapt_lr=0.1, adapt_steps=500, adapt_init="zeros", pool="last"),
    "pref": dict(rank=8, head_lr=1e-3, strength=0.02, reg="weight_decay", svd_rounds=10, svd_noise=0.1, adapt_lr=1e-2,
                 adapt_steps=500, adapt_l2=0.02, adapt_init="mean", init="svd", votes="signed"),
    "pal": dict(variant="B", rank=8, width=0, weighting="cumulative", projector_lr=1e-4, projector_decay=0.01, user_lr=5e-3,
                prototype_lr=5e-3, scale_lr=0.1),
    "vpl": dict(latent=512, vae_lr=1e-4, head_lr=1e-4, head_decay=1e-3, kl=3e-6, kl_period=10_000, min_context=2,
                max_context=8, eval_z="normalized", adapt_pairs="chunks"),
    "mpu": dict(hidden=64, head_lr=1e-3, pool="last", adapt_lr=1e-3, adapt_l2=0.01, adapt_steps=500, adapt_init="initial"),
    "genarm": dict(beta=0.05, gamma=0.0, lora_lr=5e-4),
    "pdpo": dict(soft_tokens=8, clusters=0, beta=0.5, alpha=0.5, soft_lr=1e-3, lora_lr=5e-5, init="words", adapt_lr=1e-3,
                 adapt_steps=200),
    "icl": dict(shots=8, retrieve="random", show="pair", content_tokens=200, max_length=512, demonstration_tokens=1536),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_papers_or_those_of_its_sources(name):
    config = hooks.method(name).Config()
    assert {key: getattr(config, key) for key in DEFAULTS[name]} == DEFAULTS[name]


VARIANTS = [(name, {}) for name in METHODS] + [
    ("pal", {"variant": "B"}),
    ("mpu", {"pool": "mean"}),
    ("global_rm", {"pool": "mean", "step_reward": "prefix_mean"}),
    ("lore", {"alternate": True}),
    ("pdpo", {"clusters": 2}),
    ("icl", {"shots": 0}),
    ("icl", {"show": "chosen"}),
]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: "-".join([v[0], *map(str, v[1].values())]))
def tuned(request, lm_folder, rows, tmp_path_factory):
    """(name, config, model after full training, its folder before new users, the same with new users)."""
    name, more = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PReF on sparse data
        config = config_of(name, lm_folder, **more)
        model = trainer.train(name, rows, config)
        folder = tmp_path_factory.mktemp("trained") / "model"
        model.save_pretrained(folder)
        adapt.adapt(model, rows)
    return name, config, model, folder


def test_saved_and_loaded_models_score_the_same(tuned, rows, tmp_path):
    _, _, model, _ = tuned
    model.save_pretrained(tmp_path / "m")
    again = load_model(tmp_path / "m")
    query = of_split(rows, "query")
    assert torch.equal(scores(model, query), scores(again, query))
    assert scores(again, query).isfinite().all() and again.about == model.about


def test_full_training_is_seeded_and_leaves_the_base_alone(tuned, rows, lm_folder):
    name, config, model, folder = tuned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = trainer.train(name, rows, config)
    saved = load_model(folder)
    for key, value in saved.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    base, _ = load_lm(lm_folder)
    now = {key.replace(".base_layer", ""): value for key, value in model.backbone.state_dict().items()}
    assert all(torch.equal(value, now[key]) for key, value in base.get_decoder().state_dict().items())
    if hooks.method(name).loss:
        moved = [value for key, value in model.backbone.state_dict().items() if "lora_B" in key]
        assert moved and all(value.abs().sum() > 0 for value in moved)  # LoRA's B starts at zero


def test_the_query_set_cannot_reach_adaptation(tuned, rows):
    name, _, model, folder = tuned
    other = load_model(folder)
    new = adapt.adapt(other, of_split(rows, "support"))
    assert new == ["new_00", "new_01", "new_02"]
    query = of_split(rows, "query")
    assert torch.equal(scores(model, query), scores(other, query))
    with pytest.raises(PyargsError, match="no rows with split 'support'"):
        adapt.adapt(other, query)


def test_each_user_is_adapted_as_if_alone(tuned, rows):
    name, _, model, folder = tuned
    other = load_model(folder)
    keep = [
        i
        for i, (user, split) in enumerate(zip(rows["user_id"], rows["split"], strict=True))
        if user == "new_00" and split == "support"
    ]
    adapt.adapt(other, rows.select(keep))
    for kind, table in other.users.vectors.items():
        assert torch.equal(table[other.users.ids["new_00"]], model.users.vectors[kind][model.users.ids["new_00"]])
    mine = of_split(rows, "query").filter(lambda row: row["user_id"] == "new_00")
    torch.testing.assert_close(scores(model, mine).double(), scores(other, mine).double(), atol=2e-3, rtol=2e-3)


def test_unknown_users_raise(tuned, rows):
    name, config, model, _ = tuned
    stranger = of_split(rows, "query").select(range(2)).map(lambda row: {**row, "user_id": "new_07"})
    if model.users.personal or getattr(model, "demonstrations", None):
        with pytest.raises(UnknownUser, match="new_0"):
            scores(model, stranger)
    else:
        assert scores(model, stranger).isfinite().all()


def test_every_kind_of_model_decodes_and_a_row_does_not_depend_on_its_batch(tuned, rows, lm_folder):
    """Prompts of several lengths (left padding), users and weights in one batch, and each of them alone."""
    name, config, model, _ = tuned
    policy, _ = load_lm(lm_folder)
    query = of_split(rows, "query").select([0, 9, 17, 3])
    prompts = [row["prompt"] + " please" * i for i, row in enumerate(query)]
    users, weights = list(query["user_id"]), [0.0, 0.5, 5.0, 1.0]
    if hasattr(model, "head") and model.separate_prompt:
        with pytest.raises(PyargsError, match="PAL-B"):
            answers(policy, model, prompts, users, reward_weight=weights)
        assert len(answers(policy, model, prompts, users, best_of=3)) == 4
        return
    together = answers(policy, model, prompts, users, reward_weight=weights, batch_size=4)
    alone = [answers(policy, model, [p], [u], reward_weight=w)[0] for p, u, w in zip(prompts, users, weights, strict=True)]
    assert together == alone
    if hasattr(model, "pair_scores"):  # weight 0 is the policy's own greedy answer
        plain = policy.generate(
            **dict(zip(("input_ids", "attention_mask"), left_pad_prompt(model, prompts[0]), strict=True)),
            max_new_tokens=6,
            do_sample=False,
        )
        ids = plain[0, -len(together[0]) :].tolist() if together[0] else []
        assert together[0] == ids or together[0] == plain[0][left_pad_prompt(model, prompts[0])[0].shape[1] :].tolist()


def left_pad_prompt(model, prompt):
    return left_pad([encode_prompt(model.tokenizer, prompt)], 0)


@pytest.mark.parametrize("name", [name for name in METHODS if hooks.method(name).loss])
def test_a_killed_training_goes_on_where_it_was(name, rows, lm_folder, tmp_path, monkeypatch):
    """Stopped in the fifth step, with a checkpoint after every second one: the result is that of an undisturbed run."""
    config = config_of(name, lm_folder, checkpoint_steps=2, batch_size=12)
    recipe, folder = hooks.method(name), tmp_path / "checkpoints"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = trainer.train(name, rows, config)
        plain, calls = recipe.loss, []

        def stops(model, batch, config):
            calls.append(batch.step)
            if batch.step == 5:
                raise KeyboardInterrupt
            return plain(model, batch, config)

        with monkeypatch.context() as patch:
            patch.setattr(recipe, "loss", stops)
            with pytest.raises(KeyboardInterrupt):
                trainer.train(name, rows, config, checkpoints=folder)
        assert any(folder.iterdir())
        steps = []
        with monkeypatch.context() as patch:
            patch.setattr(recipe, "loss", lambda m, b, c: steps.append(b.step) or plain(m, b, c))
            again = trainer.train(name, rows, config, checkpoints=folder)
    assert steps[0] == 4
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", [name for name in METHODS if hooks.method(name).loss])
def test_bfloat16_backbones_have_float32_heads_and_losses(name, rows, lm_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_of(name, lm_folder, dtype="bfloat16", gradient_checkpointing=True, epochs=0.5)
        recipe, seen = hooks.method(name), []
        plain = recipe.loss
        recipe.loss = lambda *args: seen.append(plain(*args)) or seen[-1]
        try:
            model = trainer.train(name, rows, config)
        finally:
            recipe.loss = plain
    assert seen and all(value.dtype == torch.float32 and value.isfinite() for value in seen)
    for key, p in model.named_parameters():
        own = "lora_" in key or not key.startswith(("backbone.", "lm."))
        assert p.dtype == (torch.float32 if own else torch.bfloat16), key
    assert scores(model, of_split(rows, "train").select(range(4))).dtype in (torch.float32, torch.float64)


def first_batch(name: str, rows, config, monkeypatch):
    """(trained model, what its loss was given in the first step)."""
    seen, plain = [], hooks.method(name).loss
    with monkeypatch.context() as patch:
        patch.setattr(hooks.method(name), "loss", lambda m, b, c: seen.append(b) or plain(m, b, c))
        return trainer.train(name, rows, config), seen[0]


@pytest.mark.parametrize("name", [name for name in METHODS if hasattr(hooks.method(name).Config, "freeze_backbone")])
def test_a_frozen_backbone_gives_what_the_text_gives(name, rows, lm_folder, monkeypatch):
    """All pairs in one step, where LoRA is still zero: the loss sees the same either way, and so does `pair_scores`."""
    train = of_split(rows, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for more in ({}, {"variant": "B"}) if name == "pal" else ({},):
            _, text = first_batch(name, rows, config_of(name, lm_folder, batch_size=len(train), **more), monkeypatch)
            config = config_of(name, lm_folder, batch_size=len(train), freeze_backbone=True, **more)
            model, kept = first_batch(name, rows, config, monkeypatch)
            assert not any("lora" in key for key in model.state_dict())
            one, two = (seen.pair.argsort() for seen in (text, kept))
            assert torch.equal(text.pair[one], torch.arange(len(train))) and torch.equal(kept.pair[two], text.pair[one])
            assert torch.equal(text.user[one], kept.user[two])
            assert torch.equal(text.mask[one].sum(-1), kept.mask[two].sum(-1))  # behind them stands padding
            tokens = [seen.hidden[order][seen.mask[order]] for seen, order in ((text, one), (kept, two))]
            torch.testing.assert_close(*tokens, atol=2e-5, rtol=2e-5)
            if more:
                torch.testing.assert_close(text.prompt[one], kept.prompt[two], atol=2e-5, rtol=2e-5)
            with torch.no_grad():
                torch.testing.assert_close(model.rewards(text)[one], model.pair_scores(train)[1], atol=2e-5, rtol=2e-5)


def packed_pass(model, data, share: bool):
    """A dataset's pairs in one pass of the model, each behind its prompt."""
    encoded, pairs = model.encode(data)
    separately = getattr(model, "separate_prompt", False)  # the prompt stands among the responses
    responses = [[encoded[g][1][i] for i in ((0, c, r) if separately else (c, r))] for g, c, r in pairs]
    packed = pack([encoded[g][0] for g, _, _ in pairs], responses, share=share)
    rejected = torch.arange(1, len(pairs) + 1) * len(responses[0]) - 1
    with torch.no_grad():
        return model(rejected - 1, rejected, model.users.rows(data["user_id"]), **vars(packed))


def test_one_packed_pass_is_two_passes(tuned, rows):
    """A pair's responses behind one copy of their prompt, and each behind its own: the same within float32 rounding."""
    _, _, model, _ = tuned
    if not hasattr(model, "forward") or not hooks.method(model.about["method"]).loss:
        return
    one, two = (packed_pass(model, of_split(rows, "query").select(range(5)), share) for share in (True, False))
    field = "hidden" if isinstance(model, RewardModel) else "own"
    torch.testing.assert_close(getattr(one, field), getattr(two, field), atol=5e-5, rtol=5e-5)


def test_p_dpo_and_genarm_learn_to_stop(lm_folder, rows):
    """The end token is in what they train on, and in no reported score."""
    for name in ("genarm", "pdpo"):
        model = trainer.train(name, rows, config_of(name, lm_folder, epochs=0.2))
        data = of_split(rows, "train").select(range(2))
        encoded, _ = model.encode(data)
        stop = model.tokenizer.eos_token_id
        assert all(response[-1] == stop and stop not in response[:-1] for _, several in encoded for response in several)
        lengths = [len(model.tokenizer(row[side])["input_ids"]) for row in data for side in ("chosen", "rejected")]
        if name == "pdpo":
            assert model.pair_logprobs(data)[1].flatten().tolist() == lengths
