"""The MTP drafter: drafts tokens from the target's last hidden state and KV cache; has no KV of its own.

Source: transformers 5.22 `SinglePositionMultiTokenCandidateGenerator`; unlike it, only valid KV rows are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from runtime.decoder import RowInputs
from runtime.model_config import DrafterConfig
from runtime.sampling import Distribution, SamplingParams, distribution
from runtime.session import Array, Binding, float_buffer
from runtime.signature import kv_view_names
from runtime.target import TargetModel

Float32 = npt.NDArray[np.float32]


class Draft(NamedTuple):
    """A drafted token and what it was drawn from; None where it was the best candidate."""

    token_id: int
    distribution: Distribution | None


@dataclass(frozen=True, slots=True)
class Candidates:
    """The drafter's scores for the next token: of `token_ids`, or of the whole vocabulary where that is None."""

    logits: Float32
    token_ids: npt.NDArray[np.int64] | None

    def draw(self, params: SamplingParams, rng: np.random.Generator) -> Draft:
        """The best candidate when greedy, else one drawn with the target's own parameters."""
        if params.is_greedy:
            best = int(self.logits.argmax())
            return Draft(best if self.token_ids is None else int(self.token_ids[best]), None)
        drawn_from = distribution(self.logits, params, self.token_ids)
        return Draft(drawn_from.sample(rng), drawn_from)


class DrafterModel:
    """A session over drafter.onnx that reads the target's tables and KV rows by reference."""

    def __init__(self, session: ort.InferenceSession, drafter: DrafterConfig, target: TargetModel) -> None:
        self._session = session
        self._target = target
        backbone = drafter.backbone_hidden_size
        self._input = float_buffer(1, 2 * backbone)
        self._state = float_buffer(1, backbone)
        self._position_ids = np.empty(1, np.int64)
        self._kinds = sorted({layer.kind for layer in drafter.layers})
        self._rows = RowInputs(self._kinds)
        self._read_names = {name for layer in drafter.layers for name in kv_view_names(layer.kv_source, layer)}
        self._ids = np.empty(drafter.num_candidates, np.int64) if drafter.num_centroids else None
        self._logits = float_buffer(drafter.num_candidates)
        self._whole: Binding | None = None  # over whole KV arrays

    def draft(
        self,
        last_token_id: int,
        hidden: Float32,
        num_draft_tokens: int,
        params: SamplingParams,
        rng: np.random.Generator,
    ) -> list[Draft]:
        """Drafts up to `num_draft_tokens` tokens behind `last_token_id`, whose own KV row does not exist yet.

        Stops early where the scores are NaN or infinite.

        Args:
            hidden: [hidden_size], the target's hidden state that predicted `last_token_id`
        """
        binding = self._bind()
        drafts: list[Draft] = []
        self._state[0] = hidden
        token_id = last_token_id
        for _ in range(num_draft_tokens):
            self._input[0, : hidden.size] = self._target.token_table.rows([token_id])[0]
            self._input[0, hidden.size :] = self._state[0]
            binding.run(self._target.run_options)
            if not np.isfinite(self._logits.max()):
                break
            drafts.append(Candidates(self._logits, self._ids).draw(params, rng))
            token_id = drafts[-1].token_id
        return drafts

    def _bind(self) -> Binding:
        """One binding serves a whole burst: position and KV rows stay, inputs and outputs are the same memory.

        In the native layout it serves every burst.
        """
        cache = self._target.cache
        self._position_ids[0] = cache.num_tokens
        if self._target.layout == "portable":
            spans = {kind: cache.draft_span(kind) for kind in self._kinds}
            arrays = ((spans[kind], name, array) for kind, name, array in cache.arrays() if name in self._read_names)
            return self._bound_over(
                {name: array[span.start : span.stop].view(np.float32) for span, name, array in arrays}
            )
        self._rows.fill(cache.draft_span)
        if self._whole is None:
            self._whole = self._bound_over({name: array for _, name, array in cache.arrays()})
            self._rows.bind(self._whole)
        return self._whole

    def _bound_over(self, rows: Mapping[str, Array]) -> Binding:
        binding = Binding(self._session)
        binding.input("inputs_embeds", self._input)
        binding.input("position_ids", self._position_ids)
        for name in self._read_names:
            binding.input(name, rows[name])
        binding.output("projected_state", self._state)
        binding.output("candidate_logits", self._logits)
        if self._ids is not None:
            binding.output("candidate_ids", self._ids)
        return binding
