"""The settings that methods share; a method's own Config adds its fields and may change a default."""

from __future__ import annotations

from dataclasses import dataclass

from pyargs.config import check_fields, option
from pyargs.errors import PyargsError


@dataclass
class ModelConfig:
    """What every method has."""

    backbone: str = option("smollm2-135m", "the language model: embedded name, local folder or hub name")
    dtype: str = option(
        "float32",
        "of the backbone; heads, rewards and losses are always float32, since bfloat16 makes ties of different rewards",
        choices=["float32", "bfloat16"],
    )
    max_length: int = option(
        512,
        "most tokens of prompt + response; longer prompts are cut, never template or response (PAL's code; paper silent)",
        least=1,
    )
    seed: int = option(0, "seed of start values and of the order of pairs; the paper has 3 seeds")

    def __post_init__(self):
        check_fields(self)


@dataclass
class FitConfig(ModelConfig):
    """What every method that trains the language model has. A method's own Config adds its fields and may change a default."""

    lora_rank: int = option(8, "LoRA rank (paper)", least=1)
    lora_alpha: float = option(16.0, "LoRA alpha (paper)")
    lora_dropout: float = option(0.0, "dropout before LoRA (paper silent; 0, as it names none)", least=0)
    rslora: bool = option(True, "scale LoRA by alpha / sqrt(rank) (paper)")
    lora_lr: float = option(5e-5, "learning rate of LoRA (paper)")
    target_modules: list[str] | None = option(
        None,
        "layers with LoRA (default: PEFT's choice for the family, mostly q_proj and v_proj, or all linear layers where it "
        "has none, as for Phi-3, OLMo2, Granite, SmolLM3; all-linear: all of them; paper silent)",
    )
    epochs: float | None = option(
        None,
        "passes over the train pairs (default: 2 with LoRA, as for PRISM and Pref-LaMP; 20 with a frozen backbone, where a "
        "pass takes a second; paper silent)",
    )
    batch_size: int = option(32, "pairs per step (most of the methods' own codes; paper silent)", least=1)
    accumulation: int = option(1, "parts of a batch whose gradients are added up, to save memory (paper silent)", least=1)
    warmup: float = option(0.03, "share of the steps with rising rate, then cosine (VPL, P-DPO; paper silent)", least=0)
    max_grad_norm: float = option(
        0.0,
        "largest norm of a step's gradient, longer ones are clipped; 0: no clipping, though the Trainer of transformers has 1 "
        "(paper silent)",
        least=0,
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory (paper silent)")
    checkpoint_steps: int = option(
        100, "steps between checkpoints, from which a killed training with LoRA continues (paper silent)", least=1
    )


@dataclass
class HeadConfig(FitConfig):
    """What every method with a reward head has."""

    freeze_backbone: bool = option(False, "train the head alone on features that are computed once and cached (not the paper)")


@dataclass
class AdaptConfig(HeadConfig):
    """What every method with vectors that are fitted to new users has."""

    adapt_steps: int = option(500, "full-batch Adam steps for new users (LoRE's code; paper silent)", least=0)


def epochs(config: FitConfig) -> float:
    """Passes over the train pairs; the default depends on whether the backbone is frozen."""
    if config.epochs is None:
        return 20.0 if getattr(config, "freeze_backbone", False) else 2.0
    if config.epochs <= 0:
        raise PyargsError(f"epochs must be > 0, got {config.epochs}")
    return config.epochs
