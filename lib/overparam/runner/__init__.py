"""The batch runner: which notebook runs are due (`plan`), and running them (`execute`)."""
