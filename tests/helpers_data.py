"""What the tests of the rooms on data share."""


def typed(fix: str, **names):
    """What a user gets who types the fix of a refusal: its statements are executed, its last expression is returned."""
    *before, last = fix.split("; ")
    for statement in before:
        exec(statement, names)
    return eval(last, names)
