"""The mobility agent: tracks dirty blocks, takes consistent points, streams changesets."""
