"""Reading token by token with the cache of a module of ``transformers``, whatever its form."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkit.models.transformers_documents import by_length, documents_in

# Names of arguments and outputs that hold a cache. That of RWKV, ``state``, mixes up the rows of a batch (transformers
# 5.23), so its models read every text from the beginning.
CACHES = ("past_key_values", "cache_params")


class Memory(NamedTuple):
    """What the encoder made of the source, one document a row."""

    outputs: Any
    mask_BS: Tensor | None

    def inputs(self) -> dict[str, Any]:
        """As arguments of the module's forward pass."""
        return {"encoder_outputs": self.outputs} | ({} if self.mask_BS is None else {"attention_mask": self.mask_BS})

    def of_rows(self, rows_M: Tensor) -> Memory:
        """That of some of the rows."""
        kept = {name: value[rows_M] if isinstance(value, Tensor) else value for name, value in self.outputs.items()}
        return Memory(type(self.outputs)(**kept), None if self.mask_BS is None else self.mask_BS[rows_M])


@dataclass
class Group:
    """Rows that hold equally many tokens, so that no padding is read with them."""

    rows_M: Tensor
    ids_MT: Tensor  # all tokens so far
    memory: Memory | None  # of encoder-decoders
    state: dict[str, Any] = field(default_factory=dict)  # the module's own cache

    def keep(self, places_M: Tensor, rows_M: Tensor) -> Group:
        """The group of these of its rows, in this order, which are now called ``rows_M``.

        Where the module's cache cannot follow, it is dropped, so that everything is read again.
        """
        memory = None if self.memory is None else self.memory.of_rows(places_M)
        follows = all(hasattr(cache, "reorder_cache") for cache in self.state.values())
        for cache in self.state.values() if follows else ():
            cache.reorder_cache(places_M)
        return Group(rows_M, self.ids_MT[places_M], memory, self.state if follows else {})


class StepCache:
    """The tokens of every row so far, and what the module keeps of them. Without a cache it reads all of them again."""

    def __init__(self, module: Any, memory: Memory | None = None) -> None:
        self._module, self._memory = module, memory
        self._caches = any(name in inspect.signature(module.forward).parameters for name in CACHES)
        self._groups: list[Group] = []
        self.length = 0

    def read(self, ids_BT: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """Logits BTV of the next tokens, zeros at padding. The first ones may have padding on the left."""
        if self._groups:
            for group in self._groups:
                group.ids_MT = torch.cat((group.ids_MT, ids_BT[group.rows_M]), dim=1)
        else:
            self._start(ids_BT, document_ids_BT)
        self.length += ids_BT.shape[1]
        logits_BTV: Tensor | None = None
        for group in self._groups:
            found_MTV = self._advance(group, ids_BT.shape[1])
            if logits_BTV is None:
                logits_BTV = found_MTV.new_zeros(*ids_BT.shape, found_MTV.shape[2])
            logits_BTV[group.rows_M, -found_MTV.shape[1] :] = found_MTV
        assert logits_BTV is not None, "a batch has rows"
        return logits_BTV

    def keep(self, rows_B: Tensor) -> None:
        """Go on with these of the rows, in this order; one may be there several times."""
        kept = []
        for group in self._groups:
            rows_M, places_M = (rows_B[:, None] == group.rows_M).nonzero().unbind(1)
            if len(rows_M):
                kept.append(group.keep(places_M, rows_M))
        self._groups = kept

    def _start(self, ids_BT: Tensor, document_ids_BT: Tensor | None) -> None:
        documents = documents_in(ids_BT, document_ids_BT)
        for numbers in by_length(documents.lengths_N.tolist(), exact=True):
            rows_M = documents.rows_N[torch.tensor(numbers)].to(ids_BT.device)
            length = int(documents.lengths_N[numbers[0]])
            memory = None if self._memory is None else self._memory.of_rows(rows_M)
            self._groups.append(Group(rows_M, ids_BT[rows_M, -length:], memory))

    def _advance(self, group: Group, n_new: int) -> Tensor:
        """Logits of a group's last ``n_new`` tokens, or of all that it has when these are fewer."""
        first = not group.state
        if group.memory is None:
            given: dict[str, Any] = {"attention_mask": torch.ones_like(group.ids_MT)}
        else:
            given = group.memory.inputs()
        inputs = self._module.prepare_inputs_for_generation(
            group.ids_MT,
            next_sequence_length=None if first else n_new,
            use_cache=self._caches,
            is_first_iteration=first,
            **given,
            **group.state,
        )
        outputs = self._module(**inputs, return_dict=True)
        for name in CACHES:
            if outputs.get(name) is not None:
                group.state = {name: outputs[name]}
        logits_MTV: Tensor = outputs.logits[:, -n_new:]
        return logits_MTV
