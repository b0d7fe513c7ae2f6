"""`nlscale generate`: what a trained model makes of a text."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

from nlscale.cli.arguments import number, path, whole
from nlscale.cli.generate_output import Paper, reading, say_what_it_took
from nlscale.cluster.life.owner import hold
from nlscale.cluster.life.signals import handled, with_hangup
from nlscale.config.in_context import described
from nlscale.errors import UserError
from nlscale.generate.given import add_tokenizer, check_folder, tokenizer_for
from nlscale.generate.imports import import_models
from nlscale.telemetry import screen
from nlscale.telemetry.files import to_json

if TYPE_CHECKING:  # torch is slow to import, and --help needs none
    from nlscale.generate.text import Continuation, Generation

_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What it takes; sets `func(args) -> int`."""
    parser.add_argument(
        "model",
        type=path,
        metavar="RUN",
        help="the folder of a run, a checkpoint, or what `nlscale checkpoint export` wrote",
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt",
        type=_text,
        metavar="TEXT",
        help="what the model goes on from (default: the beginning of a document)",
    )
    texts.add_argument(
        "--file",
        type=path,
        metavar="FILE",
        help="a file with that text, of any length; - is standard input",
    )
    _add_sampling(parser)
    parser.add_argument(
        "--stop",
        type=_stop,
        action="append",
        default=[],
        metavar="TEXT",
        help="end at this text, without it; may be given several times",
    )
    parser.add_argument(
        "--seed",
        type=whole(least=0),
        default=0,
        metavar="N",
        help="of the draws; the same seed gives the same text (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=whole(least=1),
        default=1,
        metavar="N",
        help="texts of the same prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text as it comes (default: in a terminal, where there is one sample)",
    )
    parser.add_argument(
        "--state",
        type=path,
        metavar="FILE",
        help="go on from what this file holds, if it is there, and save there what has been read "
        "and generated",
    )
    parser.add_argument(
        "--state-read-only",
        action="store_true",
        help="go on from the file of --state, and leave it as it is",
    )
    parser.add_argument(
        "--context",
        nargs="+",
        metavar="LEVEL.KEY=VALUE",
        help="have levels learn from what is read and written, beside those whose context has the "
        "objective ntp: keys of that, such as base.chunk=256 base.learning_rate=0.1",
    )
    parser.add_argument(
        "--learned",
        type=path,
        metavar="FILE",
        help="what levels with reset=never have learned: begin with it, if it is there, and save "
        "what they know at the end",
    )
    add_tokenizer(parser)
    parser.add_argument("--json", action="store_true", help="print one object of JSON")
    parser.set_defaults(func=_generate)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    for name, kind, default, text in (
        ("tokens", whole(least=0), 200, "generate so many at most; 0 only reads"),
        ("temperature", number(least=0), 0.8, "0 always takes the most likely token"),
        ("top-k", whole(least=0), 0, "draw from the K most likely tokens; 0 is all"),
        (
            "top-p",
            number(above=0, most=1),
            0.95,
            "draw from the fewest tokens of so much probability together; 1 is all",
        ),
        (
            "min-p",
            number(least=0, most=1),
            0.0,
            "draw from tokens of at least this part of the probability of the most likely",
        ),
        (
            "repetition-penalty",
            number(above=0),
            1.0,
            "make tokens that are there already less likely, where it is above 1",
        ),
    ):
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N" if name == "tokens" else name[-1].upper() if "top" in name else "X",
            help=f"{text} (default: %(default)s)",
        )


def _text(given: str) -> str:
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("a text that is not UTF-8") from None
    return given


