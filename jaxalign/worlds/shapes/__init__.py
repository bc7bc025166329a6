"""Coloured shapes on coloured grounds: `scene` draws, `prompts` describes, `judge` decides."""
