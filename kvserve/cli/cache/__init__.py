"""`kvserve cache`: looking into the store and keeping it in order, with or without a server."""
