"""A reward for programs: completions are run in the sandbox."""
