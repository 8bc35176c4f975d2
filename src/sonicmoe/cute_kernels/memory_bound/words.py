"""Neighbouring words of shared memory at a lane's own address, and which lane of a warp is the first of some."""

import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint32


def ballot(condition: Boolean) -> Uint32:
    return Uint32(cute.arch.vote_ballot_sync(condition))


def first_lane(condition: Boolean) -> Int32:
    """The lowest lane where it holds; there is one."""
    return cute.arch.inline_ptx(
        "{.reg .b32 r; neg.s32 r, {$r0}; and.b32 r, r, {$r0}; bfind.u32 {$w0}, r;}",
        write_only_types=[Int32],
        read_only_args=[ballot(condition)],
    )


def load_words(source: Int32, count: int, valid=None, anew: bool = False) -> list:
    """1, 2, 4 or more neighbouring words of shared memory; 0, and no access, where not valid.

    anew: the compiler does not keep what it has read before in registers.
    """
    if count > 4:
        return [word for i in range(0, count, 4) for word in load_words(source + i * 4, 4, valid, anew)]
    outputs = ["{$w%d}" % i for i in range(count)]
    clear = " ".join("mov.b32 %s, 0;" % o for o in outputs)
    vector = {1: "b32 {$w0}", 2: "v2.b32 {{$w0}, {$w1}}", 4: "v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}"}[count]
    condition = Int32(1) if valid is None else Int32(valid)
    load = "ld.volatile.shared" if anew else "ld.shared"
    code = "{.reg .pred p; setp.ne.s32 p, {$r1}, 0; %s @p %s.%s, [{$r0}];}" % (clear, load, vector)
    words = cute.arch.inline_ptx(code, write_only_types=[Uint32] * count, read_only_args=[source, condition])
    return [words] if count == 1 else list(words)


def store_words(target: Int32, words, valid: Boolean) -> None:
    """1, 2 or 4 neighbouring words to shared memory, where valid."""
    inputs = ", ".join("{$r%d}" % (i + 2) for i in range(len(words)))
    form = "b32 [{$r0}], %s" % inputs if len(words) == 1 else "v%d.b32 [{$r0}], {%s}" % (len(words), inputs)
    cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r1}, 0; @p st.shared.%s;}" % form,
        read_only_args=[target, Int32(valid), *words],
    )
