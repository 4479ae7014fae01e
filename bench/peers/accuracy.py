"""What quantized arithmetic costs: mean KL divergence of Headrace and llama.cpp on the same file.

    .venv/bin/python -m bench.peers.accuracy --llama-cpp DIR --save bench/results/accuracy.json

A text is cut into chunks, each computed on its own, and the second half of each chunk counts, as
`llama-perplexity` does it. Headrace's default path is held against its own reference in float32 on
the dequantized weights; llama.cpp's against itself on a float32 file made of the same weights. The
two float32 paths are compared as well: they should agree.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the server's engine process

import torch
from bench.peers.contenders import ROOT, headrace_version
from bench.peers.llama_cpp import LlamaCpp, parse_kl_divergence
from bench.peers.logits_file import LogitsFile
from bench.peers.processes import PeerError, progress, sigterm_as_interrupt
from bench.peers.record import command, markdown

from headrace.config import DeviceOptions, EngineConfig, ModelOptions
from headrace.engine.build import build_engine
from headrace.engine.hardware import probe
from headrace.errors import HeadraceError
from headrace.loading.gguf import GGUFFile
from headrace.loading.resolver import resolve_model
from headrace.text.gguf_tokenizer import gguf_tokenizer_settings, tokenizer_from_gguf
from headrace_kernels.attention_metadata import AttentionMetadata
from headrace_kernels.dispatch import OPS

DEFAULT_TEXT = ("README.md", "CONTRIBUTING.md", "docs/*.md", "LICENSE")
LEAST_LOGPROB = -16.0
Logits = Callable[[list[int]], torch.Tensor]


@dataclass
class Divergence:
    """What one path says of the tokens, against another; filled chunk by chunk."""

    name: str
    kl: list[float] = field(default_factory=list)
    """KL(reference || path) in nat, a value a position."""
    error: list[float] = field(default_factory=list)
    """Of the log-probability of the text's next token, absolute."""
    same_top: list[float] = field(default_factory=list)

    def add(self, reference: torch.Tensor, path: torch.Tensor, targets: torch.Tensor) -> None:
        """reference, path: [positions, V] log-probabilities; targets: [positions] int64."""
        reference, path = reference.double(), path.double()
        terms = reference.exp() * (reference - path)
        # As llama-perplexity: its file does not hold what lies below.
        terms.masked_fill_(reference <= LEAST_LOGPROB, 0.0)
        self.kl += terms.sum(1).tolist()
        own = targets[:, None]
        self.error += (path.gather(1, own) - reference.gather(1, own)).abs()[:, 0].tolist()
        self.same_top += (path.argmax(1) == reference.argmax(1)).double().tolist()

    def summary(self) -> dict[str, float]:
        return {
            "mean_kl": float(np.mean(self.kl)),
            "mean_kl_standard_error": float(np.std(self.kl) / np.sqrt(len(self.kl))),
            "p99_kl": float(np.quantile(self.kl, 0.99)),
            "mean_abs_logprob_error": float(np.mean(self.error)),
            "same_top": float(np.mean(self.same_top)),
            "positions": len(self.kl),
        }


