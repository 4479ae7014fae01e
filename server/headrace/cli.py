"""The command line: serve, deploy, chat, plan, kernels, bench. Thin: parses, calls, prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from headrace import __version__
from headrace.config import (
    GROUPS,
    EngineConfig,
    ServerOptions,
    door_api_key,
    load_options,
    nearest_hint,
    openai_api_key,
    option_specs,
    parse_size,
)
from headrace.errors import ConfigError, EngineError, HeadraceError

if TYPE_CHECKING:
    from headrace.hosting.model_host import ServedFacts

MODEL_HELP = (
    "A folder of safetensors, a .gguf file, ORG/NAME[@REVISION][:FILE.gguf] on the hub, or nothing "
    "for SmolLM2-135M-Instruct."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. 2: files or options are at fault, 1: something else."""
    try:
        args = _parse(argv)
        return int(args.run(args))
    except HeadraceError as error:
        print(f"headrace: {error.message}", file=sys.stderr)
        return 1 if isinstance(error, EngineError) else 2
    except KeyboardInterrupt:
        return 130


# --- parsing ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Answers a wrong option with one line, not with a page of usage."""

    def __init__(self, **keywords: Any) -> None:
        # An abbreviation that works today is ambiguous once there is one more option.
        super().__init__(**keywords, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ('{self.prog} --help' shows all options).\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = _parser(with_bench="bench" in argv[:1]).parse_known_args(argv)
    if unknown:
        option = unknown[0].partition("=")[0]
        known = [f"--{spec.name.replace('_', '-')}" for spec in option_specs()]
        raise ConfigError(f"Unknown option {option!r}{nearest_hint(option, known)}")
    return args


def _parser(*, with_bench: bool) -> argparse.ArgumentParser:
    parser = _Parser(prog="headrace", description="An LLM inference server.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over an OpenAI-compatible HTTP API")
    _add_model(serve)
    _add_options(serve, server=True)
    serve.set_defaults(run=_serve)

    serve_ray = commands.add_parser(
        "serve-ray", help="the same as a Ray Serve application, on a Ray of this machine"
    )
    _add_model(serve_ray)
    serve_ray.add_argument("--num-replicas", type=int, default=1, help="copies of the model")
    _add_options(serve_ray, server=True)
    serve_ray.set_defaults(run=_serve_ray)

    route = commands.add_parser("route", help="one address for many models and replicas")
    _add_route(route)
    route.set_defaults(run=_route)

    _add_deploy(commands)

    chat = commands.add_parser("chat", help="talk to a model, one started here or any server's")
    chat.add_argument(
        "--url",
        "--base-url",
        default="",
        help="of any OpenAI-compatible server; default: start one",
    )
    chat.add_argument(
        "--model", default="", help=f"With --url: its name there. Without: {MODEL_HELP}"
    )
    chat.add_argument("--api-key", help="for --url; default: OPENAI_API_KEY")
    _add_options(chat, server=False)
    chat.set_defaults(run=_chat)

    generate = commands.add_parser("generate", help="continue a prompt, or answer it, and exit")
    generate.add_argument("prompt", help="the text; '-' reads standard input")
    generate.add_argument("--model", default="", help=MODEL_HELP)
    generate.add_argument("--raw", action="store_true", help="continue the text; no chat template")
    generate.add_argument("--max-tokens", type=int, default=256, help="output tokens at most")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--seed", type=int, help="repeats the same output")
    _add_options(generate, server=False)
    generate.set_defaults(run=_generate)

    plan = commands.add_parser("plan", help="show what a model would take here, without loading it")
    _add_model(plan)
    _add_options(plan, server=True)
    plan.set_defaults(run=_plan)

    kernels = commands.add_parser("kernels", help="show which kernel each op uses here, and why")
    _add_model(kernels)
    kernels.add_argument(
        "--compile",
        action="store_true",
        help="load the model once, so that what a GPU runs is compiled before a server starts",
    )
    _add_options(kernels, server=False)
    kernels.set_defaults(run=_kernels)

    bench = commands.add_parser("bench", help="measure a running server")
    if with_bench:  # its imports would delay the start of the others
        _add_benchmarks(bench)
    return parser


def _add_deploy(commands: Any) -> None:
    deploy = commands.add_parser("deploy", help="check a Serve config file and roll it out")
    deploy.add_argument("file", metavar="FILE.yaml", help="in the format of Ray's `serve deploy`")
    deploy.add_argument(
        "--address",
        default="http://127.0.0.1:8265",
        metavar="URL",
        help="of the cluster's dashboard (default: http://127.0.0.1:8265)",
    )
    deploy.add_argument("--dry-run", action="store_true", help="check, and send nothing")
    deploy.add_argument(
        "--no-node-checks", action="store_true", help="leave out what only the nodes can answer"
    )
    deploy.add_argument("--timeout", type=float, default=900.0, help="seconds (default: 900)")
    deploy.set_defaults(run=_deploy)


def _add_benchmarks(bench: argparse.ArgumentParser) -> None:
    from headrace.bench import serve as bench_serve

    benches = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    command = benches.add_parser("serve", help="open-loop load test over HTTP")
    bench_serve.add_arguments(command)
    command.set_defaults(run=bench_serve.run)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help=MODEL_HELP)


