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
from gps_guidance.parts import INDEX, PARTS, SHARED, missing_parts, shared_parts
from gps_guidance.recipe import shareable

log = logging.getLogger(__name__)

MODEL = [f"{part}/**/*" for part in (*PARTS, "gps_encoder", "angle_classifier")]
SHAREABLE = ["README.md", "recipe.yaml", INDEX, LORA_WEIGHT_NAME_SAFE, *MODEL,
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
    check_finished(folder)
    name = name or repository_name(folder)
    try:
        repository = create_repository(name, private)
        files = [CommitOperationAdd(*file) for file in shareable_files(folder).items()]
        HfApi().create_commit(repository.repo_id, files,
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


def check_finished(folder: Path) -> None:
    """ValueError if the folder holds neither a whole model nor a LoRA, or one in training."""
    if (folder / "checkpoints").exists() or (
            not (folder / LORA_WEIGHT_NAME_SAFE).is_file() and missing_parts(folder)):
        raise ValueError(f"{folder} holds no finished model. Give the folder that `gps-guidance "
                         "train` wrote to the end.")


def shareable_files(folder: Path) -> dict[str, Path | bytes]:
    """What may leave this machine of a model folder, without paths of this machine: name -> file,
    or what to write for it. Parts that are in a folder beside it are among them."""
    paths = {path.relative_to(folder).as_posix(): path
             for pattern in SHAREABLE for path in folder.glob(pattern) if path.is_file()}
    for part, there in shared_parts(folder).items():
        paths |= {f"{part}/{path.relative_to(there).as_posix()}": path
                  for path in there.rglob("*") if path.is_file()}
    return {name: _content(path) for name, path in sorted(paths.items())}


def _content(path: Path) -> Path | bytes:
    """A file, or what is to be uploaded for it: the recipe has the folder of the base, and so has
    the config.json of a network that diffusers loaded."""
    if path.name == "recipe.yaml":
        settings = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(settings, dict)
        return OmegaConf.to_yaml(OmegaConf.create(shareable(settings))).encode()
    if path.name in ("config.json", INDEX):
        config = json.loads(path.read_text("utf-8"))
        config.pop("_name_or_path", None)
        config.pop(SHARED, None)  # nothing is left out of what is uploaded
        return (json.dumps(config, indent=2) + "\n").encode()
    return path


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