def headrace_logits(config: EngineConfig, context: int) -> Logits:
    """A function from a chunk of at most `context` tokens to its logits [tokens, V], in fp32.

    The model, with its weights and kernels, is the one that an engine of this configuration runs.
    """
    engine = build_engine(config)
    model = engine._runner._model  # type: ignore[attr-defined]
    facts, size = model.config, engine.info.block_size
    blocks = -(-context // size)
    shape = (blocks, facts.num_layers, 2, facts.num_kv_heads, size, facts.head_dim)
    cache = torch.zeros(shape, dtype=getattr(torch, engine.info.dtype))
    layers = [cache[:, layer] for layer in range(facts.num_layers)]

    @torch.inference_mode()
    def logits(tokens: list[int]) -> torch.Tensor:
        length = np.array([len(tokens)])
        positions = np.arange(len(tokens))
        metadata = AttentionMetadata.build(
            length, length, np.arange(blocks)[None], positions, torch.device("cpu")
        )
        hidden = model(torch.tensor(tokens), torch.from_numpy(positions), layers, metadata)
        found: torch.Tensor = model.compute_logits(hidden)
        return found

    return logits


def own_chunks(metadata: dict[str, Any], text: str, context: int) -> list[list[int]]:
    """The text's whole chunks, by our tokenizer; what is left over is dropped."""
    tokens = tokenizer_from_gguf(metadata).encode(text)
    return [tokens[i : i + context] for i in range(0, len(tokens) - context + 1, context)]


def compare_headrace(
    args: argparse.Namespace, model: Path, text: str, base: LogitsFile | None
) -> Iterator[Divergence]:
    """Default path against float32, and float32 against llama.cpp's, chunk by chunk."""
    metadata = GGUFFile(model).metadata
    chunks = own_chunks(metadata, text, args.context) if base is None else base.tokens.tolist()
    chunks = chunks[: args.chunks]
    if not chunks:
        raise PeerError(f"the text has fewer tokens than one chunk of {args.context}: --text FILE")
    # A chunk begins with the token that begins a text, where the model has one.
    settings = gguf_tokenizer_settings(metadata)
    bos = settings.bos_token_id if settings.add_bos else None
    device = DeviceOptions(device="cpu", threads=args.threads)
    default = headrace_logits(EngineConfig(model=str(model), device=device), args.context)
    exact = headrace_logits(
        EngineConfig(
            model=str(model),
            model_options=ModelOptions(dtype="float32"),
            device=DeviceOptions(
                device="cpu",
                threads=args.threads,
                kernel=tuple(f"{stem}=reference" for stem in OPS),
            ),
        ),
        args.context,
    )
    paths = [Divergence("headrace, default against float32")]
    if base is not None:
        paths.append(Divergence("float32: headrace against llama.cpp"))
    counted = slice(args.context // 2, args.context - 1)
    for number, chunk in enumerate(chunks):
        progress(f"headrace: chunk {number + 1} of {len(chunks)}")
        targets = torch.tensor(chunk[args.context // 2 + 1 :])
        tokens = chunk if bos is None else [bos, *chunk[1:]]
        torch.set_num_threads(args.threads)
        reference = exact(tokens)[counted].log_softmax(1)
        torch.set_num_threads(1)  # as the engine that has its own threads
        paths[0].add(reference, default(tokens)[counted].log_softmax(1), targets)
        if base is not None:
            paths[1].add(torch.from_numpy(base.log_probabilities(number)), reference, targets)
    yield from paths


def compare_llama_cpp(
    llama_cpp: LlamaCpp, args: argparse.Namespace, model: Path, text: Path, scratch: Path
) -> tuple[dict[str, float], LogitsFile]:
    """llama.cpp's statistics of the file, and its float32 log-probabilities."""
    base = scratch / "base.logits"
    exact = llama_cpp.quantize(model, scratch / "float32.gguf", "F32")
    chunks = ["-c", args.context, "-b", args.context, "--chunks", args.chunks, "-t", args.threads]
    progress("llama.cpp: float32")
    llama_cpp.run(
        *("llama-perplexity", "-m", exact, "-f", text, "--kl-divergence-base", base, *chunks),
        *("-ctk", "f32", "-ctv", "f32", "-fa", "off"),
        timeout=1800,
    )
    progress("llama.cpp: as it is")
    output = llama_cpp.run(
        *("llama-perplexity", "-m", model, "--kl-divergence-base", base, "--kl-divergence"),
        *chunks,
        timeout=1800,
    )
    return parse_kl_divergence(output), LogitsFile(base)


def read_text(names: list[Path]) -> str:
    """The files one after the other; by default this repository's own prose."""
    if not names:
        names = [path for pattern in DEFAULT_TEXT for path in sorted(ROOT.glob(pattern))]
    try:
        return "\n".join(path.read_text() for path in names)
    except OSError as error:
        raise PeerError(f"--text {error.filename}: {error.strerror}") from None


def run(args: argparse.Namespace, model: Path, scratch: Path) -> dict[str, Any]:
    """The record of one run."""
    text = read_text(args.text)
    (scratch / "text").write_text(text)
    peer, base, absent, version = None, None, {}, None
    try:
        llama_cpp = LlamaCpp.find(args.llama_cpp, args.threads, scratch)
        version = llama_cpp.version()
        peer, base = compare_llama_cpp(llama_cpp, args, model, scratch / "text", scratch)
    except PeerError as error:
        absent["llama.cpp"] = str(error)
    ours = {path.name: path.summary() for path in compare_headrace(args, model, text, base)}
    return {
        "command": command("bench.peers.accuracy", sys.argv[1:]),
        "model": model.name,
        "cpu": probe("cpu").name,
        "versions": {"headrace": headrace_version(), "llama.cpp": version},
        "text": {
            "files": [path.name for path in args.text] or list(DEFAULT_TEXT),
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "characters": len(text),
        },
        "context": args.context,
        "headrace": ours,
        "llama.cpp": peer,
        "absent": absent,
    }


def table(record: dict[str, Any]) -> str:
    """Markdown, a row for each comparison."""
    rows = [[record["model"], "mean KL", "+-", "99% KL", "mean abs logprob error", "same top"]]
    for name, found in record["headrace"].items():
        rows.append(
            [
                name,
                *(f"{found[key]:.5f}" for key in ("mean_kl", "mean_kl_standard_error", "p99_kl")),
                f"{found['mean_abs_logprob_error']:.4f}",
                f"{found['same_top']:.1%}",
            ]
        )
    if (peer := record["llama.cpp"]) is not None:
        # It prints neither the standard error in a field of its own nor errors in nat.
        figures = [f"{peer['Mean KLD']:.5f}", "", f"{peer['99.0% KLD']:.5f}", ""]
        name = "llama.cpp, default against float32"
        rows.append([name, *figures, f"{peer['Same top p'] / 100:.1%}"])
    return markdown(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="", help="a .gguf file (default: SmolLM2-135M-Instruct, Q4_1)")
    add("--llama-cpp", type=Path, metavar="DIR", help="its binaries (default: package, then PATH)")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE",
        help=f"(default: {', '.join(DEFAULT_TEXT)} of this repository)")  # fmt: skip
    add("--context", type=int, default=512, help="tokens of a chunk (default: %(default)s)")
    add("--chunks", type=int, default=8, help="at most so many (default: %(default)s)")
    add("--threads", type=int, default=probe("cpu").cores, help="(default: %(default)s)")
    add("--save", type=Path, metavar="FILE.json", help="write the figures")
    args = parser.parse_args()
    if args.context < 4 or args.context % 2:
        parser.error("--context must be even and at least 4")
    if args.chunks < 1:
        parser.error("--chunks must be at least 1")
    if args.save and not args.save.absolute().parent.is_dir():
        parser.error(f"--save: there is no folder {args.save.parent}")
    try:
        model = resolve_model(args.model)
        with sigterm_as_interrupt(), tempfile.TemporaryDirectory(prefix="headrace-kl-") as name:
            record = run(args, model, Path(name))
    except (HeadraceError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(table(record))
    for name, reason in record["absent"].items():
        print(f"{name}: {reason}")
    if args.save:
        args.save.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
