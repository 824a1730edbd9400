from deltatune.registry import Registry

experiments = Registry("experiment", "experiments")
