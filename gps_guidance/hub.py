"""A finished model folder on the Hugging Face Hub, by the token of `hf auth login` or HF_TOKEN.

Uploaded is what makes and describes the model, by name. What shows photos (latents, checkpoints),
and what only this machine needs, stays here.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl, get_token
from omegaconf import OmegaConf

from gps_guidance.lora import LORA_WEIGHT_NAME_SAFE
from gps_guidance.models import PARTS
from gps_guidance.recipe import shareable

log = logging.getLogger(__name__)

MODEL = [f"{part}/**/*" for part in (*PARTS, "gps_encoder", "angle_classifier")]
SHARED = ["README.md", "recipe.yaml", "model_index.json", LORA_WEIGHT_NAME_SAFE, *MODEL,
          "*_loss.csv", "loss.png", "samples-*.png", "train_report.html"]


def create_repository(name: str, private: bool) -> RepoUrl:
    """A repository on the Hub, ``name`` or ``owner/name``, which may be there already.

    ValueError if nobody is logged in, if the Hub refuses, or if ``private`` and all can see it.
    """
    if get_token() is None:
        raise ValueError("Nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set "
                         "the environment variable HF_TOKEN.")
    try:
        repository = HfApi().create_repo(name, private=private, exist_ok=True)
        is_private = HfApi().model_info(repository.repo_id).private
    except Exception as error:  # of the Hub, of the network, of its client
        raise ValueError(f"The Hub gives no repository {name!r}: {_line(error)} Is "
                         "there a network, and may your token write to that hub_model_id "
                         "(OWNER/NAME)?") from error
    if private and not is_private:
        raise ValueError(f"{repository} is there and public. Give another hub_model_id, or, if "
                         "all may see the model (docs/privacy.md), hub_private_repo=false.")
    return repository


def push(folder: str | Path, name: str | None = None, private: bool = True) -> str:
    """Upload a finished model folder in one commit, and return its address.

    ``name`` is that of the repository, by default the folder's. ValueError if the folder holds no
    finished model, or, with the command that tries again, if it could not be uploaded.
    """
    folder = Path(folder)
    whole = all((folder / part).is_dir() for part in PARTS)
    if (folder / "checkpoints").exists() or not (
            whole or (folder / LORA_WEIGHT_NAME_SAFE).is_file()):
        raise ValueError(f"{folder} holds no finished model. Give the folder that `gps-guidance "
                         "train` wrote to the end.")
    name = name or repository_name(folder)
    try:
        repository = create_repository(name, private)
        HfApi().create_commit(repository.repo_id, _files(folder),
                              commit_message="Upload from gps-guidance")
    except Exception as error:  # as above; none of them may lose what was trained
        again = ["gps-guidance", "push", str(folder), "--hub_model_id", name]
        raise ValueError(f"The model is whole in {folder}, but not on the Hub: {_line(error)} "
                         "To upload it: "
                         f"{shlex.join(again if private else [*again, '--public'])}") from error
    log.info("uploaded %s to %s", folder, repository)
    return str(repository)


def repository_name(folder: Path) -> str:
    """The name that a model's repository has unless another is given."""
    return folder.resolve().name


def _files(folder: Path) -> list[CommitOperationAdd]:
    """What is uploaded, without paths of this machine."""
    paths = sorted({path for pattern in SHARED for path in folder.glob(pattern) if path.is_file()})
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), _content(path))
            for path in paths]


def _content(path: Path) -> Path | bytes:
    """A file, or what is to be uploaded for it: the recipe has the folder of the base, and so has
    the config.json of a network that diffusers loaded."""
    if path.name == "recipe.yaml":
        settings = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(settings, dict)
        return OmegaConf.to_yaml(OmegaConf.create(shareable(settings))).encode()
    if path.name == "config.json":
        config = json.loads(path.read_text("utf-8"))
        config.pop("_name_or_path", None)
        return (json.dumps(config, indent=2) + "\n").encode()
    return path


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
