"""The two kinds of failure a user can see; every other exception is a defect of ours.

`UserError`: the input, the recipe or the command was wrong. One line that says what was wrong and what to do;
the command exits with code 2. `HeadspringError`: the work itself failed (a loss spike, a full disk); exit code 1.
"""


class HeadspringError(Exception):
    """The work failed for a reason the user can act on. Exit code 1."""

    exit_code = 1


class UserError(HeadspringError):
    """Bad usage or bad input: a one-line message that says what was wrong and what to do. Exit code 2."""

    exit_code = 2


class CorruptArtifact(UserError):
    """A file of an artifact does not have the hash its manifest records. The message names the file."""
