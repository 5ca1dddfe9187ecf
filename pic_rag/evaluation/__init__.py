"""How well each system answers: `metrics`, `shortening` -> `systems` (what is in the prompt) -> `runner` (a report)."""
