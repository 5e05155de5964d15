"""Nothing from a checkpoint, the hub or the current folder is run, unless the user trusts it."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import hub
import pytest
import torch
from checkpoints import make_bpe_tokenizer, tritconv

from fetch import FetchError, download
from tritconv.calibration.documents import Document
from tritconv.calibration.model import fast_precision
from tritconv.calibration.pretrained import load
from tritconv.calibration.text import render
from tritconv.sources.foreign_code import trusted
from tritconv.sources.mapped import open_checkpoint
from tritcore.errors import TritError

# What the attacker's code does. The class works, so that code which is trusted serves.
_CODE = """
    from pathlib import Path
    Path({marker!r}).touch()
    from transformers import PreTrainedTokenizerFast
    class EvilTok(PreTrainedTokenizerFast):
        pass
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that an attacker's code makes."""
    return tmp_path / "marker"


def _write_code(file: Path, marker: Path, code: str = _CODE) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(code).format(marker=str(marker)))


def _change(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


@pytest.fixture
def victim(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint without a tokenizer, which names one in Python in another repository."""
    folder = tmp_path / "victim"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer.model").unlink()
    _change(folder / "config.json", architectures=["HunYuanDenseV1ForCausalLM"])
    _change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/code--tok.EvilTok", None]})
    return folder


def _work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def _is_refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    for word in (*words, "--trust-remote-code"):
        assert word in line


def test_code_that_a_checkpoint_of_the_hub_names(victim: Path, marker: Path, tmp_path: Path) -> None:
    _write_code(tmp_path / "code" / "tok.py", marker)
    _change(tmp_path / "code" / "config.json")
    with hub.serve({"org/victim": victim, "evil/code": tmp_path / "code"}) as server:
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
        done = tritconv("hf-to-gguf", "org/victim", "--fast", "--depth", 2, cwd=_work(tmp_path), env=env)
        _is_refused(done, "evil/code")
        assert not any("evil" in request for request in server.requests), "it was fetched"
    assert not marker.exists()


def test_trusted_code_that_fails(victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    _write_code(victim / "tok.py", tmp_path, "raise OSError('the disk of {marker} is gone')")
    _change(victim / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.EvilTok", None]})
    with trusted(), pytest.raises(TritError, match=r"its own code for the tokenizer fails: the disk of .* gone"):
        open_checkpoint(victim)


def test_code_in_the_folder_and_in_the_config(victim: Path, marker: Path, tmp_path: Path) -> None:
    """What calibration loads besides: configuration and model."""
    _write_code(victim / "tok.py", marker)
    own = {"AutoConfig": "tok.Config", "AutoModelForCausalLM": "tok.Model", "AutoTokenizer": ["tok.EvilTok", None]}
    _change(victim / "config.json", model_type="unknown", auto_map=own)
    with pytest.raises(TritError, match=r"Python code of its own.*--trust-remote-code"):
        load(victim)
    assert not marker.exists()


def test_no_converter_class_runs_code(victim: Path, marker: Path, tmp_path: Path) -> None:
    """All of llama.cpp's classes read the tokenizer, as do those that pass trust_remote_code=True."""
    for name in ("tok.py", "custom_generate/generate.py"):
        _write_code(victim / name, marker)
    _change(victim / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tok.EvilTok"]})
    program = f"""
        from pathlib import Path
        from unittest.mock import MagicMock
        import conversion
        from tritconv.sources.foreign_code import guard, trusted
        conversion.load_all_models()
        guard()
        def read_all():
            classes = set(conversion.ModelBase._model_classes[conversion.ModelType.TEXT].values())
            for kind in classes:
                model = object.__new__(kind)
                model.dir_model = Path({str(victim)!r})
                model.hparams = {{"vocab_size": 600}}
                model.gguf_writer = MagicMock()
                try:
                    model.set_vocab()
                except BaseException:
                    pass
            return len(classes)
        assert read_all() > 50
        assert not Path({str(marker)!r}).exists()
        with trusted():
            read_all()
        assert Path({str(marker)!r}).exists(), "the test tests nothing"
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=env)
    assert done.returncode == 0, done.stderr


def test_a_kernel_for_attention(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    shutil.copytree(checkpoint, folder)
    _change(folder / "config.json", attn_implementation="evil/kernel@main:attention")
    with pytest.raises(TritError, match=r"would run code from evil/kernel.*--trust-remote-code"):
        load(folder)


@pytest.mark.build
@pytest.mark.slow
def test_trusted_code_runs(checkpoint: Path, marker: Path, tmp_path: Path) -> None:
    """A tokenizer and a model of the checkpoint's own, converted and calibrated."""
    folder, work = tmp_path / "own", _work(tmp_path)
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer.model").unlink()
    make_bpe_tokenizer(folder)
    _write_code(folder / "tok.py", marker)
    code = """
        from transformers import LlamaConfig, LlamaForCausalLM
        class OwnConfig(LlamaConfig):
            model_type = "own"
        class OwnModel(LlamaForCausalLM):
            config_class = OwnConfig
    """
    _write_code(folder / "own.py", marker, code)
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    _change(folder / "config.json", architectures=["DreamModel"], model_type="own", auto_map=own)
    _change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tok.EvilTok"]})
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on. " * 50)
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "TRITCONV_CACHE": str(tmp_path / "cache")}
    command = ["hf-to-gguf", folder, "--depth", 2, "--pre", "gpt-2", "--calibrate", text, "--calib-seq", 64]

    done = tritconv(*command, "--trust-remote-code", cwd=work, env=env)
    assert done.returncode == 0, done.stderr
    assert marker.exists()
    warning = done.stderr.splitlines()[0]
    assert warning.startswith("warning: ")
    assert "--trust-remote-code" in warning


def test_files_that_were_downloaded_do_not_run(marker: Path, tmp_path: Path) -> None:
    """Whoever loads them: here, callers that ask for no permission."""
    home = tmp_path / "home"
    downloaded = home / "hub" / "models--evil--code" / "snapshots" / "0"
    _write_code(downloaded / "kernel.py", marker)
    _write_code(home / "modules" / "tok.py", marker)
    (downloaded / "kernel.so").write_bytes(b"")
    program = f"""
        import ctypes, importlib.util, runpy, sys
        from tritconv.sources.foreign_code import ForeignCodeError, guard, trusted
        guard()
        from transformers.dynamic_module_utils import get_class_in_module
        def load_kernel():
            spec = importlib.util.spec_from_file_location("kernel", {str(downloaded / "kernel.py")!r})
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        loads = [
            load_kernel,
            lambda: get_class_in_module("EvilTok", "tok.py"),
            lambda: runpy.run_path({str(downloaded / "kernel.py")!r}),
            lambda: ctypes.CDLL({str(downloaded / "kernel.so")!r}),
        ]
        for number, load in enumerate(loads):
            try:
                load()
            except ForeignCodeError as error:
                assert "--trust-remote-code" in str(error)
            else:
                sys.exit(f"{{number}} was not refused")
        with trusted():
            load_kernel()
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {"HF_HOME": str(home)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert marker.exists(), "the test tests nothing"


class _Payload:
    """Unpickled, it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_pickles_that_run_something(checkpoint: Path, marker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(TritError, match=r"pytorch_model\.bin holds more than tensors"):
        open_checkpoint(folder)
    with pytest.raises(TritError):
        load(folder)
    assert not marker.exists()


_HOSTILE = (
    "torch numpy gguf json typer rich transformers tokenizers safetensors huggingface_hub llama_cpp conversion jinja2 "
    "sentencepiece sitecustomize usercustomize yaml tqdm accelerate kernels sympy typing_extensions pip"
)


_CHAT = ("chat", "--temp", "0", "--max-tokens", "1")


@pytest.fixture
def hostile(marker: Path, tmp_path: Path) -> Path:
    """A folder with modules and packages in the names of libraries."""
    folder = tmp_path / "hostile"
    for name in _HOSTILE.split():
        _write_code(folder / f"{name}.py", marker)
        _write_code(folder / name / "__init__.py", marker)
    return folder


@pytest.mark.build
def test_modules_in_the_current_folder(checkpoint: Path, hostile: Path, marker: Path, tmp_path: Path) -> None:
    done = tritconv("hf-to-gguf", checkpoint, "--fast", "--depth", 2, "-o", tmp_path / "x.gguf", cwd=hostile)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


def test_modules_in_the_current_folder_of_a_child(hostile: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That asks whether the processor multiplies in bfloat16, if it says so."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.chdir(hostile)
    fast_precision(torch.device("cpu"))
    assert not marker.exists()


@pytest.mark.parametrize(
    "command",
    [
        [Path(sys.executable).parent / "tritconv", "inspect"],
        pytest.param([Path(sys.executable).parent / "tritrun", *_CHAT], marks=pytest.mark.build),
        pytest.param([sys.executable, "-m", "tritrun", *_CHAT], marks=pytest.mark.build),
    ],
)
def test_modules_in_the_current_folder_of_other_commands(
    command: list[object], tiny_model: Path, hostile: Path, marker: Path
) -> None:
    whole = [*map(str, command), str(tiny_model)]
    done = subprocess.run(whole, cwd=hostile, input="hi\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not marker.exists()


def test_modules_in_the_current_folder_of_pip(
    hostile: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match="No matching distribution"):
        download("nonesuch", tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_are_confined(template: str, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = template
    document = Document("", "text.jsonl, line 1", ({"role": "user", "content": "hi"},))
    with pytest.raises(TritError, match=r"text\.jsonl"):
        render([document], tokenizer)
