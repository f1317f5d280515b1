"""A trained network as a Hugging Face model: saved and loaded, generated with and trained on as others are.

Importing this module registers it, so that `transformers.AutoModelForCausalLM` finds what was saved. It needs the extra
`longnet_kit[huggingface]`. The network is `longnet_kit.model.Transformer` unchanged; what is here is the way to it.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from longnet_kit.errors import UserError

try:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "longnet_kit.huggingface needs the library transformers, 5.24 or later; pip install 'longnet_kit[huggingface]'"
    ) from error

from longnet_kit.attention.cache import MAX_TOKENS
from longnet_kit.huggingface_cache import LongNetCache
from longnet_kit.inference import network
from longnet_kit.model import Transformer
from longnet_kit.model.loss import IGNORED

__all__ = ["LongNetCache", "LongNetConfig", "LongNetForCausalLM"]

_NETWORK = ("vocab_size", "dim", "layers", "heads", "ffn_dim", "seq_len", "dropout", "positions", "attention")
_NETWORK += ("activation_checkpointing", "ffn_chunk")
"""Settings of a Transformer that a LongNetConfig holds under the same name."""


class LongNetConfig(PreTrainedConfig):
    """The settings of `longnet_kit.model.Transformer`, by its names, and what transformers adds.

    Of transformers' names hidden_size, num_hidden_layers, num_attention_heads, intermediate_size and
    max_position_embeddings are taken for those of this kit.
    """

    model_type = "longnet_kit"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn_dim",
        "max_position_embeddings": "seq_len",
    }

    vocab_size: int = 257
    dim: int = 128
    layers: int = 4
    heads: int = 4
    ffn_dim: int = 512
    seq_len: int = 1024
    dropout: float = 0.0
    positions: str = "rope"
    attention: dict[str, Any] = field(
        default_factory=lambda: {
            "backend": "dilated",
            "segment_lengths": [256, 512, 1024],
            "dilation_rates": [1, 2, 4],
        }
    )
    activation_checkpointing: str = "none"
    ffn_chunk: int | None = None
    kit_tokenizer: str | None = None
    """The recipe's `data.tokenizer`, with which texts are to be encoded."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True
    """Always: the embedding is the head."""


