"""Metal kernels, executed on a CPU and checked while they run.

A GPU shows a defect of a kernel, if at all, as wrong numbers on some machines. Here every launch of
a kernel is executed without a GPU, and what Metal leaves undefined is an error with its line.

How a launch is executed (executor.py):
  capture.py    MLX itself makes the text, as for a GPU, from the real call;
  translate.py  the text becomes C++, with shim/ for what Metal has and C++ has not;
  rules.py      what C++ lets through and Metal does not is refused: address spaces, recursion, ...
  toolchain.py  clang compiles it, instrumented, and remembers what it has compiled;
  runtime/      runs each thread of each threadgroup as a fiber (scheduler.cpp), so that barriers
                and SIMD functions are where threads wait for each other, and checks each access to
                memory (memory.cpp).

What is seen: accesses outside of buffers and arrays, misaligned vectors, memory read before it is
written, races, barriers and SIMD functions that not all threads reach, results that are not
written, writes to inputs, too much threadgroup memory, hangs; and how many bytes each launch reads
and writes (memory.cpp counts what is left after clang's -O1, as a GPU's compiler would merge
accesses too).

What is not:
  - Apple's compiler. It may refuse what passes here, and the rules are ours. Pipelines that allow
    fewer threads than the kernel asks for are not known here.
  - Arithmetic of a GPU: the mathematical functions are libm's, precise and fast; denormal numbers
    are kept; simd_sum adds neighbours first and matrices add in the order of k, as Apple's GPUs do
    today. The fused multiply-add of half values is rounded twice.
  - Races between atomic operations that rely on their order, and threadgroups that wait for each
    other: threadgroups run one after another. Fences are not known.
  - A thread's own variables are followed only where their array has a known size; those that are
    never initialised start as NaN.
  - Time.
"""
