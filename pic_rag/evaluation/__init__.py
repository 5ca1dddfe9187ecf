"""How well each system answers: `metrics` -> `systems` (what is in the prompt) -> `runner` (a report)."""
