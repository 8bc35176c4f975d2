"""Token rounding in three launches: keys of all pairs, each expert's selection, the kept pairs in both orders.

Each launch but the first starts while the one before it ends, and waits before it reads. `state` is zero at first: the
experts' counts by top-K, their rounded counts, and how many pairs each 32 tokens keep.
"""

from dataclasses import dataclass

import cutlass.cute as cute

from .rounding_keys import WARPS as KEYS_WARPS
from .rounding_keys import Keys
from .rounding_pairs import THREADS as PAIRS_THREADS
from .rounding_pairs import Pairs
from .rounding_select import THREADS as SELECT_THREADS
from .rounding_select import Select
from .team import WARP


@dataclass(frozen=True)
class TokenRounding:
    keys: Keys
    select: Select
    pairs: Pairs

    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        draws: cute.Tensor | None,
        keys: cute.Tensor,
        state: cute.Tensor,
        marks: cute.Tensor,
        scores: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor,
        row_slot: cute.Tensor,
        slot_row: cute.Tensor,
        cu_slots: cute.Tensor,
        chosen: cute.Tensor,
        kept: cute.Tensor,
        stream,
    ):
        self.keys.kernel(logits, keys, chosen, state).launch(
            grid=[keys.shape[1] // self.keys.tile, 1, 1], block=[KEYS_WARPS * WARP, 1, 1], stream=stream
        )
        self.select.kernel(keys, draws, state, marks, logits.shape[0]).launch(
            grid=[self.select.experts, 1, 1],
            block=[SELECT_THREADS, 1, 1],
            stream=stream,
            use_pdl=True,
        )
        self.pairs.kernel(keys, state, marks, scores, cu_rows, row_token, row_slot, slot_row, cu_slots, kept).launch(
            grid=[marks.shape[0], 1, 1], block=[PAIRS_THREADS, 1, 1], stream=stream, use_pdl=True
        )