def _add_options(parser: argparse.ArgumentParser, *, server: bool) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names as flags")
    specs = list(option_specs())
    for title, group in GROUPS:
        if group is ServerOptions and not server:
            continue
        section = parser.add_argument_group(title)
        for spec in (spec for spec in specs if spec.group is group):
            flag = f"--{spec.name.replace('_', '-')}"
            default = "" if spec.default in (None, "", ()) else f" (default: {spec.default})"
            keywords: dict[str, Any] = {
                "default": argparse.SUPPRESS,
                "dest": f"option.{spec.name}",
                "help": (spec.help + default).replace("%", "%%"),
            }
            if spec.is_flag:
                section.add_argument(flag, action=argparse.BooleanOptionalAction, **keywords)
                continue
            keywords["metavar"] = spec.name.split("_")[-1].upper()
            if spec.choices:
                del keywords["metavar"]
            if spec.is_list:
                keywords["action"] = "append"
            kind = _size_argument if spec.parse is parse_size else spec.parse
            section.add_argument(flag, type=kind, choices=spec.choices, **keywords)


def _size_argument(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _options(args: argparse.Namespace) -> tuple[EngineConfig, ServerOptions, dict[str, str]]:
    flags = {
        name.removeprefix("option."): tuple(value) if isinstance(value, list) else value
        for name, value in vars(args).items()
        if name.startswith("option.")
    }
    return load_options(args.model, flags, _read_yaml(args.config) if args.config else None)


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path) as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must hold names and values, such as port: 8000.")
    return {str(key): value for key, value in content.items()}


# --- serve ------------------------------------------------------------------------------------


def _serve(args: argparse.Namespace) -> int:
    import asyncio

    import uvloop

    from headrace import cli_reports, serve
    from headrace.api_processes import supervisor
    from headrace.observability.logging import configure_logging

    config, options, _ = _options(args)
    configure_logging(options.log_level, options.log_format)
    console = cli_reports.stderr()
    if options.host not in ("127.0.0.1", "::1", "localhost") and not options.api_key:
        console.print(
            f"[yellow]Warning:[/] listening on {options.host} without --api-key: whoever reaches "
            "this address can use the model.",
            soft_wrap=True,
        )
    with (
        cli_reports.LoadingBar(console) as progress,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):

        def on_ready(facts: ServedFacts, url: str) -> None:
            progress.stop()
            cli_reports.print_ready(console, facts, url)

        run = serve.run if options.api_processes == 1 else supervisor.run
        return runner.run(run(config, options, on_ready=on_ready, on_progress=progress.update))


def _serve_ray(args: argparse.Namespace) -> int:
    from headrace.deploy import local_cluster

    config, options, _ = _options(args)
    return local_cluster.run(config, options, num_replicas=args.num_replicas)


def _add_route(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", nargs="?", metavar="FILE.yaml", help="models, replicas, options; see docs/route")
    add("--replica", action="append", default=[], metavar="NAME=URL", help="repeatable; no file")
    for name, kind in (("host", str), ("port", int), ("processes", int), ("api-key", str)):
        add(f"--{name}", type=kind, help="as in the file")


def _route(args: argparse.Namespace) -> int:
    from headrace.route import command

    flags = {name: getattr(args, name) for name in ("host", "port", "processes", "api_key")}
    flags["api_key"] = flags["api_key"] or door_api_key()
    given = {name: value for name, value in flags.items() if value is not None}
    read = (lambda: _read_yaml(args.config)) if args.config else None
    return command.route(read, args.config or "", args.replica, given)


def _deploy(args: argparse.Namespace) -> int:
    from headrace.deploy import rollout

    rollout.run(
        args.file,
        args.address,
        dry_run=args.dry_run,
        ask_nodes=not args.no_node_checks,
        timeout=args.timeout,
        tell=lambda line: print(f"headrace: {line}", file=sys.stderr, flush=True),
    )
    return 0


# --- the other commands -----------------------------------------------------------------------


def _chat(args: argparse.Namespace) -> int:
    from headrace import chat

    if args.url:
        if unused := [name for name in vars(args) if name.startswith("option.")]:
            flag = unused[0].removeprefix("option.").replace("_", "-")
            raise ConfigError(f"--{flag} is for a model started here; leave it or --url out.")
        chat.run(args.url, args.model, args.api_key or openai_api_key())
        return 0
    if args.api_key:
        raise ConfigError("--api-key is for --url; the model started here needs none.")

    from headrace import cli_reports, serve

    config, options, _ = _options(args)
    with (
        cli_reports.LoadingBar(cli_reports.stderr()) as progress,
        serve.in_background(config, options, on_progress=progress.update) as (url, key),
    ):
        progress.stop()
        chat.run(url, api_key=key)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from headrace.llm import LLM
    from headrace.sampling_params import SamplingParams

    config, _, _ = _options(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    sampling = SamplingParams(
        max_tokens=args.max_tokens, temperature=args.temperature, seed=args.seed
    )
    with LLM.from_config(config) as llm:
        pieces = (
            llm.stream(prompt, sampling)
            if args.raw
            else llm.stream_chat([{"role": "user", "content": prompt}], sampling)
        )
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    return 0


def _plan(args: argparse.Namespace) -> int:
    from headrace import cli_reports

    config, _, sources = _options(args)
    cli_reports.print_plan(config, sources)
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from headrace import cli_reports

    config, _, _ = _options(args)
    cli_reports.print_kernels(config, compile=args.compile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
