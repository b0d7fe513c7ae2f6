"""A model of this package as lm-evaluation-harness asks models. Importing this imports the harness.

It is for scripts, too: `lm_eval.simple_evaluate(model=Adapter(nlscale.load(RUN)), tasks=[...])`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nlscale.errors import UserError
from nlscale.evaluate.asking.context import Advance, Part
from nlscale.evaluate.harness.scoring import Ids, Question, likelihoods, questions
from nlscale.generate.model import Model
from nlscale.generate.sampling import Sampling
from nlscale.generate.text import Generation

_NEW_TOKENS = 256
"""Generated where a task does not say how many: what the harness's own models do."""
_TOKENS = 1 << 16
"""Of a part of the work, from which on it is closed: so that a kill costs little of it."""
_SETTINGS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
"""Of a task's `generation_kwargs`, beside those on length and ends: how tokens are chosen."""
_Item = TypeVar("_Item")


class ShareOut(Protocol):
    """As `nlscale.evaluate.asking.context.Context.parts`."""

    def __call__(
        self, parts: Sequence[Part], work: Callable[[Part, Advance], Any], unit: str
    ) -> list[Any]: ...


def _by_itself(parts: Sequence[Part], work: Callable[[Part, Advance], Any], unit: str) -> list[Any]:
    return [work(part, lambda done: None) for part in parts]


class Adapter(TemplateLM):
    """A `TemplateLM` of a trained model.

    A document is read from its first token to its last: a state of constant size knows no longest
    context, so that nothing is cut off or read in windows, unless `max_length` says so. A context
    is read once for all its continuations, and equal requests are answered once.

    Every rank is asked everything, as one process is, and the work is shared out behind that: so
    what comes out is the same for any number of ranks, few-shot examples included, and a rank
    without documents is no special case.

    Args:
        model: that answers; its tokenizer is that of the texts.
        rows: sequences side by side.
        max_length: tokens that are read at most, the last ones; None: all.
        share: shares parts of the work out over ranks, and keeps what they find.
    """

    def __init__(
        self,
        model: Model,
        rows: int = 16,
        max_length: int | None = None,
        share: ShareOut = _by_itself,
    ) -> None:
        super().__init__()
        self._model, self._rows, self._share = model, rows, share
        self._max_length = max_length
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The separator of documents: it ends what is generated, and stands for no context."""
        return self._model.tokenizer.separator

    @property
    def tokenizer_name(self) -> str:
        """As the data of the model had it."""
        return self._model.tokenizer.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; there are none to add."""
        ids: list[int] = self._model.tokenizer.encode(string).tolist()
        return ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """See the harness's `LM`; without its bar on tokenizing."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # White space alone belongs to what follows it, and leaves no context.
        first = [self.prefix_token_id]
        pairs = [self._cut(context or first, asked) for _, context, asked in requests]
        found = self._asked("loglikelihood", questions(pairs))
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """See the harness's `LM`: documents after the separator, as in training."""
        documents = [self._windows(self.tok_encode(request.args[0])) for request in requests]
        # Each by itself: what they have in common is the separator alone.
        distinct = {
            pair: Question(pair[0], (pair[1],)) for windows in documents for pair in windows
        }
        longest_first = sorted(distinct.values(), key=lambda question: -question.tokens)
        found = self._asked("loglikelihood_rolling", longest_first)
        return [sum(found[pair][0] for pair in windows) for windows in documents]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See the harness's `LM`: greedy, unless a task asks for samples; those of seed 0."""
        wanted = [(self._prompt(r.args[0], r.args[1]), _stable(r.args[1])) for r in requests]
        repeats = Counter(wanted)
        alike: dict[tuple[str, int], list[Ids]] = {}
        for (prompt, options), count in repeats.items():
            alike.setdefault((options, count), []).append(prompt)
        parts = []
        for (options, count), prompts in alike.items():
            prompts.sort(key=lambda prompt: -len(prompt))
            for first in range(0, len(prompts), self._rows):
                some = prompts[first : first + self._rows]
                name = _name("generate_until", [options, count, some])
                size = sum(map(len, some)) + len(some) * count * _limit(json.loads(options))
                parts.append(Part(name, size, (options, count, some)))
        found: dict[tuple[Ids, str], Iterator[str]] = {}
        for part, texts in zip(parts, self._share(parts, self._generated, "tokens"), strict=True):
            options, _, prompts = part.of
            found |= {(p, options): iter(t) for p, t in zip(prompts, texts, strict=True)}
        return [next(found[one]) for one in wanted]

    def _asked(self, kind: str, asked: list[Question]) -> dict[tuple[Ids, Ids], tuple[float, bool]]:
        """What is found of them, by context and continuation."""
        parts = []
        for some in _portions(asked, self._rows):
            size = sum(question.tokens for question in some)
            parts.append(Part(_name(kind, some), size, some))

        def work(part: Part, advance: Advance) -> Any:
            return likelihoods(self._model, part.of, self._rows, advance)

        found = {}
        for part, answers in zip(parts, self._share(parts, work, "tokens"), strict=True):
            for question, of in zip(part.of, answers, strict=True):
                for continuation, (log_probability, greedy) in zip(
                    question.continuations, of, strict=True
                ):
                    found[question.context, continuation] = (log_probability, greedy)
        return found

    def _generated(self, part: Part, advance: Advance) -> list[list[str]]:
        """The texts that follow each prompt."""
        options, count, prompts = part.of
        settings = json.loads(options)
        stops = [stop for stop in settings["until"] if stop]
        generation = Generation(
            self._model,
            prompts,
            tokens=_limit(settings),
            samples=count,
            sampling=_sampling(settings),
            stop=stops,
        )
        for read in generation.reading():
            advance(read)
        for _ in generation.writing():
            pass
        results = generation.results
        advance(len(prompts) * count * _limit(settings))
        texts = [self._text(one.ids, stops) for one in results]
        return [texts[i * count : (i + 1) * count] for i in range(len(prompts))]

    def _text(self, ids: list[int], stops: list[str]) -> str:
        text = self._model.tokenizer.decode(ids)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Ids, Ids]:
        """Without what comes before the last `max_length` tokens that are read."""
        most = self._max_length
        if most is not None:
            if len(continuation) > most:
                raise UserError(
                    f"--max-length {most}: an answer of a task has {len(continuation)} tokens; "
                    f"give at least that"
                )
            context = context[-(most + 1 - len(continuation)) :]
        return tuple(context), tuple(continuation)

    def _windows(self, ids: list[int]) -> list[tuple[Ids, Ids]]:
        """Contexts and continuations that add up to a document."""
        if not ids:
            return []
        if self._max_length is None:
            return [((self.prefix_token_id,), tuple(ids))]
        windows = get_rolling_token_windows(
            token_list=ids,
            prefix_token=self.prefix_token_id,
            max_seq_len=self._max_length,
            context_len=1,
        )
        return [self._cut(*make_disjoint_window(window)) for window in windows]

    def _prompt(self, text: str, options: dict[str, Any]) -> Ids:
        ids = self.tok_encode(text) or [self.prefix_token_id]
        if self._max_length is not None:
            room = self._max_length - _limit(_settled(options))
            if room < 1:
                raise UserError(
                    f"--max-length {self._max_length}: a task generates as many tokens or more; "
                    f"give more"
                )
            ids = ids[-room:]
        return tuple(ids)


