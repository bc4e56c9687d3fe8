"""A server that speaks OpenAI's protocol: requests → sequences → batches of a decoder."""
