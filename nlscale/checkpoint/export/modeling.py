"""The model as a class of Hugging Face transformers.

What an export carries as `modeling_nlscale.py` is this file, with the configuration and the
plain-torch modules that it is made of put before it (`nlscale.checkpoint.export.carried`).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nlscale.checkpoint.export.configuration import NlscaleConfig
from nlscale.model.mixers.table import plain_mixer
from nlscale.model.plain import Padding, PlainBlock, PlainLinear, PlainRMSNorm, State

# transformers 5.24 has renamed the argument and the output
CACHE = (
    "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
)
_OF_PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
"""What collators give of rows that hold several sequences."""
_PACKED = (
    "rows with several sequences, one after the other, would be read as one: their positions have "
    "to count up by one from token to token; pad instead, or split the rows"
)


class NlscaleCache(Cache):
    """The state of every block's mixer after the tokens that were read.

    Attributes:
        states: by block, tensors with the rows of the batch first
        columns: of the input ids that were read, padding included
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State] = []
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # it grows as it must

    def __len__(self) -> int:
        return len(self.states)

    def reset(self) -> None:
        self.states, self.columns = [], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *given: Any) -> None:
        raise NotImplementedError("a memory cannot forget its last tokens; copy the cache before")

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def _each(self, change: Any) -> None:
        self.states = [{k: change(x) for k, x in state.items()} for state in self.states]


class NlscaleForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, blocks, norm and head; parameters are named as nlscale names them."""

    config_class = NlscaleConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["PlainBlock"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a rejected guess of assisted generation could not be taken back
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012

    def __init__(self, config: NlscaleConfig) -> None:
        super().__init__(config)
        d, eps = config.hidden_size, config.norm_eps
        independent = config.cms == "independent"
        hidden = [level["hidden"] for level in config.levels if level["hidden"]]
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.blocks = nn.ModuleList(
            PlainBlock(plain_mixer(name)(d, eps, **options), d, hidden, independent, eps)
            for name, options in config.mixers()
        )
        self.norm = PlainRMSNorm(d, eps)
        self.head = PlainLinear(d, config.vocab_size)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: NlscaleCache | None = None,
        past_key_values: NlscaleCache | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of what follows each token.

        Args:
            input_ids: [batch, n].
            attention_mask: 0 at padding, which may stand anywhere in a row and changes nothing,
                [batch, n]; with a cache also [batch, what it has read + n]. None: no padding.
            position_ids: [batch or 1, n], which have to count up by one along the tokens of a row,
                padding left out; nothing else is made of them. None: the same.
            inputs_embeds: [batch, n, hidden_size], in the place of `input_ids`.
            labels: tokens [batch, n], of which each is predicted from those before it; -100: not.
            use_cache: return the state after these tokens; None: as the configuration says, but
                not in training.
            cache: what an earlier call has returned; it is written to. `past_key_values` likewise.
            logits_to_keep: of so many last tokens alone, or of those of these indices; 0: of all.
            output_hidden_states: return the residual stream before each block and after the last.

        Raises:
            ValueError: rows hold several sequences each, or the mask or the cache is of another
                kind.
        """
        cache = _own(past_key_values if cache is None else cache)
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        _check_positions(position_ids, attention_mask, x)
        if any(kwargs.get(name) is not None for name in _OF_PACKED):
            raise ValueError(_PACKED)
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if use_cache and cache is None:
            cache = NlscaleCache()
        x, hidden = self._read(x, attention_mask, cache, bool(output_hidden_states))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.norm(x[:, kept]) / self.config.width_multiplier)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=hidden, **({CACHE: cache} if use_cache else {})
        )
        return output.to_tuple() if return_dict is False else output

    def _read(
        self, x: Tensor, mask: Tensor | None, cache: NlscaleCache | None, keep: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Residual stream [batch, n, d_model] after the blocks, and before each of them."""
        batch, time = x.shape[:2]
        lengths, padding = torch.full((batch,), time, device=x.device), None
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: give [batch, n]")
            mask = mask[:, -time:].bool()
            if not bool(mask.all()):
                padding = Padding(mask)
                x, lengths = padding.close(x), padding.lengths
        hidden, states = [], []
        before = cache.states if cache is not None and cache.states else [None] * len(self.blocks)
        for block, state in zip(self.blocks, before, strict=True):
            hidden += [x] if keep else []
            if self.gradient_checkpointing and self.training:
                x, state = self._gradient_checkpointing_func(block, x, state, lengths)
            else:
                x, state = block(x, state, lengths)
            states.append(state)
        hidden += [x] if keep else []
        if cache is not None:
            cache.states, cache.columns = states, cache.columns + time
        if padding is not None:
            x, hidden = padding.open(x), [padding.open(h) for h in hidden]
        return x, tuple(hidden) if keep else None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: NlscaleCache | None = None,
        past_key_values: NlscaleCache | None = None,
        use_cache: bool = True,
        logits_to_keep: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The columns that the cache has not read yet.

        `input_ids` are all of them, or, where `attention_mask` is longer, only the new ones.
        """
        cache = _own(past_key_values if cache is None else cache)
        read = 0 if cache is None else cache.columns
        given: dict[str, Any] = {"use_cache": use_cache, CACHE: cache}
        if logits_to_keep is not None:
            given["logits_to_keep"] = logits_to_keep
        if inputs_embeds is not None and read == 0:
            given |= {"attention_mask": attention_mask, "position_ids": position_ids}
            return {**given, "inputs_embeds": inputs_embeds}
        if inputs_embeds is not None:
            input_ids = input_ids[:, -1:]  # those that came first were no ids
        elif attention_mask is None or attention_mask.shape[1] <= input_ids.shape[1]:
            if read >= input_ids.shape[1]:
                raise ValueError(
                    f"the cache has read {read} tokens a row, and input_ids has "
                    f"{input_ids.shape[1]}: give all of them, or an attention_mask of all"
                )
            input_ids = input_ids[:, read:]
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        if position_ids is not None:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        given |= {"attention_mask": attention_mask, "position_ids": position_ids}
        return {**given, "input_ids": input_ids}

    def _prepare_position_ids_for_generation(self, *given: Any) -> None:
        """None: `forward` counts the tokens itself, also where padding stands after them."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes one of its own

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.head = new_embeddings

    def _init_weights(self, module: Any) -> None:
        """Draw a module's own weights; those of matrices that are wider in a wide model by muP."""
        std = self.config.init_std
        # of a file that lacks others: transformers guards them from torch.nn.init alone
        own = module.parameters(recurse=False)
        loaded = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
        if isinstance(module, nn.Embedding) or module is self.head:
            nn.init.normal_(module.weight, std=std)
        elif hasattr(module, "initialize"):
            scaled = std * self.config.width_multiplier**-0.5
            module.initialize(scaled, scaled / (2 * self.config.num_hidden_layers) ** 0.5)
        for parameter, value in loaded:
            parameter.copy_(value)


def _own(cache: Any) -> NlscaleCache | None:
    if cache is not None and not isinstance(cache, NlscaleCache):
        raise ValueError(
            f"a cache of {type(cache).__name__} cannot hold the state of this model; leave it "
            f"out, or give what an earlier call has returned"
        )
    return cache


def _check_positions(positions: Tensor | None, mask: Tensor | None, x: Tensor) -> None:
    batch, time = x.shape[:2]
    if positions is None:
        return
    if positions.shape not in ((1, time), (batch, time)):
        raise ValueError(f"position_ids of shape {tuple(positions.shape)}: give [batch, n]")
    if time == 1:
        return
    stands = torch.ones(batch, time, dtype=torch.bool, device=x.device)
    if mask is not None and mask.dim() == 2:
        stands = mask[:, -time:].bool()
    ahead, limits = positions - stands.cumsum(1), torch.iinfo(torch.int64)
    least = ahead.masked_fill(~stands, limits.max).amin(1)
    most = ahead.masked_fill(~stands, limits.min).amax(1)
    if bool((least < most).any()):
        raise ValueError(_PACKED)
