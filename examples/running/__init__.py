"""What programs share that train several runs and report on them (`examples/reproduce`, `examples/paper`)."""
