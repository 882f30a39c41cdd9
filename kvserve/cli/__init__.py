"""The command line: parse, print, exit. Every decision is made further down."""
