"""A module of ``transformers`` as a model of llmkit: packed documents, the chunked loss, generation with a cache.

Only the module's ``forward`` is relied on, and on the layer that gives its logits. Documents are kept apart by giving
each a row of its own. The states that the loss reads are the inputs of the output matrix: the forward pass ends there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmkit.errors import ConfigError
from llmkit.interfaces import Batch, Tokens
from llmkit.models.layers import check_length, soft_cap
from llmkit.models.transformers_build import empty_module, new_module, output_matrix
from llmkit.models.transformers_config import TransformersConfig
from llmkit.models.transformers_documents import Part, by_length, documents_in, part_of, parts_of, put_back
from llmkit.models.transformers_steps import Memory, StepCache
from llmkit.models.transformers_tail import Tail, measure_tail

log = logging.getLogger("llmkit.models")


class _Reached(Exception):
    """The forward pass came to the output matrix."""


class Wrapped(nn.Module):
    """``hf`` has no weights until ``init_weights`` makes them or ``take`` brings them."""

    def __init__(self, config: TransformersConfig) -> None:
        super().__init__()
        self.config = config
        self._put(empty_module(config))

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def output_weight_VD(self) -> Tensor:
        """The weight of the layer that gives the logits."""
        weight_VD: Tensor = output_matrix(self.hf).weight
        return weight_VD

    @property
    def output_bias_V(self) -> Tensor | None:
        """That layer's bias, and what the architecture adds after it."""
        bias_V: Tensor | None = output_matrix(self.hf).bias
        added_V: Tensor | None = self.tail_bias
        if bias_V is not None and self.tail.scale != 1:
            bias_V = bias_V * self.tail.scale
        if bias_V is None or added_V is None:
            return added_V if bias_V is None else bias_V
        return bias_V + added_V

    @property
    def logit_softcap(self) -> float | None:
        """c of ``c tanh(logits / c)``, where the architecture ends with it."""
        return self.tail.softcap

    def output_states(self, hidden_PD: Tensor) -> Tensor:
        """The inputs of the output matrix, times what the architecture scales its logits by."""
        return hidden_PD if self.tail.scale == 1 else hidden_PD * self.tail.scale

    def hidden_states(self, batch: Batch) -> Tensor:
        """BTD: what the output matrix reads, each document computed alone; zeros at padding."""
        return self._hidden(batch.input_ids, batch.document_ids)

    def init_weights(self, seed: int) -> None:
        """As ``transformers`` initialises the architecture, from its own generator's state ``seed``."""
        made = self.hf.config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.take(new_module(self.config, made))

    def take(self, module: nn.Module) -> None:
        """Put a module with weights in place of the one there is."""
        self._put(module.train())
        self.tail, added_V = measure_tail(self.hf, output_matrix(self.hf), self._probe_inputs())
        self.tail_bias = added_V

    @torch.no_grad()
    def resize_vocab(self, n: int, known: int) -> None:
        """Give the module ``n`` embedding rows; those from ``known`` on become the mean of the rows before them."""
        self.hf.resize_token_embeddings(n, mean_resizing=False)
        head = output_matrix(self.hf)
        tables = {id(table): table for table in (self.hf.get_input_embeddings().weight, head.weight, head.bias)}
        for table in (table for table in tables.values() if table is not None):
            table[known:] = table[:known].mean(0, dtype=torch.float32).to(table.dtype)
        self.config = replace(self.config, vocab_size=n)
        self.take(self.hf)

    def freeze_unused(self) -> None:
        """Take parameters out of the training that no state depends on, such as a pooler's.

        Experts are left in: which of them a text reaches depends on the text.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        with torch.enable_grad():
            states = self._probe_states()
        for module, mode in modes:
            module.training = mode
        head = output_matrix(self.hf)
        own = {id(head.weight), id(head.bias)}
        named = {name: p for name, p in self.hf.named_parameters() if p.requires_grad and id(p) not in own}
        gradients = torch.autograd.grad(states.sum(), list(named.values()), allow_unused=True)
        unused = [name for name, grad in zip(named, gradients, strict=True) if grad is None and "expert" not in name]
        for name in unused:
            named[name].requires_grad_(False)
        if unused:
            log.info("not trained, since nothing depends on them: %s", ", ".join(unused))

    def compile_blocks(self) -> None:
        """Compile in place the layers that the library names as units. Raises ``ConfigError`` where it names none."""
        names = set(getattr(self.hf, "_no_split_modules", None) or ())
        blocks = [module for module in self.hf.modules() if type(module).__name__ in names]
        if not blocks:
            what = f"{type(self.hf).__name__} does not say which of its layers are blocks"
            raise ConfigError(what, where="engine.compile", fix="engine.compile=false")
        for block in blocks:
            block.compile()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep only the input of each layer and compute the rest again in the backward pass, where the library can."""
        name = (
            "activation_checkpointing"
            if hasattr(self.hf, "activation_checkpointing_enable")
            else "gradient_checkpointing"
        )
        if not on:
            getattr(self.hf, f"{name}_disable")()
            return
        if not self.hf.supports_gradient_checkpointing:
            what = f"{type(self.hf).__name__} cannot compute its activations again"
            raise ConfigError(what, where="engine.memory", fix="engine.memory=fast")
        getattr(self.hf, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})

    # -- private ------------------------------------------------------------------------------------------------

    def _put(self, module: Any) -> None:
        self.hf = module
        self.tail = Tail(1.0, None)
        self.register_buffer("tail_bias", None, persistent=False)
        self.pad_id: int = getattr(module.config, "pad_token_id", None) or 0
        self._accepts = frozenset(inspect.signature(module.forward).parameters)

    def _probe_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.full((1, 2), 0 if self.pad_id else min(1, self.config.vocab_rows - 1))}

    def _probe_states(self) -> Tensor:
        ids_BT = self._probe_inputs()["input_ids"].to(self.output_weight_VD.device)
        return self._hidden(ids_BT, None)

    def _hidden(self, ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        documents = documents_in(ids_BT, document_ids_BT)
        exact = "attention_mask" not in self._accepts
        parts = []
        for part in parts_of(ids_BT, documents, self.pad_id, exact=exact):
            states_MTD = self._inputs_of_output(input_ids=part.ids_MT, **_masked("attention_mask", part))
            parts.append((part.places_P, part.tokens(states_MTD)))
        return put_back(parts, ids_BT)

    def _inputs_of_output(self, **inputs: Any) -> Tensor:
        """Run the module up to its output matrix, and give what goes into it."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Reached

        handle = output_matrix(self.hf).register_forward_pre_hook(stop)
        unused = {"use_cache": False} if "use_cache" in self._accepts else {}
        try:
            self.hf(**inputs, **unused)
        except _Reached:
            return found[0]
        finally:
            handle.remove()
        what = f"{type(self.hf).__name__} does not call its output matrix as a layer"
        raise ConfigError(what, where="model", fix="choose another architecture")

    def _logits(self, states_BTD: Tensor) -> Tensor:
        logits_BTV = nn.functional.linear(self.output_states(states_BTD), self.output_weight_VD, self.output_bias_V)
        return soft_cap(logits_BTV, self.logit_softcap)


class WrappedDecoder(Wrapped):
    """Any ``AutoModelForCausalLM``."""

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: StepCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits BTV, or those of the last position alone (T = 1).

        Every document begins at position 0, whatever ``position_ids_BT`` says; when they are left out, ``ConfigError``
        is raised past ``max_seq_len``. With a cache every row is one document, with padding before it or without.
        """
        before = 0 if cache is None else cache.length
        if position_ids_BT is None:
            check_length(before + input_ids_BT.shape[1], self.max_seq_len)
        if cache is not None:
            logits_BTV = cache.read(input_ids_BT, document_ids_BT)
            return logits_BTV[:, -1:] if last_only else logits_BTV
        states_BTD = self._hidden(input_ids_BT, document_ids_BT)
        return self._logits(states_BTD[:, -1:] if last_only else states_BTD)

    def new_cache(self, batch_size: int, max_len: int) -> StepCache:
        """An empty cache; its memory grows with what is read."""
        return StepCache(self.hf)


class WrappedEncoder(Wrapped):
    """Any ``AutoModelForMaskedLM``."""

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits BTV. Without positions ``ConfigError`` is raised past ``max_seq_len``."""
        if position_ids_BT is None:
            check_length(input_ids_BT.shape[1], self.max_seq_len)
        return self._logits(self._hidden(input_ids_BT, document_ids_BT))


class WrappedSeq2Seq(Wrapped):
    """Any ``AutoModelForSeq2SeqLM``."""

    def hidden_states(self, batch: Batch) -> Tensor:
        """BTD of the decoder; a target reads the source of its document. Raises ``ConfigError`` where there is none."""
        if batch.source is None:
            raise ConfigError(
                "the objective gives an encoder-decoder nothing to read",
                where="objective",
                fix="choose an objective with a source and a target, such as span corruption",
            )
        return self._target_states(batch.source, batch.input_ids, batch.document_ids)

    def forward(
        self,
        source: Tokens,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
    ) -> Tensor:
        """Logits BTV of the target."""
        if position_ids_BT is None:
            check_length(input_ids_BT.shape[1], self.max_seq_len)
        return self._logits(self._target_states(source, input_ids_BT, document_ids_BT))

    def encode(self, source: Tokens) -> Memory:
        """What the encoder makes of rows of one document each, padded on the right or not."""
        mask_BS = None if source.document_ids is None else (source.document_ids >= 0).long()
        given = {} if mask_BS is None else {"attention_mask": mask_BS}
        return Memory(self.hf.get_encoder()(input_ids=source.input_ids, return_dict=True, **given), mask_BS)

    def decode(
        self,
        memory: Memory,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: StepCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Logits BTV, or those of the last position alone (T = 1), of targets that are one document without padding.

        Without positions ``ConfigError`` is raised past ``max_seq_len``.
        """
        before = 0 if cache is None else cache.length
        if position_ids_BT is None:
            check_length(before + input_ids_BT.shape[1], self.max_seq_len)
        if cache is not None:
            logits_BTV = cache.read(input_ids_BT, document_ids_BT)
            return logits_BTV[:, -1:] if last_only else logits_BTV
        states_BTD = self._inputs_of_output(decoder_input_ids=input_ids_BT, **memory.inputs())
        return self._logits(states_BTD[:, -1:] if last_only else states_BTD)

    def new_cache(self, memory: Memory, max_len: int) -> StepCache:
        """An empty cache; its memory grows with what is read."""
        return StepCache(self.hf, memory)

    def _probe_inputs(self) -> dict[str, Tensor]:
        inputs = super()._probe_inputs()
        return inputs | {"decoder_input_ids": inputs["input_ids"]}

    def _probe_states(self) -> Tensor:
        ids_BT = self._probe_inputs()["input_ids"].to(self.output_weight_VD.device)
        return self._target_states(Tokens(ids_BT, torch.zeros_like(ids_BT), None), ids_BT, None)

    def _target_states(self, source: Tokens, ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """BTD, from documents of similar length on both sides at a time."""
        targets, sources = documents_in(ids_BT, document_ids_BT), documents_in(source.input_ids, source.document_ids)
        source_of = {key: number for number, key in enumerate(_keys(sources))}
        numbers = [source_of.get(key) for key in _keys(targets)]
        if None in numbers:
            raise ConfigError("a target has no source to read", where="objective", fix="choose another objective")
        source_lengths = sources.lengths_N[torch.tensor(numbers)].tolist()
        parts = []
        for group in by_length(targets.lengths_N.tolist(), exact=False):
            for inner in by_length([source_lengths[number] for number in group], exact=False):
                chosen = [group[place] for place in inner]
                read = part_of(source.input_ids, sources, [numbers[i] or 0 for i in chosen], self.pad_id)
                said = part_of(ids_BT, targets, chosen, self.pad_id)
                masks = _masked("attention_mask", read) | _masked("decoder_attention_mask", said)
                states_MTD = self._inputs_of_output(input_ids=read.ids_MT, decoder_input_ids=said.ids_MT, **masks)
                parts.append((said.places_P, said.tokens(states_MTD)))
        return put_back(parts, ids_BT)


WRAPPERS = {"causal_lm": WrappedDecoder, "masked_lm": WrappedEncoder, "seq2seq_lm": WrappedSeq2Seq}


def _masked(name: str, part: Part) -> dict[str, Tensor]:
    return {} if part.mask_MT is None else {name: part.mask_MT}


def _keys(documents: Any) -> Sequence[tuple[int, int]]:
    """(row, id) of every document."""
    return list(zip(documents.rows_N.tolist(), documents.ids_N.tolist(), strict=True))
