"""Folders and files as checkpoints: what is found, what is refused, what the digest sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headrace.errors import CheckpointError
from headrace.loading.checkpoint import open_checkpoint

WriteGGUF = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The smallest folder that opens: config.json and one weight."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / "config.json", {"architectures": ["LlamaForCausalLM"]})
    save_file({"model.norm.weight": torch.ones(4)}, path / "model.safetensors")
    return path


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def test_folder(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2]})
    write_json(folder / "tokenizer.json", {})
    write_json(folder / "tokenizer_config.json", {"chat_template": "hello"})
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>"})

    checkpoint = open_checkpoint(folder)

    assert checkpoint.kind == "safetensors"
    assert checkpoint.hf_config == {"architectures": ["LlamaForCausalLM"]}
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.gguf_metadata is None
    assert checkpoint.weight_bytes == 16
    assert [weight.name for weight in checkpoint.weights()] == ["model.norm.weight"]
    tokenizer = checkpoint.tokenizer
    assert tokenizer.tokenizer_json == folder / "tokenizer.json"
    assert tokenizer.tokenizer_config == {"chat_template": "hello"}
    assert tokenizer.special_tokens_map == {"bos_token": "<s>"}
    assert tokenizer.chat_template == "hello"
    assert tokenizer.gguf_metadata is None


def test_folder_without_a_tokenizer(folder: Path) -> None:
    tokenizer = open_checkpoint(folder).tokenizer
    assert tokenizer.tokenizer_json is None
    assert tokenizer.chat_template is None


def test_gguf_file_and_the_folder_that_holds_it(write_gguf: WriteGGUF) -> None:
    path = write_gguf(
        {"output_norm.weight": np.ones(4, dtype=np.float32)}, {"llama.block_count": 3}
    )
    for place in (path, path.parent):
        checkpoint = open_checkpoint(place)
        assert checkpoint.kind == "gguf"
        assert checkpoint.path == path
        assert checkpoint.hf_config is None
        assert checkpoint.gguf_metadata is not None
        assert checkpoint.gguf_metadata["llama.block_count"] == 3
        assert checkpoint.tokenizer.gguf_metadata is checkpoint.gguf_metadata
        assert checkpoint.weight_bytes == 16
        assert [weight.name for weight in checkpoint.weights()] == ["model.norm.weight"]


def test_opening_the_real_file_imports_neither_torch_nor_numpy(smollm2_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import headrace.loading.resolver\n"
        "from headrace.loading.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(Path(sys.argv[1]))\n"
        "assert checkpoint.digest.startswith('sha256:') and next(checkpoint.weights()).name\n"
        "print(*sorted({'torch', 'numpy', 'tokenizers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, smollm2_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == ""


class TestChatTemplate:
    def test_file_wins_over_configuration(self, folder: Path) -> None:
        write_json(folder / "tokenizer_config.json", {"chat_template": "old"})
        (folder / "chat_template.jinja").write_text("new é")
        assert open_checkpoint(folder).tokenizer.chat_template == "new é"

    def test_json_file_wins_over_configuration(self, folder: Path) -> None:
        write_json(folder / "tokenizer_config.json", {"chat_template": "old"})
        write_json(folder / "chat_template.json", {"chat_template": "new"})
        assert open_checkpoint(folder).tokenizer.chat_template == "new"

    def test_named_templates_in_the_configuration(self, folder: Path) -> None:
        named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
        write_json(folder / "tokenizer_config.json", {"chat_template": named})
        template = open_checkpoint(folder).tokenizer.chat_template
        assert template == {"default": "d", "tool_use": "t"}

    def test_named_templates_as_files(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("d")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("t")
        template = open_checkpoint(folder).tokenizer.chat_template
        assert template == {"default": "d", "tool_use": "t"}

    @pytest.mark.parametrize("template", [3, [1], [{"name": "default"}]])
    def test_neither_is_refused(self, folder: Path, template: Any) -> None:
        write_json(folder / "tokenizer_config.json", {"chat_template": template})
        with pytest.raises(CheckpointError, match="chat_template: "):
            open_checkpoint(folder)

    def test_not_utf8(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8"):
            open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff{}", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_broken_json_names_the_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: not .*Download it again"):
        open_checkpoint(folder)


class TestRefused:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="absent: no such file or folder"):
            open_checkpoint(tmp_path / "absent")

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no weights here"):
            open_checkpoint(tmp_path)

    def test_no_configuration(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"there is no config\.json"):
            open_checkpoint(folder)

    def test_a_safetensors_file(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="give the folder that holds this file"):
            open_checkpoint(folder / "model.safetensors")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
    def test_pickle(self, folder: Path, name: str) -> None:
        (folder / "model.safetensors").rename(folder / name)
        with pytest.raises(CheckpointError, match=f"pickle files.*{name}.*Convert .* safetensors"):
            open_checkpoint(folder)

    def test_several_gguf_files(self, write_gguf: WriteGGUF) -> None:
        write_gguf({}, name="a.gguf")
        path = write_gguf({}, name="b.gguf")
        with pytest.raises(CheckpointError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
            open_checkpoint(path.parent)


class TestDigest:
    def test_is_stable_and_does_not_depend_on_the_place(self, folder: Path) -> None:
        digest = open_checkpoint(folder).digest
        assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
        assert open_checkpoint(folder.rename(folder.parent / "moved")).digest == digest

    @pytest.mark.parametrize(
        "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    )
    def test_sees_every_text_file(self, folder: Path, name: str) -> None:
        digests = {open_checkpoint(folder).digest}
        for content in ('{"a": 1}', '{"a": 2}'):
            (folder / name).write_text(content)
            digests.add(open_checkpoint(folder).digest)
        assert len(digests) == 3

    def test_sees_the_modules_behind_the_model(self, folder: Path) -> None:
        digests = {open_checkpoint(folder).digest}
        entry = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
        (folder / "modules.json").write_text(json.dumps([entry]))
        (folder / "1_Pooling").mkdir()
        for kind in ("cls_token", "mean_tokens"):
            content = json.dumps({f"pooling_mode_{kind}": True})
            (folder / "1_Pooling" / "config.json").write_text(content)
            digests.add(open_checkpoint(folder).digest)
        assert len(digests) == 3
        [module] = open_checkpoint(folder).modules
        assert (module.kind, module.config) == ("Pooling", {"pooling_mode_mean_tokens": True})

    def test_sees_weights_names_and_types(self, folder: Path) -> None:
        weights = torch.randn(1 << 20)
        digests = set()
        changed = weights.clone()
        changed[1 << 10 :] *= 1.001
        for tensors in (
            {"a": weights},
            {"b": weights},
            {"a": weights.view(1 << 10, 1 << 10)},
            {"a": weights.view(torch.int32)},
            {"a": changed},
        ):
            save_file(tensors, folder / "model.safetensors")
            digests.add(open_checkpoint(folder).digest)
        assert len(digests) == 5

    def test_sees_the_metadata_of_a_gguf_file(self, write_gguf: WriteGGUF) -> None:
        digests = {
            open_checkpoint(write_gguf({}, {"tokenizer.chat_template": text})).digest
            for text in ("a", "b", "a")
        }
        assert len(digests) == 2
