"""Programmatic dependent launch: a kernel may begin while the one before it in the stream is ending.

Kernels that are bound by memory or short ask for it (`use_pdl=True`), so that their launch and set-up lie under the end
of the kernel before. Every kernel calls `await_earlier`, in all threads and before it touches global memory: what the
launches before left is there only then. Two exceptions: plan's `scatter` reads ids earlier, which the launch before its
`count` left; and `aggregate` beside a GEMM waits at its end, and in one CTA only. (A kernel of somebody else's that
begins early and never waits would let its successor begin too soon.)

Beside a GEMM: every kernel lets the next one begin as soon as all of its own CTAs have. Those of a GEMM then hold their
SMs to the end, and where they are fewer than the SMs, the next launch has the others to itself: it need not wait if it
reads only what is older than the GEMM, which asked for no early begin and so began after the end of all before. But it
must end after the GEMM, since the launch after it waits for it alone.

The grouped GEMMs do not ask for it. Their CTAs would take SMs in the order in which these become free; they are faster
where CTAs of the same rows are neighbours (docs/notes/2026-11-28-placement.md).
"""

import cutlass.cute as cute


def await_earlier():
    """Wait for the end of the launches before this one; from then on the next one may begin.

    In this order, so that no more than two kernels are on their way: whatever ran before the kernel that a kernel waits
    for has ended when that kernel begins.
    """
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()
