"""One file a distillation loss: its attribute ``LOSS`` is a `base.Loss`, its docstring's first line is what lists show."""
