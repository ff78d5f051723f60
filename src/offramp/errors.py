"""Errors that a user can act on: one sentence says what is wrong, and a hint says what to do."""


class OfframpError(Exception):
    """Base of every error that offramp raises on purpose. `str(error)` is the sentence, `error.hint` the hint."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ModelNotFound(OfframpError):
    """The name is no alias, local folder, GGUF file or model that can be fetched."""


class UnsupportedModel(OfframpError):
    """The family has no row in `FAMILIES`, or the self-check found that it would be decoded wrongly."""


class ExitsMismatch(OfframpError):
    """The exits were trained for another backbone, or for another revision of it."""


class CorruptFile(OfframpError):
    """A file is truncated, unreadable, or not what it says it is."""


class BadInput(OfframpError):
    """A prompt, an option or a data file cannot be used."""


class TooLarge(BadInput):
    """What is asked for is more than the model holds, or than a server takes."""


class NothingFits(BadInput):
    """None of the tokens that were read out may come next, such as under a JSON schema."""


class BadNumbers(OfframpError):
    """Logits or a loss are NaN or infinite."""


def reason_of(error: Exception, most: int = 160) -> str:
    """The first line of what a library's error says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]