def _stop(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("an empty text would end everything; leave it out")
    return _text(given)


def _generate(args: argparse.Namespace) -> int:
    """JSON: `model`, `step`, `prompt` or `file`, `prompt_tokens`, `tokens_before` (of the state),
    `seed`, `sampling`, `stop`, `samples` (each `sample`, `text`, `ids`, `log_probabilities`,
    `ended`), `reading_seconds`, `seconds`, `tokens_per_second`, `state`; where levels learn
    `context` (keys of each) and `learned`."""
    _check(args)
    prompt = _prompt(args)
    with _held(args):
        return _generate_from(args, prompt)


def _held(args: argparse.Namespace) -> AbstractContextManager[object]:
    """The file of --state or --learned, which one process at a time goes on from and saves."""
    option, file = ("--learned", args.learned) if args.learned else ("--state", args.state)
    if file is None or args.state_read_only:
        return nullcontext()
    folder, name = file.absolute().parent, file.name
    return hold(folder, f"nlscale generate {option} {file}", f"another {option}", name=name)


def _generate_from(args: argparse.Namespace, prompt: str) -> int:
    """`_generate`, of arguments that go together."""
    begins = args.state is None or not args.state.exists()
    if args.tokens == 0 and begins and not prompt:
        raise UserError("there is nothing to read and nothing to generate; give --prompt or --file")
    check_folder(args.model)
    import_models()
    from nlscale.generate import state_file

    if not begins:
        state_file.facts_of(args.state)  # before the model is loaded, which may take minutes

    import nlscale
    from nlscale.generate.learned import levels_of
    from nlscale.generate.learner import Learner
    from nlscale.generate.sampling import Sampling
    from nlscale.generate.text import Generation

    model = nlscale.load(args.model)
    tokenizer_for(model, args.tokenizer)
    levels = levels_of(model, args.context, args.learned)
    learner = Learner(model, levels, args.learned) if levels else None
    begun = None if begins else state_file.load(args.state, model, learner)
    sampling = Sampling(
        args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty
    )
    generation = Generation(
        learner or model,
        [prompt],
        args.tokens,
        args.samples,
        sampling,
        args.stop,
        args.seed,
        begun,
    )
    before = begun.tokens if begun else 0
    with _asked_to_stop() as stopped:
        took = _read(generation, stopped)
        seconds = _write(args, generation, stopped)
        after = None
        if args.state is not None and not args.state_read_only:
            after = generation.begun
            state_file.save(args.state, after, model)
        if args.learned is not None:
            assert learner is not None, "levels_of has refused the file"
            learner.save(args.learned, generation.begun)
    count = sum(len(row.ids) for row in generation.rows)
    speed = count / seconds if count else None
    if args.json:
        found = {
            "model": str(args.model), "step": model.step,
            **({"file": str(args.file)} if args.file else {"prompt": prompt}),
            "prompt_tokens": generation.results[0].prompt_tokens, "tokens_before": before,
            "seed": args.seed, "sampling": asdict(sampling), "stop": args.stop,
            "samples": [_described(one) for one in generation.results],
            "reading_seconds": took, "seconds": seconds, "tokens_per_second": speed,
            "state": None if after is None else {"file": str(args.state), "tokens": after.tokens},
        }  # fmt: skip
        if levels:
            found["context"] = [described(level, model.config) for level in levels]
            found["learned"] = None if args.learned is None else str(args.learned)
        print(to_json(found))
    else:
        kept = None if after is None else (args.state, after.tokens)
        say_what_it_took(generation.results, took, seconds, kept)
    return _INTERRUPTED if stopped else 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError: arguments that do not go together."""
    if args.stream and (args.json or args.samples > 1):
        other = "--json" if args.json else f"--samples {args.samples}"
        raise UserError(f"--stream prints one text as it comes; leave out it or {other}")
    if args.learned is not None:
        _check_learned(args)
    if args.state is None:
        if args.state_read_only:
            raise UserError("--state-read-only says how --state is used; name its file, too")
        return
    if args.state_read_only and not args.state.exists():
        raise UserError(
            f"there is no state {args.state} to read; save it first, with --state alone"
        )
    if args.samples > 1 and not args.state_read_only:
        raise UserError(
            f"--samples {args.samples} would leave as many states; add --state-read-only, or take "
            f"one sample"
        )
    if not args.state.absolute().parent.is_dir():
        raise UserError(f"{args.state.parent} is not a folder; make it first, for --state")


def _check_learned(args: argparse.Namespace) -> None:
    """Raises UserError: --learned with arguments that it does not go with."""
    if args.state is not None:
        raise UserError(
            "--state holds what levels have learned with the text; leave out --learned, which a "
            "new text begins with, or --state"
        )
    if args.samples > 1:
        raise UserError(
            f"--samples {args.samples} would learn as many things; take one sample, or leave out "
            f"--learned"
        )
    if not args.learned.absolute().parent.is_dir():
        raise UserError(f"{args.learned.parent} is not a folder; make it first, for --learned")


def _prompt(args: argparse.Namespace) -> str:
    if args.file is None:
        return args.prompt or ""
    try:
        data = sys.stdin.buffer.read() if str(args.file) == "-" else args.file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {args.file}: {error.strerror}; name a text file") from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{args.file} is not UTF-8 (byte {error.start:,}); convert it, with iconv for example"
        ) from None
    if not text:
        raise UserError(f"{args.file} is empty; leave out --file to begin with a new document")
    return text


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Signals that ask to stop, as they come: the token that is computed is ended first. A second
    one does not wait."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(signum)

    with handled(with_hangup((signal.SIGINT, signal.SIGTERM)), note):
        yield came


def _read(generation: Generation, stopped: list[int]) -> float:
    """Seconds that reading the prompt took."""
    began = perf_counter()
    with reading(generation.prompt_tokens) as advance:
        for count in generation.reading():
            if stopped:
                raise KeyboardInterrupt  # a state that has read a part would read it twice
            advance(count)
    return perf_counter() - began


def _write(args: argparse.Namespace, generation: Generation, stopped: list[int]) -> float:
    """Generate and print; seconds that generating took."""
    paper = Paper(args.prompt or "")
    single = args.samples == 1 and not args.json
    live = args.stream if args.stream is not None else paper.terminal and single
    if live and args.tokens:
        paper.prompt()
    began = perf_counter()
    for new in generation.writing():
        if live:
            for _, text in new:
                paper.text(text)
        if stopped or (live and screen.lost()):  # `head` has read enough
            break
    seconds = perf_counter() - began
    rest = generation.leave()
    if not args.tokens or args.json:
        return seconds
    if live:
        for _, text in rest:
            paper.text(text)
        paper.end()
        return seconds
    for row in generation.results:
        if not single:
            paper.headline(f"--- sample {row.sample}")
        paper.prompt()
        paper.text(row.text)
        paper.end()
    return seconds


def _described(one: Continuation) -> dict[str, Any]:
    names = ("sample", "text", "ids", "log_probabilities", "ended")
    return {name: getattr(one, name) for name in names}
