"""Examples as a package, so that several of them can share modules: they import from `examples` with the repository in
PYTHONPATH, which their `run.sh` sets."""
