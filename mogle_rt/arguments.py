"""Checks the arguments of a call of the pipeline right away. Each error is one clear line that says what is wrong."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

from mogle_rt.config import DEFAULT_GUIDANCE, ENGINES, KERNELS, MAX_TEXT_TOKENS, PATCH
from mogle_rt.errors import ConfigError, DeviceError, InputError, MaskError, NumericalError

if TYPE_CHECKING:  # torch is imported in functions, so that the command line can check its options before loading it
    import torch
    from torch import Tensor

Generators: TypeAlias = "torch.Generator | Sequence[torch.Generator] | None"


MOST = 2**31 - 1  # the limit for images and pixels; more would overflow, but memory runs out long before
LONGEST_PROMPT = 100_000  # characters; T5 reads 512 tokens at most
MOST_STEPS = 10_000  # modulations are held for every step: at FLUX's full size, 2 MB per step and image


def is_number(value: object) -> bool:
    """Whether a value is a finite real number. True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # an integer larger than every float
        return False


def check_options(
    *,
    num_inference_steps: int = 1,
    guidance_scale: float = 1.0,
    height: int = PATCH,
    width: int = PATCH,
    condition_scale: float = 1.0,
    num_images_per_prompt: int = 1,
    position_delta: tuple[int, int] = (0, 0),
    position_scale: float = 1.0,
    max_sequence_length: int = MAX_TEXT_TOKENS,
    output_type: str = "pil",
    callback: object = None,
    callback_inputs: Sequence[str] = ("latents",),
    mask_posterior: str = "mean",
    strength: float = 1.0,
) -> None:
    """Check the options of a call.

    Raises:
        InputError: an option has a wrong type or is out of range.
    """
    for name, number, most in (
        ("num_inference_steps", num_inference_steps, MOST_STEPS),
        ("num_images_per_prompt", num_images_per_prompt, MOST),
        ("max_sequence_length", max_sequence_length, MAX_TEXT_TOKENS),
    ):
        if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
            raise InputError(f"{name} must be a positive integer, got {number!r}")
        if number > most:
            raise InputError(f"{name} can be at most {most}, got {number!r}")
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, Integral) or isinstance(size, bool) or size < PATCH or size % PATCH:
            near = f"; the nearest is {max(PATCH, round(size / PATCH) * PATCH)}" if is_number(size) else ""
            raise InputError(f"{name} must be a multiple of {PATCH}, got {size!r}{near}")
        if size > MOST:
            raise InputError(f"{name} can be at most {MOST}, got {size!r}")
    for name, value in (("guidance_scale", guidance_scale), ("condition_scale", condition_scale)):
        if not is_number(value) or value < 0:
            raise InputError(f"{name} must be a finite number of 0 or more, got {value!r}")
    if not is_number(strength) or not 0 < strength <= 1:
        raise InputError(f"strength must be a number above 0 and at most 1, got {strength!r}")
    if not is_number(position_scale) or position_scale <= 0:
        raise InputError(f"position_scale must be a positive number, got {position_scale!r}")
    if not isinstance(position_delta, Sequence) or [is_number(v) for v in position_delta] != [True, True]:
        raise InputError(f"position_delta must be two numbers (rows, columns), got {position_delta!r}")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise InputError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, got {callback!r}")
    named = list(callback_inputs) if isinstance(callback_inputs, Sequence) else None
    if named == ["prompt_embeds"] or named == ["latents", "prompt_embeds"]:
        raise InputError(
            "callback_on_step_end_tensor_inputs can be ['latents'] only: everything about the prompt is computed once, "
            "before the first step, so a callback can't change prompt_embeds"
        )
    if named != ["latents"]:
        raise InputError(f"callback_on_step_end_tensor_inputs can be ['latents'] only, got {callback_inputs!r}")
    if mask_posterior not in ("mean", "sample"):
        raise InputError(f"mask_posterior must be 'mean' or 'sample', got {mask_posterior!r}")


def warn_of_guidance(guidance_scale: float, has_guidance: bool) -> None:
    """Warn where a guidance is asked for that the model doesn't have."""
    if not has_guidance and guidance_scale != DEFAULT_GUIDANCE:
        warnings.warn(
            f"guidance_scale {guidance_scale:g} has no effect: this model was made without guidance", stacklevel=2
        )


def check_names(*, device: object = None, engine: str = "torch", kernels: str | None = None) -> None:
    """Names of a pipeline's options, as far as they can be checked before PyTorch is loaded.

    Raises:
        DeviceError, ConfigError: there is none of this name.
    """
    if isinstance(device, str) and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise DeviceError(f"device must be cpu, cuda, cuda:N or mps, got {device!r}")
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if kernels and kernels not in KERNELS:
        raise ConfigError(f"kernels must be one of {', '.join(map(repr, KERNELS))}, got {kernels!r}")


def prompt_list(prompt: str | Sequence[str] | None, embeds: Tensor | None, pooled: Tensor | None) -> list[str]:
    """The prompts as a list, which is empty if embeddings are given. Without a prompt it holds one empty text.

    Raises:
        InputError: the prompt is not a text or a list of texts, only one kind of embeddings is given, or a prompt and
            embeddings are both given.
    """
    if (embeds is None) != (pooled is None):
        raise InputError("prompt_embeds and pooled_prompt_embeds go together; one of them is missing")
    if embeds is not None:
        if prompt is not None:
            raise InputError("give a prompt or prompt_embeds, not both")
        return []
    if prompt is not None and not isinstance(prompt, Sequence):
        raise InputError(f"prompt must be a text or a list of texts, got {type(prompt).__name__}")
    prompts = [""] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("the list of prompts is empty")
    for one in prompts:
        if not isinstance(one, str):
            raise InputError(f"prompt must be a text or a list of texts, got {type(one).__name__}")
        if len(one) > LONGEST_PROMPT:
            raise InputError(f"a prompt can have at most {LONGEST_PROMPT:,} characters, got {len(one):,}")
        try:
            one.encode()
        except UnicodeEncodeError:  # a lone surrogate, which Python also uses for bytes that are not valid text
            raise InputError(f"prompt must be UTF-8 text, got {one!r}") from None
    return prompts


