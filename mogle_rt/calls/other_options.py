"""Arguments of diffusers' `FluxPipeline` that a call here doesn't have: each is refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mogle_rt.errors import InputError

_DISTILLED = (
    "FLUX.1-dev is distilled and draws without a negative prompt: its guidance is one number, guidance_scale, and what "
    "is not wanted must be left out of the prompt"
)
_IP_ADAPTER = "there is no IP-Adapter here: a face is drawn from a mask and a prompt"

REASONS = {
    "negative_prompt": _DISTILLED,
    "negative_prompt_2": _DISTILLED,
    "negative_prompt_embeds": _DISTILLED,
    "negative_pooled_prompt_embeds": _DISTILLED,
    "true_cfg_scale": _DISTILLED,
    "sigmas": "the noise levels follow from num_inference_steps and the image's size, as the model was trained",
    "timesteps": "the noise levels follow from num_inference_steps and the image's size, as the model was trained",
    "ip_adapter_image": _IP_ADAPTER,
    "ip_adapter_image_embeds": _IP_ADAPTER,
    "negative_ip_adapter_image": _IP_ADAPTER,
    "negative_ip_adapter_image_embeds": _IP_ADAPTER,
    "joint_attention_kwargs": "attention takes no further arguments here; condition_scale is the strength of the mask",
}
"""Why there is no such argument. ``prompt_2`` is not among them: it may say the same as ``prompt``."""

_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "true_cfg_scale": (None, 1, 1.0),
    "joint_attention_kwargs": (None, {}),
    "negative_prompt": (None, ""),
    "negative_prompt_2": (None, ""),
}


def check_other_options(options: Mapping[str, Any], prompt: object) -> None:
    """Refuse what a call has no use for. An argument whose value means "nothing" is let through.

    Args:
        options: the keyword arguments that a call doesn't know, by name.
        prompt: what was given as prompt; ``prompt_2`` may be the same.

    Raises:
        InputError: an argument of `FluxPipeline` that asks for something that isn't here.
        TypeError: no such argument there either, as for every Python function.
    """
    for name, value in options.items():
        if name == "prompt_2":
            if value is not None and value != prompt:
                raise InputError(
                    "prompt_2 must be left out or equal prompt: CLIP and T5 read the same text; encode_prompt and "
                    "prompt_embeds serve where they must differ"
                )
        elif name not in REASONS:
            raise TypeError(f"Pipeline.__call__() got an unexpected keyword argument {name!r}")
        elif not any(type(value) is type(none) and value == none for none in _WITHOUT_EFFECT.get(name, (None,))):
            raise InputError(f"{name} is not supported: {REASONS[name]}")
