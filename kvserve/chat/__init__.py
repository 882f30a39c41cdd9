"""Messages to tokens and back: templates, cuts, conversations, one turn. Free of MLX and HTTP."""

from kvserve.core import runtime

runtime.prepare()
