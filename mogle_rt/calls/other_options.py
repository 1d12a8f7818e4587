"""Arguments of diffusers' FLUX pipelines that are not supported here. Each is refused with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mogle_rt.errors import InputError

_DISTILLED = (
    "FLUX.1-dev is distilled and draws without a negative prompt: its guidance is one number, guidance_scale, and what "
    "is not wanted must be left out of the prompt"
)
_IP_ADAPTER = "there is no IP-Adapter here: a face is drawn from a mask and a prompt"
_IMAGE = (
    "the mask is the first argument, or mask=…; to start from an image, call edit, inpaint or image_to_image instead"
)

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
    "image": _IMAGE,
    "mask_image": _IMAGE,
    "control_image": _IMAGE,
    "joint_attention_kwargs": "attention takes no further arguments here; condition_scale is the strength of the mask",
}
"""Why each argument is not supported. ``prompt_2`` is missing here, because it is allowed if it equals ``prompt``."""

_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "true_cfg_scale": (None, 1, 1.0),
    "joint_attention_kwargs": (None, {}),
    "negative_prompt": (None, ""),
    "negative_prompt_2": (None, ""),
}


def check_other_options(options: Mapping[str, Any], prompt: object) -> None:
    """Refuse unsupported arguments. An argument is accepted if its value asks for nothing, such as None.

    Args:
        options: the keyword arguments that `Pipeline.__call__` doesn't have, by name.
        prompt: the call's prompt, which ``prompt_2`` may equal.

    Raises:
        InputError: an argument of diffusers' FLUX pipelines asks for something that is not supported.
        TypeError: those have no such argument either.
    """
    for name, value in options.items():
        if name == "prompt_2":
            if value is not None and value != prompt:
                raise InputError(
                    "prompt_2 must be left out or equal prompt: CLIP and T5 read the same text; if they must differ, "
                    "use encode_prompt and pass its results as prompt_embeds and pooled_prompt_embeds"
                )
        elif name not in REASONS:
            raise TypeError(f"Pipeline.__call__() got an unexpected keyword argument {name!r}")
        elif not any(type(value) is type(none) and value == none for none in _WITHOUT_EFFECT.get(name, (None,))):
            raise InputError(f"{name} is not supported: {REASONS[name]}")
