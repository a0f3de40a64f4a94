"""Recipes: every setting of a training in one small YAML file."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Recipe:
    """What the recipes of all kinds share; diffusers' names where it has them.

    ``base`` is a model folder in diffusers' layout, or "tiny" for our small networks from scratch,
    whose VAE is then trained first (the ``vae_*`` settings). With
    ``pretrained_vae_model_name_or_path``, a folder as ``base`` is or the name of a bundled model,
    they start with its VAE instead, which is trained on unless ``vae_steps`` is 0.
    """

    kind: ClassVar[str]

    base: str = "CompVis/stable-diffusion-v1-4"
    resolution: Any = 512  # int, or [height, width]
    seed: int = 0
    max_train_steps: int = 15000
    train_batch_size: int = 512
    gradient_accumulation_steps: int = 1  # batches in one step of the optimiser
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 20  # steps in a row without a finite loss, after which training ends
    snr_gamma: float | None = None  # Min-SNR weights of the loss; 5 is usual
    ema_decay: float = 0.0  # 0 switches the moving average off
    condition_dropout: float = 0.1  # all conditions dropped together: the e(0, 0) of Eq. 4 and 7
    null_text: str = "zeros"
    high_noise_fraction: float | None = None  # share of t >= high_noise_from; null: even
    high_noise_from: int = 650
    crops_per_photo: int = 4
    min_zoom: float = 0.9
    colour_jitter: float = 0.0
    cache_dir: str | None = "auto"  # of latents; auto: <out>/latents, for this run; null: in memory
    random_flip: bool = False  # half of the crops mirrored, and with them signs and lettering
    checkpointing_steps: int = 200
    checkpoints_total_limit: int = 2
    validation_steps: int = 200
    mixed_precision: str = "no"  # or bf16; or fp16, on CUDA
    gradient_checkpointing: bool = False
    use_8bit_adam: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    torch_compile: bool = False
    report_to: str = "none"  # or tensorboard, or wandb
    logging_dir: str = "logs"  # of TensorBoard, in the model's folder
    save_dtype: str = "float32"  # float16 halves the folder; loading gives float32 either way
    push_to_hub: bool = False  # upload the finished folder to the Hugging Face Hub
    hub_model_id: str | None = None  # name, or owner/name; null: the folder's name
    hub_private_repo: bool = True  # a repository that nobody else sees
    lora_rank: int = 0  # 0: full fine-tuning; above: LoRA layers of that rank, and the encoder
    lora_alpha: int | None = None  # they count alpha / rank; null: lora_rank
    lora_target_modules: list[str] = field(  # of the UNet
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    train_text_encoder: bool = False  # by LoRA where the UNet is; with base "tiny" always
    pretrained_vae_model_name_or_path: str | None = None  # null: a VAE from scratch
    vae_steps: int = 1500
    vae_batch_size: int = 16
    vae_learning_rate: float = 3e-3
    vae_kl_weight: float = 1.5e-3

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        one = self.resolution
        sides = [one, one] if isinstance(one, int) else one
        if not isinstance(sides, (list, tuple)) or [type(s) for s in sides] != [int, int] or (
            min(sides) < 1
        ):
            raise ValueError(f"The recipe's resolution is {one!r}; give a number of pixels or "
                             "[height,width].")
        return (sides[0], sides[1])

    @property
    def dropout(self) -> tuple[float, float, float]:
        """Shares of samples that lose all conditions, the place alone, and the text alone."""
        return (self.condition_dropout, 0.0, 0.0)

    @property
    def encoder(self) -> str:
        """What the model has of an encoder of the place: "trained", "silent" or "none"."""
        return "none"

    def rate(self, parameter: str) -> float:
        """The learning rate of a parameter, by its name with the module's name before it."""
        return self.learning_rate

    def check(self) -> None:
        """Refuse, before any work, what cannot be trained: ValueError names the key."""
        dtypes = ("float32", "float16", "bfloat16")
        if self.save_dtype not in dtypes:
            raise ValueError(f"The recipe's save_dtype is {self.save_dtype!r}; it must be one of "
                             f"{', '.join(dtypes)}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"The recipe's mixed_precision is {self.mixed_precision!r}; it must "
                             "be no, bf16 or, on CUDA, fp16.")
        if self.report_to not in ("none", "tensorboard", "wandb"):
            raise ValueError(f"The recipe's report_to is {self.report_to!r}; it must be none, "
                             "tensorboard or wandb.")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"The recipe's snr_gamma is {self.snr_gamma}; it must be above 0, or "
                             "null for equal weights.")
        for key in ("gradient_accumulation_steps", "max_skipped_steps"):
            if getattr(self, key) < 1:
                raise ValueError(f"The recipe's {key} is {getattr(self, key)}; it must be at "
                                 "least 1.")
        if min(self.dropout) < 0 or sum(self.dropout) > 1:
            raise ValueError(f"The recipe's dropouts (all, place, text) are {self.dropout}: they "
                             "are shares of one draw, from 0 and at most 1 together.")
        share = self.high_noise_fraction
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"The recipe's high_noise_fraction is {share}; it is a share of the "
                             "time steps, from 0 to 1, or null for an even draw.")
        if self.lora_rank < 0 or (self.lora_alpha is not None and self.lora_alpha < 1):
            raise ValueError(f"The recipe's lora_rank is {self.lora_rank} and lora_alpha "
                             f"{self.lora_alpha}: a rank is at least 1, or 0 for full fine-tuning, "
                             "and alpha at least 1, or null for the rank.")
        vae = self.pretrained_vae_model_name_or_path
        if vae is not None and self.base != "tiny":
            raise ValueError(f"The recipe's pretrained_vae_model_name_or_path is {vae!r}, but the "
                             f"base {self.base} has a VAE: leave it null, or set base to tiny.")
        if self.base == "tiny" and self.vae_steps < 1 and vae is None:
            raise ValueError(f"The recipe's vae_steps is {self.vae_steps}, but the VAE of base: "
                             "tiny has learned nothing yet: give it steps, or a "
                             "pretrained_vae_model_name_or_path.")
        if self.lora_rank and self.base == "tiny":
            raise ValueError(f"The recipe's lora_rank is {self.lora_rank}, but the networks of "
                             "base: tiny have learned nothing yet: set it to 0, or give a base.")


