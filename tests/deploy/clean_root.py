"""Builds our Dockerfile in plain folders: each stage is a copy of the one it is made from, each RUN a chroot into it.

What stands for the Debian image is a root that debootstrap makes once and that is kept. Needs Linux, root's rights
(chroot, mount) and debootstrap. A RUN sees the machine's own settings of pip, as a build behind a mirror does; they are
mounted for the time it takes and are never part of what is built.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.deploy.dockerfile import Instruction, Stage, chain, copy_source, fill, read_stages

ROOT = Path(__file__).resolve().parent.parent.parent
DEBIAN = "bookworm"  # the release of the Dockerfile's BASE
_CA_IN_ROOT = "/run/build-ca.crt"
_PIP_FILES = ("/etc/pip.conf", "/etc/xdg/pip", "/root/.config/pip", "/root/.pip")
_RUN_SECONDS = 1500


@dataclass(slots=True)
class Image:
    """A root folder, and how what is in it is started."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    def derived(self, root: Path) -> "Image":
        """The same settings over another folder."""
        return Image(
            root,
            dict(self.env),
            self.user,
            self.workdir,
            [*self.entrypoint],
            [*self.command],
            [*self.healthcheck],
            [*self.volumes],
        )


def check_machine() -> None:
    """Raise SystemExit, saying what is missing, where the build cannot work."""
    if os.geteuid() != 0:
        raise SystemExit("building a clean root needs root: it mounts and changes roots")
    for tool, package in (("debootstrap", "debootstrap"), ("unshare", "util-linux"), ("setpriv", "util-linux")):
        if shutil.which(tool) is None and not Path(f"/usr/sbin/{tool}").exists():
            raise SystemExit(f"{tool} is missing: apt-get install {package}")


def build(target: str, folder: Path, base: Path, build_args: Mapping[str, str], file: Path | None = None) -> Image:
    """The image of a stage of docker/Dockerfile, with each stage in a folder of its own under `folder`.

    `base` is the root that stands for the image that the Dockerfile begins with; it is made if it is not there. An image
    that was built from the very same files is taken as it is.
    """
    check_machine()
    make_base(base)
    text = (file or ROOT / "docker" / "Dockerfile").read_text()
    stages = read_stages(text)
    stamp, digest = folder / f"{target}.json", _digest_of_inputs(text, stages, build_args)
    if stamp.exists() and (kept := json.loads(stamp.read_text()))["digest"] == digest:
        return Image(folder / target, **kept["settings"])
    stamp.unlink(missing_ok=True)
    images: dict[str, Image] = {}
    for name in chain(stages, target):
        root = folder / name
        shutil.rmtree(root, ignore_errors=True)
        parent = images.get(stages[name].base, Image(base))
        copy_tree(parent.root, root)
        images[name] = parent.derived(root)
        _build_stage(stages[name], images[name], images, build_args)
    settings = asdict(images[target])
    del settings["root"]
    stamp.write_text(json.dumps({"digest": digest, "settings": settings}))
    return images[target]


def _digest_of_inputs(text: str, stages: Mapping[str, Stage], build_args: Mapping[str, str]) -> str:
    """Of the Dockerfile, its arguments, and every file that it copies from the context."""
    found = hashlib.sha256(json.dumps([text, dict(build_args)], sort_keys=True).encode())
    copies = [one for stage in stages.values() for one in stage.instructions if one.name == "COPY"]
    for source in [source for copy in copies if copy_source(copy) is None for source in copy.words()[:-1]]:
        path = ROOT / source
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        for each in files:
            if "__pycache__" not in each.parts and not any(part.endswith(".egg-info") for part in each.parts):
                found.update(str(each.relative_to(ROOT)).encode() + b"\0" + each.read_bytes())
    return found.hexdigest()


def make_base(root: Path) -> None:
    """A minimal Debian, less what its slim image leaves out too, so that sizes can be compared."""
    if (root / "complete").exists():
        return
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    mirror = "http://deb.debian.org/debian"
    _call("debootstrap", "--variant=minbase", DEBIAN, str(root), mirror)
    for name in ("doc", "man", "locale", "info"):
        shutil.rmtree(root / "usr/share" / name, ignore_errors=True)
    for name in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / name, ignore_errors=True)
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    (root / "complete").touch()


def copy_tree(source: Path, target: Path) -> None:
    """A copy with owners and modes; `target` is made with its parents, a folder merges into one that is there."""
    target.mkdir(parents=True, exist_ok=True)
    _call("cp", "-a", "--reflink=auto", f"{source}/.", str(target))


