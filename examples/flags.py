"""A flag of one script among the flags of another."""


def take_flag(arguments: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Takes `flag VALUE` or `flag=VALUE` out of the arguments; None where it is not among them."""
    for place, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == flag:
            rest = arguments[:place] + arguments[place + (1 if value else 2) :]
            return value or "".join(arguments[place + 1 : place + 2]), rest
    return None, arguments
