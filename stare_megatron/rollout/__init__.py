"""From prompts to scored groups: one episode, one group, one update batch."""