def tree_bytes(root: Path) -> int:
    """What the files of a folder take, each once."""
    return int(_call("du", "-sxB1", str(root)).split()[0])


def _build_stage(stage: Stage, image: Image, images: Mapping[str, Image], build_args: Mapping[str, str]) -> None:
    args: dict[str, str] = {}
    for instruction in stage.instructions:
        if instruction.name == "RUN":
            print(f"[{stage.name}] RUN {instruction.text[:100]}", file=sys.stderr, flush=True)
            _run(image, args, instruction.text)
        elif instruction.name == "ARG":
            name, _, value = instruction.text.partition("=")
            args[name] = build_args.get(name, value)
        elif instruction.name == "COPY":
            _copy(image, instruction, images)
        else:
            _configure(image, instruction, args)


def _configure(image: Image, instruction: Instruction, args: Mapping[str, str]) -> None:
    """What changes how the image is started, and no file in it but the working directory."""
    name, words = instruction.name, instruction.words()
    if name == "ENV":
        for word in words:
            key, _, value = word.partition("=")
            image.env[key] = fill(value, {**args, **image.env})
    elif name == "USER":
        image.user = words[0]
    elif name == "WORKDIR":
        image.workdir = words[0]
        (image.root / words[0].lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif name == "ENTRYPOINT":
        image.entrypoint, image.command = words, []
    elif name == "CMD":
        image.command = words
    elif name == "HEALTHCHECK":
        image.healthcheck = json.loads(instruction.text.partition("CMD ")[2])
    elif name == "VOLUME":
        image.volumes += words


def _copy(image: Image, instruction: Instruction, images: Mapping[str, Image]) -> None:
    origin = copy_source(instruction)
    *sources, target = [word for word in instruction.words() if not word.startswith("--")]
    place = image.root / os.path.join(image.workdir, target).lstrip("/")
    for source in sources:
        path = (images[origin].root if origin is not None else ROOT) / source.lstrip("/")
        if path.is_dir():
            copy_tree(path, place)
            continue
        to = place / path.name if target.endswith("/") else place
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, to)
    if origin is None:  # Docker gives what comes from the context to root
        _call("chown", "-R", "0:0", str(place))


def _run(image: Image, args: Mapping[str, str], command: str) -> None:
    """One RUN: `sh -c` in the root. The mounts live in a namespace of their own and are gone with it."""
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
    env |= {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
    mounts, made = [f"mount -t proc proc {image.root}/proc"], []
    binds = [("/dev/null",) * 2, ("/dev/urandom",) * 2, ("/etc/resolv.conf",) * 2, ("/etc/hosts",) * 2]
    binds += [(path, path) for path in _pip_paths()]
    certificates = os.environ.get("PIP_CERT")
    if certificates:
        binds.append((certificates, _CA_IN_ROOT))
        env["PIP_CERT"] = _CA_IN_ROOT
    for source, target in binds:
        place = image.root / target.lstrip("/")
        if not place.exists():
            made.append(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir() if Path(source).is_dir() else place.touch()
        mounts.append(f"mount --bind {source} {place}")
    inside = ["chroot", str(image.root), "sh", "-ec", f"cd {image.workdir}; {command}"]
    script = "set -e; " + "; ".join(mounts) + '; exec "$@"'
    try:
        _call(
            "unshare", "--mount", "--pid", "--fork", "sh", "-c", script, "sh", *inside, env={**env, **args, **image.env}
        )
    finally:
        for place in made:
            place.rmdir() if place.is_dir() else place.unlink()


def _pip_paths() -> list[str]:
    """Files and folders of this machine that pip is set up to use: its settings, and packages that lie on the disk."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    named = [found.removeprefix("file://") for found in re.findall(r"(?:file://)?/[^\s'\"]+", listed)]
    places = (Path(path) for path in named if not path.startswith("/etc/"))
    # an index on the disk is a folder `simple` of links to files beside it
    wanted = {str(path.parent if path.name == "simple" else path): None for path in places}
    return [path for path in (*_PIP_FILES, *wanted) if Path(path).exists()]


def _call(*command: str, env: Mapping[str, str] | None = None) -> str:
    """Run to the end and return what it printed. Raises SystemExit with the end of its output if it fails."""
    finished = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_RUN_SECONDS
    )
    if finished.returncode != 0:
        raise SystemExit(f"{' '.join(command)[-300:]} exited {finished.returncode}:\n{finished.stdout[-4000:]}")
    return finished.stdout