@dataclass
class TextRecipe(Recipe):
    """How to train a text model of a dataset's captions, by default from scratch: the stand-in for
    Stable Diffusion in the miniature. From a base it is the baseline that is not told where."""

    kind = "text"

    base: str = "tiny"
    null_text: str = "empty"

    def check(self) -> None:
        super().check()
        if self.null_text != "empty":
            raise ValueError(f"The recipe's null_text is {self.null_text!r}; a text model has no "
                             "encoder to say so, and is read as 'empty', like Stable Diffusion.")


@dataclass
class GPSRecipe(Recipe):
    """How to train a GPS model of a city. Defaults are the paper's (Sec. 4.1, A.1).

    With ``condition: address`` it is told where by words (Fig. 8): a text model without an encoder,
    whose text is dropped as often as here anything is.
    """

    kind = "gps"

    condition: str = "gps"  # or address: of the dataset's column, after the caption
    condition_dropout: float = 0.05
    gps_dropout: float = 0.05  # the GPS tokens alone zeroed: the e(p, 0) of Eq. 4
    text_dropout: float = 0.05  # the text alone dropped
    axis_embedding: bool = True
    match_text_scale: bool = True
    gps_learning_rate: float | None = None  # of the GPS encoder; null: learning_rate
    attention_learning_rate: float | None = None  # of the UNet's cross-attention; null likewise

    @property
    def dropout(self) -> tuple[float, float, float]:
        parts = (self.condition_dropout, self.gps_dropout, self.text_dropout)
        return parts if self.condition == "gps" else (sum(parts), 0.0, 0.0)

    @property
    def encoder(self) -> str:
        return "trained" if self.condition == "gps" else "none"

    def check(self) -> None:
        super().check()
        _check_condition(self.condition, "gps", "address")
        if self.condition == "address" and self.null_text != "empty":
            raise ValueError(f"The recipe's null_text is {self.null_text!r}; a model of addresses "
                             "has no encoder to say so, and is read as a text model: add "
                             "null_text=empty.")

    def rate(self, parameter: str) -> float:
        own = None
        if parameter.startswith("gps_encoder."):
            own = self.gps_learning_rate
        elif ".attn2." in parameter:  # diffusers' name of cross-attention
            own = self.attention_learning_rate
        return self.learning_rate if own is None else own


@dataclass
class AngleRecipe(Recipe):
    """How to train an angle model. Defaults are the paper's (A.2.1)."""

    kind = "angle"

    condition: str = "angle"  # or text: the bearing is not told (Fig. 8)
    resolution: Any = 256
    max_train_steps: int = 800
    train_batch_size: int = 256
    learning_rate: float = 5e-6
    prompt: str = "A photo of {landmark}"
    num_bins: int = 36
    dither_bins: bool = False  # draw one of the two nearest bins instead of snapping
    balance_bins: float = 0.0  # draw photos with probability ~ (photos in the bin) ** -this
    angle_dropout: float = 0.0  # angle alone zeroed; prior preservation teaches the same
    with_prior_preservation: bool = True
    prior_loss_weight: float = 1.0
    num_class_images: int = 200

    @property
    def dropout(self) -> tuple[float, float, float]:
        return (self.condition_dropout, self.angle_dropout, 0.0)

    @property
    def encoder(self) -> str:
        return "trained" if self.condition == "angle" else "silent"

    def check(self) -> None:
        super().check()
        _check_condition(self.condition, "angle", "text")
        if self.random_flip:
            raise ValueError("The recipe's random_flip is true, but a mirrored photo was taken "
                             "from another bearing: leave it false for an angle model.")


