"""What an image is asked to be made of: its digest, what travels, what stays behind, and what is refused."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from rethaw.images import archive
from rethaw.images.spec import blobs, check, layers, spec_digest, tree_digest
from rethaw.model.errors import InvalidInput, NotFound, TooLarge
from rethaw.model.image_types import ImageSpec, ImageStep
from rethaw.sdk import additions, elf, environment
from rethaw.sdk.ignore import DEFAULT, Rules
from rethaw.sdk.images import Image

GOLDEN = [
    (
        '{"suite":"bookworm","apt":[],"pip":[],"env":{}}',
        "4a56f1e1f8e936f00d074b3cbb67c01cba5dc518f4b20fabf155e48dbd89d04d",
        "653ce9d4a754acd921a69c2881dcde7d379a30b33cd1034a3686bc462421cd3e",
    ),
    (
        '{"suite":"bookworm","apt":["jq","curl"],"pip":["openai>=2","a"],"env":{"B":"1","A":"2"}}',
        "03fcdc8be59fc8ad4b68142da31aa24c658f9899aa3a2747d0f17c2e5b250f63",
        "0d24ba533087d4904b62bed9bdcdd298012e159ddb1c3bf6bf98b5305062a706",
    ),
]


@pytest.mark.parametrize(("text", "tree", "spec"), GOLDEN)
def test_specs_of_0_1_are_what_they_were(text: str, tree: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    old = ImageSpec.model_validate_json(text)
    assert (tree_digest(old), spec_digest(old)) == (tree, spec)
    assert old.model_dump_json() == text and json.loads(text) == old.model_dump(mode="json")


def test_steps_survive_the_wire_and_keep_their_order() -> None:
    image = (
        Image.debian()
        .apt_install("jq")
        .pip_install("a")
        .env(A="1")
        .run("x")
        .env(A="2")
        .pip_install("b")
        .apt_install("c")
        .run("y")
    )
    spec = image.spec
    assert (spec.apt, spec.pip, spec.env) == (("jq",), ("a",), {"A": "2"})
    assert [(s.kind, s.words, s.env) for s in spec.steps] == [
        ("run", ("x",), {"A": "1"}),
        ("pip", ("b",), {}),
        ("apt", ("c",), {}),
        ("run", ("y",), {"A": "2"}),
    ]
    assert ImageSpec.model_validate_json(spec.model_dump_json()) == spec
    found = layers(spec)
    assert len(found) == 7 == len(set(found))  # the base, its Debian packages, its Python packages, and four steps
    changed = layers(spec.model_copy(update={"steps": (*spec.steps[:3], ImageStep(kind="run", words=("z",)))}))
    assert changed[:6] == found[:6] and changed[6] != found[6]
    assert Image.debian().run("x").pip_install("b") != Image.debian().pip_install("b").run("x")


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def test_npm_packages_bring_debians_node_and_directories_are_part_of_the_name() -> None:
    image = Image.debian().apt_install("npm").npm_install("@scope/tool@1.2.3", "typescript@>=5 <6")
    assert image.spec.apt == ("npm", "nodejs") and image.spec.steps[0].words == (
        "@scope/tool@1.2.3",
        "typescript@>=5 <6",
    )
    check(image.spec)
    later = Image.debian().run("true").npm_install("typescript")
    assert later.spec.apt == () and [step.kind for step in later.spec.steps] == ["run", "npm"]
    there = Image.debian().run("true").workdir("/srv").run("true").spec
    assert [step.workdir for step in there.steps] == [None, "/srv"] and there.workdir == "/srv"
    assert "workdir" not in Image.debian().run("true").spec.model_dump_json()
    assert len({spec_digest(Image.debian().workdir(path).spec) for path in ("/", "/a", "/b")}) == 3
    for bad in ("-g", "", "../x", "https://example.com/x.tgz", "a b", "./here", "git+ssh://x", "x@npm:y"):
        with pytest.raises(InvalidInput, match="is not an npm package"):
            Image.debian().npm_install(bad)
        with pytest.raises(InvalidInput, match="is not an npm package"):
            check(ImageSpec(steps=(ImageStep(kind="npm", words=(bad,)),)))
    with pytest.raises(InvalidInput, match="'srv' is not a directory"):
        Image.debian().workdir("srv")


def test_directories_travel_without_what_is_ignored(tmp_path: Path) -> None:
    tree(
        tmp_path / "d", "a.txt", "b.log", "keep.log", "sub/c.log", "sub/build/x", "build/x", "build/y", ".git/config",
        ".env", "deep/.venv/bin/python", "x/__pycache__/m.pyc", "docs/one/two/z.md", "docs/z.md",
    )  # fmt: skip
    (tmp_path / "d/.rethawignore").write_text("# logs\n*.log\n!keep.log\n/build/\n\n")
    (tmp_path / "d/link").symlink_to("sub")
    (tmp_path / "d/run.sh").write_text("#!/bin/sh")
    (tmp_path / "d/run.sh").chmod(0o700)
    image = Image.debian().add_local_dir(tmp_path / "d", "/data/d/", ignore=["docs/**/z.md"])
    ((digest, data),) = image.uploads()
    assert names(data) == ["a.txt", "keep.log", "link", "run.sh", "sub/build/x"]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {m.name: m.mode & 0o777 for m in tar if m.isfile()}["run.sh"] == 0o755
        assert tar.getmember("link").linkname == "sub"
    (step,) = image.spec.steps
    assert (step.kind, step.target, step.blob) == ("add", "/data/d", digest)
    assert blobs(image.spec) == (digest,)
    os.utime(tmp_path / "d/a.txt", (1, 1))
    assert image.uploads()[0][0] == digest
    (tmp_path / "d/a.txt").write_text("other")
    assert image.uploads()[0][0] != digest


@pytest.mark.parametrize(
    ("pattern", "fits", "not_"),
    [
        ("*.py", ["a.py", "x/a.py"], ["a.pyc", "a.py/b"]),
        ("/a.py", ["a.py"], ["x/a.py"]),
        ("x/*.py", ["x/a.py"], ["x/y/a.py", "y/x/a.py"]),
        ("x/**/a", ["x/a", "x/y/a", "x/y/z/a"], ["a"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
        ("a[0-9]", ["a1"], ["ab"]),
        ("a[!0-9]", ["ab"], ["a1"]),
        ("\\#x", ["#x"], ["x"]),
        ("a.c", ["a.c"], ["abc"]),
    ],
)
def test_patterns(pattern: str, fits: list[str], not_: list[str]) -> None:
    rules = Rules([pattern])
    assert [name for name in [*fits, *not_] if rules.ignores(name, False)] == fits


def test_patterns_of_directories_and_their_order() -> None:
    rules = Rules(["build/", "*.x", "!a.x"])
    assert rules.ignores("sub/build", True) and not rules.ignores("build", False)
    assert rules.ignores("b.x", False) and not rules.ignores("a.x", False)
    assert not Rules([*DEFAULT, "!.env"]).ignores(".env", False)


def test_files_and_what_cannot_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a.txt", "d/b.txt")
    image = Image.debian().add_local_file(tmp_path / "a.txt", "/etc/app/").add_local_file(tmp_path / "a.txt", "/x")
    assert [(s.target, names(data)) for s, (_, data) in zip(image.spec.steps, image.uploads(), strict=True)] == [
        ("/etc/app", ["a.txt"]),
        ("/", ["x"]),
    ]
    for make, said in (
        (lambda: Image.debian().add_local_dir(tmp_path / "none", "/x"), "there is no directory"),
        (lambda: Image.debian().add_local_file(tmp_path / "d", "/x"), "no file.*use add_local_dir"),
        (lambda: Image.debian().add_local_dir(tmp_path / "a.txt", "/x"), "no directory.*use add_local_file"),
    ):
        with pytest.raises(NotFound, match=said):
            make()
    for target in ("x", "/", "/a/../b", "/proc/x", "/tmp", "/.rethaw/lib"):
        with pytest.raises(InvalidInput, match="/data"):
            Image.debian().add_local_dir(tmp_path, target)
    (tmp_path / "d/out").symlink_to("/etc/passwd")
    with pytest.raises(InvalidInput, match=r"d/out is a link that leads out of .*/d: /etc/passwd; ignore it"):
        Image.debian().add_local_dir(tmp_path / "d", "/x").uploads()
    (tmp_path / "d/out").unlink()
    os.mkfifo(tmp_path / "d/pipe")
    with pytest.raises(InvalidInput, match="pipe is no file"):
        Image.debian().add_local_dir(tmp_path / "d", "/x").uploads()
    monkeypatch.setattr(additions, "MAX_BYTES", 5)
    with pytest.raises(TooLarge, match=r"the largest: b.txt.*\.rethawignore"):
        Image.debian().add_local_dir(tmp_path / "d", "/x", ignore=["pipe"]).uploads()


def test_relative_paths_are_beside_the_file_that_says_them(tmp_path: Path) -> None:
    tree(tmp_path, "data/x", "r.txt")
    (tmp_path / "r.txt").write_text("six==1.16.0\n")
    code = (
        "from rethaw import Image\nimage = Image.debian().add_local_dir('data', '/d').pip_install(requirements='r.txt')"
    )
    (tmp_path / "mine.py").write_text(code + "\nprint(image.spec.model_dump_json())")
    done = subprocess.run([sys.executable, tmp_path / "mine.py"], cwd="/", capture_output=True, text=True, check=False)
    assert [s["kind"] for s in json.loads(done.stdout)["steps"]] == ["add", "pip"], done.stderr


def test_requirement_files(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("httpx[http2]>=0.27 ; python_version > '3'\n")
    text = "# mine\nsix==1.16.0  # a word\n-r more.txt\n\nidna==3.7 \\\n    --hash=sha256:ab12 --hash=sha256:cd34\n"
    (tmp_path / "r.txt").write_text(text)
    image = Image.debian().pip_install("a", requirements=tmp_path / "r.txt")
    wanted = (
        "a",
        "six==1.16.0",
        "httpx[http2]>=0.27 ; python_version > '3'",
        "idna==3.7 --hash=sha256:ab12 --hash=sha256:cd34",
    )
    assert image.spec.steps == (ImageStep(kind="pip", words=wanted),)  # hashes travel by a file, which is a step
    check(image.spec)
    for line in ("-e .", "./local", "git+https://x/y", "x @ https://y", "--index-url=https://x", "-c constraints.txt"):
        (tmp_path / "bad.txt").write_text(f"six\n{line}\n")
        with pytest.raises(InvalidInput, match=r"bad\.txt:2: .*cannot be taken.*Image\.run"):
            Image.debian().pip_install(requirements=tmp_path / "bad.txt")
    (tmp_path / "loop.txt").write_text("-r loop.txt")
    with pytest.raises(InvalidInput, match="includes itself"):
        Image.debian().pip_install(requirements=tmp_path / "loop.txt")
    with pytest.raises(NotFound, match=r"no file .*none\.txt"):
        Image.debian().pip_install(requirements=tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"kind": "apt", "words": ["--yes"]}, "--yes"),
        ({"kind": "pip", "words": ["-r x"]}, "-r x"),
        ({"kind": "pip", "words": ["a --hash=sha256:ab --index-url=x"]}, "is not a requirement"),
        ({"kind": "run", "words": []}, "one shell command"),
        ({"kind": "run", "words": ["true"], "env": {"A B": "1"}}, "A B"),
        ({"kind": "add", "blob": "../../etc", "target": "/x"}, "digest"),
        ({"kind": "add", "blob": "0" * 64, "target": "x"}, "place in an image"),
        ({"kind": "add", "blob": "0" * 64, "target": "/a/../../b"}, "place in an image"),
        ({"kind": "add", "blob": "0" * 64, "target": "/proc/x"}, "made anew"),
        ({"kind": "add", "blob": "0" * 64, "target": "/x", "words": ["vax"]}, "files for vax do not fit this node"),
    ],
)
def test_steps_are_checked_by_the_server_too(step: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        check(ImageSpec(steps=(ImageStep.model_validate(step, strict=False),)))
    with pytest.raises(InvalidInput, match="interpreter"):
        check(ImageSpec(python="sh -c x"))


# ---------------------------------------------------------------- the caller's own Python


def test_a_python_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"Debian bookworm has Python 3\.11, not 3\.13; .*from_env"):
        Image.debian(python="3.13")
    assert Image.debian(python="3.11") == Image.debian()
    version = platform.python_version()
    monkeypatch.setattr(elf, "needs", lambda path: elf.Needs((), 39))
    with pytest.raises(
        InvalidInput,
        match=rf"Python {version} here needs the C library 2\.39, Debian bookworm has 2\.36 \(and Python 3\.11\)",
    ):
        Image.from_env()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        InvalidInput, match=rf"CPython {version} of darwin cannot run .* CPython 3\.11; use Image\.debian"
    ):
        Image.from_env()


def test_what_an_environment_refuses() -> None:
    with pytest.raises(InvalidInput, match=r"no-such-dist: not installed here; correct exclude"):
        Image.from_env(exclude=["no.such_dist"])


def test_packages_on_an_environment_are_for_its_own_interpreter() -> None:
    image = Image.from_env().pip_install("six")
    step = image.steps[-1]
    assert (step.kind, step.words) == ("pip", ("six",))
    assert dict(step.environment)["LD_LIBRARY_PATH"] == "/opt/rethaw-python/lib"
    one, two = (
        layers(ImageSpec(steps=(ImageStep(kind="pip", words=("six",)),), python=python))
        for python in (None, image.python)
    )
    assert one[0] == two[0] and one[1] != two[1]


def test_the_base_never_has_what_a_user_names() -> None:
    base = layers(ImageSpec())
    for spec in (Image.debian().apt_install("jq").spec, Image.debian().pip_install("a").spec):
        assert layers(spec)[0] == base[0] and len(layers(spec)) == 2
    assert layers(Image.debian().apt_install("git").spec) == base  # it has that
    assert layers(Image.debian().apt_install("git=1:2").spec) != base


def test_binaries_tell_what_they_need() -> None:
    found = elf.needs(Path(sys.executable).resolve())
    assert found is not None and "libc.so.6" in found.libraries and 17 <= found.glibc <= environment.GLIBC["bookworm"]
    assert elf.needs(Path(__file__)) is None


def test_an_environment_is_a_virtual_environment_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unpacked under another root, since only there is room for it in a test; what runs is not this Python."""
    packages = tmp_path / "packages"
    tree(
        packages,
        "thing/__init__.py",
        "thing/data.txt",
        "thing-1.0.dist-info/METADATA",
        "other.py",
        "mine-1.0.dist-info/METADATA",
    )
    (packages / "thing-1.0.dist-info/METADATA").write_text("Name: thing\nVersion: 1.0\n")
    (packages / "mine-1.0.dist-info/METADATA").write_text("Name: mine\nVersion: 1.0\n")
    (packages / "mine-1.0.dist-info/direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
    (packages / "mine-1.0.dist-info/RECORD").write_text("_mine.pth,,\n")
    source = tree(tmp_path / "project/src", "mine/__init__.py", "mine/.env", "notes.txt")
    (packages / "_mine.pth").write_text(f"{source}\n")
    for name in ("thing/__init__.py", "mine/__init__.py"):
        (packages / name if name.startswith("thing") else source / name).write_text("VALUE = 42\n")
    (packages / "other.py").write_text("")
    monkeypatch.setattr(environment, "_site_directories", lambda: [packages])
    monkeypatch.setattr(sys, "path", [str(packages), *[p for p in sys.path if "site-packages" not in p]])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    environment._entries.cache_clear()  # pyright: ignore[reportPrivateUsage]
    try:
        image = Image.from_env()
        first = image.uploads()
        assert len(list((tmp_path / "cache/rethaw/environments").glob("*.tar.gz"))) == 2
        with monkeypatch.context() as only:
            only.setattr(additions, "pack", lambda entries: pytest.fail("packed again"))
            assert image.uploads() == first
        environment._entries.cache_clear()  # pyright: ignore[reportPrivateUsage]
        (packages / "other.py").write_text("CHANGED = 1\n")
        assert (
            [digest for digest, _ in image.uploads()] == [first[0][0], image.uploads()[1][0]] != [d for d, _ in first]
        )
        for _, data in image.uploads():
            (tmp_path / "part.tar.gz").write_bytes(data)
            archive.extract(tmp_path / "part.tar.gz", tmp_path / "root")
    finally:
        environment._entries.cache_clear()  # pyright: ignore[reportPrivateUsage]
    config = tmp_path / "root/opt/rethaw-venv/pyvenv.cfg"
    config.write_text(config.read_text().replace("= /opt", f"= {tmp_path}/root/opt"))
    place = tmp_path / f"root/opt/rethaw-venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    assert (place / "mine/__init__.py").exists() and not (place / "mine/.env").exists()
    assert not (place / "notes.txt").exists() and not (place / "_mine.pth").exists()
    code = "import sys, ssl, sqlite3, thing, mine; print(thing.VALUE + mine.VALUE, sys.prefix, sys.base_prefix, thing.__file__)"
    python = tmp_path / "root/opt/rethaw-venv/bin/python3"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False, env={})
    root = f"{tmp_path}/root/opt"
    assert done.stdout.split()[:3] == ["84", f"{root}/rethaw-venv", f"{root}/rethaw-python"], done.stderr
    (packages / "mine-1.0.dist-info/RECORD").write_text("")
    with pytest.raises(InvalidInput, match=r"mine is installed as an editable project.*exclude=\['mine'\]"):
        Image.from_env()
    assert Image.from_env(exclude=["mine"]).python == "/opt/rethaw-venv/bin/python3"


