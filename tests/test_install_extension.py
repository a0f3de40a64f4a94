"""``gps-guidance install-extension`` in a folder that looks like a clone of threestudio."""

import json
import sys
from pathlib import Path

import pytest

from gps_guidance import cli, extension
from gps_guidance.nocompile.stand_ins import OPTIONAL

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "threestudio clone"
    (folder / "threestudio").mkdir(parents=True)
    (folder / "threestudio" / "__init__.py").write_text('__modules__ = {}\n__version__ = "0.2.3"\n')
    (folder / "launch.py").touch()
    (folder / "custom").mkdir()
    return folder


def test_it_links_and_again_changes_nothing(clone, capsys):
    for _ in range(2):
        assert cli.main(["install-extension", str(clone)]) == 0
        target = clone / "custom" / "threestudio-gps"
        assert capsys.readouterr().out.splitlines()[0] == str(target)
        assert target.is_symlink() and target.samefile(ROOT / "custom" / "threestudio-gps")


def test_it_copies_updates_the_copy_and_turns_a_link_into_one(clone):
    target = extension.install_extension(clone)
    assert extension.install_extension(clone, copy=True) == target
    assert not target.is_symlink()
    files = {path.relative_to(extension.SOURCE) for path in extension.SOURCE.rglob("*.py")}
    assert {path.relative_to(target) for path in target.rglob("*.py")} == files
    (target / "README.md").write_text("old")
    extension.install_extension(clone, copy=True)
    assert (target / "README.md").read_text() == (extension.SOURCE / "README.md").read_text()
    assert extension.install_extension(clone) == target and not target.is_symlink()
    assert (extension.SOURCE / "__init__.py").is_file()  # the link was removed, not what it names


@pytest.mark.parametrize("there", ["folder", "file", "link", "dangling link"])
def test_it_overwrites_nothing_else(clone, tmp_path, there):
    target, other = clone / "custom" / "threestudio-gps", tmp_path / "other"
    if there == "folder":
        target.mkdir()
        (target / "__init__.py").write_text("import threestudio\n")
    elif there == "file":
        target.write_text("mine")
    else:
        if there == "link":
            other.mkdir()
        target.symlink_to(other)
    for copy in (False, True):
        with pytest.raises(ValueError, match="is something else already"):
            extension.install_extension(clone, copy)
    assert not (other / "__init__.py").exists()


@pytest.mark.parametrize("written, said", [
    ('__version__ = "0.1.9"\n', "is threestudio 0.1.9; its custom/ came with 0.2.0"),
    ("__modules__ = {}\n", "is threestudio older"),
])
def test_an_old_threestudio_is_refused(clone, written, said):
    (clone / "threestudio" / "__init__.py").write_text(written)
    with pytest.raises(ValueError, match=said):
        extension.install_extension(clone)


def test_what_is_no_clone_is_refused(tmp_path, capsys):
    assert cli.main(["install-extension", str(tmp_path)]) == 2
    assert "git clone https://github.com/threestudio-project/threestudio" in capsys.readouterr().err


def test_a_package_without_its_repository_says_where_to_get_it(clone, tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "SOURCE", tmp_path / "site-packages/custom/threestudio-gps")
    with pytest.raises(ValueError, match="installed without its repository. Clone gps-guidance"):
        extension.install_extension(clone)
    assert list((clone / "custom").iterdir()) == []


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes modules importable, of libigl in some version, and all others of threestudio's not."""
    def put(*modules, libigl="2.5.1"):
        for module in modules:
            (tmp_path / f"{module}.py").touch()
        info = tmp_path / "libigl-0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: libigl\nVersion: {libigl}\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        for name in (*extension.NEEDED, *extension.REPLACED):
            monkeypatch.delitem(sys.modules, name, raising=False)
    return put


def test_nothing_is_said_where_nothing_is_missing(packages):
    packages(*extension.NEEDED, *extension.REPLACED)
    assert extension.advice() == []


def test_what_is_missing_is_named_with_one_command(packages):
    packages("igl", "cv2", "einops", "wandb", "nvdiffrast")
    needed, replaced = extension.advice()
    assert needed.endswith(f"Run: {sys.executable} -m pip install nerfacc jaxtyping typeguard")
    assert "not needed with launch.py --threestudio: tinycudann, envlight" in replaced
    assert '"git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"' in replaced
    assert "nvdiffrast" not in replaced and "wandb" not in replaced


def test_another_libigl_is_replaced(packages):
    packages(*extension.NEEDED, *extension.REPLACED, libigl="2.6.2")
    assert extension.advice() == [
        f'threestudio lacks libigl==2.5.1. Run: {sys.executable} -m pip install "libigl==2.5.1"']


def test_every_stand_in_is_known():
    lazy = {"pysdf"}  # threestudio imports it where it is used
    assert set(extension.REPLACED) == {"tinycudann", "nvdiffrast", *OPTIONAL} - lazy


def test_the_extra_installs_what_is_needed():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extra = text.split("\nthreestudio = [", 1)[1].split("]", 1)[0]
    names = [entry.strip().strip('"').split(">")[0] for entry in extra.split(",") if entry.strip()]
    assert set(extension.NEEDED.values()) | {"xatlas"} == set(names)  # xatlas: --export


def test_the_entry_for_threestudios_list_names_the_folder():
    entry, = json.loads((extension.SOURCE / "extension.json").read_text("utf-8"))["custom_nodes"]
    assert entry["title"] == extension.SOURCE.name
    assert set(entry) == {"author", "title", "install_type", "description"}
    assert entry["install_type"] == "git-clone"
