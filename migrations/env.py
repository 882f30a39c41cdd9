"""What Alembic runs for each upgrade: the steps, on the connection that it was given.

Only `kvserve.store.migrate` starts it, and holds the transaction that all steps share.
"""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
