"""Text of a job on a person's screen: its names are whatever a program has called its modules. Pure."""


def printable(text: str) -> str:
    """The text in one line: ends of lines, control characters and bidi marks are written as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
