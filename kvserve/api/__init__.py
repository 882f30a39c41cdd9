"""HTTP only: routes, wire shapes, server-sent events, one table from exception to status."""
