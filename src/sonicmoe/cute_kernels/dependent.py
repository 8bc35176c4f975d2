"""Programmatic dependent launch: a kernel may begin while the one before it in the stream is ending.

Every launch asks for it (`use_pdl=True`), so that a kernel's set-up, and the launch itself, lie under the last tiles of
the kernel before. Every kernel therefore calls `await_earlier`, in all threads and before it reads or writes what
another launch writes or reads: what the launches before left is there only then.
"""

import cutlass.cute as cute


def await_earlier():
    """Wait for the end of the launches before this one; from then on the next one may begin.

    In this order, so that no more than two kernels are on their way: whatever ran before the kernel that a kernel waits
    for has ended when that kernel begins.
    """
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()
