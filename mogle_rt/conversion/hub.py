"""Find files by a local path or by a hub id. Files of a hub id are downloaded unless they are in the cache."""

from __future__ import annotations

import re
from pathlib import Path

from mogle_rt.errors import CheckpointError, DownloadError

RELEASED_FLUX = "black-forest-labs/FLUX.1-dev"
RELEASED_LORA = "XavierJiezou/face-mogle-models/pytorch_lora_weights.safetensors"
RELEASED_MOGLE = "XavierJiezou/face-mogle-models/global_local_mask_moe.pt"

FLUX_FOLDERS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".sft", ".gguf")
PEFT_WEIGHTS, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(/[\w./-]+)?")


def find(spec: str | Path, *, default_file: str | None = None) -> Path:
    """Return a local path, or the default file in it; for a hub id, download the files, or find them in the cache.

    A name is looked up on the hub only if it can't be meant as a local path, see `_is_local`.

    Args:
        spec: a path, or a hub id: ``owner/name`` for a repository, ``owner/name/file`` for one file.
        default_file: the file to take if ``spec`` names only a repository, or a folder that holds this file, as one
            does that was downloaded from it. None takes FLUX's folders.

    Raises:
        CheckpointError: there is no such path, and it is not a hub id.
        DownloadError: the hub can't be reached, refuses access (gated), or has no such repository or file.
    """
    path = find_here(spec)
    if path is not None:
        inside = None if default_file is None else path / default_file
        return inside if inside is not None and inside.is_file() else path
    owner, repository, *rest = str(spec).split("/", 2)
    return _download(f"{owner}/{repository}", rest[0] if rest else default_file, str(spec))


def find_here(spec: str | Path) -> Path | None:
    """The local path that is meant, or None for a hub id. Nothing is asked of the hub.

    Raises:
        CheckpointError: there is no such path, and it is not a hub id.
    """
    name = str(spec)
    try:
        path = Path(spec).expanduser()
        path.stat()  # `exists` hides other errors from Python 3.14 on
        return path
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the name contains a null character
        pass
    except (OSError, RuntimeError) as error:  # a name too long, a folder without permission, ~ of an unknown user
        raise CheckpointError(f"{name}: can't be read: {error}") from None
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        if Path(name).suffix.lower() in WEIGHT_SUFFIXES:  # nobody means a hub id by that
            raise CheckpointError(f"{name}: no such file or folder")
        raise CheckpointError(f"{name}: no such file or folder, nor a hub id like {RELEASED_FLUX}")
    if _is_local(name):
        raise CheckpointError(f"{name}: no such file or folder")
    return None


def check_flux_folder(folder: Path) -> None:
    """Check that a path is FLUX's own folder, and not a file, or the folder above it or one of those in it.

    Raises:
        CheckpointError: it isn't. The message names the right one, if it is near.
    """

    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is a file; pass a transformer in one file as --transformer, and with --flux the folder that "
            "holds its vae and scheduler (and, for prompts, the text encoders)"
        )

    def fits(candidate: Path) -> bool:
        return any((candidate / name).is_dir() for name in FLUX_FOLDERS)

    if fits(folder):
        return
    resolved = folder.resolve()
    near = [path for path in (resolved.parent, *sorted(resolved.iterdir())) if path.is_dir() and fits(path)]
    hint = f"; did you mean {near[0]}?" if near else ""
    raise CheckpointError(
        f"{folder}: is not FLUX's folder in diffusers' layout, which holds the folders {', '.join(FLUX_FOLDERS)}{hint}"
    )


def _is_local(name: str) -> bool:
    """Whether a name in the form of a hub id is meant as a local path, so that a mistyped path is not sent to the hub.

    ``folder/file.safetensors`` is a local path, because no repository's name ends like a weights file. So is every name
    whose first part is an existing folder.
    """
    first, *others = name.split("/")
    return (len(others) == 1 and Path(name).suffix.lower() in WEIGHT_SUFFIXES) or Path(first).is_dir()


def _download(repository: str, file: str | None, spec: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    files = [] if file is None else [file]
    if (
        file is not None and Path(file).name == PEFT_WEIGHTS
    ):  # peft keeps the scale in a second file, which must be in the same folder
        files.append(file.removesuffix(PEFT_WEIGHTS) + PEFT_SETTINGS)
    try:
        if files:
            weights, *_ = [Path(hf_hub_download(repository, name)) for name in files]
            return weights
        patterns = [f"{folder}/*" for folder in FLUX_FOLDERS]
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except GatedRepoError:
        raise DownloadError(
            f"{spec}: access is gated; accept its licence on the model's page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise DownloadError(f"{spec}: no such local path, and no such repository on the hub (or no access)") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise DownloadError(
            f"{spec}: not a local path, and the hub can't be reached; download it elsewhere and pass its path"
        ) from None
    except EntryNotFoundError:
        raise DownloadError(f"{spec}: the repository has no file {' with '.join(map(repr, files))}") from None
    except HFValidationError:
        raise CheckpointError(f"{spec}: no such file or folder, nor a hub id like {RELEASED_FLUX}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DownloadError(f"{spec}: not a local path, and the hub answered: {reason}") from None
