"""Token rounding in three launches: every token's choice, each expert's selection, the kept pairs in both orders.

Each launch starts while the one before it ends, and waits before it reads. `state` holds the experts'
counts by top-K, zero at first, where they are needed; their rounded counts; and how many pairs each 32 tokens keep,
which the first launch makes zero.
"""

from dataclasses import dataclass

import cutlass.cute as cute

from .rounding_choose import THREADS as CHOOSE_THREADS
from .rounding_choose import Choose
from .rounding_pairs import THREADS as PAIRS_THREADS
from .rounding_pairs import Pairs
from .rounding_select import Select


@dataclass(frozen=True)
class TokenRounding:
    choose: Choose
    select: Select
    pairs: Pairs

    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        draws: cute.Tensor | None,
        softmax: cute.Tensor,
        tiles: cute.Tensor,
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
        self.choose.kernel(logits, chosen, softmax, tiles, state).launch(
            grid=[marks.shape[0], 1, 1], block=[CHOOSE_THREADS, 1, 1], stream=stream, use_pdl=True
        )
        self.select.kernel(logits, softmax, tiles, draws, state, marks).launch(
            grid=[self.select.experts, 1, 1],
            block=[self.select.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )
        self.pairs.kernel(
            logits, softmax, chosen, state, marks, scores, cu_rows, row_token, row_slot, slot_row, cu_slots, kept
        ).launch(
            grid=[marks.shape[0], 1, 1],
            block=[PAIRS_THREADS, 1, 1],
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
        )
