"""What `--image` names: names, rethaw.toml, archives; and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rethaw import Image
from rethaw.cli import imagefile
from rethaw.cli.main import main
from rethaw.model.errors import InvalidInput, NotFound
from rethaw.server.config import load

TOML = """
[image]
base = "node"
apt = ["jq"]
pip = "httpx>=0.27"
npm = ["typescript@5.4.5"]
workdir = "/srv"
run = ["npm --version", "true"]
add = { "src" = "/srv/src", "one.txt" = "/etc/" }

[image.env]
MODEL = "x"

[[image.steps]]
run = "make"

[[image.steps]]
add = "src"
to = "/again"
ignore = ["*.md"]

[[image.steps]]
env = { LATE = "1" }

[providers.openai]
key_env = "MY"
"""


def project(top: Path, text: str = TOML) -> Path:
    (top / "src").mkdir(exist_ok=True)
    (top / "src/a.py").write_text("a")
    (top / "src/b.md").write_text("b")
    (top / "one.txt").write_text("one")
    (top / "rethaw.toml").write_text(text)
    return top / "rethaw.toml"


def test_a_rethaw_toml_says_the_same_as_python_and_the_server_takes_it_too(tmp_path: Path) -> None:
    path = project(tmp_path)
    same = (
        Image.debian().apt_install("nodejs", "npm", "jq").pip_install("httpx>=0.27").npm_install("typescript@5.4.5")
        .env(MODEL="x").workdir("/srv").add_local_dir(tmp_path / "src", "/srv/src").add_local_file(tmp_path / "one.txt", "/etc/")
        .run("npm --version").run("true").run("make").add_local_dir(tmp_path / "src", "/again", ignore=["*.md"]).env(LATE="1")
    )  # fmt: skip
    assert imagefile.image_of(str(path)) == same and imagefile.image_of(str(tmp_path)) == same
    load(path)


def test_names_are_those_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert imagefile.image_of("base") == imagefile.image_of("python") == Image.debian()
    assert imagefile.image_of("node").spec.apt == ("nodejs", "npm")
    assert main(["run", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in imagefile.NAMES)
    with pytest.raises(NotFound, match=r"no image 'pyhton'; did you mean 'python'\?"):
        imagefile.image_of("pyhton")
    with pytest.raises(NotFound, match=r"no image 'ubuntu'; write --image base or python or node"):
        imagefile.image_of("ubuntu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("apt = 1", r"no table \[image\]"),
        ("[image]\napps = ['x']", r"image.apps is not known; known: base"),
        ("[image]\nbase = 'nod'", r"image.base 'nod' is not known; did you mean 'node'"),
        ("[image]\nbase = 'node'\nfrom_oci = 'x'", "both given"),
        ("[image]\napt = 5", "image.apt = 5 is no list of texts"),
        ("[image]\napt = ['Not A Name']", "not a Debian package name"),
        ("[image]\nnpm = ['-g']", "not an npm package"),
        ("[image]\nworkdir = 'srv'", "'srv' is not a directory"),
        ("[image]\nenv = 'A=1'", "image.env is no table"),
        ("[image]\nadd = 'src'", "does not say where 'src' goes"),
        ("[image]\nadd = { 'none' = '/x' }", "no file"),
        ("[[image.steps]]\nrun = 'a'\napt = ['b']", "step 1 of image.steps does 2 things"),
        ("[[image.steps]]\nrun = 'a'\nfoo = 1", "unknown key 'foo'"),
        ("[image]\nsteps = ['a']", "no array of tables"),
        ("[image", "cannot be read"),
    ],
)
def test_mistakes_in_a_rethaw_toml_are_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises((InvalidInput, NotFound), match=said):
        imagefile.image_of(str(project(tmp_path, text)))


def test_a_directory_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"neither rethaw\.toml nor"):
        imagefile.image_of(str(tmp_path))
    with pytest.raises(NotFound, match=r"no image .*gone\.tar"):
        imagefile.image_of(str(tmp_path / "gone.tar"))


def test_a_dry_run_shows_the_image_of_a_rethaw_toml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = project(tmp_path)
    assert main(["run", "--dry-run", "--json", "--image", str(path), "--", "true"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [step["kind"] for step in told["agent"]["image"]["steps"]] == [
        "npm",
        "add",
        "add",
        "run",
        "run",
        "run",
        "add",
    ]
    assert told["agent"]["image"]["workdir"] == "/srv" and told["agent"]["command"] == ["true"]
