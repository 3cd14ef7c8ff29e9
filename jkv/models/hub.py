"""Where a checkpoint is: a built-in model, a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from jkv._text import brief
from jkv.errors import CheckpointError
from jkv.models import diagnose

BUILT_IN = ("shakespeare",)

# Weights as safetensors, configuration, tokenizer, templates; nothing in folders but that of more
# templates, and not the second copy of the weights that some repositories carry in their authors'
# own layout.
ALL = ("*.json", "*.safetensors", "*.jinja")
ALL_BUT_WEIGHTS = ("*.json", "*.jinja")
CONFIG = ("config.json", "generation_config.json")
_TEMPLATES = "additional_chat_templates"
_UNWANTED = (
    # Every folder but one. Patterns cannot say "but": these are the names that differ from it in
    # their first letter, their second, and so on; that end early; and that go on.
    *(f"{_TEMPLATES[:i]}[!{letter}/]*/*" for i, letter in enumerate(_TEMPLATES)),
    *(f"{_TEMPLATES[:i]}/*" for i in range(1, len(_TEMPLATES))),
    f"{_TEMPLATES}[!/]*/*",
    f"{_TEMPLATES}/*/*",
    f"{_TEMPLATES}/*.json",
    f"{_TEMPLATES}/*.safetensors",
    "consolidated*",
)


def resolve(
    source: object, revision: str | None, *, show: bool = False, wanted: tuple[str, ...] = ALL
) -> Path:
    """Find the directory of a checkpoint, downloading it if necessary.

    Args:
        source: name of a built-in model, else an existing directory, else a repository's id.
        revision: branch, tag or commit of a repository.
        show: progress bars while downloading.
        wanted: patterns of the files to download.

    Raises:
        CheckpointError: there is no such thing, or the hub cannot be reached.
        ValueError: a source of another kind, or a revision of a local directory.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(
            f"load got {brief(source)}; expected a built-in model ({', '.join(BUILT_IN)}), a "
            "directory, or a hub id such as 'openai-community/gpt2'"
        )
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    is_path = not isinstance(source, str) or name.startswith((".", "~", os.sep))
    if name in BUILT_IN and isinstance(source, str):
        path = Path(__file__).parent.parent / "data" / name
        if not path.is_dir():
            raise CheckpointError(
                f"the built-in model {brief(name)} is not part of this installation"
            )
    elif os.path.isdir(path):  # False for whatever can be no path
        pass
    elif os.path.exists(path):
        raise CheckpointError(diagnose.file(path))
    elif not is_path and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII):
        return _download(name, revision, show, wanted)
    else:
        raise CheckpointError(
            f"load got {brief(name)}, which is neither a directory nor a hub id; the built-in "
            f"models are {', '.join(BUILT_IN)}{diagnose.suggestion(name, BUILT_IN)}"
        )
    if revision is not None:
        raise ValueError(
            f"load got revision={brief(revision)} for {brief(name)}, which is not a repository "
            "of the hub"
        )
    return path


def _download(name: str, revision: str | None, show: bool, wanted: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """No bars."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    near = diagnose.suggestion(name, BUILT_IN)
    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(wanted),
            ignore_patterns=list(_UNWANTED),
            tqdm_class=None if show else Silent,
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated on the hub: accept its terms there, then log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {brief(revision)} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a directory here, nor a repository of the hub that you may read; "
            f"log in with `hf auth login` if it is private{near}"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{name} is neither a directory here nor a valid hub id: {error}{near}"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        which = "" if revision is None else f" at revision {brief(revision)}"
        raise CheckpointError(
            f"{name}{which} is neither a directory here nor in the hub's cache, and the hub cannot "
            "be reached. Connect (and unset HF_HUB_OFFLINE), or download it where there is a "
            f"connection with `hf download {name}` and load that directory{near}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"the hub refused {name}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be downloaded: {error}") from error
    return Path(path)
