"""The batch runner: which notebook runs are due (`plan`), running them (`execute`) here (`pool`) or on a `cluster`."""