def _check_condition(condition: str, *known: str) -> None:
    if condition not in known:
        raise ValueError(f"The recipe's condition is {condition!r}; it must be "
                         f"{' or '.join(known)}.")


KINDS: dict[str, type[Recipe]] = {r.kind: r for r in (TextRecipe, GPSRecipe, AngleRecipe)}


def load_recipe(name_or_path: str | None = None, overrides: list[str] | None = None,
                kind: str = "angle") -> Recipe:
    """A recipe of one of KINDS from a YAML file or a bundled name, with ``key=value`` overrides.

    ValueError names an unknown key and the known ones, or the value that does not fit its key.
    """
    path = None
    if name_or_path is not None:
        path = Path(name_or_path)
        if not path.is_file():
            path = RECIPES / f"{Path(name_or_path).stem}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise ValueError(f"There is no recipe {name_or_path!r}. Give a YAML file or: {known}.")
    try:
        layers = [OmegaConf.load(path)] if path is not None else []
        layers.append(OmegaConf.from_dotlist(overrides or []))
        for key in (str(key) for layer in layers for key in layer):
            _check_key(key, kind)
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(KINDS[kind]), *layers))
    except (OmegaConfBaseException, YAMLError) as error:
        source = f"recipe {name_or_path}" if overrides is None else "recipe or its overrides"
        raise ValueError(f"The {source}: {' '.join(str(error).split())}") from error
    assert isinstance(recipe, Recipe)
    return recipe


def shareable(settings: dict[Any, Any]) -> dict[str, Any]:
    """The settings of a recipe, of folders the name alone: what may leave this machine."""
    folders = ("base", "cache_dir", "logging_dir", "pretrained_vae_model_name_or_path")
    return {key: Path(value).name if key in folders and value else value
            for key, value in settings.items()}


def flags_as_overrides(words: Sequence[str]) -> list[str]:
    """A command line in which ``--key value``, ``--key=value`` and, of a switch, ``--key``, as
    diffusers' scripts have them, are ``key=value`` at the end. ValueError if a value is missing."""
    switches = {f.name: type(f.default) is bool for kind in KINDS.values() for f in fields(kind)}
    others, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        key, sign, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or key not in switches:
            others.append(word)
            continue
        following = rest[0] if rest else "--"
        if not sign and switches[key]:
            value = rest.pop(0) if following.lower() in ("true", "false") else "true"
        elif not sign and following.startswith("--"):
            raise ValueError(f"{word} needs a value: {word} VALUE.")
        elif not sign:
            value = rest.pop(0)
        overrides.append(f"{key}={value}")
    return others + overrides


def nearest_flag(word: str) -> str | None:
    """The setting that a misspelt ``--key`` or ``--key=value`` may have meant, as ``--key``."""
    keys = {f.name for kind in KINDS.values() for f in fields(kind)}
    close = difflib.get_close_matches(word.lstrip("-").partition("=")[0], sorted(keys), 1)
    return f"--{close[0]}" if close else None


def as_written(value: Any) -> str:
    """A setting as one writes it in a recipe or on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def settings() -> str:
    """Every key of the recipes with its default, for people."""
    common = asdict(Recipe())
    parts = {"of every kind": common}
    for name, kind in KINDS.items():
        own = asdict(kind())
        parts[f"of {name}"] = {key: own[key] for key in own
                               if key not in common or own[key] != common[key]}
    lines = ["settings of the recipe, as key=value or --key value, with their defaults:"]
    for title, values in parts.items():
        words = [f"{key}={as_written(value)}" for key, value in values.items()]
        lines += textwrap.wrap(f"{title}: {', '.join(words)}", 90, initial_indent="  ",
                               subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _check_key(key: str, kind: str) -> None:
    """Refuse a key that a recipe of this kind does not have, with the nearest one it has."""
    keys = {name: [f.name for f in fields(recipe)] for name, recipe in KINDS.items()}
    if key in keys[kind]:
        return
    others = [name for name in KINDS if key in keys[name]]
    close = difflib.get_close_matches(key, keys[kind], 1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    if others:
        hint = f"It is a key of `train {others[0]}`, and this is `train {kind}`. "
    raise ValueError(f"The recipe has no key {key!r}. {hint}It has {', '.join(keys[kind])}.")
