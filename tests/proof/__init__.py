"""The proof harness: what a kernel is dropped into before anybody trusts it.

`yardstick`  how near is near enough: twice what torch loses in the same dtype; gradients also as vectors
`memory`     NaN-poisoned outputs, canaries round every buffer, awkward strides
`watch`      every address a launch touches: accesses outside, programs that meet, values never written
`allocations` what a call allocates on a CPU: peak, total, largest
`order`      the programs of a launch run in shuffled order
`aot`        the kernel compiled for real chips without one, and what the chip's code says about it

`test_catches.py` shows that each of them catches the fault it is for.
"""