def common_count(masks: int, prompts: int) -> int:
    """The number of pairs of a mask and a prompt.

    Raises:
        InputError: a count is 0, or the counts differ and neither is 1.
    """
    if not masks or not prompts:
        raise InputError(f"give at least one prompt (or its embeddings) and one mask, got {prompts} and {masks}")
    if masks != prompts and 1 not in (masks, prompts):
        raise InputError(
            f"{masks} masks and {prompts} prompts don't pair up: give the same number of both, or only one of either"
        )
    return max(masks, prompts)


def refuse_prompt_as_mask(mask: object) -> None:
    """Refuse a prompt that was given as the mask. Users of diffusers' pipelines may pass the prompt first.

    Raises:
        MaskError: ``mask`` is, or is a list that contains, a text of several words that is not a path.
    """
    for one in mask if isinstance(mask, (list, tuple)) else [mask]:
        if isinstance(one, str) and len(one.split()) > 1 and not os.path.splitext(one.strip(" ."))[1]:
            try:
                found = os.path.lexists(os.path.expanduser(one))
            except ValueError:  # the text contains a null character
                found = False
            if not found:
                raise MaskError(
                    f"{one[:60]!r} is not a file and reads like a prompt: masks come first, so write "
                    "pipe(mask, prompt), or pipe(prompt=...) for a prompt alone"
                )


def seeded_generators(seed: int | Sequence[int], generator: Generators, batch: int) -> list[torch.Generator]:
    """Make a generator on the CPU for each image, from seeds.

    Args:
        seed: the seed of the first image, which the next images increase by 1 each; or a list of one seed per image.
        generator: must be None, because a call takes either seeds or generators.
        batch: the number of images.

    Raises:
        InputError: a seed is not a whole number from 0 to 2**63 - batch - 1, the number of seeds is wrong, or
            generators are given too.
    """
    import torch

    if generator is not None:
        raise InputError("give a seed or a generator, not both")
    several = isinstance(seed, Sequence) and not isinstance(seed, str)
    seeds: list[Any] = list(seed) if isinstance(seed, Sequence) and several else [seed]
    for one in seeds:
        if not isinstance(one, Integral) or isinstance(one, bool) or not 0 <= int(one) < 2**63 - batch:
            raise InputError(
                f"seed must be a whole number from 0 to {2**63 - batch - 1}, or a list of them, got {one!r}"
            )
    numbers = [int(one) for one in seeds if isinstance(one, Integral)]
    if not several:
        numbers = [numbers[0] + i for i in range(batch)]
    if len(numbers) != batch:
        raise InputError(f"seed must be one number or a list of {batch} (one per image), got {len(numbers)}")
    return [torch.Generator("cpu").manual_seed(number) for number in numbers]


def generator_list(generator: Generators, batch: int, device: torch.device) -> list[torch.Generator] | None:
    """The list of generators, one for each image, or None if a single generator or none was given.

    Raises:
        InputError: the number of generators is wrong, something is not a generator, or a generator is on another device
            than the pipeline. A generator on the CPU works for every device.
    """
    import torch

    every = [generator] if isinstance(generator, torch.Generator) else generator
    generators = list(every) if isinstance(every, Sequence) else []
    for g in generators:
        if isinstance(g, torch.Generator) and g.device.type not in ("cpu", device.type):
            raise InputError(
                f"generator is on {g.device} and the pipeline on {device}: give a generator on the CPU, which draws the "
                "same noise for every device, or a seed"
            )
    if generator is None or isinstance(generator, torch.Generator):
        return None
    if len(generators) != batch or not all(isinstance(g, torch.Generator) for g in generators):
        raise InputError(
            f"generator must be one torch.Generator or a list of {batch} (one per image), got {generator!r}"
        )
    return generators


def check_embeddings(embeds: Any, pooled: Any, width: int, pooled_width: int) -> None:
    """Check prompt embeddings: T5's, [B, T, ``width``], and CLIP's, [B, ``pooled_width``].

    Raises:
        InputError, NumericalError: see `check_tensor`.
    """
    check_tensor("prompt_embeds", embeds, (None, None, width))
    check_tensor("pooled_prompt_embeds", pooled, (embeds.shape[0], pooled_width))


def check_tensor(name: str, value: Any, shape: tuple[int | None, ...]) -> None:
    """Check that a value is a finite floating point tensor of this shape, in which None stands for any size.

    Raises:
        InputError: it is something else.
        NumericalError: it contains NaN or infinity.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise InputError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided or value.is_meta:
        kind = "nested" if value.is_nested else "meta" if value.is_meta else "sparse"
        raise InputError(f"{name} must be a dense tensor that holds data, got a {kind} one")
    if value.ndim != len(shape) or any(s not in (None, v) for s, v in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise InputError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        raise InputError(f"{name} must be floating point of 16, 32 or 64 bits, got {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise NumericalError(f"{name} holds NaN or infinite values")