def _portions(asked: list[Question], rows: int) -> Iterator[list[Question]]:
    """Questions that are one part of the work: `rows` of them at most, fewer of long ones."""
    some: list[Question] = []
    for question in asked:
        some.append(question)
        if len(some) == rows or sum(one.tokens for one in some) >= _TOKENS:
            yield some
            some = []
    if some:
        yield some


def _name(kind: str, content: Any) -> str:
    """Of a part, by what is asked in it: data that have changed are another part."""
    return f"{kind} {hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]}"


def _settled(options: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` by one name each, with `until`, `max_gen_toks`, `do_sample`."""
    return {**normalize_gen_kwargs(options, _NEW_TOKENS)}


def _stable(options: dict[str, Any]) -> str:
    return json.dumps(_settled(options), sort_keys=True)


def _limit(settings: dict[str, Any]) -> int:
    return int(settings["max_gen_toks"])


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Raises UserError: a task asks for what is not known here."""
    unknown = settings.keys() - _SETTINGS - {"until", "max_gen_toks", "do_sample"}
    if unknown:
        raise UserError(
            f"a task's generation_kwargs have {min(unknown)}, which is not known here; known are "
            f"until, max_gen_toks, do_sample, {', '.join(sorted(_SETTINGS))}"
        )
    given = {name: settings[name] for name in _SETTINGS & settings.keys()}
    if not settings["do_sample"]:
        return Sampling(temperature=0, repetition_penalty=given.get("repetition_penalty", 1.0))
    return Sampling(**{"temperature": 1.0, "top_p": 1.0, **given})
