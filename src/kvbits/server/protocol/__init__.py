"""What clients send and get, in OpenAI's shapes."""
