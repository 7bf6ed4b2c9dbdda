"""How many elements of a flat tensor a program takes."""

import triton


def block_of(n, block):
    """`block`; but interpreted up to 64 Ki, and all of n that are fewer: numpy pays per program and per element."""
    return max(16, min(1 << 16, triton.next_power_of_2(n))) if triton.knobs.runtime.interpret else block
