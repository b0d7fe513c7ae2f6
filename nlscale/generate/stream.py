"""Sequences that a model reads piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlscale.errors import UserError
from nlscale.generate.tokens import Integers, Tokens, counted, known, numbered, shaped
from nlscale.model.decoder import Decoder
from nlscale.model.graph import AFTER, CapturedToken
from nlscale.model.mixers.module import check_takes_lengths
from nlscale.model.mixers.state import State
from nlscale.model.one_token import DecoderOneToken
from nlscale.parallel.alone import alone

_LENGTHS = "lengths"


class Stream:
    """Sequences that a model reads piece by piece; `Model.stream` begins them.

    Between pieces it holds the state of each block's mixer: memories, also those of a chunk that
    is not over, and the last inputs of the convolution; keys and values of attention. A piece may
    end anywhere, and in each row elsewhere: feeding in pieces gives what feeding at once gives, and
    a row gives what it gives alone, up to the rounding of sums in another order.

    Attributes:
        batch: sequences
        lengths: tokens that each has read, int64 [batch], on the CPU
        context: what levels learn by from what is read: nothing
    """

    context = ""

    def __init__(self, decoder: Decoder, vocabulary: int, batch: int) -> None:
        if batch < 1:
            raise UserError(f"a stream of {batch} sequences; give batch=1 or more")
        self.batch = batch
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self._decoder, self._vocabulary = decoder, vocabulary
        self._device = next(decoder.parameters()).device
        self._states: dict[str, Any] | None = None
        self._whole = True
        """Whether no piece was broken off in the middle."""
        self._takes_lengths = False  # whether all mixers were asked
        self._apart = False
        """Whether no tensors of the states share memory, so that they can be written in place."""
        self._since = 0  # tokens that were read one by one
        self._one_token: DecoderOneToken | None = None
        self._captured: CapturedToken | None = None

    def feed(self, tokens: Tokens, lengths: Integers | None = None, last: bool = False) -> Tensor:
        """Read on.

        Args:
            tokens: the next of every sequence, [batch, n], n at least 1.
            lengths: how many of its tokens each reads, integers [batch] from 0 to n. What follows
                them changes nothing, whatever it is, and a sequence that reads none stays as it is.
                None: all.
            last: whether to return no more than the logits after the last token of each.

        Returns:
            Logits [batch, n, vocabulary] on the device of the model, fp32, or float64 where its
            weights are that; those at token i are of token i + 1, and those at tokens that are not
            read have no meaning. `last`: [batch, vocabulary], NaN where a sequence reads none.

        Raises:
            UserError: tokens of another shape or type, beyond the vocabulary, or for another batch
                than the stream's; other lengths; lengths for a mixer that reads all rows alike; or
                an earlier piece was broken off.
        """
        self._check_whole()
        tokens = shaped(tokens)
        if len(tokens) != self.batch:
            raise UserError(
                f"{len(tokens)} sequences are fed to a stream of {self.batch}; begin it with "
                f"model.stream(batch={len(tokens)})"
            )
        n, read = tokens.shape[1], counted(lengths, *tokens.shape)
        if read is not None:
            most = max(1, int(read.max()))
            tokens = tokens[:, :most]
            padding = torch.arange(most) >= read[:, None]
            tokens = tokens.masked_fill(padding.to(tokens.device), 0)
            read = None if int(read.min()) == most else read
        tokens = known(tokens, self._vocabulary).to(self._device)
        if read is not None and not self._takes_lengths:
            for block in self._decoder.blocks.values():
                check_takes_lengths(block.mixer)  # type: ignore[arg-type]
            self._takes_lengths = True
        self._whole = False  # until all of it is read: blocks write into their states
        with torch.no_grad(), alone():
            if tokens.shape[1] == 1 and self._states is not None:
                logits = self._read_one(tokens[:, 0], read, last)
            else:
                logits = self._read(tokens, read, last)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.lengths = self.lengths + (tokens.shape[1] if read is None else read)
        self._whole = True
        if last:
            return logits
        return F.pad(logits, (0, 0, 0, n - tokens.shape[1])).contiguous()

    def _read(self, tokens: Tensor, read: Tensor | None, last: bool) -> Tensor:
        """Logits [batch, n, vocabulary], or of the last tokens [batch, vocabulary]."""
        x, self._states = self._decoder.hidden(tokens, self._states, lengths=read)
        self._apart, self._captured = False, None
        if not last:
            return self._decoder.logits(x).transpose(0, 1)
        if read is None:
            return self._decoder.logits(x[-1:])[0]
        at = (read - 1).clamp(min=0).to(x.device)
        x = x.take_along_dim(at[None, :, None], 0)
        return _nowhere(self._decoder.logits(x)[0], read)

    def _read_one(self, tokens: Tensor, read: Tensor | None, last: bool) -> Tensor:
        """The same of one token, [batch]."""
        if self._one_token is None:
            self._one_token = DecoderOneToken(self._decoder)
        if not self._apart:
            self._set_apart()
        assert self._states is not None
        active = None if read is None else read.bool()
        if active is None and tokens.is_cuda and self._one_token.capturable:
            logits = self._replayed(self._one_token, self._states, tokens)
        else:
            logits = self._one_token.logits(tokens, self._states, active)
        self._one_token.advance(self._states, active)
        return _nowhere(logits, read) if last else logits[:, None]

    def _replayed(
        self, one_token: DecoderOneToken, states: dict[str, Any], tokens: Tensor
    ) -> Tensor:
        """By a CUDA graph, once there have been enough tokens."""
        self._since += 1
        if self._since <= AFTER:
            return one_token.logits(tokens, states, None)
        if self._captured is None:
            self._captured = CapturedToken(one_token, states, tokens)
        return self._captured.logits(tokens)

    def _set_apart(self) -> None:
        """Copy the states, so that they share no memory; those that are no `State` stay."""
        every = torch.arange(self.batch)
        self._states = {
            name: state.select(every) if isinstance(state, State) else state
            for name, state in (self._states or {}).items()
        }
        self._apart, self._since = True, 0

    def _check_whole(self) -> None:
        if not self._whole:
            raise UserError(
                "a piece was broken off while this stream read it, and the stream is half way "
                "through it; go on from a clone() or tensors() taken before, or begin anew with "
                "model.stream"
            )

    def select(self, rows: Integers) -> Stream:
        """Another stream, of these sequences in their order, that goes on from here on its own.

        A sequence may be given several times, to go on in several ways.

        Raises:
            UserError: there is no such sequence; a piece was broken off; or the state of the mixer
                is not one of `nlscale.model.mixers.module.State`.
        """
        self._check_whole()
        chosen = numbered(rows, self.batch)
        other = Stream(self._decoder, self._vocabulary, len(chosen))
        other.lengths = self.lengths[chosen]
        if self._states is not None:
            other._states = {name: state.select(chosen) for name, state in self._each()}
            other._apart = True
        other._one_token, other._takes_lengths = self._one_token, self._takes_lengths
        return other

    def clone(self) -> Stream:
        """Another stream that goes on from here, and leaves this one where it is."""
        return self.select(range(self.batch))

    def anew(self) -> Stream:
        """Another stream, of as many sequences from their start."""
        return Stream(self._decoder, self._vocabulary, self.batch)

    def reset(self, rows: Integers) -> None:
        """Begin these sequences anew; raises as `select`."""
        self._check_whole()
        chosen = numbered(rows, self.batch)
        states = dict(self._each())
        if states and not self._apart:
            self._set_apart()
            states = dict(self._each())
        for state in states.values():
            state.reset(chosen)
        self.lengths = self.lengths.index_fill(0, chosen, 0)

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, for `Model.stream_from`; before it has read: lengths alone.

        Raises:
            UserError: a piece was broken off; or the state of the mixer is not one of
                `nlscale.model.mixers.module.State`.
        """
        self._check_whole()
        return {
            name: x.clone(memory_format=torch.contiguous_format) for name, x in self._held().items()
        }

    @property
    def nbytes(self) -> int:
        """Of `tensors`, of all sequences. Attention keeps room for as many tokens again at most."""
        return sum(x.nbytes for x in self._held().values())

    @classmethod
    def of(cls, decoder: Decoder, vocabulary: int, tensors: Mapping[str, Tensor]) -> Stream:
        """See `Model.stream_from`."""
        lengths = tensors.get(_LENGTHS)
        if lengths is None or lengths.dim() != 1 or lengths.dtype != torch.long or not len(lengths):
            raise UserError("these are not the tensors of a stream: it has lengths, int64 [batch]")
        stream = cls(decoder, vocabulary, len(lengths))
        stream.lengths = lengths.cpu().clone()
        least, most = (int(x) for x in stream.lengths.aminmax())
        if least < 0:
            raise UserError(f"these are not the tensors of a stream: one of its lengths is {least}")
        if set(tensors) == {_LENGTHS}:
            if most:
                raise UserError(
                    f"the tensors of a stream that has read {most} tokens have the states of its "
                    f"blocks with lengths; give all that tensors() returned"
                )
            return stream
        like = cls(decoder, vocabulary, 1)
        like.feed([[0]])
        every = numbered(range(len(lengths)), len(lengths))
        stream._states = {
            name: _restored(state, name, tensors, stream).select(every)
            for name, state in like._each()
        }
        stream._apart = True
        odd = set(tensors) ^ set(stream._held())
        if odd:
            raise UserError(f"the tensors are of a stream of another model: {min(odd)} is odd")
        return stream

    def _each(self) -> Iterator[tuple[str, State]]:
        """The state of each block, by the number of the block."""
        for name, state in (self._states or {}).items():
            if not isinstance(state, State):
                mixer = type(self._decoder.blocks[name].mixer).__name__
                raise UserError(
                    f"rows of a stream can be chosen, begun anew and saved where the state of the "
                    f"mixer is a nlscale.model.mixers.module.State, and that of {mixer} is a "
                    f"{type(state).__name__}; see docs/how-to/add-a-mixer.md"
                )
            yield name, state

    def _held(self) -> dict[str, Tensor]:
        held = {_LENGTHS: self.lengths}
        for name, state in self._each():
            held |= {f"blocks.{name}.{key}": x for key, x in state.tensors().items()}
        return held


def _nowhere(logits: Tensor, read: Tensor | None) -> Tensor:
    """Logits [batch, vocabulary], NaN for rows that have read nothing."""
    if read is None:
        return logits
    return logits.masked_fill((read == 0).to(logits.device)[:, None], torch.nan)


def _restored(like: State, name: str, tensors: Mapping[str, Tensor], stream: Stream) -> State:
    """The state of a block, of tensors that fit one of another row."""
    found = {}
    for key in like.form():
        x = tensors.get(f"blocks.{name}.{key}")
        if x is None:
            raise UserError(f"the tensors are of a stream of another model: no blocks.{name}.{key}")
        found[key] = x
    state = like.restored(found, stream._device)
    for key, form in state.form().items():
        if form != like.form()[key] or len(found[key]) != stream.batch:
            raise UserError(
                f"the tensors are of a stream of another model: blocks.{name}.{key} is "
                f"{form[0]} of shape {tuple(found[key].shape)}"
            )
    if not state.fits(stream._decoder.blocks[name].mixer, stream.lengths):
        raise UserError(
            f"these are not the tensors of a stream: what is in blocks.{name} is not after lengths "
            f"{stream.lengths.tolist()[:8]}; take them anew with tensors()"
        )
    return state
