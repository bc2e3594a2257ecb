"""A sandbox for programs that a model wrote. It needs Linux, but no privilege and no package.

    sandbox    `Sandbox`: run a program, or run tests against it, and read the result
    launcher   the process in which a program runs, confined before the program is read
    confine    the confinement: resource limits, no capabilities, Landlock, seccomp
    tester     the process in which tests run, apart from the program that they test
    wire       messages between these processes: plain values only

All modules use the standard library alone, because the launcher runs without site packages.
"""