class LongNetForCausalLM(PreTrainedModel, GenerationMixin):
    """A LongNet language model.

    Its `.model` is the bare network, whose embedding is the head, so no weight is stored twice.

    Raises:
        UserError: settings that do not go together, see `longnet_kit.model.Transformer`.
    """

    config_class = LongNetConfig
    _is_stateful = True  # no decoding that takes tokens back
    accepts_loss_kwargs = True  # of transformers' Trainer: num_items_in_batch

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__(config)
        if not config.tie_word_embeddings:
            raise UserError("tie_word_embeddings is False, and this model's embedding is its head; leave it out")
        options = {name: getattr(config, name) for name in _NETWORK}
        self.model = Transformer(**options, compute_dtype=torch.get_default_dtype())
        self.post_init()

    @classmethod
    def from_run(cls, source: str | Path) -> LongNetForCausalLM:
        """A network that this kit trained, in evaluation mode, on the CPU, with its weights in their dtype.

        Args:
            source: a run directory, runs/<name>, a recipe, or a file of `longnet export`, as of `network.load`.
                One from outside the working directory whose recipe imports modules needs `plugins.trusted`.

        Raises:
            UserError: there is no such network, or it is no causal language model.
        """
        trained = network.load(source, device="cpu")
        if not isinstance(trained.network, Transformer) or not trained.network.causal:
            raise UserError(f"{source} is no causal language model, and this class is for one; give a run that is")
        settings = {name: trained.network.config[name] for name in _NETWORK}
        eos = trained.tokenizer.eos
        config = LongNetConfig(**settings, eos_token_id=eos, kit_tokenizer=trained.recipe.data.tokenizer)
        model = cls(config)
        model.model = trained.network
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of `transformers.PreTrainedModel`, but that weights which do not fit are never drawn anew.

        Raises:
            UserError: the files lack weights of this network, hold others, or some are of another shape.
        """
        options = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}  # or it names none of them
        model, told = cast(Any, super().from_pretrained(*args, **options))
        misfits = [
            f"{key} is {tuple(there)} there and {tuple(here)} here" for key, there, here in told["mismatched_keys"]
        ]
        lists = {"do not fit": misfits, "are missing": told["missing_keys"], "are left over": told["unexpected_keys"]}
        for words, found in lists.items():
            if found:
                more = f" and {len(found) - 3} more" if len(found) > 3 else ""
                raise UserError(
                    f"weights {words}: {', '.join(sorted(found)[:3])}{more}; is this a model of longnet_kit?"
                )
        return (model, told) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: LongNetCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **others: None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next token, and a loss where labels are given.

        Args:
            input_ids: (B, N); with a cache the tokens after its past.
            attention_mask: (B, N), 1 where the token is real; padding on the right alone. With a cache all are real.
            cache: the past, from `new_cache` or an earlier call. It runs without autograd.
            labels: (B, N) as input_ids: the shift is made here. -100 is ignored.
            use_cache: return a cache to go on from; by default only where one is given.
            logits_to_keep: only so many tokens at the end get logits, or those at these places, (K,) int64; 0: all.
            num_items_in_batch: what the sum of the losses is divided by; by default the number of labels.
            others: arguments of other models (`inputs_embeds`, `position_ids`, ...), which some libraries always give;
                they must be None.

        Returns:
            loss, logits (B, N, V), cache: those that there are.

        Raises:
            UserError: something of this cannot be had.
        """
        if output_attentions or output_hidden_states:
            raise UserError(
                "output_attentions and output_hidden_states are not to be had; the attention's maps are, from "
                "model.model.attention_backends[i].attention_map"
            )
        if given := [name for name, value in others.items() if value is not None]:
            raise UserError(f"{', '.join(given)}: this model takes none; it reads input_ids, from position 0 on")
        if use_cache and cache is None:
            cache = self.new_cache(len(input_ids))
        if cache is None:
            mask = None if attention_mask is None else _padding(attention_mask, input_ids)
            hidden = self.model.hidden(input_ids, key_padding_mask=mask)
        else:
            if not isinstance(cache, LongNetCache):
                raise UserError(f"cache is a {type(cache).__name__}; make one with the model's new_cache(batch_size)")
            if labels is not None:
                raise UserError("with a cache nothing is trained; give labels without one, and use_cache=False")
            if attention_mask is not None:
                _check_whole(attention_mask)
            hidden = self.model.hidden(input_ids, cache=cache.stream)
        is_part = isinstance(logits_to_keep, Tensor) or logits_to_keep > 0
        if labels is not None and is_part:
            raise UserError(f"logits_to_keep is {logits_to_keep}, and labels need them all; give one of the two")
        places = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        logits = nn.functional.linear(hidden[:, places], self.model.head_weight)
        loss = None if labels is None else _loss(logits, labels, num_items_in_batch)
        found = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)  # type: ignore[arg-type]
        return found if return_dict or (return_dict is None and self.config.return_dict) else found.to_tuple()

    def new_cache(self, batch_size: int, max_tokens: int | None = None) -> LongNetCache:
        """An empty past of so many texts that go on together; see `Transformer.new_cache`."""
        return LongNetCache(self.model.new_cache(batch_size, max_tokens=max_tokens))

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of `transformers.GenerationMixin`, for prompts of one length."""
        if kwargs.get("attention_mask") is not None:
            _check_whole(kwargs["attention_mask"])
        return cast(Any, super()).prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Make the cache that `generate` runs on, in place of transformers' own kinds."""
        if (kind := generation_config.cache_implementation) is not None:
            raise UserError(f"cache_implementation is {kind!r}, and this model has a cache of its own; leave it out")
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["cache"] = self.new_cache(rows, max(MAX_TOKENS, max_cache_length))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding, which is the head too."""
        self.model.embedding = cast(nn.Embedding, value)
        self.model.config["vocab_size"] = self.model.embedding.num_embeddings

    def get_output_embeddings(self) -> None:
        """None: there is no head beside the embedding."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the network has drawn its weights itself."""


def _padding(attention_mask: Tensor, input_ids: Tensor) -> Tensor | None:
    """The network's mask, (B, N) bool; None where all tokens are real."""
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected that of input_ids, "
            f"{tuple(input_ids.shape)}: 1 where the token is real"
        )
    mask = attention_mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise UserError(
            "attention_mask has padding before a real token, which would shift the segments of the attention; pad on "
            "the right: tokenizer.padding_side = 'right'"
        )
    return None if mask.all() else mask


def _check_whole(attention_mask: Tensor) -> None:
    """Raise a UserError where texts that are to be continued together are padded."""
    if not attention_mask.all():
        raise UserError(
            "attention_mask has padding, and texts that are continued together stand at one position, since padding "
            "would shift the segments of the attention; give prompts of one length, one at a time, or to "
            "longnet_kit.inference.generate.generate, which takes any lengths"
        )


def _loss(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """Mean -log p of the next token, or its sum over `items`, in float32 at least."""
    if labels.shape != logits.shape[:2]:
        raise UserError(
            f"labels has shape {tuple(labels.shape)}, expected that of input_ids, {tuple(logits.shape[:2])}"
        )
    exact = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels[:, 1:].flatten().to(logits.device)
    reduction = "mean" if items is None else "sum"
    loss = nn.functional.cross_entropy(exact, targets, ignore_index=IGNORED, reduction=reduction)
    return loss if items is None else loss / items


AutoConfig.register(LongNetConfig.model_type, LongNetConfig)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM)
