"""What the routes work with: the parts below and the plain values they were started with.

Holds no state of its own. Built once by `create_app`, read on the event loop; routes take it as an
argument instead of finding it in a global, so that a test can run two servers in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvserve.core.types import SamplingParams

if TYPE_CHECKING:  # the engine imports MLX, which HTTP has no use for
    from kvserve.chat.operations import ConversationService
    from kvserve.chat.turn import TurnService
    from kvserve.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts and settings that routes may use.

    `keep_alive_s` is the time between keep-alive comments of a stream, `shutdown_grace_s` how long
    a running stream may go on once the server is told to stop. `defaults` are the sampling
    parameters of a request that names none. `log_content` writes messages and replies to the log.
    """

    turns: TurnService
    conversations: ConversationService
    engine: Engine
    max_body_bytes: int
    keep_alive_s: float
    shutdown_grace_s: float
    defaults: SamplingParams
    log_content: bool