# ---------------------------------------------------------------- nothing else


def test_nothing_else_of_the_disk_is_read(tmp_path: Path) -> None:
    tree(tmp_path, "secret.txt", "data/in.txt", "data/.env", "unused.py", "data/.git/config")
    (tmp_path / "beside.py").write_text("X = 1\n")
    (tmp_path / "agent_file.py").write_text("""
import rethaw, beside
@rethaw.agent(image=rethaw.Image.debian().add_local_dir("data", "/data"))
def main(ctx: rethaw.Context, n: int = 1) -> None: ...
""")
    code = f"""
import sys
opened = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
connected = []
sys.addaudithook(lambda event, args: connected.append(args[1]) if event == "socket.connect" else None)
from rethaw.cli.main import main
code = main(["run", "--dry-run", "{tmp_path}/agent_file.py", "--n", "3"])
mine = sorted(p.removeprefix("{tmp_path}/") for p in opened if p.startswith("{tmp_path}") and "__pycache__" not in p)
print(code, mine, connected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 ['agent_file.py', 'beside.py', 'data/in.txt'] []", done.stdout + done.stderr
    assert any(line.split() == ["6", "beside.py"] for line in lines) and any(line.endswith(" in.txt") for line in lines)
    assert any(line.startswith("  step 1  add ") for line in lines) and lines[-2].startswith("Nothing else")
    assert not any(word in done.stdout for word in ("secret", "unused", ".env", ".git"))
