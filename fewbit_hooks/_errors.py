"""Every error and warning that the library raises."""


class FewbitError(Exception):
    """Base of every error raised by fewbit_hooks."""


class FewbitTypeError(FewbitError, TypeError):
    """An argument has the wrong type."""


class FewbitValueError(FewbitError, ValueError):
    """An argument has the right type and a value that is not allowed."""


class FewbitRuntimeError(FewbitError, RuntimeError):
    """A backward that cannot be served: where stock PyTorch would raise a RuntimeError, or codes do not suffice."""


class FewbitWarning(UserWarning):
    """Something works, but not as its caller probably believes."""
