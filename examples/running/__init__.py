"""What programs share that train several runs and report on them, such as those of `examples/paper`."""
