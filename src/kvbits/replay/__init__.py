"""Load on any OpenAI-compatible server: traces, real prompts for them, arrivals, measurements. No torch."""
